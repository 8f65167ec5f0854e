"""Embeddings of a batch to a number."""

from clasp.training.losses.contrastive import LOSSES, info_nce, sigmoid
from clasp.training.losses.distributed import Ring
from clasp.training.losses.settings import LossSettings, loss_of

__all__ = ["LOSSES", "LossSettings", "Ring", "info_nce", "loss_of", "sigmoid"]
