"""Speed with ``VLLM_COMPILE_CUSTOM_OPS=auto``, and with the ops that vLLM chooses: ``python -m benchmarks.custom_ops``.

Measures the model's ops, then starts servers of both kinds in turn on one cache, each kind `TURNS` times.  Tokens/s are
those of `benchmarks.levels`, the best of a kind's servers.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from pathlib import Path

from rich.console import Console
from rich.table import Table

from benchmarks import demo, levels
from benchmarks.models import SIZES
from benchmarks.serve import environment
from vllm_compile_ext.cli.bench.figures import machine

TURNS = 3
KINDS = ("stock", "auto")  # values of VLLM_COMPILE_CUSTOM_OPS


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    default = "n70" if shutil.which("nvidia-smi") else "llama16"
    parser.add_argument("size", nargs="?", choices=sorted(SIZES), default=default, metavar="SIZE")
    parser.add_argument("--eager", action="store_true", help="measure and serve with --enforce-eager")
    args = parser.parse_args()
    console = Console() if sys.stdout.isatty() else Console(width=130)
    options = ("--enforce-eager",) if args.eager else ()
    found: dict[str, list[demo.Result]] = {kind: [] for kind in KINDS}
    with demo.running(Path(".demo") / "custom_ops", console) as progress:
        demo.read_ahead(progress)
        model = demo.make_model(progress, args.size)
        command = [sys.executable, "-m", "vllm_compile_ext.cli", "ops", str(model), *demo.ARGS, *options, "--measure"]
        cache = (demo.FOLDER / "cache").resolve()
        demo.call(progress, "measuring its ops", command, "ops.log", **environment(cache, {}))
        for turn in range(TURNS):
            for kind in KINDS:
                run, env = demo.Run(f"{kind} {turn}", "1", "cache", options), {"VLLM_COMPILE_CUSTOM_OPS": kind}
                number = f"{turn + 1}/{TURNS}"
                found[kind].append(demo.measure(run, number, model, progress, env, levels.rate))
    console.print((demo.FOLDER / "ops.log").read_text(), markup=False, soft_wrap=True)
    table = Table(title=f"vllm serve, {args.size}{' --enforce-eager' * args.eager}: tokens/s", title_justify="left")
    for name in ("custom ops", *(f"server {turn + 1}" for turn in range(TURNS)), "best", "tokens as stock"):
        table.add_column(name, justify="right")
    best = {kind: max(each.tokens_per_second or 0.0 for each in results) for kind, results in found.items()}
    for kind, results in found.items():
        rates = [demo.cell(each.tokens_per_second) for each in results]
        same = demo.agreement(results[0].answers, found["stock"][0].answers)
        table.add_row(kind, *rates, demo.cell(best[kind], best["stock"] if kind == "auto" else None), same)
    console.print(table)
    console.print(machine())
    return 0


if __name__ == "__main__":
    sys.exit(main())
