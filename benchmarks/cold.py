"""Cold and warm starts of ``vllm serve``, stock and ours in one run: ``python -m benchmarks.cold llama8 llama80``.

For each model four servers, one after the other: stock cold, stock warm, ours cold, ours warm.  On CPU the figure to
read is the first pass, from vLLM's "Warming up model for the compilation" to its end: compiling, or loading what is
compiled, and one forward pass; on GPUs it is vLLM's own figure for torch.compile.  Ratios are to stock's.  With a
shallow and a deep model the last lines say how the cost grows with depth.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from benchmarks import demo
from benchmarks.models import SIZES

STARTS = ("stock cold", "stock warm", "ours cold", "ours warm")
PLUGIN = """
import time, vllm.engine.arg_utils
from importlib.metadata import entry_points
(point,) = [p for p in entry_points(group="vllm.general_plugins") if p.name == "compile_ext"]
begin = time.perf_counter()
point.load()()
print("SECONDS", time.perf_counter() - begin)
"""


def plugin_seconds(runs: int = 3) -> float:
    """Median seconds that importing and registering the plugin adds to a process, as vLLM does it."""

    def once() -> float:
        done = subprocess.run([sys.executable, "-c", PLUGIN], capture_output=True, text=True, check=True)
        return float(done.stdout.rpartition("SECONDS ")[2])

    return statistics.median(once() for _ in range(runs))


def runs(size: str, starts: Sequence[str]) -> list[demo.Run]:
    """The starts of one model: stock and ours on caches of their own, cold before warm."""
    return [
        demo.Run(f"{size} {start}", "0" if start.startswith("stock") else "1", f"cache-{size}-{start.split()[0]}")
        for start in starts
    ]


def first_pass(result: demo.Result) -> float:
    """Seconds of compiling or loading and the first forward pass; on GPUs of compiling or loading."""
    return result.phases.first_run or result.phases.compile or 0.0


def table(size: str, starts: Sequence[str], results: Sequence[demo.Result]) -> Table:
    """A row for each start of one model; a ratio is to stock's start of the same kind."""
    grid = Table(title=f"vllm serve, {size}: seconds, ours as a ratio to stock's", title_justify="left")
    for name in ("start", "first pass", "torch.compile (vLLM's figure)", "engine init", "ready", "code was"):
        grid.add_column(name, justify="left" if name == "start" else "right")
    done = dict(zip(starts, results, strict=True))
    for start, result in done.items():
        stock = done.get(start.replace("ours", "stock")) if start.startswith("ours") else None
        cells = [
            demo.cell(getattr(result.phases, field), getattr(stock.phases, field) if stock else None)
            for field in ("first_run", "compile", "init", "ready")
        ]
        grid.add_row(start, *cells, result.code)
    same = [
        f"{one} as {other}: {demo.agreement(done[one].answers, done[other].answers)}"
        for one, other in (("ours warm", "ours cold"), ("ours cold", "stock cold"))
        if one in done and other in done
    ]
    grid.caption = "tokens, " + "; ".join(same)
    grid.caption_justify = "left"
    return grid


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("sizes", nargs="+", choices=sorted(SIZES), metavar="SIZE", help=", ".join(SIZES))
    parser.add_argument("--starts", nargs="+", choices=STARTS, default=STARTS, metavar="START")
    parser.add_argument("--json", type=Path, help="write the figures to this file too")
    args = parser.parse_args()
    console = Console() if sys.stdout.isatty() else Console(width=110)
    demo.FOLDER = Path(".demo") / "cold"
    shutil.rmtree(demo.FOLDER, ignore_errors=True)
    demo.FOLDER.mkdir(parents=True)
    results: dict[str, list[demo.Result]] = {}
    try:
        with demo.Progress(console) as progress:
            demo.read_ahead(progress)
            for size in args.sizes:
                model = demo.make_model(progress, size)
                todo = runs(size, args.starts)
                results[size] = [
                    demo.measure(run, number, len(todo), model, progress) for number, run in enumerate(todo, 1)
                ]
    except demo.ServerError as error:
        demo.report(error, console)
        return 1
    for size, done in results.items():
        console.print(table(size, args.starts, done))
    if len(args.sizes) == 2:
        shallow, deep = args.sizes
        for start, less, more in zip(args.starts, results[shallow], results[deep], strict=True):
            ratio = first_pass(more) / (first_pass(less) or float("nan"))
            console.print(f"{start}: the first pass of {deep} takes {ratio:.2f} times that of {shallow}")
    plugin = plugin_seconds()
    console.print(f"loading the plugin: {plugin * 1000:.0f} ms a process")
    console.print(demo.machine())
    if args.json:
        figures = {run.run.title: vars(run.phases) for done in results.values() for run in done}
        data = {"date": time.strftime("%Y-%m-%d"), "machine": demo.machine(), "runs": figures}
        args.json.write_text(json.dumps(data | {"plugin_seconds": plugin}, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
