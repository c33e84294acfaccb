"""Small models of many architectures, for tests of what is the same in two layers and what is not."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.models import VOCAB, llama, make

_TEXT = {"vocab_size": VOCAB, "max_position_embeddings": 512, "bos_token_id": 0, "eos_token_id": 1}
_HEADS = {"hidden_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32}


def _config(name: str, architecture: str, **values: Any) -> Any:
    import transformers

    return getattr(transformers, name)(architectures=[architecture], **(_TEXT | values))


def _qwen3(folder: Path) -> Path:  # norms of query and key, tied embeddings
    values = _HEADS | {"num_hidden_layers": 5, "intermediate_size": 256, "tie_word_embeddings": True}
    return make(folder, _config("Qwen3Config", "Qwen3ForCausalLM", **values))


def _gemma3(folder: Path) -> Path:  # every third layer attends to everything, the others to a window of 16
    values = _HEADS | {"num_hidden_layers": 6, "intermediate_size": 256, "sliding_window": 16}
    kinds = ["sliding_attention", "sliding_attention", "full_attention"] * 2
    return make(folder, _config("Gemma3TextConfig", "Gemma3ForCausalLM", layer_types=kinds, **values))


def _mixtral(folder: Path) -> Path:  # a mixture of experts
    heads = {k: v for k, v in _HEADS.items() if k != "head_dim"}
    values = heads | {"num_hidden_layers": 5, "intermediate_size": 256, "num_local_experts": 4}
    return make(folder, _config("MixtralConfig", "MixtralForCausalLM", **values))


def _opt(folder: Path) -> Path:  # LayerNorm, learned positions
    values = {"hidden_size": 128, "num_hidden_layers": 5, "num_attention_heads": 4, "ffn_dim": 256}
    return make(folder, _config("OPTConfig", "OPTForCausalLM", word_embed_proj_dim=128, **values))


def _bert(folder: Path) -> Path:  # an encoder that embeds
    values = {"hidden_size": 128, "num_hidden_layers": 5, "num_attention_heads": 4, "intermediate_size": 256}
    return make(folder, _config("BertConfig", "BertModel", pad_token_id=0, **values))


def _qwen3next(folder: Path) -> Path:  # linear attention, which takes the layer's name, a full one each fourth layer
    values = _HEADS | {"num_hidden_layers": 8, "intermediate_size": 256, "tie_word_embeddings": False}
    values |= {"moe_intermediate_size": 64, "shared_expert_intermediate_size": 64, "num_experts": 4}
    values |= {"linear_num_value_heads": 2, "linear_num_key_heads": 1}
    values |= {"linear_key_head_dim": 128, "linear_value_head_dim": 128, "num_experts_per_tok": 2}
    return make(folder, _config("Qwen3NextConfig", "Qwen3NextForCausalLM", **values))


def _deepseek(folder: Path) -> Path:  # a dense layer, then mixtures of experts; multi-head latent attention
    values = {"hidden_size": 128, "num_hidden_layers": 5, "intermediate_size": 256, "moe_intermediate_size": 64}
    values |= {"num_attention_heads": 4, "num_key_value_heads": 4, "first_k_dense_replace": 1, "n_shared_experts": 1}
    values |= {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1, "topk_method": "greedy"}
    values |= {
        "q_lora_rank": None,
        "kv_lora_rank": 512,
        "qk_rope_head_dim": 64,
        "qk_nope_head_dim": 32,
        "v_head_dim": 32,
    }
    return make(folder, _config("DeepseekV2Config", "DeepseekV2ForCausalLM", **values))


def _granite(folder: Path) -> Path:  # reads its configuration while it is traced
    values = _HEADS | {"num_hidden_layers": 5, "intermediate_size": 256, "tie_word_embeddings": False}
    values |= {"embedding_multiplier": 2.0, "residual_multiplier": 0.5, "logits_scaling": 2.0}
    return make(folder, _config("GraniteConfig", "GraniteForCausalLM", **values))


def _llama(layers: int) -> Callable[[Path], Path]:
    return lambda folder: llama(folder, "llama8", num_hidden_layers=layers)


FAMILIES: dict[str, Callable[[Path], Path]] = {
    "llama": _llama(6),
    "llama of 1 layer": _llama(1),
    "llama of 2 layers": _llama(2),
    "qwen3": _qwen3,
    "gemma3": _gemma3,
    "mixtral": _mixtral,
    "opt": _opt,
    "bert": _bert,
    "qwen3next": _qwen3next,
    "deepseek": _deepseek,
    "granite": _granite,
}
