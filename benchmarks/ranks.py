"""How many graphs Inductor compiles on each of two tensor-parallel ranks: ``python -m benchmarks.ranks MODEL OUT``.

Starts one engine of two ranks on this machine and writes a JSON list to OUT, one number a rank.  `count` runs it, for
stock and for ours.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.serve import MEMORY_SHARE, environment
from vllm_compile_ext.cli.program import Line, Program

RANKS = 2
DISTINCT = re.compile(r"pieces to compile, (\d+) of them distinct")
# One core a rank on CPU; the engine's workers in processes of their own, which take the function below by pickle.
ENV = {
    "VLLM_CPU_OMP_THREADS_BIND": "0|1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "1",
    "VLLM_ALLOW_INSECURE_SERIALIZATION": "1",
    "VLLM_LOGGING_LEVEL": "INFO",
}


@dataclass(frozen=True)
class Count:
    """ranks: the graphs that each rank compiled; needed: how many a rank alone would compile."""

    ranks: list[int]
    needed: int

    @property
    def total(self) -> int:
        return sum(self.ranks)

    @property
    def ratio(self) -> float:
        return self.total / self.needed if self.needed else float("nan")


def count(model: Path, cache: Path, log: Path, switch: str, listen: Callable[[Line], None]) -> Count:
    """Start two ranks on the cache folder `cache`; `switch` is VLLM_COMPILE_EXT.  Raises `ProgramError`."""
    out = log.with_suffix(".json")
    out.unlink(missing_ok=True)
    env = environment(cache, ENV | {"VLLM_COMPILE_EXT": switch})
    command = [sys.executable, "-m", "benchmarks.ranks", str(model), str(out)]
    with Program(command, env, log=log, listen=listen) as program:
        status = program.wait()
    if status or not out.exists():
        raise program.error(f"an engine of {RANKS} ranks ended with status {status}")
    ranks = json.loads(out.read_text())
    # Ours says how many pieces a rank has; a stock rank compiles all of its own.
    distinct = [int(match[1]) for line in program.lines if (match := DISTINCT.search(line.text))]
    return Count(ranks, max(distinct, default=max(ranks)))


def compiled(worker: Any) -> int:
    """Graphs for which Inductor made code in this process (torch 2.13.0, `GraphLowering.codegen` in its timings)."""
    from torch._dynamo.utils import compilation_time_metrics

    return len(compilation_time_metrics.get("GraphLowering.codegen", ()))


def main() -> None:
    from vllm import LLM

    model, out = sys.argv[1:]
    llm = LLM(
        model=model,
        tensor_parallel_size=RANKS,
        distributed_executor_backend="mp",
        max_model_len=512,
        max_num_batched_tokens=512,
        gpu_memory_utilization=MEMORY_SHARE,
        disable_log_stats=True,
    )
    from benchmarks.ranks import compiled  # by its module's name, which is "__main__" here

    Path(out).write_text(json.dumps(llm.collective_rpc(compiled)))


if __name__ == "__main__":
    main()
