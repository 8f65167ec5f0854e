"""Imports of the peer libraries, where they are available.

Note: torchvision, which open_clip and timm import but hardly use, may have no build for this torch version; importing
it then fails on two operators without implementation, and so does any check for it in transformers. They are declared
here first, without implementation.
"""

from __future__ import annotations

import importlib
import logging
import warnings
from collections.abc import Callable
from functools import cache
from typing import Any, TypeVar

from torch.library import Library

Peer = TypeVar("Peer")


@cache
def repair_torchvision() -> Library:
    """Declares the operators of torchvision's compiled extension; call before anything imports it."""
    operators = Library("torchvision", "DEF")  # the operators live as long as this object
    for name in ("nms", "qnms"):
        operators.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    return operators


def imported(name: str) -> Any:
    """Import a peer's module. Raises whatever the import raises."""
    repair_torchvision()
    logging.getLogger("transformers").setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return importlib.import_module(name)


def attempt(make: Callable[[], Peer]) -> Peer | str:
    """The result of ``make``, or why it failed: a peer that does not run is reported, not omitted."""
    try:
        return make()
    except Exception as error:
        lines = str(error).strip().splitlines() or [""]
        return f"cannot run here: {type(error).__name__}: {lines[0][:200]}"
