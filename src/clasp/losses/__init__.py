"""Embeddings of a batch to a number."""

from clasp.losses.contrastive import LOSSES, info_nce, sigmoid
from clasp.losses.ring import Ring
from clasp.losses.settings import LossSettings, loss_of

__all__ = ["LOSSES", "LossSettings", "Ring", "info_nce", "loss_of", "sigmoid"]
