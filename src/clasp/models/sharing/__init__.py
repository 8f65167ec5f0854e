"""Weights that both towers hold in common."""
