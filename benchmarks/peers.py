"""Other people's libraries, imported where they can be.

Unusual: torchvision, which open_clip and timm import and hardly use, may have no build for this torch; then importing
it fails on two operators that it describes, and so does whatever of transformers looks whether it is there. They are
declared here first, with nothing behind them.
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
    """Declares what torchvision's compiled half would; to be called before anything imports it."""
    operators = Library("torchvision", "DEF")  # the operators go when it does
    for name in ("nms", "qnms"):
        operators.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    return operators


def imported(name: str) -> Any:
    """A peer's module. Raises whatever its import does."""
    repair_torchvision()
    logging.getLogger("transformers").setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return importlib.import_module(name)


def attempt(make: Callable[[], Peer]) -> Peer | str:
    """What ``make`` gives, or why it cannot: a peer that does not run is told of, not left out."""
    try:
        return make()
    except Exception as error:
        said = str(error).strip().splitlines() or [""]
        return f"cannot run here: {type(error).__name__}: {said[0][:200]}"
