"""``vllm-compile-ext warm``: one start of the engine, so that the next one finds its compiled code and its kernels."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from vllm_compile_ext import jit_caches, settings
from vllm_compile_ext.cli.progress import Progress
from vllm_compile_ext.compilation import outcomes, scratch
from vllm_compile_ext.compilation.outcomes import Outcome
from vllm_compile_ext.printable import plain
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
TAIL = 25  # lines of the log that an error shows
STOP = 5.0  # seconds between the polite signal and the final one
# What is said when a line of vLLM's log is the latest of these.
STEPS = {
    "Initializing a V1 LLM engine": "starting the engine",
    "Starting to load model": "making the model, with random weights",
    "Starting torch.compile": "compiling",
    "loaded compiled code": "loaded; warming up",
    "kept as": "kept; warming up",
    "Capturing CUDA graphs": "capturing CUDA graphs",
    "init engine (profile": "ending the engine",
}


@dataclass
class Start:
    """One start of the engine: exit status of `warm_start`, what it told, and its output in lines."""

    status: int = -1
    told: list[Outcome] = field(default_factory=list)
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

    status: str
    why: str = ""
    entries: list[Entry] = field(default_factory=list)
    bytes: int = 0
    store: str = ""
    kernels: int = 0
    new_kernels: int = 0
    seconds: float = 0.0


def run(arguments: Sequence[str], listen: Callable[[str], None]) -> Start:
    """Start the engine for the arguments of ``vllm serve``; `listen` gets each line of the output."""
    start = Start()
    with tempfile.NamedTemporaryFile(prefix="vllm-compile-warm-") as told:
        env = {outcomes.VARIABLE: told.name, "VLLM_NO_USAGE_STATS": "1", "PYTHONUNBUFFERED": "1"}
        with _process([*PROGRAM, *arguments], os.environ | env) as process:

            def read() -> None:
                assert process.stdout is not None
                for raw in process.stdout:
                    start.lines.append(raw.decode(errors="replace").rstrip("\n"))
                    listen(start.lines[-1])

            reader = threading.Thread(target=read, daemon=True)
            reader.start()
            start.status = process.wait()
        reader.join(STOP)
        start.told = outcomes.read(Path(told.name))
    scratch.remove_abandoned(settings.cache_root() / scratch.NAME)  # else an image would keep it
    return start


@contextlib.contextmanager
def _process(command: Sequence[str], env: dict[str, str]) -> Iterator[subprocess.Popen[bytes]]:
    """A process in a session of its own, which is gone afterwards with all its children."""
    process = subprocess.Popen(
        command,
        env=env,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )
    try:
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGTERM)
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(STOP)
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def judge(start: Start) -> tuple[str, str]:
    """Status and reason of a `Report`."""
    refused = [each.why for each in start.told if each.what == "refused"]
    failed = [f"{each.model} ({each.shard}) was not kept: {each.why}" for each in start.told if each.what == "failed"]
    if refused or failed:
        return "failed", (refused or failed)[0]
    if start.status:
        return "failed", f"the engine did not start (exit status {start.status})"
    if not start.told:
        return "failed", "nothing was kept: no part of this model is compiled"
    return ("kept" if any(each.what == "kept" for each in start.told) else "already there"), ""


def report(start: Start, seconds: float, kernels_before: int) -> Report:
    """What to print of a start."""
    status, why = judge(start)
    folder = settings.store()
    made = Report(status, why, store=str(folder), seconds=round(seconds, 1))
    if status == "failed":
        return made
    store, blobs = Store.open(folder), set[Blob]()
    for each in sorted(start.told, key=lambda told: (told.model, told.shard)):
        manifest = next(iter(store.variants(each.key, each.shard)), None)  # the last used
        mine = set(manifest.members.values()) if manifest else set()
        state = "kept" if each.what == "kept" else "already there"
        made.entries.append(Entry(each.key, each.shard, each.model, state, total(mine)))
        blobs |= mine
    made.bytes = total(blobs)
    made.kernels = kernels.size(jit_caches.folder())
    made.new_kernels = max(0, made.kernels - kernels_before)
    return made


def text(made: Report) -> str:
    """A `Report` that is not of a failure, for people."""
    lines = [
        f"{each.model}, {each.shard}: {each.state} as {each.key[:12]}, {_megabytes(each.bytes)}"
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


def excerpt(lines: Sequence[str]) -> list[str]:
    """The end of the first error in vLLM's log, or of the log.

    The process that failed first says why, in lines with the same beginning; the ones that waited for it fail later.
    """
    first = next((number for number, line in enumerate(lines) if " ERROR " in line), None)
    if first is None:
        return list(lines[-TAIL:])
    process = lines[first].partition(" ERROR ")[0]
    return [line for line in lines if line.startswith(f"{process} ERROR ")][-TAIL:]


def _fail(made: Report, start: Start, *, shown: bool) -> None:
    """Say on stderr what went wrong, with the log where it has more to say and the user has not seen it."""
    if start.status and not shown and not any(each.what == "refused" for each in start.told):
        typer.echo("\n".join(["from vllm's log (all of it: --verbose):", *excerpt(start.lines)]), err=True)
    typer.echo(plain(f"error: {made.why}"), err=True)


def command(
    context: typer.Context,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    verbose: Annotated[bool, typer.Option("--verbose", help="Show vLLM's log, on stderr.")] = False,
) -> None:
    # No short options: click would look for them inside of vLLM's, which are words behind one dash (-tp, -cc.mode=3).
    if not context.args:
        raise typer.BadParameter("name a model: vllm-compile-ext warm MODEL [options of vllm serve]")
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))  # takes the engine along, as Ctrl-C does
    before, begin = kernels.size(jit_caches.folder()), time.monotonic()
    console = Console(stderr=True, highlight=False)
    with contextlib.ExitStack() as stack:
        progress = None if verbose else stack.enter_context(Progress(console))
        if progress:
            progress.task("importing vLLM")

        said: list[str] = []

        def listen(line: str) -> None:
            if progress is None:
                typer.echo(line, err=True)
                return
            for step in (step for mark, step in STEPS.items() if mark in line):
                if said[-1:] != [step]:  # each rank has its own lines
                    said.append(step)
                    progress.step(step)

        start = run(context.args, listen)
    if start.status == 2 and not start.told:
        if not verbose:
            typer.echo("\n".join(start.lines), err=True)
        raise typer.Exit(2)
    made = report(start, time.monotonic() - begin, before)
    if as_json:
        typer.echo(json.dumps(asdict(made), indent=2))
    elif made.status != "failed":
        typer.echo(text(made))
    if made.status == "failed":
        _fail(made, start, shown=verbose)
        raise typer.Exit(1)
