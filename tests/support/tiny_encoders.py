"""Tiny text and picture encoders with random weights, saved and loaded by the real packages."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "red", "blue", "paint", "brush", "for", "walls", "[END]"]


def save_clip(path: Path) -> Path:
    """A CLIP model: 8 dimensions, pictures of 32 × 32 in 4 × 4 patches."""
    import transformers

    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = transformers.CLIPConfig(
        text_config=sizes | {"vocab_size": 11, "max_position_embeddings": 12, "eos_token_id": 10,
                             "bos_token_id": 2, "pad_token_id": 10},
        vision_config=sizes | {"image_size": 32, "patch_size": 8},
        projection_dim=8,
    )  # fmt: skip
    transformers.CLIPModel(config).save_pretrained(path)
    _tokenizer(transformers, "[END]", "[END]").save_pretrained(path)
    transformers.CLIPImageProcessor(
        size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}
    ).save_pretrained(path)
    return path


def save_bert(path: Path) -> Path:
    """A BERT model of 16 dimensions, as sentence-transformers reads it."""
    import transformers

    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=11, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=32,
    )  # fmt: skip
    transformers.BertModel(config).save_pretrained(path)
    _tokenizer(transformers, "[PAD]", "[SEP]").save_pretrained(path)
    return path


def _tokenizer(transformers: Any, pad: str, last: str) -> Any:
    from tokenizers import Tokenizer, processors
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace

    number = {word: i for i, word in enumerate(WORDS)}
    words = Tokenizer(WordLevel(number, unk_token="[UNK]"))
    words.pre_tokenizer = Whitespace()
    words.post_processor = processors.TemplateProcessing(
        single=f"[CLS] $A {last}", special_tokens=[("[CLS]", 2), (last, number[last])]
    )
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=words, unk_token="[UNK]", pad_token=pad, cls_token="[CLS]", eos_token=last
    )
