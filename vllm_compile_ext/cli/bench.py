"""``vllm-compile-ext bench``: how long a model takes to start, stock and ours, cold, warm and eager."""

from __future__ import annotations

import json
import os
import signal
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from vllm_compile_ext import harmless, temporary
from vllm_compile_ext.bench import chart, figures
from vllm_compile_ext.bench.machine import machine
from vllm_compile_ext.bench.server import Line, ServerError
from vllm_compile_ext.bench.starts import KINDS, Bench, Kind, Start, order
from vllm_compile_ext.cli.progress import Progress
from vllm_compile_ext.cli.warm import excerpt

HELP = "\n\n".join(
    (
        "Measure starts of `vllm serve MODEL [OPTIONS]`: cold, warm and eager, stock and ours in turn.",
        "Takes every option of `vllm serve`. Each cold start has empty caches; nothing of this user's is touched but "
        "the downloaded models. The first start is eager and is not measured: it downloads and reads the files.",
        "With --engine the engine alone is started, and timed as `vllm bench startup` does it.",
        "Exit status 1: a start failed.",
    )
)
PREFIX = "vllm-compile-ext-bench-"
# What is said when a line of vLLM's log is the latest of these.
STEPS = {
    "Initializing a V1 LLM engine": "starting the engine",
    "Starting to load model": "loading weights",
    "Warming up model for the compilation": "compiling or loading",
    "Starting torch.compile": "compiling",
    "Capturing CUDA graphs": "capturing CUDA graphs",
    "init engine (profile": "starting the server",
}


def command(
    context: typer.Context,
    runs: Annotated[int, typer.Option("--runs", min=1, metavar="N", help="How many starts of each kind.")] = 3,
    starts: Annotated[str, typer.Option("--starts", metavar="KINDS", help="Which kinds.")] = ",".join(KINDS),
    engine: Annotated[bool, typer.Option("--engine", help="Start the engine alone, without a server.")] = False,
    json_file: Annotated[
        Path | None, typer.Option("--json", metavar="FILE", help="Write the figures there.", show_default=False)
    ] = None,
    chart_file: Annotated[
        Path | None,
        typer.Option(
            "--chart", metavar="FILE", help="Draw them there (.svg; .png with matplotlib).", show_default=False
        ),
    ] = None,
    limit: Annotated[int, typer.Option("--limit", metavar="SECONDS", help="What one start may take.")] = 1800,
    verbose: Annotated[bool, typer.Option("--verbose", help="Show vLLM's log, on stderr.")] = False,
) -> None:
    # No short options: click would look for them inside of vLLM's, which are words behind one dash (-tp, -cc.mode=3).
    if not context.args:
        raise typer.BadParameter("name a model: vllm-compile-ext bench MODEL [options of vllm serve]")
    kinds = _kinds(starts)
    _check_files(json_file, chart_file)
    for number in (signal.SIGTERM, signal.SIGHUP):  # take the server along, as Ctrl-C does
        signal.signal(number, lambda got, _: sys.exit(128 + got))
    console = Console(stderr=True, highlight=False)
    try:
        done, bench = _measure(context.args, runs, kinds, engine, limit, console, verbose=verbose)
    except ServerError as error:
        _fail(error, shown=verbose)
        raise typer.Exit(1) from None
    except KeyboardInterrupt:
        typer.echo("interrupted; what was started has been ended", err=True)
        raise typer.Exit(130) from None
    what = "vLLM's engine" if engine else "vllm serve"
    line = harmless.arguments(["vllm", "serve", *context.args], context.args[0])[2:]
    title = f"{what} {' '.join(line)}"
    made = figures.summaries(done, bench.figures)
    grid = figures.table(made, bench.figures, f"{title}: median of {runs}" + (" (least-most)" if runs > 1 else ""))
    grid.caption = machine()
    out = Console(highlight=False, width=None if sys.stdout.isatty() else 120)
    out.print(grid)
    for figure in bench.figures:
        if any(each.figure == figure.name for each in made):
            out.print(f"{figure.title}: {figure.meaning}", markup=False)
    if json_file is not None:
        about: dict[str, Any] = {"date": time.strftime("%Y-%m-%d"), "machine": machine()}
        about |= {
            "arguments": line,
            "measured": "vllm bench startup" if engine else "vllm serve",
            "runs": runs,
        }
        json_file.write_text(json.dumps(figures.as_json(done, bench.figures, about), indent=2) + "\n")
    if chart_file is not None:
        first = bench.figures[0]
        shown = [each for each in made if each.figure == first.name]
        chart.write(
            chart_file,
            shown,
            f"{what} {_model(context.args)}: {first.title}",
            [f"Median of {runs}. {title}", machine()],
        )


def _model(arguments: Sequence[str]) -> str:
    """The model's last name, where it is the first argument."""
    return "" if arguments[0].startswith("-") else harmless.model_name(arguments[0]).rpartition("/")[2]


def _kinds(text: str) -> list[Kind]:
    named = [part.strip() for part in text.split(",")]
    wrong = [part for part in named if part not in KINDS]
    if wrong:
        raise typer.BadParameter(f"--starts {text}: {', '.join(wrong)} is none of {', '.join(KINDS)}")
    kinds: list[Kind] = [kind for kind in KINDS if kind in named]
    if "warm" in kinds and "cold" not in kinds:
        raise typer.BadParameter("--starts: a warm start needs the cold one before it")
    return kinds


def _check_files(json_file: Path | None, chart_file: Path | None) -> None:
    """Say now what would be said after all the starts."""
    for file in (json_file, chart_file):
        if file is not None and not os.access(file if file.exists() else file.absolute().parent, os.W_OK):
            raise typer.BadParameter(f"{file} cannot be written")
    if chart_file is not None:
        try:
            chart.check(chart_file)
        except chart.ChartError as error:
            raise typer.BadParameter(str(error)) from None


def _measure(
    arguments: Sequence[str],
    runs: int,
    kinds: Sequence[Kind],
    engine: bool,
    limit: int,
    console: Console,
    *,
    verbose: bool,
) -> tuple[list[Start], Bench]:
    """All starts, in a temporary folder that is gone afterwards.  Raises `ServerError`."""
    todo, done = order(runs, kinds), list[Start]()
    with ExitStack() as stack:
        progress = None if verbose else stack.enter_context(Progress(console))
        root = Path(tempfile.gettempdir())
        temporary.remove_abandoned(root, PREFIX)
        folder = temporary.Folder(root, PREFIX)
        stack.callback(folder.remove)
        title = "one start that is not measured"

        def listen(line: Line) -> None:
            if progress is None:
                typer.echo(line.text, err=True)
                return
            for mark, step in STEPS.items():
                if mark in line.text:
                    progress.step(f"{title}: {step}")

        bench = Bench(arguments, folder.path, engine, limit, listen)
        try:
            for number, start in enumerate([None, *todo]):
                title = f"[{number}/{len(todo)}] {start.side} {start.kind}" if start else title
                if progress:
                    progress.task(f"{title}: importing vLLM")
                if start is None:
                    bench.prepare()
                else:
                    done.append(bench.measure(start))
                    if not any(_same_caches(start, later) for later in todo[number:]):
                        bench.clean(start)
                if progress:
                    progress.done(title)
        except ServerError as error:
            error.keep()  # the log goes with the folder
            raise ServerError(f"{title}: {error}", error.log, error.text) from None
    return done, bench


def _same_caches(one: Start, other: Start) -> bool:
    return (one.round, one.side) == (other.round, other.side)


def _fail(error: ServerError, *, shown: bool) -> None:
    """Say on stderr what went wrong, with the end of the log where the user has not seen it."""
    if not shown:
        lines = excerpt(error.text.splitlines()) or ["(the log is empty)"]
        typer.echo("\n".join(["from vllm's log (all of it: --verbose):", *lines]), err=True)
    typer.echo(f"error: {error}", err=True)
