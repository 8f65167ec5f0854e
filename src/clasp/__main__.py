"""The ``clasp`` command, as its script and ``python -m clasp`` start it.

Note: the verbs take a part of a second to import; Ctrl-C in it is one line, as everywhere else. A search is one query,
and the 330,000 objects of torch and the model stay to its end: it runs without the collector of cycles, which
would go through all of them several times, and again as the process ends unless they are frozen.
"""

import atexit
import gc
import sys


def start_command() -> None:
    """Run the verb that was typed."""
    try:
        if sys.argv[1:2] == ["search"]:
            gc.disable()
            atexit.register(gc.freeze)
        from clasp.commands.launch import end_with_launcher

        end_with_launcher()
        from clasp.cli import main as run_verb
    except KeyboardInterrupt:
        from clasp.commands.launch import exit_interrupted

        exit_interrupted()
    run_verb()


if __name__ == "__main__":
    start_command()
