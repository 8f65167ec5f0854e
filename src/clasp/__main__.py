"""The ``clasp`` command, as its script and ``python -m clasp`` start it.

Note: the verbs take a part of a second to import; Ctrl-C in it is one line, as everywhere else.
"""


def start_command() -> None:
    """Run the verb that was typed."""
    try:
        from clasp.commands.launch import end_with_launcher

        end_with_launcher()
        from clasp.cli import main as run_verb
    except KeyboardInterrupt:
        from clasp.commands.launch import exit_interrupted

        exit_interrupted()
    run_verb()


if __name__ == "__main__":
    start_command()
