"""``make fuzz``: mutated files of every format that clasp reads, and hostile HTTP requests; see ``__main__``."""
