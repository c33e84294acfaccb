"""Speed with ``VLLM_COMPILE_CUSTOM_OPS=auto``, and with the ops that vLLM chooses: ``python -m benchmarks.custom_ops``.

Measures the model's ops, then starts a server of each kind on one cache, so that its code is there, and both once more,
side by side: tokens/s are those of `benchmarks.pairs`.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from pathlib import Path

from rich.console import Console
from rich.table import Table

from benchmarks import demo, pairs
from benchmarks.models import SIZES
from benchmarks.serve import environment
from vllm_compile_ext.cli.bench.figures import machine

KINDS = ("stock", "auto")  # values of VLLM_COMPILE_CUSTOM_OPS


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    default = "n70" if shutil.which("nvidia-smi") else "llama16"
    parser.add_argument("size", nargs="?", choices=sorted(SIZES), default=default, metavar="SIZE")
    parser.add_argument("--eager", action="store_true", help="measure and serve with --enforce-eager")
    args = parser.parse_args()
    console = Console() if sys.stdout.isatty() else Console(width=130)
    options = ("--enforce-eager",) if args.eager else ()
    runs = [demo.Run(kind, "1", "cache", options, (("VLLM_COMPILE_CUSTOM_OPS", kind),)) for kind in KINDS]
    with demo.running(Path(".demo") / "custom_ops", console) as progress:
        demo.read_ahead(progress)
        model = demo.make_model(progress, args.size)
        command = [sys.executable, "-m", "vllm_compile_ext.cli", "ops", str(model), *demo.ARGS, *options, "--measure"]
        cache = (demo.FOLDER / "cache").resolve()
        demo.call(progress, "measuring its ops", command, "ops.log", **environment(cache, {}))
        answers = [demo.measure(run, f"{n}/{len(runs)}", model, progress).answers for n, run in enumerate(runs, 1)]
        speeds = pairs.compare(model, runs, progress, "tokens/s")
    console.print((demo.FOLDER / "ops.log").read_text(), markup=False, soft_wrap=True)
    table = Table(title=f"vllm serve, {args.size}{' --enforce-eager' * args.eager}: tokens/s", title_justify="left")
    for name in (*KINDS, "auto to stock", "tokens as stock"):
        table.add_column(name, justify="right")
    table.add_row(*speeds.cells(), demo.agreement(*answers))
    console.print(table)
    console.print(machine())
    return 0


if __name__ == "__main__":
    sys.exit(main())
