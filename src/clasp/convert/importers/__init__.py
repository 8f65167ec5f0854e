"""Checkpoints of other people's code as runs: a module for each kind."""
