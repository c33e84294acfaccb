"""On a GPU: graphs of encoders are stock's, also where the model itself has none."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests import process

pytestmark = [pytest.mark.gpu, pytest.mark.engine]

CODE = """
    import os
    from pathlib import Path
    from tests import forks
    from tests.gpu import vision_model
    from tests.gpu.engines import start
    from vllm import SamplingParams

    def answer(llm):
        '''Tokens of prompts with one image each, and how many images the encoder's graphs served.'''
        from PIL import Image
        images = [Image.effect_noise((56, 56), 30 * n).convert("RGB") for n in (1, 2, 3)]
        prompts = [{"prompt": vision_model.PROMPT, "multi_modal_data": {"image": image}} for image in images]
        answers = llm.generate(prompts, SamplingParams(temperature=0, max_tokens=12, ignore_eos=True), use_tqdm=False)
        state = llm.llm_engine.model_executor.driver_worker.worker.model_runner.model_state
        graphs = state.encoder_runner.cudagraph_manager
        hits = graphs.get_cumulative_stats()["graph_hits"] if graphs is not None else None
        return {"tokens": [list(each.outputs[0].token_ids) for each in answers], "hits": hits}

    if __name__ == "__main__":  # not a process that vLLM spawns
        made = forks.run(lambda: str(vision_model.make(Path("model"))))
        assert made.status == 0, made.output
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
        limits = {"max_model_len": 1024, "max_num_seqs": 16, "limit_mm_per_prompt": {"image": 8}}
        encoder = {
            "cudagraph_mm_encoder": True, "encoder_cudagraph_token_budgets": [4, 8, 16],
            "encoder_cudagraph_max_vision_items_per_batch": 4, "cudagraph_capture_sizes": [1, 2, 4, 8, 16],
        }
        none = encoder | {"mode": 0, "cudagraph_mode": "NONE"}
        del none["cudagraph_capture_sizes"]
        report({
            "eager": start(answer, enforce_eager=True, **limits),
            "none, stock": start(answer, "eager", compilation_config=none, **limits),
            "none": start(answer, compilation_config=none, **limits),
            "all": start(answer, compilation_config=encoder, **limits),
        })
"""


def test_an_encoder_has_stocks_graphs(tmp_path: Path) -> None:
    outcome = process.run(CODE, folder=tmp_path)
    assert outcome.code == 0, outcome.output[-5000:]
    ran: dict[str, Any] = outcome.value
    print({name: engine["lines"] for name, engine in ran.items()})
    assert not any(engine["error"] for engine in ran.values()), ran
    found = {name: engine["value"] for name, engine in ran.items()}
    assert len({tuple(tokens) for tokens in found["eager"]["tokens"]}) == 3  # the image counts
    assert found["eager"]["hits"] is None
    assert found["none"] == found["none, stock"]
    assert found["none"]["hits"] == found["all"]["hits"] == 3
    assert found["none"]["tokens"] == found["eager"]["tokens"]
