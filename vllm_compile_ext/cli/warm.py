"""``vllm-compile-ext warm``: one start of the engine, so that the next one finds its compiled code and its kernels."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from vllm_compile_ext import settings
from vllm_compile_ext.cli._store import DIGITS, errors, plain
from vllm_compile_ext.cli.program import Line, Program, excerpt, interruptible
from vllm_compile_ext.cli.progress import Progress
from vllm_compile_ext.compilation import scratch
from vllm_compile_ext.record import read
from vllm_compile_ext.record.read import Note
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
# What a start's record says of a model's code, and what `warm` calls it.
STATES = {"kept": "kept", "loaded": "already there"}


@dataclass
class Run:
    """One start of the engine: exit status of `warm_start`, notes of its record (None: not recorded), its output."""

    status: int
    notes: list[Note] | None
    lines: list[str] = field(default_factory=list)


@dataclass
class Entry:
    """One entry of the store; `bytes` counts its blobs, some of which other entries may share."""

    key: str
    shard: str
    model: str
    state: str
    bytes: int


@dataclass
class Report:
    """What `warm` prints.

    status: "kept", "already there", or "failed", then for the reason `why`.
    bytes: of the blobs of all entries, each once.  kernels: bytes of the JIT caches in the store; new_kernels: of those
    that were added.
    """

    status: str = "failed"
    why: str = ""
    entries: list[Entry] = field(default_factory=list)
    bytes: int = 0
    store: str = ""
    kernels: int = 0
    new_kernels: int = 0
    seconds: float = 0.0


def run(arguments: Sequence[str], listen: Callable[[Line], None]) -> Run:
    """Start the engine for the arguments of ``vllm serve``; `listen` gets each line of the output."""
    recorded = settings.load().VLLM_COMPILE_STARTS
    env = dict(os.environ)
    if not recorded:  # nor is it to be sent anywhere
        env = {name: value for name, value in env.items() if not name.startswith("OTEL_EXPORTER_OTLP_")}
    env |= {"VLLM_COMPILE_STARTS": "1", "VLLM_NO_USAGE_STATS": "1", "PYTHONUNBUFFERED": "1"}
    with tempfile.TemporaryDirectory(prefix="vllm-compile-ext-warm-") as place:
        env[read.FOLDER] = place
        with Program([*PROGRAM, *arguments], env, listen=listen, patience=5.0) as program:
            status = program.wait()
        scratch.remove_abandoned(settings.cache_root() / scratch.NAME)  # else an image would keep it
        start = next(read.starts(Path(place)), None)
        if start is not None and start.path is not None and recorded:
            with contextlib.suppress(OSError):
                read.folder().mkdir(mode=0o700, parents=True, exist_ok=True)
                shutil.move(start.path, read.folder())
    return Run(status, None if start is None else start.notes, [line.text for line in program.lines])


def report(run: Run) -> Report:
    """What became of each model's code."""
    made, became = Report(store=str(settings.store())), outcomes(run.notes or ())
    if run.status == REFUSED:
        refusals = [line.removeprefix("refused: ") for line in run.lines if line.startswith("refused: ")]
        made.why = refusals[-1] if refusals else "it was refused, and nothing says why"
    elif run.status:
        made.why = f"the engine did not start (exit status {run.status})"
    elif run.notes is None:
        made.why = "what was kept is not known: the start could not be recorded in a temporary folder"
    elif not became:
        made.why = "nothing was kept: no part of this model is compiled"
    for (model, shard), note in became.items():
        if note.name not in STATES and not made.why:
            made.why = f"{model} ({shard}) was not kept: {note.attrs.get('why') or note.attrs.get('line')}"
    if made.why:
        return made
    store, blobs = Store.open(settings.store()), set[Blob]()
    for (model, shard), note in became.items():
        key = note.attrs["key"]
        manifest = next(iter(store.variants(key, shard)), None)  # the last used
        mine = set(manifest.members.values()) if manifest else set()
        made.entries.append(Entry(key, shard, model, STATES[note.name], total(mine)))
        blobs |= mine
    made.status = "kept" if any(entry.state == "kept" for entry in made.entries) else "already there"
    made.bytes = total(blobs)
    return made


def outcomes(notes: Iterable[Note]) -> dict[tuple[str, str], Note]:
    """The last note on the code of each model and rank; a fallback counts where no other came."""
    fallbacks: dict[tuple[str, str], Note] = {}
    last: dict[tuple[str, str], Note] = {}
    for note in notes:
        if "key" in note.attrs and note.name in (*STATES, "not kept", "fallback"):
            found = fallbacks if note.name == "fallback" else last
            found[note.attrs["model"], note.attrs.get("shard", "")] = note
    return dict(sorted((fallbacks | last).items(), key=lambda item: item[0]))


def text(made: Report) -> str:
    """A `Report` that is not of a failure, for people."""
    lines = [
        f"{plain(each.model)}, {each.shard}: {each.state} as {each.key[:DIGITS]}, {_megabytes(each.bytes)}"
        for each in made.entries
    ]
    if len(lines) > 1:
        lines.append(f"together {_megabytes(made.bytes)}: what entries share is there once")
    if made.kernels:
        lines.append(f"kernels of other compilers: {_megabytes(made.kernels)}, new {_megabytes(made.new_kernels)}")
    everything = "everything was already there" if made.status == "already there" else "kept"
    return "\n".join([*lines, f"{everything}: {made.store} ({made.seconds:.0f} s)"])


def _megabytes(size: int) -> str:
    return f"{size / 1e6:.2f} MB"


def command(
    context: typer.Context,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    verbose: Annotated[bool, typer.Option("--verbose", help="Show vLLM's log, on stderr.")] = False,
) -> None:
    # No short options: click would look for them inside of vLLM's, which are words behind one dash (-tp, -cc.mode=3).
    if not context.args:
        raise typer.BadParameter("name a model: vllm-compile-ext warm MODEL [options of vllm serve]")
    before, begin = kernels.size(kernels.folder()), time.monotonic()
    progress = Progress(Console(stderr=True, highlight=False), verbose=verbose)
    with interruptible(), errors():
        with progress:
            progress.task("warm")
            done = run(context.args, progress.listen)
        if done.status == 2:  # a bad option
            if not verbose:
                typer.echo("\n".join(done.lines), err=True)
            raise typer.Exit(2)
        made = report(done)
    made.seconds = round(time.monotonic() - begin, 1)
    if made.status != "failed":
        made.kernels = kernels.size(kernels.folder())
        made.new_kernels = max(0, made.kernels - before)
    if as_json:
        typer.echo(json.dumps(asdict(made), indent=2))
    elif made.status != "failed":
        typer.echo(text(made))
    if made.status == "failed":
        if done.status not in (0, REFUSED) and not verbose:
            typer.echo("\n".join(["from vllm's log (all of it: --verbose):", *excerpt(done.lines)]), err=True)
        typer.echo(plain(f"error: {made.why}"), err=True)
        raise typer.Exit(1)
