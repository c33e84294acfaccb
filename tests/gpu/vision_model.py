"""A small Idefics3 with seeded weights: of the models whose encoders vLLM captures graphs of, the one of fewest files.

Every image is 4 tokens.  Its image processor needs no torchvision.
"""

from __future__ import annotations

import json
from pathlib import Path

PROMPT = "<s>User:<image>What is in this picture?\nAssistant:"
_SIZE, _PATCH, _SCALE = 56, 14, 2
_SPECIAL = ["<s>", "</s>", "<image>", "<fake_token_around_image>", "<global-img>", "<end_of_utterance>"]
_SPECIAL += [f"<row_{row}_col_{column}>" for row in range(1, 7) for column in range(1, 7)]
_PROCESSOR = {
    "processor_class": "Idefics3Processor",
    "image_processor_type": "Idefics3ImageProcessor",
    "do_resize": True,
    "size": {"longest_edge": _SIZE},
    "do_image_splitting": False,  # an image of any size is one tile
    "max_image_size": {"longest_edge": _SIZE},
    "do_normalize": True,
    "image_mean": [0.5] * 3,
    "image_std": [0.5] * 3,
    "do_pad": True,
}


def make(folder: Path) -> Path:
    """Write configuration, tokenizer and bf16 weights of normal distribution with scale 1.5 / sqrt(fan-in)."""
    import pydoc_data.topics

    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import Idefics3Config, Idefics3ForConditionalGeneration, LlamaConfig, PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=1024, special_tokens=_SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(pydoc_data.topics.topics.values(), trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="</s>", model_max_length=2048
    )
    fast.save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps(_PROCESSOR))
    tokens = (_SIZE // _PATCH // _SCALE) ** 2
    (folder / "processor_config.json").write_text(
        json.dumps({"processor_class": "Idefics3Processor", "image_seq_len": tokens})
    )
    layers = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 2}
    ids = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1, "tie_word_embeddings": False}
    text = LlamaConfig(
        vocab_size=1024, num_key_value_heads=2, head_dim=64, max_position_embeddings=2048, **layers, **ids
    )
    config = Idefics3Config(
        text_config=text.to_dict(),
        vision_config=layers | {"image_size": _SIZE, "patch_size": _PATCH},
        scale_factor=_SCALE,
        image_token_id=_SPECIAL.index("<image>"),
        architectures=["Idefics3ForConditionalGeneration"],
        **ids,
    )
    torch.manual_seed(0)
    model = Idefics3ForConditionalGeneration(config)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() >= 2:
                weight.normal_(0.0, 1.5 / weight[0].numel() ** 0.5)
    model.to(torch.bfloat16).save_pretrained(folder)
    return folder
