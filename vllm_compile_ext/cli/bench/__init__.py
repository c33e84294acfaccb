"""``vllm-compile-ext bench``: how long a model takes to start, stock and ours, cold, warm and eager."""

from __future__ import annotations

import json
import os
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from vllm_compile_ext import harmless, temporary
from vllm_compile_ext.cli.bench import chart, figures
from vllm_compile_ext.cli.bench.starts import KINDS, Bench, Kind, Start, order
from vllm_compile_ext.cli.program import ProgramError, excerpt, interruptible
from vllm_compile_ext.cli.progress import Progress

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


def command(
    context: typer.Context,
    runs: Annotated[int, typer.Option("--runs", min=1, metavar="N", help="How many starts of each kind.")] = 3,
    starts: Annotated[str, typer.Option("--starts", metavar="KINDS", help="Which kinds.")] = ",".join(KINDS),
    engine: Annotated[bool, typer.Option("--engine", help="Start the engine alone, without a server.")] = False,
    json_file: Annotated[Path | None, typer.Option("--json", metavar="FILE", help="Write the figures there.")] = None,
    chart_file: Annotated[
        Path | None, typer.Option("--chart", metavar="FILE", help="Draw them there (.svg or .png; needs matplotlib).")
    ] = None,
    limit: Annotated[int, typer.Option("--limit", metavar="SECONDS", help="What one start may take.")] = 1800,
    verbose: Annotated[bool, typer.Option("--verbose", help="Show vLLM's log, on stderr.")] = False,
) -> None:
    # No short options: click would look for them inside of vLLM's, which are words behind one dash (-tp, -cc.mode=3).
    if not context.args:
        raise typer.BadParameter("name a model: vllm-compile-ext bench MODEL [options of vllm serve]")
    todo = order(runs, _kinds(starts))
    _check_files(json_file, chart_file)
    progress = Progress(Console(stderr=True, highlight=False), verbose=verbose)
    folder = Path(tempfile.gettempdir())
    with interruptible():
        caches = temporary.Folder(folder, PREFIX)
        bench = Bench(context.args, caches.path, engine, limit, progress.listen)
        try:
            with progress:
                done = _measure(bench, todo, progress)
        except ProgramError as error:
            if not verbose:
                lines = excerpt(error.lines)
                typer.echo("\n".join(["from vllm's log (all of it: --verbose):", *lines]), err=True)
            typer.echo(f"error: {error}", err=True)
            raise typer.Exit(1) from None
        finally:
            caches.remove()
    what = "vLLM's engine" if engine else "vllm serve"
    line = harmless.arguments(["vllm", "serve", *context.args], context.args[0])[2:]
    title = f"{what} {' '.join(line)}"
    made = figures.summaries(done, bench.figures)
    out = Console(highlight=False, width=None if sys.stdout.isatty() else 120)
    spread = " (least-most)" if runs > 1 else ""
    out.print(figures.table(made, bench.figures, f"{title}: median of {runs}{spread}"))
    for figure in bench.figures:
        if any(each.figure == figure.name for each in made):
            out.print(f"{figure.title}: {figure.meaning}", markup=False)
    if json_file is not None:
        measured = "vllm bench startup" if engine else "vllm serve"
        about = {"arguments": line, "measured": measured, "runs": runs}
        json_file.write_text(json.dumps(figures.as_json(done, bench.figures, about), indent=2) + "\n")
    if chart_file is not None:
        first = bench.figures[0]
        shown = [each for each in made if each.figure == first.name]
        model = "" if context.args[0].startswith("-") else harmless.model_name(context.args[0]).rpartition("/")[2]
        captions = [f"Median of {runs}. {title}", figures.machine()]
        chart.write(chart_file, shown, f"{what} {model}: {first.title}", captions)


def _kinds(text: str) -> list[Kind]:
    named = [part.strip() for part in text.split(",")]
    if wrong := [part for part in named if part not in KINDS]:
        raise typer.BadParameter(f"--starts {text}: {', '.join(wrong)} is none of {', '.join(KINDS)}")
    if "warm" in named and "cold" not in named:
        raise typer.BadParameter("--starts: a warm start needs the cold one before it")
    return [kind for kind in KINDS if kind in named]


def _check_files(json_file: Path | None, chart_file: Path | None) -> None:
    """Refuse before all the starts what would fail after them."""
    for file in (json_file, chart_file):
        if file is not None and not os.access(file if file.exists() else file.absolute().parent, os.W_OK):
            raise typer.BadParameter(f"{file} cannot be written")
    if chart_file is not None:
        try:
            chart.check(chart_file)
        except chart.ChartError as error:
            raise typer.BadParameter(str(error)) from None


def _measure(bench: Bench, todo: Sequence[Start], progress: Progress) -> list[Start]:
    """Make all starts and one before them; caches that no later start uses are removed.  Raises `ProgramError`."""
    done = []
    # Unmeasured and eager: it downloads the model, reads all files once, and fails at once where an option is wrong.
    starts = [Start(0, "eager", "stock"), *todo]
    for number, start in enumerate(starts):
        title = f"[{number}/{len(todo)}] {start.side} {start.kind}" if number else "one start that is not measured"
        progress.task(title)
        try:
            done.append(bench.measure(start))
        except ProgramError as error:
            raise ProgramError(f"{title}: {error}", error.lines) from None
        if all(later.caches != start.caches for later in starts[number + 1 :]):
            bench.clean(start)
        progress.done()
    return done[1:]
