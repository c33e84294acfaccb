"""Many architectures and options: traced once a kind of layer, they answer as when every layer is traced."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from benchmarks import models
from tests import engine
from vllm_compile_ext import platforms

pytestmark = pytest.mark.engine

COMMON = {"vocab_size": models.VOCAB, "max_position_embeddings": 512, "bos_token_id": 0, "eos_token_id": 1}
COMMON |= {"hidden_size": 128, "num_attention_heads": 4, "num_hidden_layers": 4}
TEXT = {"num_key_value_heads": 2, "head_dim": 32, "intermediate_size": 256}
SHAPES = "dynamic_shapes_config"


class Family(NamedTuple):
    """A small model.

    kind: of the classes in transformers, the configuration without "Config" and the model.  values: of the
    configuration, beside `COMMON`.  layers: traced, and copied; the first decoder layer is called without a residual.
    """

    kind: tuple[str, str]
    values: dict[str, Any]
    layers: tuple[int, int]
    options: dict[str, Any] = {}  # noqa: RUF012


FAMILIES = {
    "llama": Family(("Llama", "LlamaForCausalLM"), TEXT, (2, 2)),
    "qwen3": Family(  # norms of query and key, tied embeddings
        ("Qwen3", "Qwen3ForCausalLM"),
        TEXT | {"tie_word_embeddings": True},
        (2, 2),
        {"compilation_config": {SHAPES: {"type": "unbacked"}}},
    ),
    "gemma3": Family(  # every third layer attends to everything, the others to a window
        ("Gemma3Text", "Gemma3ForCausalLM"),
        TEXT
        | {
            "num_hidden_layers": 6,
            "layer_types": ["sliding_attention", "sliding_attention", "full_attention"] * 2,
            "sliding_window": 16,
        },
        (2, 4),
    ),
    "mixtral": Family(  # a mixture of experts
        ("Mixtral", "MixtralForCausalLM"),
        {"num_key_value_heads": 2, "intermediate_size": 256, "num_local_experts": 4},
        (2, 2),
    ),
    "opt": Family(  # LayerNorm, learned positions
        ("OPT", "OPTForCausalLM"),
        {"ffn_dim": 256, "word_embed_proj_dim": 128},
        (1, 3),
        {"compilation_config": {SHAPES: {"type": "backed_size_oblivious"}}},
    ),
    "bert": Family(  # an encoder
        ("Bert", "BertModel"), {"intermediate_size": 256, "pad_token_id": 0}, (1, 3), {"embeds": True}
    ),
    "qwen3next": Family(  # linear attention, which takes the layer's name, a full one each fourth layer
        ("Qwen3Next", "Qwen3NextForCausalLM"),
        TEXT
        | {
            "num_hidden_layers": 8,
            "tie_word_embeddings": False,
            "moe_intermediate_size": 64,
            "shared_expert_intermediate_size": 64,
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "linear_num_value_heads": 2,
            "linear_num_key_heads": 1,
            "linear_key_head_dim": 128,
            "linear_value_head_dim": 128,
        },
        (5, 3),
        {"dtype": "bfloat16"},  # all that vLLM's kernels for linear attention take on CPU
    ),
    "deepseek": Family(  # a dense layer, then mixtures of experts; multi-head latent attention
        ("DeepseekV2", "DeepseekV2ForCausalLM"),
        {
            "num_key_value_heads": 4,
            "intermediate_size": 256,
            "moe_intermediate_size": 64,
            "first_k_dense_replace": 1,
            "n_shared_experts": 1,
            "n_routed_experts": 4,
            "num_experts_per_tok": 2,
            "n_group": 1,
            "topk_group": 1,
            "topk_method": "greedy",
            "q_lora_rank": None,
            "kv_lora_rank": 512,
            "qk_rope_head_dim": 64,
            "qk_nope_head_dim": 32,
            "v_head_dim": 32,
        },
        (2, 2),
        {"dtype": "bfloat16"} if "amx" in platforms.name() else {},  # all that AMX's kernels take
    ),
    "granite": Family(  # reads its configuration while it is traced
        ("Granite", "GraniteForCausalLM"),
        TEXT
        | {
            "tie_word_embeddings": False,
            "embedding_multiplier": 2.0,
            "residual_multiplier": 0.5,
            "logits_scaling": 2.0,
        },
        (2, 2),
        {"compilation_config": {"compile_sizes": [1, 8]}},
    ),
}


# test_start.py has a Llama.
@pytest.mark.parametrize("name", [name for name in FAMILIES if name != "llama"])
def test_same_answers_as_a_full_trace(name: str, tmp_path: Path) -> None:
    assert compare(name, tmp_path, FAMILIES[name].options, fork=True) == FAMILIES[name].layers


def compare(name: str, folder: Path, options: dict[str, Any], *, fork: bool = False) -> tuple[int, int]:
    """Start one family traced in full, once, and warm from another folder, and compare.

    Returns how many layers were traced, and copied.
    """
    import transformers

    (config, architecture), values = FAMILIES[name][:2]
    made = getattr(transformers, f"{config}Config")(architectures=[architecture], **(COMMON | values))
    model = models.make(folder / "model", made)
    full = engine.run(model, folder / "full", options | {"upstream": True}, fork=fork)
    once = engine.run(model, folder / "once", options, fork=fork)
    warm = engine.run(model.rename(folder / "elsewhere"), folder / "once", options, fork=fork)

    assert once.tokens == full.tokens == warm.tokens
    # The same kernels: the same bits.
    assert once.logprobs == full.logprobs == warm.logprobs
    assert once.vectors == full.vectors == warm.vectors
    assert once.tokens or once.vectors
    assert once.counters["num_compiled_artifacts_saved"] <= full.counters["num_compiled_artifacts_saved"]
    assert (warm.loaded, warm.compiled) == (1, 0)
    assert warm.counters["num_compiled_artifacts_loaded"] == once.counters["num_compiled_artifacts_saved"]

    assert full.output.lines("every layer is traced", "asked for by a test")
    assert not once.output.lines("every layer is traced")
    (line,) = once.output.lines("traced", "copied", "distinct")
    traced, copied, _, distinct = map(int, re.findall(r"\d+", line.partition("traced")[2])[:4])
    # Each piece for any number of tokens, and for each of the sizes.
    times = 1 + len(options.get("compilation_config", {}).get("compile_sizes", ()))
    assert once.compiled == times * distinct
    assert once.compiled <= full.compiled
    return traced, copied
