"""One start of the engine, timed as ``vllm bench startup`` times it; the arguments are OUT and those of ``vllm serve``.

OUT becomes the JSON that vLLM 0.32.0's own function makes (`vllm/benchmarks/startup.py: run_startup_in_subprocess`):
"total_startup_time", from after the imports until `vllm.LLM` is there, and "compilation_time" and
"encoder_compilation_time", vLLM's figures for torch.compile.  As there, the engine is in the same process.

The command itself is not run: it makes all cold starts before all warm ones, while here stock and ours take turns.
"""

from __future__ import annotations

import json
import os
import queue
import sys
from pathlib import Path
from typing import Any


def main() -> None:
    out, arguments = Path(sys.argv[1]), sys.argv[2:]
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # as the command sets it, for the figures of torch.compile
    from vllm.benchmarks.startup import run_startup_in_subprocess
    from vllm.engine.arg_utils import EngineArgs

    from vllm_compile_ext.cli.warm_start import parse

    said: queue.Queue[Any] = queue.Queue()  # it wants no more than `put`
    run_startup_in_subprocess(EngineArgs.from_cli_args(parse(arguments)), said)
    figures = said.get()
    if figures is None:
        sys.exit(f"ERROR the engine did not start: {said.get()}")
    out.write_text(json.dumps(figures))


# The engine's workers, where there are several, are spawned and import this module again.
if __name__ == "__main__":
    main()
