"""The ``clasp`` command: each verb reads its arguments, calls one function of ``clasp.commands`` and prints the result.

``--json`` prints one JSON object on standard output; progress and log lines go to standard error.
Note: a command imports the module of its own verb (``verbs``), and torch and transformers inside the verb, so that
``--help`` and ``clasp search`` through a running server return at once.
"""

from clasp.cli.program import main

__all__ = ["main"]
