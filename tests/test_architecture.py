"""The rules of the package that a machine can check: floors, fences, names, sizes, and what the documentation names."""

from __future__ import annotations

import ast
import re
import runpy
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

from docblocks import DOCS, PAGES, ROOT

PACKAGE = ROOT / "src" / "clasp"
FILES = sorted(PACKAGE.rglob("*.py"))
MAX_ROOMS, MAX_LINES, MAX_PARAMETERS = 12, 60, 7
# third-party packages, and where in src/clasp they may be imported (a folder, or a file without its suffix)
FENCES = {
    "PIL": (
        "data/images",
        "data/decoding",
        "data/image_header",
        "data/augment",
        "data/corruptions",
        "report/contact_sheet",
        "report/text_rendering",
    ),
    "huggingface_hub": ("models/zoo/",),
    "timm": ("models/zoo/",),
    "peft": ("models/tuning/peft_methods",),
    "matplotlib": ("report/",),
    "fastapi": ("serve/",),
    "starlette": ("serve/",),
    "uvicorn": ("serve/",),
    "qdrant_edge": ("search/edge_store",),
    "qdrant_client": ("search/qdrant_store",),
}


@cache
def trees() -> dict[Path, ast.Module]:
    """The syntax tree of every file; parsed by the process that asks."""
    return {path: ast.parse(path.read_text(encoding="utf-8")) for path in FILES}


def place(path: Path) -> str:
    """A file of the package as the rules name it."""
    return path.relative_to(PACKAGE).as_posix().removesuffix(".py")


# --- floors and fences -----------------------------------------------------------------------------------------------


def test_floors_hold():
    lint = Path(sys.executable).with_name("lint-imports")
    done = subprocess.run([lint, "--no-cache"], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout


def test_fences_and_style_hold():
    done = subprocess.run(
        [sys.executable, "-m", "ruff", "check", "."], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stdout


@cache
def importers() -> dict[str, set[str]]:
    """The files that import each top-level name, inside functions too."""
    found = defaultdict(set)
    for path, tree in trees().items():
        for node in ast.walk(tree):
            if isinstance(node, ast.Import):
                for alias in node.names:
                    found[alias.name.partition(".")[0]].add(place(path))
            elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
                found[node.module.partition(".")[0]].add(place(path))
    return found


@pytest.mark.parametrize("package", FENCES)
def test_third_party_packages_stay_behind_their_fence(package: str):
    users = importers()[package]
    outside = sorted(user for user in users if not user.startswith(FENCES[package]))
    assert not outside, f"{package} belongs to {', '.join(FENCES[package])} only"
    assert users, f"nothing imports {package}: drop its fence"


def test_importing_does_nothing_heavy():
    script = "import sys, clasp, clasp.cli; assert not {'transformers', 'peft', 'accelerate', 'PIL'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", script], check=True, timeout=120)


# --- files, names, functions -----------------------------------------------------------------------------------------


def test_every_file_opens_with_its_purpose():
    """With a paragraph: what it is, what goes in, what comes out."""
    assert not [place(path) for path, tree in trees().items() if not ast.get_docstring(tree)]
    assert not [place(path) for path in FILES if path.stem in ("utils", "common", "helpers", "misc", "core")]


def test_nothing_inside_the_package_imports_from_its_own_init():
    nodes = {place(path): ast.walk(tree) for path, tree in trees().items()}
    assert not [
        path
        for path, each in nodes.items()
        if any(isinstance(node, ast.ImportFrom) and node.module == "clasp" for node in each)
    ]


def test_the_package_has_few_rooms():
    entries = {entry.name for entry in PACKAGE.iterdir()} - {
        "__init__.py",
        "__main__.py",
        "py.typed",
        "cli",
        "errors.py",
        "plain_types.py",
        "__pycache__",
    }
    assert len(entries) <= MAX_ROOMS, sorted(entries)


def defined_names(tree: ast.Module) -> Iterator[str]:
    """Names that a module defines at its top level; what it imports is another's."""
    for node in tree.body:
        match node:
            case ast.ClassDef() | ast.FunctionDef() | ast.AsyncFunctionDef():
                yield node.name
            case ast.Assign(targets=targets):
                yield from (part.id for target in targets for part in ast.walk(target) if isinstance(part, ast.Name))
            case ast.AnnAssign(target=ast.Name(id=name)):
                yield name


def test_no_public_name_is_defined_twice():
    homes = defaultdict(set)
    for path, tree in trees().items():
        for name in defined_names(tree):
            homes[name].add(place(path))
    twice = {name: sorted(where) for name, where in homes.items() if not name.startswith("_") and len(where) > 1}
    assert not twice


def functions() -> Iterator[tuple[str, ast.FunctionDef | ast.AsyncFunctionDef]]:
    for path, tree in trees().items():
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                yield f"{place(path)}.py:{node.lineno} {node.name}", node


def parameters(function: ast.FunctionDef | ast.AsyncFunctionDef) -> list[str]:
    """Names of the parameters, without ``self`` and ``cls``."""
    arguments = function.args
    named = [each.arg for each in (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs)]
    open_ended = [each.arg for each in (arguments.vararg, arguments.kwarg) if each]
    return [*(named[1:] if named[:1] in (["self"], ["cls"]) else named), *open_ended]


def test_functions_are_short():
    lengths = {title: (node.end_lineno or node.lineno) - node.lineno + 1 for title, node in functions()}
    assert not {title: lines for title, lines in lengths.items() if lines > MAX_LINES}


def test_functions_take_few_parameters():
    counts = {title: len(parameters(node)) for title, node in functions()}
    counts = {title: count for title, count in counts.items() if not title.startswith("cli/")}  # options of a verb
    assert not {title: count for title, count in counts.items() if count > MAX_PARAMETERS}


# --- the documentation -----------------------------------------------------------------------------------------------


def test_the_floors_in_the_readme_are_those_of_the_contract():
    drawn = runpy.run_path(str(DOCS / "floors.py"))
    text = PAGES[0].read_text(encoding="utf-8")
    assert drawn["render_readme"](text) == text, "type: python docs/floors.py"
    picture = drawn["render_svg"](drawn["read_floors"]())
    assert drawn["PICTURE"].read_text(encoding="utf-8") == picture, "type: python docs/floors.py"


PLACEHOLDERS = ("runs", "RUN", "FOLDER", "Pictures", "USER", "recipe.toml")  # first parts of paths that a reader makes
BUILT = "docs/_build/"  # by make docs
PATH = re.compile(r"[\w.-]+(?:/[\w.-]+)+/?|[\w-]+\.(?:py|toml)")


def named_paths(text: str) -> Iterator[str]:
    """What reads as a path of the repository: words of code, in line and in fenced blocks."""
    fenced = re.findall(r"^```.*?\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    inline = re.findall(r"`([^`\n]+)`", re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE))
    for word in " ".join([*fenced, *inline]).split():
        word = word.strip("'\"(),;")
        if PATH.fullmatch(word) and word.split("/")[0] not in PLACEHOLDERS and not word.startswith(BUILT):
            yield word


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_and_paths_of_the_pages_exist(page: Path):
    text = page.read_text(encoding="utf-8")
    links = re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", text)
    gone = [link for link in links if "://" not in link and not (page.parent / link).exists()]
    roots = (ROOT, PACKAGE, page.parent)
    for path in named_paths(text):
        recipe = ROOT / "recipes" / f"{path}.toml"
        if not recipe.exists() and not any((root / path).exists() for root in roots):
            gone.append(path)
    assert not gone


def glossary() -> Iterator[tuple[str, str]]:
    """The term and the code of each row of the glossary's tables."""
    for line in (DOCS / "glossary.md").read_text(encoding="utf-8").splitlines():
        cells = [cell.strip() for cell in line.strip("|").split(" | ")]
        if line.startswith("|") and len(cells) == 3 and cells[0] != "term" and not set(cells[0]) <= set("-:"):
            yield cells[0], cells[2]


def squeezed(text: str) -> str:
    """Lower case without separators: ``feature cache``, ``feature_cache`` and ``FeatureCache`` are one."""
    return re.sub(r"[\s_-]", "", text.lower())


def test_every_term_of_the_glossary_is_found_in_the_code():
    source = "\n".join(path.read_text(encoding="utf-8") for path in FILES)
    words, prose = set(re.findall(r"\w+", source)), squeezed(source)
    rows = list(glossary())
    assert len(rows) > 30, "the glossary has no table of three columns"
    for term, code in rows:
        assert squeezed(term) in prose, f"the term {term!r} is nowhere in src/clasp"
        named = re.findall(r"`([^`]+)`", code)
        assert named, f"{term}: the last column names no code"
        for name in named:
            there = (PACKAGE / name).exists() if "/" in name else set(re.findall(r"[^\W\d]\w*", name)) <= words
            assert there, f"{term}: {name} is not in src/clasp"
