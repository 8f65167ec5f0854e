"""Weights from elsewhere: the hub, timm, pip packages, a file, a user's own factory."""
