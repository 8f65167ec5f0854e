"""A corpus that can be asked."""
