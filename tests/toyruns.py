"""Whole runs in seconds: tiny random towers saved to a folder as the hub would have them, and recipes that use them.

In: a folder. Out: towers for ``file:FOLDER``, a ``Recipe`` of them and toy pairs, and what a run left behind. The
towers are random but good enough to tell the toy world's colours and shapes apart, so heads on them can learn.
"""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path

import tokenizers
import torch
import transformers as hf
from safetensors.torch import load_file, save_file
from torch import Tensor

from clasp.commands.train import TrainResult, train_recipe
from clasp.config.recipe import Recipe, recipe_from_dict
from toydata import COLOURS, SHAPES

WORDS = ("a", "an", "the", "photo", "of", ".", "nyekundu", "rot", "##er", *COLOURS, *SHAPES)
SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]")
_SIZES = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64)


def save_image_tower(folder: Path, family: str = "vit") -> Path:
    """A random image tower of 32 x 32 pixels."""
    net: hf.PreTrainedModel = {
        "vit": lambda: hf.ViTModel(hf.ViTConfig(**_SIZES, image_size=32, patch_size=8)),
        "convnext": lambda: hf.ConvNextModel(hf.ConvNextConfig(hidden_sizes=[16, 24, 32, 48], depths=[1, 1, 1, 1])),
    }[family]()
    _save(net, folder)
    facts = {"size": {"height": 32, "width": 32}, "image_mean": [0.5] * 3, "image_std": [0.5] * 3, "resample": 3}
    (folder / "preprocessor_config.json").write_text(json.dumps({**facts, "image_processor_type": "ViTImageProcessor"}))
    return folder


def save_text_tower(folder: Path) -> Path:
    """A random BERT whose WordPiece tokenizer knows the words of the toy world."""
    vocabulary = {word: number for number, word in enumerate((*SPECIAL, *WORDS))}
    _save(hf.BertModel(hf.BertConfig(**_SIZES, vocab_size=len(vocabulary), pad_token_id=0)), folder)
    backend = tokenizers.Tokenizer(tokenizers.models.WordPiece(vocabulary, unk_token="[UNK]"))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    backend.post_processor = tokenizers.processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    special = dict(zip(("pad_token", "unk_token", "cls_token", "sep_token"), SPECIAL, strict=True))
    hf.PreTrainedTokenizerFast(tokenizer_object=backend, **special).save_pretrained(folder)
    return folder


def _save(net: hf.PreTrainedModel, folder: Path) -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        for name, p in net.named_parameters():
            p.data = torch.randn_like(p) * (0.3 if p.ndim > 1 else 0.1) + ("norm" in name.lower() and "weight" in name)
    net.save_pretrained(folder)


def recipe(towers: Path, train: str | Path, *overrides: str) -> Recipe:
    """Locked towers below linear heads, 64 wide, on some pairs."""
    given = {
        "image": {"tower": f"file:{towers / 'image'}"},
        "text": {"tower": f"file:{towers / 'text'}"},
        "head": {"width": 16, "standardize": True},
        "data": {"train": str(train), "val_fraction": 0.25},
        "train": {"batch_size": 16, "epochs": 3, "lr": 3e-3, "precision": "float32", "seed": 1, "log_every": 2},
    }
    return recipe_from_dict(given, "toy").with_overrides(overrides)


def run(made: Recipe, folder: Path, *, resume: bool = False) -> TrainResult:
    """Align without a word."""
    return train_recipe(made, folder, say=lambda line: None, resume=resume)


def lines(file: Path) -> list[dict]:
    """The objects of a ``.jsonl``."""
    return [json.loads(line) for line in file.read_text("utf-8").splitlines()]


def delta(folder: Path) -> dict[str, Tensor]:
    """The trained tensors of a run."""
    return load_file(folder / "delta.safetensors")


def spoil(tower: Path) -> None:
    """One number of one norm of a saved tower becomes another."""
    tensors = load_file(tower / "model.safetensors")
    name = next(name for name in sorted(tensors) if name.lower().endswith("layernorm.weight"))
    tensors[name][0] += 1e-3
    save_file(tensors, tower / "model.safetensors", {"format": "pt"})


@cache
def save_towers(folder: Path) -> Path:
    """Both towers, once: ``FOLDER/image`` and ``FOLDER/text``."""
    save_image_tower(folder / "image")
    save_text_tower(folder / "text")
    return folder
