"""An empty text means nothing: whatever asks or learns refuses it; what embeds a list embeds it, in its row."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import tokenizers
import torch

from clasp.data.pairs import open_pairs
from clasp.data.tokenizer import Tokenizer
from clasp.evaluation.compositional import HardNegativeQueries
from clasp.evaluation.zeroshot import ZeroShotQueries, read_class_names, read_descriptions, read_templates
from clasp.search.query import SearchQuery, WeightedText, parse_words
from clasp.types import UserError
from toydata import toys, write_jsonl
from toysearch import model

EMPTY = ["", "   ", "\n\t", "\u200b"]


def _class_list(text: str, folder: Path) -> object:
    path = folder / "classes.txt"
    path.write_text(f"{text}\n" * 2, encoding="utf-8")
    return read_class_names(path)


def _descriptions(text: str, folder: Path) -> object:
    path = folder / "descriptions.json"
    path.write_text(json.dumps({"cat": ["a cat", text]}))
    return read_descriptions(path)


def _caption(text: str, folder: Path) -> object:
    table = write_jsonl(toys(3), folder)
    first, *rest = table.read_text(encoding="utf-8").splitlines()
    table.write_text("\n".join([json.dumps({**json.loads(first), "caption": text}), *rest]), encoding="utf-8")
    return open_pairs(table)


def _classes(text: str, **more: object) -> object:
    given = {"labels": {}, "classes": ["cat", "dog"], "templates": ["a {}"], "read": lambda texts: iter(())}
    return ZeroShotQueries(**{**given, **more})  # pyright: ignore[reportArgumentType]


ENTRANCES: dict[str, Callable[[str, Path], object]] = {
    "caption of a pair": _caption,
    "class list": _class_list,
    "class name": lambda text, folder: _classes(text, classes=["cat", text]),
    "template": lambda text, folder: _classes(text, templates=[text]),
    "template of a list": lambda text, folder: read_templates(json.dumps(["a {}", text])),
    "description": lambda text, folder: _classes(text, descriptions={"cat": ["a cat", text], "dog": ["a dog"]}),
    "description in a file": _descriptions,
    "candidate": lambda text, folder: HardNegativeQueries(
        candidates={"1": ("a cat", text)}, groups={}, read=lambda texts: iter(())
    ),
    "words of a search": lambda text, folder: parse_words(text),
    "text of a search": lambda text, folder: SearchQuery((WeightedText(text),)),
    "text subtracted in a search": lambda text, folder: SearchQuery((WeightedText("cat"), WeightedText(text, -1.0))),
}


@pytest.mark.parametrize("entrance", ENTRANCES)
@pytest.mark.parametrize("text", EMPTY, ids=ascii)
def test_what_asks_or_learns_refuses_an_empty_text(entrance: str, text: str, tmp_path: Path):
    with pytest.raises(UserError):
        ENTRANCES[entrance](text, tmp_path)


def test_a_list_is_embedded_with_its_empty_texts():
    """The special tokens of an empty text are its embedding; a tokenizer without any has nothing to embed."""
    encoder = model()
    assert encoder.encode_text([]).shape == encoder.encode_image([]).shape == (0, 3)
    with pytest.raises(UserError, match="the caption '' has no token"):
        encoder.encode_text(["red", ""])
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel({"[PAD]": 0, "[CLS]": 1, "red": 2}, unk_token="[PAD]"))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    backend.post_processor = tokenizers.processors.TemplateProcessing("[CLS] $A", special_tokens=[("[CLS]", 1)])
    encoder.tokenizer = Tokenizer(backend)
    rows = encoder.encode_text(["red", "", "red", "   "])
    assert torch.equal(rows[0], rows[2]) and torch.equal(rows[1], rows[3]) and not torch.equal(rows[0], rows[1])
    assert torch.equal(rows[1:2], encoder.encoder.embed_text(encoder.tokenizer([""])))
