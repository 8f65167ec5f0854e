"""Importers: a module for each kind of checkpoint, which becomes a run."""
