"""Embeddings of a batch to a number."""

from clasp.losses.contrastive import LOSSES, info_nce, sigmoid
from clasp.losses.ring import Ring

__all__ = ["LOSSES", "Ring", "info_nce", "sigmoid"]
