"""What all importers share: the import options, writing a run from towers and tensors, and the choice of a tokenizer.

Input: a recipe whose towers are already in the run folder, and a tensor for every parameter. Output: the run with its
delta. Note: everything is verified; a parameter outside the selection must already equal the checkpoint's.
"""

from __future__ import annotations

import difflib
import importlib.metadata
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import torch
from torch import Tensor

from clasp.config.build import build_model_and_preprocessing
from clasp.config.recipe import recipe_from_dict
from clasp.data.tokenizer import Tokenizer, Truncation
from clasp.models.dual_encoder import DualEncoder, ParameterCount
from clasp.models.tower_settings import TextTowerSettings
from clasp.models.zoo.pip_packages import PIP_TOWERS
from clasp.models.zoo.registry import load_backbone
from clasp.training.run_folder import RunFolder
from clasp.types import UserError

# by vocabulary size, for the papers' BERTs; MiniLM has exactly the vocabulary of the uncased one, in a pip package
_BERT_UNCASED, BERT_UNCASED_PIP = "hf:google-bert/bert-base-uncased", "minilm-l6"
_DEFAULT_TOKENIZERS = {30_522: _BERT_UNCASED, 119_547: "hf:google-bert/bert-base-multilingual-cased"}


@dataclass(frozen=True, slots=True, kw_only=True)
class ImportOptions:
    """Settings of a checkpoint that its file does not contain."""

    tokenizer: str | None = None
    """``pip:NAME``, ``hf:NAME`` or ``file:FOLDER``; by default the usual one for the vocabulary size"""
    size: int | None = None
    """Image side in pixels; by default that of the checkpoint's position embedding"""
    image_heads: int | None = None
    """Attention heads; by default one per 64 channels"""
    text_heads: int | None = None
    lateral_layers: tuple[int, ...] | None = None
    """Layers before which MS-CLIP's parallel branch is added; by default those of the released models"""
    truncation: Truncation = "keep_eos"
    """Truncation of captions longer than the context of an MS-CLIP text encoder"""


@dataclass(frozen=True, slots=True)
class ImportReport:
    """What an importer reports of the run that it wrote."""

    lines: list[str]
    """what was found and what was assumed, human-readable"""
    facts: Mapping[str, Any]
    """settings of the checkpoint, saved in the run"""
    counts: dict[str, ParameterCount]
    delta_bytes: int


def parse_import_options(options: Sequence[str]) -> ImportOptions:
    """Parse ``key=value`` options. Raises ``UserError`` for an unknown key, or a value that does not parse."""
    parsers: dict[str, tuple[str, Callable[[str], Any]]] = {
        "tokenizer": ("tokenizer", str),
        "size": ("size", _positive),
        "image_heads": ("image_heads", _positive),
        "text_heads": ("text_heads", _positive),
        "lateral": ("lateral_layers", _layers),
        "truncation": ("truncation", _truncation),
    }
    given = {}
    for option in options:
        key, equals, value = option.partition("=")
        if not equals or key not in parsers:
            near = difflib.get_close_matches(key, parsers, n=1)
            hint = f"did you mean {near[0]}=…? " if near else ""
            raise UserError(f"import: {option!r} is not an option; {hint}options: {', '.join(parsers)}")
        field, parse = parsers[key]
        try:
            given[field] = parse(value)
        except ValueError as error:
            raise UserError(f"import: {option}: {error}") from None
    return ImportOptions(**given)


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise ValueError("must be a whole number from 1")
    return int(text)


def _layers(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(layer) for layer in text.split(","))
    except ValueError:
        raise ValueError("must be a list of layers, such as 2,4,6,8,10") from None


def _truncation(text: str) -> Truncation:
    known: dict[str, Truncation] = {choice: choice for choice in get_args(Truncation)}
    if text not in known:
        raise ValueError(f"must be one of {', '.join(known)}")
    return known[text]


def write_run(run: RunFolder, recipe: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> tuple[DualEncoder, int]:
    """Write the run of a recipe (``{run}`` unresolved), whose towers are in the folder; returns the model and delta
    bytes.

    ``tensors`` has every parameter of the model by name.
    """
    validated = recipe_from_dict(dict(recipe), "the checkpoint's recipe")
    parts = build_model_and_preprocessing(
        recipe_from_dict(run.resolve_placeholder(validated.to_dict()), "the checkpoint's recipe")
    )
    parameters = dict(parts.model.named_parameters())
    assert parameters.keys() == tensors.keys(), sorted(parameters.keys() ^ tensors.keys())[:3]
    with torch.no_grad():
        for name, parameter in parameters.items():
            if name in parts.model.selection:
                parameter.copy_(tensors[name])
            assert torch.equal(parameter, tensors[name]), f"{name} is not in the delta and differs in the tower"
    run.start(validated.to_toml(), parts.model, parts.transform, parts.tokenizer, pairs=None)
    return parts.model, run.save(parts.model)


def load_matching_tokenizer(vocabulary: int, wanted: str | None) -> tuple[str, Tokenizer]:
    """The name and the tokenizer requested, or the usual one for a vocabulary size. Raises ``UserError``."""
    name = wanted or _default_tokenizer(vocabulary)
    folder = Path(os.path.expanduser(name.removeprefix("file:")))
    if name.startswith("file:") and not (folder / "config.json").is_file():
        return name, Tokenizer.from_folder(folder)
    try:
        load_tokenizer = load_backbone(TextTowerSettings(tower=name), meta=True).tokenizer
        assert load_tokenizer is not None
        return name, load_tokenizer()
    except UserError as error:
        raise UserError(f"no tokenizer: {error}; choose one with tokenizer=pip:NAME, hf:NAME or file:FOLDER") from None


def _default_tokenizer(vocabulary: int) -> str:
    if vocabulary not in _DEFAULT_TOKENIZERS:
        raise UserError(
            f"the checkpoint has no tokenizer, and no default one has {vocabulary:,} tokens; choose one with "
            "tokenizer=pip:NAME, hf:NAME or file:FOLDER"
        )
    name = _DEFAULT_TOKENIZERS[vocabulary]
    installed = any(each.name == PIP_TOWERS[BERT_UNCASED_PIP].package for each in importlib.metadata.distributions())
    return f"pip:{BERT_UNCASED_PIP}" if name == _BERT_UNCASED and installed else name
