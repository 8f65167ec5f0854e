"""The study of a pre-trained trunk on toys: cells in their order, going on, test photos, and the page."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import tomlkit
from studies.sharing import trunk, trunk_cells, trunk_grid, trunk_page
from studies.sharing.trunk_grid import ROWS, Cell, cells, chosen, shown, start_of
from studies.sharing.trunk_page import BEGIN, END, write

from clasp.config.build import build_model
from toyruns import save_towers
from toystudies import write_photos


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_every_row_can_be_built(row):
    counts = build_model(Cell(row, 1e-3, 60).recipe, meta=True).parameter_counts()
    assert ("shared" in counts) == (row != trunk_grid.TWO) and counts["model"].percent < 5


def test_starts_come_first_then_rates_and_longer_runs_have_the_best():
    known = {}
    assert [cell.steps for cell in cells(known.get)] == [0, 0, 0] and chosen(ROWS[0], known.get) is None
    for row in ROWS:
        known[start_of(row).key] = {}
    assert [(cell.rate, cell.steps) for cell in cells(known.get)[3:]] == [(r, 60) for row in ROWS for r in row.rates]
    for cell in cells(known.get)[3:]:
        known[cell.key] = {"validation": -abs(cell.rate - 1e-3)}
    assert [(cell.steps, cell.rate) for cell in cells(known.get)[11:]] == [(180, 1e-3)] * 3 + [(540, 1e-3)] * 3
    assert len(shown(known.get)) == 12


@pytest.fixture
def photos(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Toy photos; and two rows of toy towers at one rate for few steps."""
    monkeypatch.setenv("CLASP_CACHE", str(tmp_path / "cache"))
    towers = save_towers(tmp_path / "towers")
    recipe = {
        "image": {"tower": f"file:{towers / 'image'}"},
        "text": {"tower": f"file:{towers / 'text'}"},
        "tune": {"image": ["norms"], "text": ["norms"]},
        "head": {"width": 8},
        "train": {"batch_size": 16, "precision": "float32", "select": "last", "log_every": 1},
    }
    (tmp_path / "trunk.toml").write_text(tomlkit.dumps(recipe), encoding="utf-8")
    for module in (trunk_grid, trunk_cells):
        monkeypatch.setattr(module, "PAIRS", 32)
    rows = tuple(replace(row, rates=(1e-3,)) for row in ROWS[:2])
    for name, value in {"ROWS": rows, "TWO": rows[0], "STEPS": (0, 2), "CHOSEN_AT": 2}.items():
        for module in (trunk_grid, trunk_page):
            monkeypatch.setattr(module, name, value)
    monkeypatch.setattr(trunk_grid, "COMMON", tmp_path / "trunk.toml")
    return write_photos(tmp_path / "photos")


def test_cells_are_trained_asked_and_gone_on_with(photos: Path, tmp_path: Path):
    given = ["--photos", str(photos), "--runs", str(tmp_path / "runs")]
    trunk.main(given, tmp_path)
    lines = [json.loads(line) for line in (tmp_path / "results" / "trunk.jsonl").read_text().splitlines()]
    assert [(line["row"], line["steps"]) for line in lines] == [
        (row.name, steps) for steps in (0, 2) for row in ROWS[:2]
    ]
    assert all(
        line["validation"] < 0 and set(line["answers"]) >= {"tinyimagenet/top1", "cifar10/top1"} for line in lines
    )
    assert "Test photos" not in (tmp_path / "trunk.md").read_text()

    again = tmp_path / "again"  # runs are there, records are not
    trunk.main(given, again)
    repeated = [json.loads(line) for line in (again / "results" / "trunk.jsonl").read_text().splitlines()]
    assert [line["answers"] for line in repeated] == [line["answers"] for line in lines]
    elsewhere = ["--photos", str(photos), "--runs", str(tmp_path / "elsewhere")]  # records are there, runs are not
    trunk.main([*elsewhere, "--test"], again)
    trunk.main([*elsewhere, "--test"], again)
    assert len((again / "results" / "trunk.jsonl").read_text().splitlines()) == 8, "each cell is asked once"
    text = (again / "trunk.md").read_text()
    assert "## Test photos" in text and "Not complete" not in text


def test_the_page_keeps_what_a_person_wrote_and_says_what_is_missing(tmp_path: Path):
    (tmp_path / "trunk.md").write_text(f"{BEGIN}\nOne trunk is enough.\n{END}", encoding="utf-8")
    text = write({}.get, tmp_path).read_text()
    assert "One trunk is enough." in text and "**Not complete.** Missing: two towers: rate 0.001, 0 steps" in text


def test_runs_and_photos_go_together(tmp_path: Path):
    for given in (["--test"], ["--photos", "nowhere"]):
        with pytest.raises(SystemExit, match="--photos FOLDER and --runs FOLDER"):
            trunk.main(given, tmp_path)
