"""``python -m clasp``: the ``clasp`` command, where its script is not on the path."""

from clasp.cli import main

if __name__ == "__main__":
    main()
