"""Two tensor-parallel ranks on one machine: a piece that both have is compiled by one of them."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest

from tests import process

pytestmark = [
    pytest.mark.engine,
    pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="vLLM binds each rank to cores of its own"),
]

CODE = """
    if __name__ == "__main__":
        from vllm import LLM, SamplingParams
        limits = dict(max_num_batched_tokens=256, max_model_len=256, gpu_memory_utilization=0.4)
        size = int(sys.argv[2])
        parallel = dict(tensor_parallel_size=size, distributed_executor_backend="mp" if size > 1 else None)
        llm = LLM(model=sys.argv[1], dtype="float32", disable_log_stats=True, **limits, **parallel)
        params = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
        outputs = llm.generate(["The import statement", "def f(x):", "x"], params, use_tqdm=False)
        report([list(o.outputs[0].token_ids) for o in outputs])
"""


def test_two_ranks_compile_a_common_piece_once(llama2: Path, tmp_path: Path) -> None:
    env = {"VLLM_ENABLE_V1_MULTIPROCESSING": "1", "VLLM_CACHE_ROOT": str(tmp_path / "root")}
    bound = env | {"VLLM_CPU_OMP_THREADS_BIND": "0|1"}
    cold = process.run(CODE, str(llama2), "2", folder=tmp_path / "cold", **bound)
    assert cold.code == 0, cold.output[-5000:]
    said = re.findall(r"compiled (\d+) pieces with \d+ workers, loaded (\d+) that another", cold.output)
    assert len(said) == 2
    # Three distinct pieces a rank; the first holds the rank's part of the vocabulary and is another one in each.
    assert sum(int(compiled) for compiled, _ in said) == 4
    assert sum(int(loaded) for _, loaded in said) == 2

    warm = process.run(CODE, str(llama2), "2", folder=tmp_path / "warm", **bound)
    assert warm.code == 0, warm.output[-5000:]
    assert len(warm.lines("loaded compiled code")) == 2
    assert not warm.lines("cache miss")
    one = process.run(CODE, str(llama2), "1", folder=tmp_path / "one", **env)
    assert cold.value == warm.value == one.value
