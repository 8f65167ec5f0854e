"""Import of checkpoints of other code, and export to formats of other code."""
