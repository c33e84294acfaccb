"""Test and demo models, made on the spot: no model hub is ever asked.

Every model has a real byte-level BPE tokenizer trained here and seeded weights written as safetensors, so that vLLM's
real loading code runs.  The weights are drawn wide enough that greedy tokens vary from step to step: vLLM's own
``--load-format dummy`` weights repeat one token, which hides errors.
"""

from __future__ import annotations

import argparse
import pydoc_data.topics
from pathlib import Path
from typing import Any

VOCAB = 1024
CHAT_TEMPLATE = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)

# The models that benchmarks name.
SIZES: dict[str, dict[str, int]] = {
    "llama8": dict(hidden_size=256, num_hidden_layers=8, num_attention_heads=8, num_key_value_heads=2),
    "llama16": dict(hidden_size=256, num_hidden_layers=16, num_attention_heads=8, num_key_value_heads=2),
    "llama80": dict(hidden_size=256, num_hidden_layers=80, num_attention_heads=8, num_key_value_heads=2),
    # The depth of Llama-70B, narrow: for GPUs.
    "n8": dict(hidden_size=1024, num_hidden_layers=8, num_attention_heads=8, num_key_value_heads=8, head_dim=128),
    "n70": dict(hidden_size=1024, num_hidden_layers=80, num_attention_heads=8, num_key_value_heads=8, head_dim=128),
}


def train_tokenizer(folder: Path) -> None:
    """Train a byte-level BPE tokenizer of `VOCAB` entries on Python's own manual and save it in `folder`."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(pydoc_data.topics.topics.values(), trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")
    fast.chat_template = CHAT_TEMPLATE
    fast.save_pretrained(folder)


def make(folder: Path, config: Any, *, dtype: str = "float32", seed: int = 0) -> Path:
    """Write a complete model folder for a transformers `config` and return it; an existing one is kept.

    `dtype` is "float32" or "bfloat16".  In float32 every way of compiling a model gives the same greedy tokens and
    logprobs within 1e-4, so tests use it.  In bfloat16 logits are rounded to 1/32 or coarser and exact ties are common;
    `_settle` keeps the top two tokens apart, so that greedy tokens agree there too.
    """
    if (folder / "model.safetensors").exists():
        return folder
    import torch
    from transformers import AutoModel, AutoModelForCausalLM

    folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(seed)
    encoder = config.model_type in ("bert", "roberta")
    model = (AutoModel if encoder else AutoModelForCausalLM).from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() >= 2:
                parameter.normal_(0.0, 1.5 / parameter.shape[-1] ** 0.5)
        if dtype == "bfloat16":
            _settle(model)
    train_tokenizer(folder)
    model.config.dtype = getattr(torch, dtype)
    model.to(model.config.dtype).save_pretrained(folder, max_shard_size="50GB")
    return folder


def _settle(model: Any) -> None:
    """Let the embedding outweigh the layers, and the head prefer a fixed permutation of the token just seen.

    Greedy tokens then walk through the vocabulary, about one in thirty decided by the context, with the two best logits
    at least 1/8 apart: measured with vLLM 0.32.0 on Llamas of 8 and 16 layers, 12 prompts of 32 tokens, where eager,
    stock and piecewise compilation agree on every token.  Needs an untied head.
    """
    import torch

    embedding, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    embedding.normal_(0.0, 1.0)
    for name, parameter in model.named_parameters():
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            parameter.mul_((8 / model.config.num_hidden_layers) ** 0.7 / 3)
    order = torch.randperm(len(head))
    head[order] = 3.0 / head.shape[-1] ** 0.5 * (torch.randn_like(head) + 1.4 * embedding)


def llama(folder: Path, size: str = "llama8", *, dtype: str = "float32", seed: int = 0, **overrides: Any) -> Path:
    """A Llama of one of `SIZES` in `folder`; `overrides` go to transformers' `LlamaConfig`."""
    from transformers import LlamaConfig

    values = SIZES[size] | dict(
        vocab_size=VOCAB,
        intermediate_size=4 * SIZES[size]["hidden_size"],
        max_position_embeddings=2048,
        bos_token_id=0,
        eos_token_id=1,
        tie_word_embeddings=False,
        architectures=["LlamaForCausalLM"],
    )
    return make(folder, LlamaConfig(**(values | overrides)), dtype=dtype, seed=seed)


def main() -> None:
    parser = argparse.ArgumentParser(description="make a model folder")
    parser.add_argument("size", choices=sorted(SIZES))
    parser.add_argument("folder", type=Path)
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    args = parser.parse_args()
    print(llama(args.folder, args.size, dtype=args.dtype))


if __name__ == "__main__":
    main()
