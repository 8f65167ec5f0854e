"""The ways pairs lie on disk, one file each; ``clasp.data.pairs`` is the only door."""
