"""Tiny random towers as folders on disk, as a hub would have them: weights, ``preprocessor_config.json``, tokenizer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import transformers as hf
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import nn

from toydata import COLOURS, SHAPES, Toy
from toytowers import IMAGE_NETS, NETS, base

_SIZES = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64)
_IMAGE = dict(**_SIZES, image_size=32, patch_size=8)
_TEXT = dict(**_SIZES, vocab_size=64, pad_token_id=0, bos_token_id=1)
END = 63  # the highest id, since CLIP's oldest checkpoints find the end of a text by that

WHOLE = {  # both halves in one checkpoint
    "clip": lambda: hf.CLIPModel(hf.CLIPConfig(text_config=dict(**_TEXT, eos_token_id=END), vision_config=_IMAGE)),
    "chinese_clip": lambda: hf.ChineseCLIPModel(
        hf.ChineseCLIPConfig(text_config=dict(**_TEXT, eos_token_id=END), vision_config=_IMAGE, projection_dim=16)
    ),
    "metaclip_2": lambda: hf.MetaClip2Model(
        hf.MetaClip2Config(text_config=dict(**_TEXT, eos_token_id=END), vision_config=_IMAGE, projection_dim=16)
    ),
    "siglip": lambda: hf.SiglipModel(
        hf.SiglipConfig(text_config=dict(**_TEXT, eos_token_id=END, projection_size=32), vision_config=_IMAGE)
    ),
}
PREPROCESSOR = {"image_mean": [0.5, 0.4, 0.3], "image_std": [0.2, 0.3, 0.4], "size": {"height": 32, "width": 32}}


def net(name: str) -> nn.Module:
    """A tiny net of ``toytowers`` or of ``WHOLE``."""
    if name in NETS:
        return base(name).net
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return WHOLE[name]().eval()


def save(name: str, folder: Path, **preprocessor: Any) -> Path:
    """Write the tower; ``preprocessor`` is put over ``PREPROCESSOR``."""
    net(name).save_pretrained(folder)
    if name in IMAGE_NETS or name in WHOLE:
        save_preprocessor(folder, **preprocessor)
    if name not in IMAGE_NETS:
        save_tokenizer(folder, template="<s> $A" if name == "llama" else "<s> $A </s>")
    return folder


def save_preprocessor(folder: Path, **changes: Any) -> None:
    """``preprocessor_config.json``; ``changes`` are put over ``PREPROCESSOR``."""
    (folder / "preprocessor_config.json").write_text(json.dumps({**PREPROCESSOR, **changes}))


def save_tokenizer(folder: Path, *, template: str) -> None:
    """``words`` as ``transformers`` would save it."""
    hf.PreTrainedTokenizerFast(
        tokenizer_object=words(template), pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    ).save_pretrained(folder)


def words(template: str = "<s> $A </s>") -> Tokenizer:
    """One id a word: ``w3`` to ``w62`` are 3 to 62."""
    ids = {"<pad>": 0, "<s>": 1, "<unk>": 2, **{f"w{number}": number for number in range(3, END)}, "</s>": END}
    backend = Tokenizer(models.WordLevel(ids, "<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.post_processor = processors.TemplateProcessing(
        single=template, special_tokens=[(token, ids[token]) for token in ("<s>", "</s>")]
    )
    return backend


class WordToy(Toy):
    """A toy whose caption is of ``words``."""

    @property
    def caption(self) -> str:
        return f"w{10 + list(COLOURS).index(self.colour)} w{20 + SHAPES.index(self.shape)}"
