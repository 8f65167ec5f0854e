"""What every importer needs: what a person may ask, a run made of towers and tensors, a tokenizer for so many words.

In go a recipe whose towers lie in the run already and a tensor for every parameter, out comes the run with its delta.
Unusual: nothing is taken on trust; a parameter that is not selected must already be what the checkpoint has.
"""

from __future__ import annotations

import difflib
import importlib.metadata
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import torch
from torch import Tensor

from clasp.config.build import build_model_and_preprocessing
from clasp.config.recipe import recipe_from_dict
from clasp.data.tokenizer import Tokenizer, Truncation
from clasp.models.backbone import TextTowerSettings
from clasp.models.dual_encoder import DualEncoder, ParameterCount
from clasp.models.zoo.pip_packages import PIP_TOWERS
from clasp.models.zoo.registry import load_backbone
from clasp.training.run_folder import RunFolder
from clasp.types import UserError

# words of the BERTs that papers take; MiniLM has the uncased one's, word for word, and comes in a package
_BERT_UNCASED, BERT_UNCASED_PIP = "hf:google-bert/bert-base-uncased", "minilm-l6"
_DEFAULT_TOKENIZERS = {30_522: _BERT_UNCASED, 119_547: "hf:google-bert/bert-base-multilingual-cased"}


@dataclass(frozen=True, slots=True, kw_only=True)
class ImportOptions:
    """What a person says of a checkpoint that its file does not."""

    tokenizer: str | None = None
    """``pip:NAME``, ``hf:NAME`` or ``file:FOLDER``; the usual one for so many words where left out"""
    size: int | None = None
    """Pixels a side of the images; those of the file's positions where left out"""
    image_heads: int | None = None
    """Heads of the attention; told by the width where left out"""
    text_heads: int | None = None
    lateral_layers: tuple[int, ...] | None = None
    """Layers that MS-CLIP's branch joins; those of the released models where left out"""
    truncation: Truncation = "keep_eos"
    """What is left of a caption that is too long for a text net of MS-CLIP"""


@dataclass(frozen=True, slots=True)
class ImportReport:
    """What an importer tells of the run that it wrote."""

    lines: list[str]
    """what was found and what was assumed, for a person"""
    facts: Mapping[str, Any]
    """settings of the checkpoint, to be kept in the run"""
    counts: dict[str, ParameterCount]
    delta_bytes: int


def parse_import_options(options: Sequence[str]) -> ImportOptions:
    """``key=value`` as they were typed. Raises ``UserError`` for an unknown key, or a value that does not parse."""
    read: dict[str, tuple[str, Callable[[str], Any]]] = {
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
        if not equals or key not in read:
            near = difflib.get_close_matches(key, read, n=1)
            hint = f"did you mean {near[0]}=…? " if near else ""
            raise UserError(f"import: {option!r} is not an option; {hint}options: {', '.join(read)}")
        field, parse = read[key]
        try:
            given[field] = parse(value)
        except ValueError as error:
            raise UserError(f"import: {option}: {error}") from None
    return ImportOptions(**given)


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise ValueError("this is a whole number from 1")
    return int(text)


def _layers(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(layer) for layer in text.split(","))
    except ValueError:
        raise ValueError("this is a list of layers, such as 2,4,6,8,10") from None


def _truncation(text: str) -> Truncation:
    known: dict[str, Truncation] = {choice: choice for choice in get_args(Truncation)}
    if text not in known:
        raise ValueError(f"this is one of {', '.join(known)}")
    return known[text]


def write_run(run: RunFolder, recipe: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> tuple[DualEncoder, int]:
    """Write the run of a recipe (``{run}`` not filled in), its towers being there; also gives the bytes of its delta.

    ``tensors`` has every parameter of the model by name.
    """
    settled = recipe_from_dict(dict(recipe), "the checkpoint's recipe")
    parts = build_model_and_preprocessing(
        recipe_from_dict(run.resolve_placeholder(settled.to_dict()), "the checkpoint's recipe")
    )
    parameters = dict(parts.model.named_parameters())
    assert parameters.keys() == tensors.keys(), sorted(parameters.keys() ^ tensors.keys())[:3]
    with torch.no_grad():
        for name, parameter in parameters.items():
            if name in parts.model.selection:
                parameter.copy_(tensors[name])
            assert torch.equal(parameter, tensors[name]), f"{name} is in no delta, and the tower has another"
    run.start(settled.to_toml(), parts.model, parts.transform, parts.tokenizer, pairs=None)
    return parts.model, run.save(parts.model)


def load_matching_tokenizer(vocabulary: int, wanted: str | None) -> tuple[str, Tokenizer]:
    """The tokenizer asked for, or the usual one for so many words, and what it is called. Raises ``UserError``."""
    named = wanted or _default_tokenizer(vocabulary)
    folder = Path(named.removeprefix("file:")).expanduser()
    if named.startswith("file:") and not (folder / "config.json").is_file():
        return named, Tokenizer.from_folder(folder)
    try:
        opened = load_backbone(TextTowerSettings(tower=named), meta=True).tokenizer
        assert opened is not None
        return named, opened()
    except UserError as error:
        raise UserError(f"no tokenizer: {error}; choose one with tokenizer=pip:NAME, hf:NAME or file:FOLDER") from None


def _default_tokenizer(vocabulary: int) -> str:
    if vocabulary not in _DEFAULT_TOKENIZERS:
        raise UserError(
            f"the checkpoint has no tokenizer, and {vocabulary:,} words are no usual tower's; choose one with "
            "tokenizer=pip:NAME, hf:NAME or file:FOLDER"
        )
    named = _DEFAULT_TOKENIZERS[vocabulary]
    here = any(each.name == PIP_TOWERS[BERT_UNCASED_PIP].package for each in importlib.metadata.distributions())
    return f"pip:{BERT_UNCASED_PIP}" if named == _BERT_UNCASED and here else named
