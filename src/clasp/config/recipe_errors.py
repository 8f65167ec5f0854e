"""The message for a recipe that pydantic refuses: one line with the key, the value and the nearest valid names.

Input: a validation error and every key of a recipe. Output: the line.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import Any

from pydantic import ValidationError

from clasp.data.formats.rows import shorten

RENAMED_KEYS = {
    "data.features": "data.feature_cache",
    "data.views": "data.cached_augmentations",
    "head.start": "head.init",
    "image.ground": "image.background",
    "image.more_layers": "image.extra_layers",
    "image.net.order": "image.net.norm_position",
    "loss.scale_start": "loss.init_logit_scale",
    "share.also": "share.overrides",
    "text.more_layers": "text.extra_layers",
    "text.net.order": "text.net.norm_position",
    "text.overlong": "text.truncation",
    "train.batch": "train.batch_size",
    "train.decay": "train.decay_filter",
    "train.keep": "train.select",
    "train.lr_tower": "train.lr_factors.tower",
    "train.lr_floor": "train.min_lr_ratio",
    "train.recompute": "train.activation_checkpointing",
}
"""Keys that recipes had before version 0.2; an error names the new one"""


def explain_validation_error(error: ValidationError, known: Mapping[str, Any]) -> str:
    """The first validation error as one line, with the nearest valid names.

    ``known``: every key of a recipe with its type; ``None`` for a section.
    """
    first = error.errors()[0]
    key, kind, given = _key(first, known), first["type"], first["input"]
    keys = [*known, "extends"]
    section = ".".join(part for part in key.split(".")[:-1] if not part.isdigit())  # items of a list have like keys
    if key == "extends":
        return "extends stands at the beginning of a recipe file, and nowhere else"
    if kind in ("extra_forbidden", "unexpected_keyword_argument"):
        beside = [name for name in keys if name.rpartition(".")[0] == section]
        elsewhere = [name for name in keys if name.rpartition(".")[2] == key.rpartition(".")[2]]
        if key in RENAMED_KEYS:
            return f"unknown key {key!r}; it is {RENAMED_KEYS[key]} now"
        near = elsewhere[:2] or difflib.get_close_matches(key, beside, n=2, cutoff=0.7)
        valid = f"did you mean {' or '.join(near)}?" if near else f"valid keys: {', '.join(beside)}"
        return f"unknown key {key!r}; {valid}"
    if kind == "missing":
        return f"{key} is missing" if isinstance(first["loc"][-1], str) else f"{key} = {list(given)} has too few values"
    if kind in ("model_type", "dataclass_type"):
        inside = [name for name in keys if name.startswith(f"{key}.")]
        return f"{key} = {given!r}: this is a section; its keys are {', '.join(inside)}"
    if kind == "value_error":
        message = first["msg"].removeprefix("Value error, ")
        return message if message.startswith(f"{key} = ") else f"{key}: {message}"
    if kind == "list_type":
        return f"{key} = {given!r} should be a list: [{given!r}]"
    expected = dict.fromkeys(_expected(each) for each in error.errors() if _key(each, known) == key)
    return f"{key} = {shorten(given)} should {' or '.join(expected)}"


def _expected(error: Any) -> str:
    """The values that pydantic expects, as the end of the sentence ``key = value should …``."""
    if error["type"] == "literal_error":
        return f"be {error['ctx']['expected']}"
    if error["type"] == "int_parsing_size":
        return "be a smaller whole number"
    expected = error["msg"].partition(" should ")[2] or error["msg"]
    return expected.replace(" after validation", "").replace("a valid tuple", "a list")


def _key(error: Any, known: Mapping[str, Any]) -> str:
    """The dotted key, without the union branches that pydantic adds to the location."""
    key = ""
    for part in error["loc"]:
        longer = f"{key}.{part}".removeprefix(".")
        if (
            known.get(key) is None
            or longer in known
            or error["type"] in ("extra_forbidden", "unexpected_keyword_argument")
        ):
            key = longer
    return key
