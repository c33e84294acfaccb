"""Warm starts of ``vllm serve``, stock and ours in one run: ``python -m benchmarks.warm llama8 llama80``.

As `benchmarks.cold`, each start with a home folder of its own, as in a container that keeps only vLLM's cache root.
The last table is about the second starts: what loading costs, how it grows with depth, what is kept, and on GPUs how
many kernels are compiled again.  With --ranks also how many pieces two tensor-parallel ranks compile.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import site
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from benchmarks import cold, demo, ranks
from benchmarks.models import SIZES
from vllm_compile_ext.store.store import Store

STOCK, OURS = "stock", "ours"
STORE = "compile_store"  # in vLLM's cache root
# A folder with such a file is one kernel: Triton's, and those of the libraries in `vllm_compile_ext.jit_caches`.
KERNELS = ("__grp__*.json", "*.cubin", "*.so")


@dataclass(frozen=True)
class Start:
    """One start: what it showed, and how many folders of JIT-compiled kernels it left that were not there before."""

    result: demo.Result
    kernels: int


Starts = dict[str, list[Start]]  # "ours warm" -> its starts


@dataclass(frozen=True)
class Row:
    """One line of the last table: the value of each side, None where it was not measured; `target` is the issue's."""

    what: str
    stock: float | None
    ours: float | None
    unit: str = "s"
    target: str = ""


def has_gpu() -> bool:
    return shutil.which("nvidia-smi") is not None


def kernel_folders(cache: Path, home: Path) -> set[Path]:
    """Folders of kernels below vLLM's cache root and the home folder; what a process works in while it compiles is not
    kept and does not count.
    """
    found = {path.parent for root in (cache, home) for pattern in KERNELS for path in root.rglob(pattern)}
    return {path for path in found if "compile_scratch" not in path.parts}


def measure(size: str, starts: Sequence[str], progress: demo.Progress) -> Starts:
    """The starts of one model."""
    model, made = demo.make_model(progress, size), Starts()
    todo = cold.runs(size, starts)
    for number, (start, run) in enumerate(zip(starts, todo, strict=True), 1):
        cache, home = (demo.FOLDER / run.cache).resolve(), (demo.FOLDER / f"home-{size}-{number}").resolve()
        home.mkdir()
        # Packages that were installed for the user stay where they are.
        env = {"HOME": str(home), "PYTHONUSERBASE": os.environ.get("PYTHONUSERBASE", site.getuserbase())}
        before = kernel_folders(cache, home)
        result = demo.measure(run, number, len(todo), model, progress, env)
        made.setdefault(start, []).append(Start(result, len(kernel_folders(cache, home) - before)))
    return made


def kept(size: str, side: str) -> tuple[float, float]:
    """MB that the starts of one side left: what the next start loads, and everything in the cache folder.

    For stock the first is its compile cache with Inductor's files, for ours the blobs and manifests of the store.
    """
    cache = demo.FOLDER / f"cache-{size}-{side}"
    everything = _megabytes(cache)
    if side == OURS:
        return Store.open(cache / STORE).size() / 1e6, everything
    return _megabytes(cache / "torch_compile_cache") + _megabytes(cache / "inductor"), everything


def _megabytes(folder: Path) -> float:
    return sum(path.lstat().st_size for path in folder.rglob("*") if path.is_file()) / 1e6


def figure(starts: Starts, start: str, get: Callable[[Start], float | None]) -> float | None:
    """The median over the starts of one kind, None where none of them tells."""
    values = [value for each in starts.get(start, ()) if (value := get(each)) is not None]
    return statistics.median(values) if values else None


def first_pass(start: Start) -> float | None:
    return start.result.phases.first_run


def load(start: Start) -> float | None:
    """vLLM's figure for torch.compile, in hundredths of a second; stock on CPU gives none."""
    return start.result.phases.compile


def fine_load(start: Start) -> float | None:
    """The same, finer where ours says it: for ratios."""
    return start.result.phases.load or load(start)


def rows(measured: dict[str, Starts], counts: dict[str, ranks.Count]) -> list[Row]:
    """The lines of the last table."""
    made = []
    deepest, gpu = list(measured)[-1], has_gpu()
    for size, starts in measured.items():

        def both(get: Callable[[Start], float | None], starts: Starts = starts) -> list[float | None]:
            return [figure(starts, f"{side} warm", get) for side in (STOCK, OURS)]

        def goal(value: str, size: str = size) -> str:
            return value if size == deepest else ""

        made.append(Row(f"{size}: torch.compile (vLLM's figure)", *both(load), target=goal("0.1" if gpu else "0.3")))
        made.append(Row(f"{size}: compile or load, and first pass", *both(first_pass)))
        made.append(Row(f"{size}: engine init", *both(lambda start: start.result.phases.init)))
        if gpu:
            again = both(lambda start: float(start.kernels))
            made.append(Row(f"{size}: kernels compiled again", *again, unit="", target=goal("0")))
        sides = [kept(size, side) if f"{side} warm" in starts else None for side in (STOCK, OURS)]
        made.append(Row(f"{size}: kept", *(side and side[0] for side in sides), unit="MB", target=goal("5")))
        made.append(Row(f"{size}: all of the cache folder", *(side and side[1] for side in sides), unit="MB"))
    if len(measured) == 2:
        made += growth(measured)
    if counts:
        values = [counts[side].ratio if side in counts else None for side in (STOCK, OURS)]
        made.append(Row("two ranks over one: pieces compiled", *values, unit="x", target="1"))
    return made


def growth(measured: dict[str, Starts]) -> list[Row]:
    """How warm starts grow from the first model to the second."""
    (shallow, less), (deep, more) = measured.items()
    made = []
    for name, get, target in (("torch.compile", fine_load, "1.5"), ("first pass", first_pass, "")):
        values = []
        for side in (STOCK, OURS):
            low, high = (figure(starts, f"{side} warm", get) for starts in (less, more))
            values.append(high / low if low and high else None)
        made.append(Row(f"{deep} over {shallow}: {name}", *values, unit="x", target=target))
    return made


def table(made: Sequence[Row]) -> Table:
    grid = Table(title="warm starts", title_justify="left")
    for name in ("", STOCK, OURS, "ours to stock", "target"):
        grid.add_column(name, justify="left" if not name else "right", no_wrap=not name)
    for row in made:
        ratio = f"{row.ours / row.stock:.3f}x" if row.ours is not None and row.stock and row.unit != "x" else ""
        target = f"{row.target} {row.unit}".replace(" x", "x").strip() if row.target else ""
        grid.add_row(row.what, _cell(row.stock, row.unit), _cell(row.ours, row.unit), ratio, target)
    return grid


def _cell(value: float | None, unit: str) -> str:
    if value is None:
        return "-"
    return f"{value:.0f}" if not unit else f"{value:.2f}x" if unit == "x" else f"{value:.2f} {unit}"


def count_ranks(size: str, progress: demo.Progress) -> dict[str, ranks.Count]:
    """Cold starts of two ranks, stock and ours."""
    model, counts = demo.FOLDER / size, {}
    for side, switch in ((STOCK, "0"), (OURS, "1")):
        title = f"{side}, {ranks.RANKS} ranks of {size}, cold"
        progress.task(title)
        cache = (demo.FOLDER / f"cache-ranks-{side}").resolve()
        counts[side] = ranks.count(model, cache, demo.FOLDER / f"ranks-{side}.log", switch)
        progress.done(title)
    return counts


def repeated(starts: Sequence[str], times: int) -> list[str]:
    """The starts in order, each warm one `times` times."""
    return [start for start in starts for _ in range(times if start.endswith("warm") else 1)]


def main() -> int:
    parser = argparse.ArgumentParser(description="Warm starts of vllm serve, stock and ours in one run.")
    default = ("n8", "n70") if has_gpu() else ("llama8", "llama80")
    parser.add_argument("sizes", nargs="*", choices=sorted(SIZES), metavar="SIZE", help=f"default: {' '.join(default)}")
    parser.add_argument("--starts", nargs="+", choices=cold.STARTS, default=cold.STARTS, metavar="START")
    parser.add_argument("--repeat", type=int, default=1, metavar="N", help="measure each warm start N times (median)")
    parser.add_argument("--ranks", action="store_true", help="also start two ranks; needs two cores or two GPUs")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures to this file too")
    args = parser.parse_args()
    sizes, starts = args.sizes or default, repeated(args.starts, args.repeat)
    console = Console() if sys.stdout.isatty() else Console(width=100)
    demo.FOLDER = Path(".demo") / "warm"
    shutil.rmtree(demo.FOLDER, ignore_errors=True)
    demo.FOLDER.mkdir(parents=True)
    counts: dict[str, ranks.Count] = {}
    try:
        with demo.Progress(console) as progress:
            demo.read_ahead(progress)
            measured = {size: measure(size, starts, progress) for size in sizes}
            if args.ranks:
                counts = count_ranks(sizes[0], progress)
    except demo.ServerError as error:
        demo.report(error, console)
        return 1
    for size, each in measured.items():
        console.print(cold.table(size, tuple(each), [done[0].result for done in each.values()]))
    made = rows(measured, counts)
    console.print(table(made))
    for side, count in counts.items():
        more = "; what depends on the rank is compiled on each" if side == OURS and count.total > count.needed else ""
        console.print(f"{side}: two ranks compiled {' + '.join(map(str, count.ranks))}, one has {count.needed}{more}")
    console.print(demo.machine())
    if args.json:
        args.json.write_text(json.dumps(figures(measured, made, counts), indent=2) + "\n")
    return 0


def figures(measured: dict[str, Starts], made: Sequence[Row], counts: dict[str, ranks.Count]) -> dict[str, object]:
    """Everything that was measured, for a file."""
    runs = {
        each[0].result.run.title: [vars(one.result.phases) | {"kernels": one.kernels} for one in each]
        for starts in measured.values()
        for each in starts.values()
    }
    return {
        "date": time.strftime("%Y-%m-%d"),
        "machine": demo.machine(),
        "runs": runs,
        "table": [vars(row) for row in made],
        "ranks": {side: vars(count) for side, count in counts.items()},
    }


if __name__ == "__main__":
    sys.exit(main())
