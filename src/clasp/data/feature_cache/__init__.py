"""The feature cache: outputs of frozen towers and frozen prefixes, computed once and stored on disk."""
