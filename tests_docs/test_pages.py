"""The pages that teach, run as they are written: every ``sh`` and ``python`` block, in order, in a folder of its own.

Each page is a test, and ``make pages`` runs two at a time. Note: they need the first page's run, which is made once and
copied into the folder of each. Blocks below ``<!-- not run: … -->`` are left out.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from contextlib import suppress
from pathlib import Path

import pytest

from clasp.commands.demo_photos import installed_photos
from clasp.data.cache_folder import cache_folder
from clasp.data.samples.emoji import unpack_emoji_sample
from docblocks import DOCS, read_blocks

FIRST = "start/first-search.md"
SLOW = ("start/own-folder.md", "start/recipe.md", "start/memory.md", "start/deploy.md", "start/low-resource.md")
BRIEF = ("start/sharing.md", "python.md")
BLOCK_SECONDS = 900
"""After which a block is taken to hang; the longest takes a minute on two cores with nothing else to do"""
CLASSES = {"FOLDER": slice(0, 1000, 25), "HELD_OUT": slice(1, 1000, 50)}
"""Folder -> which of the sample's concepts are its classes: 40 and 20"""


pytestmark = pytest.mark.timeout(3 * BLOCK_SECONDS)


@pytest.fixture(scope="session")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the first of the processes that test has prepared, for all."""
    base = tmp_path_factory.getbasetemp()
    shared = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base
    place = shared / "prepared"
    with (shared / "prepared.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (place / "ready").exists():
            shutil.rmtree(place, ignore_errors=True)
            prepare(place)
            (place / "ready").touch()
    return place


@pytest.fixture
def page_folder(prepared: Path, tmp_path: Path) -> Path:
    """A copy of what is prepared, for one page."""
    return shutil.copytree(prepared, tmp_path / "page")


def prepare(place: Path) -> None:
    """A folder with what the pages name: class folders of drawings, photographs in ``~/Pictures``, and two runs."""
    sample = unpack_emoji_sample(cache_folder(), quick=False)
    rows = [json.loads(line) for line in sample.pairs("train").read_text(encoding="utf-8").splitlines()]
    concepts = list(dict.fromkeys(row["caption"][0]["text"] for row in rows))
    for folder, part in CLASSES.items():
        for row in rows:
            if (name := row["caption"][0]["text"]) in concepts[part]:
                (place / folder / name).mkdir(parents=True, exist_ok=True)
                shutil.copy(sample.folder / row["image"], place / folder / name / row["image"].replace("/", "-"))
    (place / "home" / "Pictures").mkdir(parents=True)
    photos = installed_photos()
    for name, file in photos.items():
        shutil.copy(file, place / "home" / "Pictures" / name)
    shutil.copy(photos["china.jpg"], place / "a.jpg")
    shutil.copy(photos["coffee.png"], place / "b.png")
    run_page(FIRST, place)
    shutil.copytree(place / "runs" / "photos", place / "runs" / "start")


def run_page(page: str, place: Path) -> None:
    """Fails with what a block printed where its exit code is not 0."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    env = {**os.environ, "PATH": path, "HOME": str(place / "home"), "CLASP_CACHE": str(cache_folder())}
    for language, text, runs in read_blocks((DOCS / page).read_text(encoding="utf-8")):
        if runs:
            program = ["bash", "-euo", "pipefail", "-c"] if language == "sh" else [sys.executable, "-c"]
            code, printed = run_block([*program, text], place, env)
            assert code == 0, f"{page}\n{text}\n{printed[-4000:]}"


def run_block(program: list[str], place: Path, env: dict[str, str]) -> tuple[int, str]:
    """The exit code and what was printed; what a block leaves running is killed."""
    with tempfile.TemporaryFile() as printed:
        block = subprocess.Popen(
            program, cwd=place, env=env, stdout=printed, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            code = block.wait(timeout=BLOCK_SECONDS)
        finally:
            with suppress(ProcessLookupError):
                os.killpg(block.pid, signal.SIGKILL)
            block.wait()
        printed.seek(0)
        return code, printed.read().decode(errors="replace")


def test_the_first_page_runs(prepared: Path):
    assert (prepared / "runs" / "photos" / "search.png").exists()


@pytest.mark.parametrize("page", [*(pytest.param(page, marks=pytest.mark.slow_page) for page in SLOW), *BRIEF])
def test_page_runs(page: str, page_folder: Path):
    run_page(page, page_folder)
