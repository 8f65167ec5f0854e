"""Settings of the documentation's site: ``make docs`` builds it from these pages into ``docs/_build``.

In: Sphinx runs it. Out: the names that Sphinx looks for. Note: the pages are read as files too, so they keep to plain
Markdown; a link to a file beside ``docs`` (a study, the log) is the name of that file on the site.
"""

import re
import sys
from pathlib import Path
from typing import Any

DOCS = Path(__file__).resolve().parent
sys.path.insert(0, str(DOCS))  # reference.py

project = "clasp"
author = "The clasp authors"
extensions = ["myst_parser", "sphinx.ext.autodoc", "reference"]
exclude_patterns = ["_build"]
smartquotes = False  # options begin with two hyphens

myst_enable_extensions = ["attrs_inline", "deflist"]
myst_heading_anchors = 3

autodoc_member_order = "bysource"

html_theme = "furo"
html_title = "clasp"
html_show_sourcelink = False
html_copy_source = False


def name_files_outside(app: Any, page: str, source: list[str]) -> None:
    """Replace links that lead out of ``docs``: the label where it is the path already, else label and path."""

    def replace(link: re.Match[str]) -> str:
        label, target = link.groups()
        file = ((DOCS / page).parent / target.partition("#")[0]).resolve()
        if "://" in target or file.is_relative_to(DOCS):
            return link[0]
        path = file.relative_to(DOCS.parent).as_posix()
        return f"`{path}`" if label == path else f"{label} (`{path}`)"

    source[0] = re.sub(r"\[([^\]\n]+)\]\(([^)\s]+)\)", replace, source[0])


def setup(app: Any) -> None:
    """Called by Sphinx."""
    app.connect("source-read", name_files_outside)
