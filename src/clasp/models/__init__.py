"""Towers and what trains in them."""
