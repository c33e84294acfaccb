"""What tests of CUDA graphs do with engines.  Imported by processes of `tests/process.py` only: it imports vLLM, and
each start is a fork of the process.
"""

from __future__ import annotations

import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

from vllm_compile_ext import plugin

plugin.register()

import vllm.model_executor.models.llama  # noqa: E402
import vllm.v1.engine.core  # noqa: E402
import vllm.v1.engine.llm_engine  # noqa: E402
import vllm.v1.worker.gpu.model_runner  # noqa: E402
import vllm.v1.worker.gpu_worker  # noqa: E402, F401
from vllm import LLM, SamplingParams, TokensPrompt  # noqa: E402
from vllm.compilation import monitor  # noqa: E402

from benchmarks import models  # noqa: E402
from tests import forks  # noqa: E402

os.environ["VLLM_CACHE_ROOT"] = str(Path("root").absolute())
os.environ["VLLM_ALLOW_INSECURE_SERIALIZATION"] = "1"  # for collective_rpc of a function


def make(name: str) -> None:
    """A model with seeded weights in the folder "model"."""
    made = forks.run(lambda: str(models.llama(Path("model"), name, dtype="bfloat16")))
    assert made.status == 0, made.output


def start(then: Callable[[Any], Any], policy: str = "lazy", **options: Any) -> dict[str, Any]:
    """``then(llm)`` of an engine that captures graphs by `policy`: its "value"; the "lines" that speak of graphs; the
    "error" of an engine that ended early.
    """

    def function() -> Any:
        os.environ["VLLM_COMPILE_CUDAGRAPHS"] = policy
        limits = {"max_num_batched_tokens": 2048, "max_model_len": 512, "gpu_memory_utilization": 0.4}
        return then(LLM(**({"model": "model", "dtype": "bfloat16", "disable_log_stats": True} | limits | options)))

    ended = forks.run(function)
    error = ended.output[-5000:] if ended.status else ""
    return {"value": ended.value, "lines": ended.lines("CUDA graph"), "error": error}


def traffic(llm: Any, temperature: float = 0.0) -> list[list[int]]:
    """The tokens of 200 prompts of mixed lengths that arrive at random steps, the same for every engine."""
    r = random.Random(1)
    prompts = [[r.randrange(3, 1000) for _ in range(r.randrange(4, 300))] for _ in range(200)]
    at = sorted(r.randrange(150) for _ in prompts)
    lengths = [r.randrange(4, 40) for _ in prompts]
    done: dict[str, list[int]] = {}
    step = sent = 0
    llm.reset_prefix_cache()
    while sent < len(prompts) or llm.llm_engine.has_unfinished_requests():
        while sent < len(prompts) and at[sent] <= step:
            params = SamplingParams(
                temperature=temperature, seed=sent, max_tokens=lengths[sent], ignore_eos=True, logprobs=1
            )
            llm.llm_engine.add_request(f"{sent:03d}", TokensPrompt(prompt_token_ids=prompts[sent]), params)
            sent += 1
        # Without a request, a client of another process would wait for an output.
        for output in llm.llm_engine.step() if llm.llm_engine.has_unfinished_requests() else ():
            if output.finished:
                done[output.request_id] = list(output.outputs[0].token_ids)
        step += 1
    return [done[name] for name in sorted(done)]


def about(worker: Any) -> dict[str, Any]:
    """A worker's graphs in numbers."""
    session = worker.model_runner.cudagraph_manager.session
    return {
        **{what: dict(by_kind) for what, by_kind in session.counts.items()},
        "seconds": max(session.seconds, default=0),
        "shapes": len(session.policy.shapes),
        "left": len(session.policy.left),
        "asked": sum(session.policy.asked.values()),
        "reasons": sorted(set(session.policy.barred.values())),
        "held": session.budget.held,
        "limit": session.budget.limit,
        "source": session.budget.source,
        "guard": monitor.cudagraph_capturing_enabled,
    }
