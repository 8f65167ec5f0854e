"""The documentation against the code: the reference is whole, every page is found, what stands in a block exists.

``tests_docs`` runs the blocks of the tutorials; here the blocks of every page are only parsed: verbs, options, recipe
keys, evaluation tasks and suites, targets of ``make``, extras, routes of the server, and names in Python.
"""

from __future__ import annotations

import ast
import importlib
import inspect
import re
import sys
import tomllib
from collections.abc import Callable, Iterator, Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import typer
from fastapi.testclient import TestClient

import clasp
from clasp.cli.verbs import root_command
from clasp.config.recipe import read_recipe, recipe_keys
from clasp.evaluation.options import ANALYZE_OPTIONS, MAP_OPTIONS
from clasp.evaluation.registry import EVALUATION_TASKS
from clasp.evaluation.suites import find_suite
from clasp.serve.editor import IndexEditor
from clasp.serve.upload_folder import UploadFolder
from docblocks import DOCS, PAGES, ROOT, clasp_commands, inline_commands, read_blocks, shell_commands
from toyserver import toy_app, toy_service

sys.path.append(str(DOCS))

import reference

# --- the reference ---------------------------------------------------------------------------------------------------


def test_every_recipe_key_is_in_the_reference():
    listed = {key.name: key for key in reference.list_recipe_keys()}
    assert listed.keys() == recipe_keys().keys()
    assert not [name for name, key in listed.items() if not key.description], "a key has a docstring below it"
    page = reference.render_recipe_keys()
    assert not [name for name, kind in recipe_keys().items() if kind is not None and f"\n`{name}`{{#" not in page]
    assert '`train.batch_size`{#train-batch_size}\n: integer > 1 ≤ 1,000,000,000, "auto"; default `"auto"`' in page


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
    group: Any = typer.main.get_command(root_command())
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


def require_programs(script: str, api: Mapping[str, Any]) -> None:
    """Fails for a program that nothing here can check: such a block needs a row in ``_PROGRAMS``."""
    for program, *words in shell_commands(script):
        assert program in _PROGRAMS, f"{program}: a row of _PROGRAMS says how it is checked"
        _PROGRAMS[program](words, api)


def _require_targets(words: list[str], api: Mapping[str, Any]) -> None:
    made = re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    assert set(words) <= set(made)


def _require_extras(words: list[str], api: Mapping[str, Any]) -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]
    assert {name for word in words for name in re.findall(r"\[(\w+)\]", word)} <= extras.keys()


def _require_route(words: list[str], api: Mapping[str, Any]) -> None:
    """The method and path of a call by curl, and the names of its fields."""
    (path,) = [found[1] for word in words if (found := re.fullmatch(r"http://127\.0\.0\.1:\d+(/\S*)", word))]
    sent = [(option, value.partition("=")[0]) for option, value in pairwise(words)]
    form = {name for option, name in sent if option == "-F"}
    method = next((name.lower() for option, name in sent if option == "-X"), "post" if form else "get")
    route = api["paths"][path][method]
    assert {name for option, name in sent if option in ("-d", "--data-urlencode")} <= {
        each["name"] for each in route.get("parameters", ())
    }
    body = route.get("requestBody", {}).get("content", {}).get("multipart/form-data", {}).get("schema", {})
    named = api["components"]["schemas"].get(body.get("$ref", "").rpartition("/")[2], body)
    assert form <= named.get("properties", {}).keys()


def _parsed_elsewhere(words: list[str], api: Mapping[str, Any]) -> None:
    """Of what ``clasp_commands`` finds, or a program of others without anything of ours."""


_PROGRAMS: dict[str, Callable[[list[str], Mapping[str, Any]], None]] = {
    "make": _require_targets,
    "pip": _require_extras,
    "curl": _require_route,
    **dict.fromkeys(("clasp", "torchrun", "srun", "for", "wait", "export", "head", "tensorboard"), _parsed_elsewhere),
}


def require_names(code: str, name: str) -> None:
    """Of ``clasp``: the modules and names that are imported, attributes, and keywords of what is called."""
    tree = ast.parse(code, name)
    known: dict[str, Any] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == "clasp":
            module = importlib.import_module(node.module or "")
            known |= {each.asname or each.name: getattr(module, each.name) for each in node.names}
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "clasp":
            assert node.attr in clasp.__all__, f"clasp.{node.attr}"
        if isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            found = getattr(clasp, called[6:]) if called.startswith("clasp.") else known.get(called)
            if found is not None:
                taken = inspect.signature(found).parameters
                given = {keyword.arg for keyword in node.keywords if keyword.arg}
                anything = any(each.kind is each.VAR_KEYWORD for each in taken.values())
                assert anything or given <= taken.keys(), f"{called}: {given}"


@pytest.fixture(scope="module")
def api(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Any]:
    """The OpenAPI schema of the server, with what ``--uploads`` adds."""
    service = toy_service(tmp_path_factory.mktemp("index"))
    editor = IndexEditor(service, UploadFolder(tmp_path_factory.mktemp("uploads")))
    schema = TestClient(toy_app(service, editor=editor), base_url="http://127.0.0.1").get("/openapi.json").json()
    service.close()
    return schema


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_commands_and_code_of_a_page_are_valid(page: Path, api: Mapping[str, Any], tmp_path: Path):
    for language, text, _ in read_blocks(page.read_text(encoding="utf-8")):
        if language == "python":
            require_names(text, page.name)
        elif language == "toml":
            (tmp_path / "mine.toml").write_text(text, encoding="utf-8")
            read_recipe(str(tmp_path / "mine.toml"), ())
        else:
            if language == "sh":
                require_programs(text, api)
            for arguments in clasp_commands(text):
                for verb, given in parsed(arguments):
                    require_valid(verb, given)


def require_valid(verb: str, given: Mapping[str, Any]) -> None:
    """Recipe keys, tasks with their options, suites: what a parsed command has in its words."""
    if verb in ("train", "params", "doctor") and Path(given["recipe"]).name != "mine.toml":
        recipe = "heads" if given["recipe"] == "RECIPE" else given["recipe"]
        read_recipe(recipe, given["overrides"] or ())
        require_keys(given.get("grid") or [])
    elif verb == "pair":
        require_keys(given["overrides"] or [])
    elif (suite := given.get("suite")) is not None:
        assert suite.endswith(".toml") or find_suite(suite)
    elif verb in _RUN_OPTIONS or verb in ("eval", "compare"):
        task = verb if verb in _RUN_OPTIONS else given["task"]
        require_options(task, given["options"] or [])


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_commands_in_the_text_of_a_page_exist(page: Path):
    """Their verb and their options; arguments may be left out there."""
    for code in inline_commands(page.read_text(encoding="utf-8")):
        group: Any = typer.main.get_command(root_command())
        context, words = group.make_context("clasp", [], resilient_parsing=True), code.split()[1:]
        while isinstance(group, typer.core.TyperGroup) and words and words[0] != "VERB":
            _, group, words = group.resolve_command(context, words)
            assert group is not None, code
        options = {option for each in group.params for option in each.opts} | {"--help"}
        assert {word for word in words if re.fullmatch("-[a-z]|--[a-z-]+", word)} <= options, code


def _anchors(page: Path) -> set[str]:
    text = re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    titles = (re.sub(r"`|\[|\]\([^)]*\)", "", title) for title in re.findall("^#{1,6} (.+)$", text, re.MULTILINE))
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def test_links_lead_somewhere():
    """Of the pages and of what lies beside ``docs``, which Sphinx does not read."""
    for page in (*PAGES, ROOT / "CHANGELOG.md", ROOT / "benchmarks" / "README.md", *(ROOT / "studies").rglob("*.md")):
        for target in re.findall(r"\[[^\]\n]*\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
            if "://" not in target:
                path, _, anchor = target.partition("#")
                file = (page.parent / path).resolve() if path else page
                assert file.exists() and (not anchor or anchor in _anchors(file)), f"{page.name}: {target}"
