"""A run as data: the recipe, the pairs that it names, and the one place where its model is built."""
