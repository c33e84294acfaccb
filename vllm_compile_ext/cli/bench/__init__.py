"""``vllm-compile-ext bench``: how long a model takes to start, stock and ours, cold, warm and eager."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from vllm_compile_ext import harmless, temporary
from vllm_compile_ext.cli.bench import figures, starts
from vllm_compile_ext.cli.bench.starts import ENGINE, KINDS, SERVE, Start
from vllm_compile_ext.cli.program import ProgramError, interruptible
from vllm_compile_ext.cli.progress import Progress
from vllm_compile_ext.cli.shared import VerboseOption

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
    kinds: Annotated[str, typer.Option("--starts", metavar="KINDS", help="Which kinds.")] = ",".join(KINDS),
    engine: Annotated[bool, typer.Option("--engine", help="Start the engine alone, without a server.")] = False,
    json_file: Annotated[Path | None, typer.Option("--json", metavar="FILE", help="Write the figures there.")] = None,
    chart_file: Annotated[
        Path | None, typer.Option("--chart", metavar="FILE", help="Draw them there (.svg or .png; needs matplotlib).")
    ] = None,
    limit: Annotated[int, typer.Option("--limit", metavar="SECONDS", help="What one start may take.")] = 1800,
    verbose: VerboseOption = False,
) -> None:
    # No short options: click would look for them inside of vLLM's, which are words behind one dash (-tp, -cc.mode=3).
    if not context.args:
        raise typer.BadParameter("name a model: vllm-compile-ext bench MODEL [options of vllm serve]")
    todo = starts.order(runs, _kinds(kinds))
    _check_files(json_file, chart_file)
    progress = Progress(Console(stderr=True, highlight=False), verbose=verbose)
    titles, measure_one = (ENGINE, starts.engine) if engine else (SERVE, starts.serve)

    def measure(start: Start, caches: Path) -> dict[str, float]:
        arguments = [*context.args, "--enforce-eager"] if start.kind == "eager" else context.args
        found = measure_one(arguments, starts.environment(caches, start.side), limit, progress.listen)
        return {name: round(found[name], 4) for name in titles if name in found}

    with interruptible(), progress:
        _measure_all(todo, measure, progress)
    made = figures.summaries(todo, titles)
    arguments = harmless.arguments(["vllm", "serve", *context.args], context.args[0])[2:]
    what = "vLLM's engine" if engine else "vllm serve"
    title = f"{what} {' '.join(arguments)}"
    out = Console(highlight=False, width=None if sys.stdout.isatty() else 120)
    spread = " (least-most)" if runs > 1 else ""
    out.print(figures.table(made, titles, f"{title}: median of {runs}{spread}"))
    if json_file is not None:
        data = {
            "date": time.strftime("%Y-%m-%d"),
            "machine": figures.machine(),
            "arguments": arguments,
            "measured": "vllm bench startup" if engine else "vllm serve",
            "runs": runs,
            "starts": [asdict(start) for start in todo],
            "summary": [asdict(each) for each in made],
        }
        json_file.write_text(json.dumps(data, indent=2) + "\n")
    if chart_file is not None:
        first = next(iter(titles))
        model = "" if context.args[0].startswith("-") else harmless.model_name(context.args[0]).rpartition("/")[2]
        shown = [each for each in made if each.figure == first]
        captions = [f"Median of {runs}. {title}", figures.machine()]
        figures.draw(chart_file, shown, f"{what} {model}: {titles[first]}", captions)


def _kinds(text: str) -> list[str]:
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
    if chart_file is not None and chart_file.suffix not in (".svg", ".png"):
        raise typer.BadParameter(f"a chart's file ends in .svg or .png, and {chart_file.name} does not")
    if chart_file is not None and importlib.util.find_spec("matplotlib") is None:
        raise typer.BadParameter('a chart needs matplotlib: pip install "vllm-compile-ext[chart]"')


def _measure_all(todo: list[Start], measure: Callable[[Start, Path], dict[str, float]], progress: Progress) -> None:
    """Make all starts, and one before them.  Raises `ProgramError`."""
    # Unmeasured and eager: it downloads the model, reads all files once, and fails at once where an option is wrong.
    everything = [Start(0, "eager", "stock"), *todo]
    folder = temporary.Folder(Path(tempfile.gettempdir()), PREFIX)
    try:
        for number, start in enumerate(everything):
            title = f"[{number}/{len(todo)}] {start.side} {start.kind}" if number else "one start that is not measured"
            progress.begin(title)
            try:
                start.figures = measure(start, folder.path / start.caches)
            except ProgramError as error:
                raise ProgramError(f"{title}: {error}", [] if progress.verbose else error.lines) from None
            if all(later.caches != start.caches for later in everything[number + 1 :]):
                shutil.rmtree(folder.path / start.caches, ignore_errors=True)
            progress.done()
    finally:
        folder.remove()
