"""Embeddings of a batch to a number."""

from clasp.training.losses.build import build_loss
from clasp.training.losses.contrastive import LOSSES, LossMethod, find_loss, info_nce, sigmoid_loss

__all__ = [
    "LOSSES",
    "LossMethod",
    "build_loss",
    "find_loss",
    "info_nce",
    "sigmoid_loss",
]
