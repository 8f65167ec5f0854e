"""The documentation against the code: the reference is whole, every page is found, what stands in a block exists.

``tests_docs`` runs the blocks of the tutorials; here every ``clasp`` command of every page is parsed only.
"""

from __future__ import annotations

import re
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer

import clasp
from clasp.cli.app import app
from clasp.config.recipe import read_recipe, recipe_keys
from clasp.evaluation.options import ANALYZE_OPTIONS, MAP_OPTIONS
from clasp.evaluation.registry import EVALUATION_TASKS
from docblocks import DOCS, PAGES, ROOT, clasp_commands, read_blocks

sys.path.append(str(DOCS))

import reference

# --- the reference ---------------------------------------------------------------------------------------------------


def test_every_recipe_key_is_in_the_reference():
    listed = {key.name: key for key in reference.list_recipe_keys()}
    assert listed.keys() == recipe_keys().keys()
    assert not [name for name, key in listed.items() if not key.description], "a key has a docstring below it"
    page = reference.render_recipe_keys()
    assert not [name for name, kind in recipe_keys().items() if kind is not None and f"\n`{name}`{{#" not in page]
    assert '`train.batch_size`{#train-batch_size}\n: integer > 1, "auto"; default `"auto"`' in page


def test_every_verb_and_option_is_in_the_reference():
    page = reference.render_verbs()
    verbs = reference.list_verbs()
    assert {"train", "search", "store copy"} <= verbs.keys()
    for name, command in verbs.items():
        assert command.help and f"## clasp {name}\n" in page
        undescribed = [parameter.name for parameter in command.params if not parameter.help]
        assert not undescribed, f"clasp {name}"
        own = page.partition(f"## clasp {name}\n")[2].partition("\n## ")[0]
        options = [option for each in command.params if each.param_type_name == "option" for option in each.opts]
        assert not [option for option in options if option not in own]


def test_every_public_name_is_in_the_reference():
    page = (DOCS / "reference" / "python.md").read_text(encoding="utf-8")
    documented = set(re.findall(r"^\.\. auto\w+:: (\w+)$", page, re.MULTILINE))
    assert documented == set(clasp.__all__) - {"__version__"}


def test_every_page_is_in_the_table_of_contents():
    text = (DOCS / "index.md").read_text(encoding="utf-8")
    trees = "\n".join(re.findall(r"^```\{toctree\}\n(.*?)^```", text, re.DOTALL | re.MULTILINE))
    named = {line.rpartition("<")[2].strip(">") for line in trees.splitlines() if line and not line.startswith(":")}
    pages = {page.relative_to(DOCS).as_posix() for page in PAGES if page.is_relative_to(DOCS)}
    assert named == pages - {"index.md"}


def test_the_papers_are_mapped_to_what_there_is():
    """Tables of statement, recipe, code and test: each file is there, and each test in its file."""
    page = (DOCS / "papers.md").read_text(encoding="utf-8")
    mapped = [row.strip("| ").split(" | ") for part in page.split("### Line by line")[1:] for row in part.splitlines()]
    found = [(code, test) for _, _, code, test in (row for row in mapped if len(row) == 4 and "`" in row[3])]
    assert len(found) > 30
    for code, test in found:
        for path in re.findall("`([^`]+)`", code):
            assert (ROOT / path).exists() or (ROOT / "src" / "clasp" / path).exists(), path
        for path, name in re.findall("`([^`:]+)(?:::([^`]+))?`", test):
            text = (ROOT / path).read_text(encoding="utf-8")
            assert not name or f"def {name}(" in text, f"{path}::{name}"


def test_the_citation_is_of_this_version():
    version = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["version"]
    citation = (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    assert clasp.__version__ == version and f"\nversion: {version}\n" in citation


# --- the blocks ------------------------------------------------------------------------------------------------------


def parsed(arguments: list[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    """The verb and its parameters; an unknown verb or option raises."""
    group: Any = typer.main.get_command(app)
    context = group.make_context("clasp", [], resilient_parsing=True)
    name = ""
    while isinstance(group, typer.core.TyperGroup):
        word, group, arguments = group.resolve_command(context, arguments)
        name = f"{name} {word}".strip()
    if arguments != ["--help"]:
        yield name, group.make_context(name, arguments).params


def require_keys(overrides: list[str]) -> None:
    unknown = [key for override in overrides if (key := override.partition("=")[0]) not in recipe_keys()]
    assert not unknown


_RUN_OPTIONS = {"analyze": ANALYZE_OPTIONS, "maps": MAP_OPTIONS}


def require_options(task: str, options: list[str]) -> None:
    given = {option.partition("=")[0] for option in options}
    known = _RUN_OPTIONS[task] if task in _RUN_OPTIONS else EVALUATION_TASKS[task].all_options
    assert given <= {option.name for option in known}, task


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_commands_and_code_of_a_page_are_valid(page: Path):
    for language, text, _ in read_blocks(page.read_text(encoding="utf-8")):
        if language == "python":
            compile(text, page.name, "exec")
            continue
        for arguments in clasp_commands(text):
            for verb, given in parsed(arguments):
                if verb in ("train", "params", "doctor") and Path(given["recipe"]).name != "mine.toml":
                    recipe = "heads" if given["recipe"] == "RECIPE" else given["recipe"]
                    read_recipe(recipe, given["overrides"] or ())
                    require_keys(given.get("grid") or [])
                elif verb == "pair":
                    require_keys(given["overrides"] or [])
                elif verb in _RUN_OPTIONS or (verb in ("eval", "compare") and not given.get("suite")):
                    task = verb if verb in _RUN_OPTIONS else given["task"]
                    require_options(task, given["options"] or [])
