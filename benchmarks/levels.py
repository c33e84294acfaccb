"""Start time and speed of vLLM's four levels, stock and ours in one run: ``python -m benchmarks.levels llama16``.

For each level four servers, as in `benchmarks.warm`, on caches of their own, and then both once more, side by side:
tokens/s are those of `benchmarks.pairs`.  The tokens that are compared are those of single requests: what is in a batch
together may round differently.  What each level sets: ``vllm-compile-ext explain MODEL --levels``.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import time
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

from rich.console import Console
from rich.table import Table

from benchmarks import demo, pairs, warm
from benchmarks.models import SIZES
from vllm_compile_ext.cli.bench.figures import machine

LEVELS = (0, 1, 2, 3)


def table(size: str, measured: Mapping[int, tuple[warm.Starts, pairs.Speeds]]) -> Table:
    """A row for each level, and ours as a ratio to stock's start of the same kind."""
    grid = Table(title=f"vllm serve, {size}: seconds to ready, and ours as a ratio to stock's", title_justify="left")
    for name in ("level", *warm.STARTS, "stock, tokens/s", "ours, tokens/s", "ours to stock", "tokens as stock"):
        grid.add_column(name, justify="left" if name == "level" else "right")
    for level, (starts, speeds) in measured.items():
        done = {name: start.result for name, start in starts.items()}
        ready = {name: result.phases["ready"] for name, result in done.items()}
        cells = [
            demo.cell(ready[name], ready[name.replace("ours", "stock")] if name.startswith("ours") else None)
            for name in warm.STARTS
        ]
        same = [
            demo.agreement(done[f"ours {kind}"].answers, done[f"stock {kind}"].answers) for kind in ("cold", "warm")
        ]
        grid.add_row(f"-O{level}", *cells, *speeds.cells(), ", ".join(dict.fromkeys(same)))
    return grid


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    default = "n70" if shutil.which("nvidia-smi") else "llama16"
    parser.add_argument(
        "size", nargs="?", choices=sorted(SIZES), default=default, metavar="SIZE", help=f"default: {default}"
    )
    parser.add_argument("--levels", nargs="+", type=int, choices=LEVELS, default=LEVELS, metavar="N")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures to this file too")
    args = parser.parse_args()
    console = Console() if sys.stdout.isatty() else Console(width=130)
    measured = {}
    with demo.running(Path(".demo") / "levels", console) as progress:
        demo.read_ahead(progress)
        model = demo.make_model(progress, args.size)
        for level in args.levels:
            name, option = f"{args.size}-O{level}", (f"-O{level}",)
            starts = warm.measure(name, model, warm.STARTS, progress, option)
            both = [
                demo.Run(f"{side} -O{level}", str(int(side == "ours")), f"cache-{name}-{side}", option)
                for side in warm.SIDES
            ]
            measured[level] = starts, pairs.compare(model, both, progress, f"-O{level}")
    console.print(table(args.size, measured))
    console.print(machine())
    if args.json:
        runs = {
            start.result.run.title: start.result.phases for starts, _ in measured.values() for start in starts.values()
        }
        speeds = {f"-O{level}": asdict(speeds) for level, (_, speeds) in measured.items()}
        data = {"date": time.strftime("%Y-%m-%d"), "machine": machine(), "runs": runs, "tokens_per_second": speeds}
        args.json.write_text(json.dumps(data, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
