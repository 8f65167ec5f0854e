"""Image retrieval over an embedding index: stores, entries and the search engine."""
