"""Small models of many architectures, for tests of what is the same in two layers and what is not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from benchmarks.models import VOCAB, make

COMMON = {"vocab_size": VOCAB, "max_position_embeddings": 512, "bos_token_id": 0, "eos_token_id": 1}
COMMON |= {"hidden_size": 128, "num_attention_heads": 4, "num_hidden_layers": 4}
TEXT = {"num_key_value_heads": 2, "head_dim": 32, "intermediate_size": 256}

# Of each family its configuration in transformers, its architecture, and what its configuration holds beside COMMON.
FAMILIES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", "LlamaForCausalLM", TEXT),
    # Norms of query and key, tied embeddings.
    "qwen3": ("Qwen3Config", "Qwen3ForCausalLM", TEXT | {"tie_word_embeddings": True}),
    # Every third layer attends to everything, the others to a window of 16.
    "gemma3": (
        "Gemma3TextConfig",
        "Gemma3ForCausalLM",
        TEXT
        | {
            "num_hidden_layers": 6,
            "layer_types": ["sliding_attention", "sliding_attention", "full_attention"] * 2,
            "sliding_window": 16,
        },
    ),
    # A mixture of experts.
    "mixtral": (
        "MixtralConfig",
        "MixtralForCausalLM",
        {"num_key_value_heads": 2, "intermediate_size": 256, "num_local_experts": 4},
    ),
    # LayerNorm, learned positions.
    "opt": ("OPTConfig", "OPTForCausalLM", {"ffn_dim": 256, "word_embed_proj_dim": 128}),
    # An encoder that embeds.
    "bert": ("BertConfig", "BertModel", {"intermediate_size": 256, "pad_token_id": 0}),
    # Linear attention, which takes the layer's name, a full one each fourth layer.
    "qwen3next": (
        "Qwen3NextConfig",
        "Qwen3NextForCausalLM",
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
    ),
    # A dense layer, then mixtures of experts; multi-head latent attention.
    "deepseek": (
        "DeepseekV2Config",
        "DeepseekV2ForCausalLM",
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
    ),
    # Reads its configuration while it is traced.
    "granite": (
        "GraniteConfig",
        "GraniteForCausalLM",
        TEXT
        | {
            "tie_word_embeddings": False,
            "embedding_multiplier": 2.0,
            "residual_multiplier": 0.5,
            "logits_scaling": 2.0,
        },
    ),
}


def family(name: str, folder: Path) -> Path:
    """A model of one of `FAMILIES` with seeded weights, in `folder`."""
    import transformers

    config, architecture, values = FAMILIES[name]
    return make(folder, getattr(transformers, config)(architectures=[architecture], **(COMMON | values)))
