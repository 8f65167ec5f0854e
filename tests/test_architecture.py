"""The rules of the house that a machine can check: floors, fences, opening lines, names."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FILES = sorted((ROOT / "src").rglob("*.py"))


def test_floors_hold():
    lint = Path(sys.executable).with_name("lint-imports")
    done = subprocess.run([lint, "--no-cache"], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout


def test_fences_and_style_hold():
    done = subprocess.run(
        [sys.executable, "-m", "ruff", "check", "."], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT / "src")))
def test_every_file_says_what_it_is(path: Path):
    tree = ast.parse(path.read_text(encoding="utf-8"))
    assert ast.get_docstring(tree), "a file opens by saying what it is"
    assert path.stem not in ("utils", "common", "helpers", "misc", "core")
    internal = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.module == "clasp"]
    assert not internal, "nothing inside the package imports from its own __init__"


def test_importing_does_nothing_heavy():
    script = "import sys, clasp, clasp.cli; assert not {'transformers', 'peft', 'accelerate', 'PIL'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", script], check=True, timeout=120)
