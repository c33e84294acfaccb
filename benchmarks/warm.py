"""Cold and warm starts of ``vllm serve``, stock and ours in one run: ``python -m benchmarks.warm llama8 llama80``.

For each model four servers, one after the other: stock cold, stock warm, ours cold, ours warm.  Each has a home folder
of its own, as in a container that keeps only vLLM's cache root.  On CPU the figure to read is the first pass, from
vLLM's "Warming up model for the compilation" to its end: compiling, or loading what is compiled, and one forward pass;
on GPUs it is vLLM's own figure for torch.compile.  Ratios are to stock's.  ``VLLM_ENABLE_STARTUP_PLAN=1`` is passed on.

The last table is about the second starts: what loading costs, how it grows from a shallow model to a deep one, what is
kept, and on GPUs how many kernels are compiled again.  With --ranks also how many pieces two tensor-parallel ranks
compile.  For models of your own there is ``vllm-compile-ext bench``.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import site
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from benchmarks import demo, ranks
from benchmarks.models import SIZES
from benchmarks.serve import standing_by
from vllm_compile_ext.cli.bench.figures import machine
from vllm_compile_ext.cli.progress import Progress
from vllm_compile_ext.store.store import Store

SIDES = ("stock", "ours")
STARTS = ("stock cold", "stock warm", "ours cold", "ours warm")
EAGER = ("stock eager", "ours eager")
SPAWNED = ("ours spawned",)  # a warm start with VLLM_COMPILE_FORK=0
STANDBY = ("ours standby", "eager standby")  # warm, and eager, from `vllm-compile-ext standby`
MORE = EAGER + SPAWNED + STANDBY
COMPARED = (
    *((f"ours {kind}", "ours cold") for kind in ("warm", "spawned", "standby")),
    ("ours cold", "stock cold"),
)
# A folder with such a file is one kernel: Triton's, and those of the libraries in `vllm_compile_ext.store.kernels`.
KERNELS = ("__grp__*.json", "*.cubin", "*.so")
PLUGIN = """
import time, vllm.engine.arg_utils
from importlib.metadata import entry_points
(point,) = [p for p in entry_points(group="vllm.general_plugins") if p.name == "compile_ext"]
begin = time.perf_counter()
point.load()()
print("SECONDS", time.perf_counter() - begin)
"""


@dataclass(frozen=True)
class Start:
    """One start: what it showed, and how many folders of JIT-compiled kernels it left that were not there before."""

    result: demo.Result
    kernels: int


Starts = dict[str, Start]  # "ours warm" -> that start
Get = Callable[[Start], float | None]


@dataclass(frozen=True)
class Row:
    """One line of the last table: the value of each side, None where it was not measured."""

    what: str
    stock: float | None
    ours: float | None
    unit: str = "s"


def plugin_seconds() -> float:
    """Median seconds that importing and registering the plugin adds to a process, as vLLM does it."""
    command = [sys.executable, "-c", PLUGIN]
    runs = [subprocess.run(command, capture_output=True, text=True, check=True) for _ in range(3)]
    return statistics.median(float(done.stdout.rpartition("SECONDS ")[2]) for done in runs)


def kernel_folders(*roots: Path) -> set[Path]:
    """Folders of kernels below vLLM's cache root and the home folder; what a process works in while it compiles is not
    kept and does not count.
    """
    found = {path.parent for root in roots for pattern in KERNELS for path in root.rglob(pattern)}
    return {path for path in found if "compile_scratch" not in path.parts}


def measure(
    name: str,
    model: Path,
    starts: Sequence[str],
    progress: Progress,
    args: tuple[str, ...] = (),
) -> Starts:
    """The starts of one model with options `args`: stock and ours on caches of their own, which `name` names."""
    made = Starts()
    for number, start in enumerate(starts, 1):
        side = "stock" if start.startswith("stock") else "ours"
        eager = ("--enforce-eager",) if "eager" in start else ()
        run = demo.Run(f"{name} {start}", str(int(side == "ours")), f"cache-{name}-{side}", (*eager, *args))
        cache, home = (demo.FOLDER / run.cache).resolve(), (demo.FOLDER / f"home-{name}-{number}").resolve()
        home.mkdir()
        # Packages that were installed for the user stay where they are.
        env = {"HOME": str(home), "PYTHONUSERBASE": os.environ.get("PYTHONUSERBASE", site.getuserbase())}
        if start in SPAWNED:
            env["VLLM_COMPILE_FORK"] = "0"
        before = kernel_folders(cache, home)
        with contextlib.ExitStack() as stack:
            if start in STANDBY:
                env |= {"VLLM_COMPILE_EXT": "1"}
                env = stack.enter_context(standing_by(cache, env, demo.FOLDER / f"standby-{number}.log"))
            result = demo.measure(run, f"{number}/{len(starts)}", model, progress, env)
        made[start] = Start(result, len(kernel_folders(cache, home) - before))
    return made


def kept(size: str, side: str) -> tuple[float, float]:
    """MB that the starts of one side left: what the next start loads, and everything in the cache folder.

    For stock the first is its compile cache with Inductor's files, for ours the blobs and manifests of the store.
    """
    cache = demo.FOLDER / f"cache-{size}-{side}"
    if side == "ours":
        return Store.open(cache / "compile_store").size() / 1e6, _megabytes(cache)
    return _megabytes(cache / "torch_compile_cache") + _megabytes(cache / "inductor"), _megabytes(cache)


def _megabytes(folder: Path) -> float:
    return sum(path.lstat().st_size for path in folder.rglob("*") if path.is_file()) / 1e6


def phase(name: str) -> Get:
    """Seconds of a phase."""
    return lambda start: start.result.phases.get(name)


def load(start: Start) -> float | None:
    """Seconds of loading what is compiled: vLLM's figure, finer where ours says it; stock on CPU gives none."""
    phases = start.result.phases
    return phases.get("load") or phases.get("compile")


def both(starts: Starts, get: Get, kind: str = "warm") -> list[float | None]:
    """A figure of each side's start of a kind; None where it does not say."""
    found = [starts.get(f"{side} {kind}") for side in SIDES]
    return [get(start) if start is not None else None for start in found]


def rows(measured: dict[str, Starts], counts: dict[str, ranks.Count]) -> list[Row]:
    """The lines of the last table."""
    made = []
    for size, starts in measured.items():
        made.append(Row(f"{size}: torch.compile (vLLM's figure)", *both(starts, phase("compile"))))
        made.append(Row(f"{size}: compile or load, and first pass", *both(starts, phase("first_run"))))
        made.append(Row(f"{size}: engine init", *both(starts, phase("init"))))
        if shutil.which("nvidia-smi"):
            made.append(Row(f"{size}: kernels compiled again", *both(starts, lambda start: float(start.kernels)), ""))
        sides = [kept(size, side) if f"{side} warm" in starts else (None, None) for side in SIDES]
        made.append(Row(f"{size}: kept", *(loaded for loaded, _ in sides), "MB"))
        made.append(Row(f"{size}: all of the cache folder", *(everything for _, everything in sides), "MB"))
    if len(measured) == 2:
        (shallow, less), (deep, more) = measured.items()
        for kind, name, get in (
            ("cold", "first pass", phase("first_run")),
            ("warm", "first pass", phase("first_run")),
            ("warm", "torch.compile", load),
        ):
            pairs = zip(both(less, get, kind), both(more, get, kind), strict=True)
            values = [high / low if low and high else None for low, high in pairs]
            made.append(Row(f"{deep} over {shallow}, {kind}: {name}", *values, "x"))
    if counts:
        values = [counts[side].ratio if side in counts else None for side in SIDES]
        made.append(Row("two ranks over one: pieces compiled", *values, "x"))
    return made


def start_table(size: str, starts: Starts) -> Table:
    """A row for each kind of start of one model; a ratio is to stock's start of the same kind."""
    grid = Table(title=f"vllm serve, {size}: seconds, ours as a ratio to stock's", title_justify="left")
    columns = ("first pass", "torch.compile (vLLM's figure)", "engine init", "ready", "first request", "all requests")
    for name in ("start", *columns, "code was"):
        grid.add_column(name, justify="left" if name == "start" else "right")
    done = {start: each.result for start, each in starts.items()}
    for start, result in done.items():
        stock = (
            done.get(start.replace("ours", "stock").replace("spawned", "warm")) if start.startswith("ours") else None
        )
        names = ("first_run", "compile", "init", "ready")
        cells = [demo.cell(result.phases.get(name), stock.phases.get(name) if stock else None) for name in names]
        cells.append(demo.cell(result.first, stock.first if stock else None))
        cells.append(demo.cell(result.requests, stock.requests if stock else None))
        grid.add_row(start, *cells, result.code)
    same = [
        f"{one} as {other}: {demo.agreement(done[one].answers, done[other].answers)}"
        for one, other in COMPARED
        if one in done and other in done
    ]
    grid.caption, grid.caption_justify = "tokens, " + "; ".join(same), "left"
    return grid


def row_table(made: Sequence[Row]) -> Table:
    grid = Table(title="warm starts", title_justify="left")
    for name in ("", *SIDES, "ours to stock"):
        grid.add_column(name, justify="left" if not name else "right", no_wrap=not name)
    for row in made:
        ratio = f"{row.ours / row.stock:.3f}x" if row.ours is not None and row.stock and row.unit != "x" else ""
        grid.add_row(row.what, _cell(row.stock, row.unit), _cell(row.ours, row.unit), ratio)
    return grid


def _cell(value: float | None, unit: str) -> str:
    if value is None:
        return "-"
    return f"{value:.0f}" if not unit else f"{value:.2f}x" if unit == "x" else f"{value:.2f} {unit}"


def count_ranks(size: str, progress: Progress) -> dict[str, ranks.Count]:
    """Cold starts of two ranks, stock and ours."""
    counts = {}
    for side in SIDES:
        progress.begin(f"{side}, {ranks.RANKS} ranks of {size}, cold")
        cache, log = (demo.FOLDER / f"cache-ranks-{side}").resolve(), demo.FOLDER / f"ranks-{side}.log"
        counts[side] = ranks.count(demo.FOLDER / size, cache, log, str(int(side == "ours")), progress.listen)
        progress.done()
    return counts


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    default = ("n8", "n70") if shutil.which("nvidia-smi") else ("llama8", "llama80")
    parser.add_argument("sizes", nargs="*", choices=sorted(SIZES), metavar="SIZE", help=f"default: {' '.join(default)}")
    parser.add_argument(
        "--starts", nargs="+", choices=STARTS + MORE, default=STARTS, metavar="START", help="also: " + ", ".join(MORE)
    )
    parser.add_argument("--ranks", action="store_true", help="also start two ranks; needs two cores or two GPUs")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures to this file too")
    args = parser.parse_args()
    console = Console() if sys.stdout.isatty() else Console(width=130)
    with demo.running(Path(".demo") / "starts", console) as progress:
        demo.read_ahead(progress)
        measured = {}
        for size in args.sizes or default:
            measured[size] = measure(size, demo.make_model(progress, size), args.starts, progress)
        counts = count_ranks(next(iter(measured)), progress) if args.ranks else {}
    for size, found in measured.items():
        console.print(start_table(size, found))
    made, plugin = rows(measured, counts), plugin_seconds()
    console.print(row_table(made))
    for side, count in counts.items():
        more = "; what depends on the rank is compiled on each" if side == "ours" and count.total > count.needed else ""
        console.print(f"{side}: two ranks compiled {' + '.join(map(str, count.ranks))}, one has {count.needed}{more}")
    console.print(f"loading the plugin: {plugin * 1000:.0f} ms a process")
    console.print(machine())
    if args.json:
        runs = {
            each.result.run.title: each.result.phases
            | {"kernels": each.kernels, "first_request": each.result.first, "requests": each.result.requests}
            for found in measured.values()
            for each in found.values()
        }
        data = {"date": time.strftime("%Y-%m-%d"), "machine": machine(), "runs": runs, "plugin_seconds": plugin}
        data |= {"table": [asdict(row) for row in made], "ranks": {side: asdict(c) for side, c in counts.items()}}
        args.json.write_text(json.dumps(data, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
