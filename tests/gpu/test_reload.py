"""On a GPU, with CUDA graphs: a warm start, other weights, and weights that were given up while sleeping."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests import process

pytestmark = [pytest.mark.gpu, pytest.mark.engine]

CODE = """
    import os
    from pathlib import Path
    from vllm_compile_ext import plugin
    plugin.register()
    from tests import forks
    from vllm import LLM, SamplingParams
    from vllm.compilation.counter import compilation_counter as counter
    import vllm.v1.engine.llm_engine, vllm.model_executor.models.llama
    first, second = sys.argv[1:3]
    os.environ["VLLM_CACHE_ROOT"] = str(Path("root").absolute())

    def ask(llm):
        llm.reset_prefix_cache()
        params = SamplingParams(temperature=0, max_tokens=16, logprobs=1, ignore_eos=True)
        prompts = ["The import statement", "def f(x):", "x"]
        outputs = [o.outputs[0] for o in llm.generate(prompts, params, use_tqdm=False)]
        return [[list(o.token_ids), [p[t].logprob for p, t in zip(o.logprobs, o.token_ids)]] for o in outputs]

    def start(model, then=lambda llm: []):
        def function():
            limits = dict(max_num_batched_tokens=512, max_model_len=512, gpu_memory_utilization=0.4)
            llm = LLM(model=model, dtype="bfloat16", disable_log_stats=True, enable_sleep_mode=True, **limits)
            return [ask(llm), counter.num_aot_artifacts_loaded, then(llm)]
        ended = forks.run(function)
        assert ended.status == 0, ended.output[-3000:]
        return ended.value

    def reload(llm):
        answers = []
        for path in (second, first):
            llm.collective_rpc("reload_weights", kwargs={"weights_path": path})
            answers.append(ask(llm))
        return answers

    def sleep(llm):
        llm.sleep(level=2)
        llm.wake_up(tags=["weights"])
        llm.collective_rpc("reload_weights")
        llm.wake_up(tags=["kv_cache"])
        return ask(llm)

    out = {"cold": start(first), "reloaded": start(first, reload), "second": start(second)}
    report(out | {"slept": start(first, sleep)})
"""


@pytest.fixture(scope="module")
def ran(llama: Path, other_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    outcome = process.run(CODE, str(llama), str(other_llama), folder=tmp_path_factory.mktemp("reload"))
    assert outcome.code == 0, outcome.output[-5000:]
    return outcome.value


def test_a_warm_start_answers_as_the_cold_one(ran: dict[str, Any]) -> None:
    cold, loaded, _ = ran["cold"]
    assert loaded == 0
    for name in ("reloaded", "slept"):
        assert ran[name][:2] == [cold, 1]


def test_reloaded_weights_are_used(ran: dict[str, Any]) -> None:
    cold, second = ran["cold"][0], ran["second"][0]
    assert cold != second
    assert ran["reloaded"][2] == [second, cold]


def test_after_sleeping_at_level_2(ran: dict[str, Any]) -> None:
    assert ran["slept"][2] == ran["cold"][0]
