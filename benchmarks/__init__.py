"""Benchmarks of clasp's speed and memory against alternatives; see README.md here."""
