"""The ops of a model and their shapes, and what is measured of them, with vLLM's models.

`test_in_vllm` runs these in a fork of a process that has vLLM imported.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, MixtralConfig
from vllm.engine.arg_utils import EngineArgs
from vllm.model_executor.layers.activation import SiluAndMul

from tests import forks
from vllm_compile_ext.ops import measure, model

SIZES = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
}
COMMON = SIZES | {"num_hidden_layers": 3, "vocab_size": 512, "max_position_embeddings": 256}
MIXTRAL = COMMON | {"num_local_experts": 4, "architectures": ["MixtralForCausalLM"]}
LLAMA = COMMON | {"architectures": ["LlamaForCausalLM"], "dtype": "bfloat16"}


def find(made: Any, folder: Path, **options: Any) -> dict[str, list[tuple[int, str]]]:
    """Counts and shapes, by op."""
    made.save_pretrained(folder)

    def function() -> None:
        arguments = EngineArgs(model=str(folder), skip_tokenizer_init=True, max_model_len=256, **options)
        calls, problem = model.find(arguments.create_engine_config())
        assert problem is None, problem
        found: dict[str, list[tuple[int, str]]] = {}
        for call in calls:
            found.setdefault(call.op.name, []).append((call.count, call.shapes))
        return found  # type: ignore[return-value]

    ended = forks.run(function)
    assert ended.status == 0, ended.output
    return {name: [(count, shapes) for count, shapes in each] for name, each in ended.value.items()}


def test_shapes_are_those_of_a_rank(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_CPU_SIM_MULTI_NUMA", "1")
    norms = [(1, "[n, 64] bfloat16"), (6, "[n, 64] bfloat16, [n, 64] bfloat16")]
    assert find(LlamaConfig(**LLAMA), tmp_path) == {
        "rms_norm": norms,
        "rotary_embedding": [(3, "[n] int64, [n, 64] bfloat16, [n, 32] bfloat16")],
        "silu_and_mul": [(3, "[n, 256] bfloat16")],
    }
    assert find(LlamaConfig(**LLAMA), tmp_path, tensor_parallel_size=2) == {
        "rms_norm": norms,
        "rotary_embedding": [(3, "[n] int64, [n, 32] bfloat16, [n, 16] bfloat16")],
        "silu_and_mul": [(3, "[n, 128] bfloat16")],
    }


def test_experts_are_passed_over(tmp_path: Path) -> None:
    assert set(find(MixtralConfig(**MIXTRAL), tmp_path)) == {"rms_norm", "rotary_embedding"}


def silu() -> model.Call:
    with torch.device("meta"):
        op = SiluAndMul(compile_native=False)
    op.forward = op.forward  # as `model` has it noted
    return model.Call(op, ((model.Shape((model.TOKENS, 64), torch.bfloat16),), {}))


@pytest.fixture(autouse=True)
def configured() -> Any:
    from vllm.config import VllmConfig, set_current_vllm_config

    with set_current_vllm_config(VllmConfig()):
        yield


def test_a_measurement(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "SECONDS", 0.001)
    torch.set_num_threads(1)
    call = silu()
    monkeypatch.setattr(SiluAndMul, "wrong", lambda self, x: self.forward_native(x) + 1, raising=False)
    rows = measure.measure(call, "forward_cpu", 8, torch.device("cpu"), False)
    assert [row.tokens for row in rows] == list(measure.BATCHES)
    assert all(min(row.kernel, row.native, row.compiled) > 0 for row in rows)
    assert max(row.error for row in rows) < 0.01
    assert min(row.error for row in measure.measure(call, "wrong", 8, torch.device("cpu"), False)) > 0.01
