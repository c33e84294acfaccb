"""On a GPU: what ``VLLM_ENABLE_STARTUP_PLAN=1`` remembers beside graphs on demand is not used without them, nor the
other way round."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests import process

pytestmark = [pytest.mark.gpu, pytest.mark.engine]

CODE = """
    import os
    from tests.gpu.engines import make, start

    def plan(llm):
        '''The bytes of the KV cache, and the plans there are.'''
        worker = llm.llm_engine.model_executor.driver_worker.worker
        plans = os.listdir(os.path.join(os.environ["VLLM_CACHE_ROOT"], "startup_plan"))
        return {"bytes": worker.cache_config.kv_cache_memory_bytes, "plans": sorted(plans)}

    if __name__ == "__main__":  # not a process that vLLM spawns
        make("n8")
        os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_ENABLE_STARTUP_PLAN": "1"}
        # "eager" is stock's capture: what a start without the plugin does, and remembers.
        report([start(plan, policy) for policy in ("lazy", "eager", "lazy", "eager")])
"""


def test_a_plan_is_used_only_by_starts_of_its_kind(tmp_path: Path) -> None:
    outcome = process.run(CODE, folder=tmp_path)
    assert outcome.code == 0, outcome.output[-5000:]
    assert not any(each["error"] for each in outcome.value), outcome.value
    lazy, eager, lazy_again, eager_again = (each["value"] for each in outcome.value)
    assert (lazy["bytes"], eager["bytes"]) == (None, None)
    assert [len(each["plans"]) for each in (lazy, eager, eager_again)] == [1, 2, 2]
    (of_lazy,) = lazy["plans"]
    assert of_lazy.endswith("_on_demand.json")
    assert None not in (lazy_again["bytes"], eager_again["bytes"])
    assert lazy_again["bytes"] != eager_again["bytes"]
