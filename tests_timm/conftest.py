"""Lets timm be imported beside a torch that torchvision was not built for.

timm needs torchvision to import, and nothing of its compiled half to run. Where that half does not fit torch, importing
torchvision fails on two operators it describes; here they are declared, with nothing behind them.
"""

from __future__ import annotations

from torch.library import Library

from exactness import converted_towers, float32_by_default

__all__ = ["converted_towers", "float32_by_default"]

OPERATORS = Library("torchvision", "DEF")  # kept: the operators go when it does
for name in ("nms", "qnms"):
    OPERATORS.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
