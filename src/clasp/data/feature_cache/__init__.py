"""Outputs of frozen towers and frozen prefixes, computed once and kept on disk."""
