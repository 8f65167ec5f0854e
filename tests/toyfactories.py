"""Every tiny tower as a user's own factory, for recipes: ``toyfactories:vit`` reads no file."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

from clasp.data.images import ImageTransform
from clasp.data.tokenizer import Tokenizer
from clasp.models.backbone import Backbone
from toysavedtowers import words
from toytowers import NETS, base

TRANSFORM = ImageTransform(32, (0.5, 0.4, 0.3), (0.2, 0.3, 0.4))


def _factory(name: str) -> Backbone:
    return replace(base(name), transform=TRANSFORM, tokenizer=lambda: Tokenizer(words()))


globals().update({name: partial(_factory, name) for name in NETS})
