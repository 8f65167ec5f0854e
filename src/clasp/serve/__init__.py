"""The search server: an HTTP API over the index of a run, and the page that uses it."""
