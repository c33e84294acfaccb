"""``vllm-compile-ext warm``: one start of the engine, so that the next one finds its compiled code and its kernels."""

from __future__ import annotations

import contextlib
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import typer
from rich.console import Console

from vllm_compile_ext import settings, temporary
from vllm_compile_ext.cli import shared
from vllm_compile_ext.cli.program import Line, Program, ProgramError, interruptible
from vllm_compile_ext.cli.progress import Progress
from vllm_compile_ext.cli.shared import DIGITS, JsonOption, UserError, VerboseOption
from vllm_compile_ext.harmless import plain
from vllm_compile_ext.record import read
from vllm_compile_ext.record.read import Note
from vllm_compile_ext.report.formats import size
from vllm_compile_ext.store import kernels
from vllm_compile_ext.store.store import Blob, Store, total

HELP = "\n\n".join(
    (
        "Fill the store for `vllm serve MODEL [OPTIONS]`: no server is started, and no weights are needed.",
        "Takes every option of `vllm serve`; those of the server itself, such as --port, change nothing. In a "
        "Dockerfile, RUN it: the same options then find everything there.",
        "Exit status 1: the engine did not start, or nothing was kept.",
    )
)
PROGRAM = [sys.executable, "-m", "vllm_compile_ext.cli.warm_start"]
REFUSED = 3  # its exit status where it starts nothing
REFUSAL = "refused: "  # what the line begins with that says why
# What a start's record says of a model's code, and what `warm` calls it.
STATES = {"kept": "kept", "loaded": "already there"}


@dataclass
class Run:
    """One start of the engine: exit status of `warm_start`, notes of its record (None: not recorded), its output."""

    status: int
    notes: list[Note] | None
    lines: list[str] = field(default_factory=list)


def run(arguments: Sequence[str], listen: Callable[[Line], None]) -> Run:
    """Start the engine for the arguments of ``vllm serve``; `listen` gets each line of the output."""
    recorded = settings.load().VLLM_COMPILE_STARTS
    env = dict(os.environ)
    if not recorded:  # nor is it to be sent anywhere
        env = {name: value for name, value in env.items() if not name.startswith("OTEL_EXPORTER_OTLP_")}
    env |= {"VLLM_COMPILE_STARTS": "1", "VLLM_NO_USAGE_STATS": "1", "PYTHONUNBUFFERED": "1"}
    with tempfile.TemporaryDirectory(prefix="vllm-compile-ext-warm-") as place:
        env[read.FOLDER] = place
        with Program([*PROGRAM, *arguments], env, listen=listen) as program:
            status = program.wait()
        root = settings.cache_root() / temporary.SCRATCH
        temporary.remove_abandoned(root, temporary.SCRATCH_PREFIX)  # else an image would keep it
        start = next(read.starts(Path(place)), None)
        if start is not None and start.path is not None and recorded:
            with contextlib.suppress(OSError):
                read.folder().mkdir(mode=0o700, parents=True, exist_ok=True)
                shutil.move(start.path, read.folder())
    return Run(status, None if start is None else start.notes, [line.text for line in program.lines])


def outcomes(run: Run) -> dict[tuple[str, str], Note]:
    """The note that says what became of the code of each model and rank.  Raises `UserError` unless all is kept."""
    if run.status == REFUSED:
        refusals = [line.removeprefix(REFUSAL) for line in run.lines if line.startswith(REFUSAL)]
        raise UserError(refusals[-1] if refusals else "it was refused, and nothing says why")
    if run.notes is None:
        raise UserError("what was kept is not known: the start could not be recorded in a temporary folder")
    fallbacks: dict[tuple[str, str], Note] = {}  # they count where no other note came
    found: dict[tuple[str, str], Note] = {}
    for note in run.notes:
        if "key" in note.attrs and note.name in (*STATES, "not kept", "fallback"):
            notes = fallbacks if note.name == "fallback" else found
            notes[note.attrs["model"], note.attrs.get("shard", "")] = note
    found = fallbacks | found
    if not found:
        raise UserError("nothing was kept: no part of this model is compiled")
    for (model, shard), note in found.items():
        if note.name not in STATES:
            raise UserError(f"{model} ({shard}) was not kept: {note.attrs.get('why') or note.attrs.get('line')}")
    return dict(sorted(found.items(), key=lambda item: item[0]))


def command(context: typer.Context, as_json: JsonOption = False, verbose: VerboseOption = False) -> None:
    # No short options: click would look for them inside of vLLM's, which are words behind one dash (-tp, -cc.mode=3).
    if not context.args:
        raise typer.BadParameter("name a model: vllm-compile-ext warm MODEL [options of vllm serve]")
    begin = time.monotonic()
    progress = Progress(Console(stderr=True, highlight=False), verbose=verbose)
    with interruptible(), progress:
        progress.begin("warm")
        done = run(context.args, progress.listen)
    if done.status == 2:  # a bad option
        if not verbose:
            typer.echo("\n".join(done.lines), err=True)
        raise typer.Exit(2)
    try:
        if done.status not in (0, REFUSED):
            raise ProgramError(f"the engine did not start (exit status {done.status})", [] if verbose else done.lines)
        became = outcomes(done)
    except (ProgramError, UserError) as error:
        if as_json:
            shared.print_json({"status": "failed", "why": str(error)})
        raise
    store, blobs, entries = Store.open(settings.store()), set[Blob](), []
    for (model, shard), note in became.items():
        key, state = note.attrs["key"], STATES[note.name]
        manifest = next(iter(store.variants(key, shard)), None)  # the last used
        mine = set(manifest.members.values()) if manifest else set()
        entries.append({"key": key, "shard": shard, "model": model, "state": state, "bytes": total(mine)})
        blobs |= mine
        if not as_json:
            typer.echo(f"{plain(model)}, {shard}: {state} as {key[:DIGITS]}, {size(total(mine))}")
    status = "kept" if any(entry["state"] == "kept" for entry in entries) else "already there"
    jit = kernels.size(store.jit)
    if as_json:
        data = {"status": status, "entries": entries, "bytes": total(blobs), "store": str(store.root), "kernels": jit}
        shared.print_json(data)
        return
    if len(entries) > 1:
        typer.echo(f"together {size(total(blobs))}: what entries share is there once")
    if jit:
        typer.echo(f"kernels of other compilers: {size(jit)}")
    everything = "kept" if status == "kept" else "everything was already there"
    typer.echo(f"{everything}: {store.root} ({time.monotonic() - begin:.0f} s)")
