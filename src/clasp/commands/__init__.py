"""One module a verb of the ``clasp`` command; ``clasp.cli`` reads their arguments."""
