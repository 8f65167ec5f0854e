"""Recipes: reading and checking them, opening the pairs that they name, building their models."""
