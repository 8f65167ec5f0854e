"""Logging of a run: files, the console, and experiment trackers."""
