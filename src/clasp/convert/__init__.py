"""Checkpoints of other code in, and models for other code out."""
