"""Settings that keep stock's capture, or did, tried on demand: ``python -m tests.gpu.candidates [NAME ...]``.

For each a start with stock's capture and one with every row of `coverage.STOCK` lifted, on the same traffic.  A setting
that serves, gives stock's tokens and skips no shape can lose its row, and get a test in `test_cudagraphs.py` instead.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any, NamedTuple

from tests.integration.test_families import COMMON, FAMILIES, TEXT

WIDE = {"hidden_size": 512, "num_attention_heads": 8, "num_hidden_layers": 8}
DRAFT = {"num_speculative_tokens": 2}


class Candidate(NamedTuple):
    """family: of the model.  options: of the engine.  env: variables."""

    family: str
    options: dict[str, Any] = {}  # noqa: RUF012
    env: dict[str, str] = {}  # noqa: RUF012


CANDIDATES = {
    "breakable": Candidate("llama", env={"VLLM_USE_BREAKABLE_CUDAGRAPH": "1"}),
    "MLA": Candidate("deepseek"),
    "TRITON_MLA": Candidate("deepseek", {"attention_backend": "TRITON_MLA"}),
    "FLASHMLA": Candidate("deepseek", {"attention_backend": "FLASHMLA", "block_size": 64}),
    "linear attention": Candidate("qwen3next"),
    "FLASHINFER": Candidate("llama", {"attention_backend": "FLASHINFER"}),
    "FLEX_ATTENTION": Candidate("llama", {"attention_backend": "FLEX_ATTENTION"}),
    "ngram": Candidate("llama", {"speculative_config": DRAFT | {"method": "ngram", "prompt_lookup_max": 3}}),
    "draft model": Candidate("llama", {"speculative_config": DRAFT | {"model": "llama", "method": "draft_model"}}),
    "LoRA": Candidate("llama", {"enable_lora": True}),
    "cudagraph_mode=FULL": Candidate("llama", {"compilation_config": {"cudagraph_mode": "FULL"}}),
    "sleep_mode_offload_cudagraph": Candidate(
        "llama", {"enable_sleep_mode": True, "sleep_mode_offload_cudagraph": True}
    ),
    "pipeline parallel": Candidate("llama", {"pipeline_parallel_size": 2}),
    "data parallel experts": Candidate("mixtral", {"data_parallel_size": 2, "enable_expert_parallel": True}),
}


def make(family: str) -> None:
    """The model of `family`, in a folder of its name."""
    import transformers

    from benchmarks import models
    from tests import forks

    (config, architecture), values = FAMILIES[family][:2]
    heads = {"num_key_value_heads": 8, "head_dim": 64} if values.items() >= TEXT.items() else {}
    values = COMMON | values | WIDE | heads
    made = getattr(transformers, f"{config}Config")(architectures=[architecture], **values)
    ended = forks.run(lambda: str(models.make(Path(family), made, dtype="bfloat16")))
    assert ended.status == 0, ended.output


def tried(candidate: Candidate) -> dict[str, Any]:
    """What both starts of a candidate showed."""
    from tests.gpu import engines
    from vllm_compile_ext.cuda_graphs import coverage

    def stock(llm: Any) -> Any:
        return {"tokens": engines.traffic(llm), "why": coverage.stock_because(llm.llm_engine.vllm_config)}

    def on_demand(llm: Any) -> Any:
        tokens = [engines.traffic(llm) for _ in range(2)]
        return {"tokens": tokens, "graphs": llm.collective_rpc(engines.about)[0]}

    options = {"model": candidate.family, **candidate.options}
    if not Path(candidate.family).exists():
        make(candidate.family)
    os.environ.update(candidate.env)
    rows = coverage.STOCK
    try:
        one = engines.start(stock, "eager", **options)
        coverage.STOCK = ()  # type: ignore[assignment]
        other = engines.start(on_demand, **options)
    finally:
        coverage.STOCK = rows
        for name in candidate.env:
            del os.environ[name]
    found: dict[str, Any] = {"errors": [one["error"][-1500:], other["error"][-1500:]], "lines": other["lines"][-5:]}
    if one["value"] and other["value"]:
        expected = one["value"]["tokens"]
        found |= {
            "row": one["value"]["why"],
            "same": [sum(a == b for a, b in zip(got, expected, strict=True)) for got in other["value"]["tokens"]],
            "graphs": other["value"]["graphs"],
        }
    return found


if __name__ == "__main__":
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    for each in sys.argv[1:] or CANDIDATES:
        print(json.dumps({each: tried(CANDIDATES[each])}), flush=True)
