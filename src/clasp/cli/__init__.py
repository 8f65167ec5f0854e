"""The ``clasp`` command: each verb reads its arguments, calls one function of ``clasp.commands`` and prints the result.

``--json`` prints one JSON object on standard output; progress and log lines go to standard error.
Note: torch and transformers are imported inside the verbs, so that ``--help`` returns at once.
"""

from clasp.cli import train, pair, evaluate, maps, convert, search, store  # each adds its verbs, in the order of --help  # isort: skip
from clasp.cli.program import main

__all__ = ["convert", "evaluate", "main", "maps", "pair", "search", "store", "train"]
