"""On a GPU: the process that asks an engine in another process leaves CUDA alone, so that vLLM forks the engine's."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests import process

pytestmark = [pytest.mark.gpu, pytest.mark.engine]

CODE = """
    import os
    from vllm_compile_ext import plugin
    plugin.register()
    from vllm import LLM

    if __name__ == "__main__":  # not a process that vLLM spawns
        import torch
        limits = dict(max_num_batched_tokens=512, max_model_len=512, gpu_memory_utilization=0.4)
        llm = LLM(model=sys.argv[1], dtype="bfloat16", disable_log_stats=True, **limits)
        report([torch.cuda.is_initialized(), os.environ.get("VLLM_WORKER_MULTIPROC_METHOD")])
"""


def test_cuda_is_not_started_in_the_front(llama2: Path, tmp_path: Path) -> None:
    outcome = process.run(CODE, str(llama2), folder=tmp_path, VLLM_ENABLE_V1_MULTIPROCESSING="1")
    assert outcome.code == 0, outcome.output[-5000:]
    assert outcome.value == [False, None]
