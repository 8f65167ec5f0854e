"""The study of sharing on toys: cells of every kind, what is run next, and the page from recorded lines."""

from __future__ import annotations

from argparse import ArgumentTypeError
from dataclasses import replace
from pathlib import Path

import pytest

pytest.importorskip("matplotlib")

from studies.records import Record, Results
from studies.sharing import closeness, figure, page
from studies.sharing.__main__ import Part, main
from studies.sharing.cells import run
from studies.sharing.datasets import World
from studies.sharing.grid import (
    MSCLIP,
    NOTHING,
    RATES,
    SCRATCH,
    SEEDS,
    Cell,
    at_equal_arithmetic,
    cells,
    chosen,
    to_time,
)

from clasp.config.build import build_model
from toystudies import write_drawings, write_photos

FEW = ("train.batch_size=16", "image.net.layers=2", "text.net.layers=2", "text.net.vocabulary=300", "train.select=last")


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CLASP_CACHE", str(tmp_path_factory.mktemp("cache")))
        photos, emoji = tmp_path_factory.mktemp("photos"), tmp_path_factory.mktemp("emoji")
        yield World(write_photos(photos), write_drawings(emoji), held=10)


@pytest.mark.parametrize("row", SCRATCH, ids=lambda row: row.name)
def test_every_row_can_be_built(row):
    model = build_model(Cell(row, 1e-3, 1, 0).recipe, meta=True)
    assert model.parameter_counts()["model"].total > 1e6


def test_rows_of_equal_parameters_have_them():
    total = {
        row.name: build_model(Cell(row, 1e-3, 1, 0).recipe, meta=True).parameter_counts()["model"].total
        for row in SCRATCH
    }
    assert total["nothing shared, as many parameters as MS-CLIP"] == pytest.approx(total[MSCLIP.name], rel=0.06)
    assert total["MS-CLIP, as many parameters as CLIP"] == pytest.approx(total[NOTHING.name], rel=0.06)


def test_a_cell_trains_for_its_steps_and_answers(world: World, tmp_path: Path):
    row = replace(MSCLIP, changes=FEW)
    record = run(Cell(row, 1e-3, 9, 0), world, Results(tmp_path))
    assert world.different == 30 + 3 * 6 and record["different_pairs"] == world.different
    assert len(record["losses"]) >= 1 and record["macs"] > 1e6 and record["pairs_per_second"] > 0
    assert set(record["answers"]) == {"photos/top1", "drawings/recall@1", "drawings/recall@5"}
    assert len(record["answers"]["photos/top1"]["right"]) == 30 and record["validation"] < 0
    assert Results(tmp_path).get(record["key"]) == record
    timed = run(Cell(row, 1e-3, 3, 0, "speed"), world, Results(tmp_path))
    assert timed["pairs_per_second"] > 0 and "answers" not in timed and timed["key"] != record["key"]
    train, few = world.pairs(100, 0)
    ids = [pair.id for pair in train]
    assert len(ids) == 100 and len(set(ids[:48])) == 48
    assert set(ids[:48]) == set(ids[48:96]), "every pair once before any comes again"
    assert not {pair.image.name for pair in few} & {pair.image.name for pair in train}


def test_closeness_is_measured_before_and_after(world: World, monkeypatch: pytest.MonkeyPatch):
    row = replace(MSCLIP, changes=FEW)
    monkeypatch.setattr(closeness, "NEIGHBOURS", 3)
    record = closeness.run(Cell(row, 1e-3, 3, 0), world)
    for stage in ("before", "after"):
        found = record[stage]
        assert found["pairs"] == 6 and [each["image_block"] for each in found["blocks"]] == [0, 1, 2]
        assert [each["block"] for each in found["clusters"]] == [0, 1, 2] and found["attention"]["heads"] == 8
    assert record["before"] != record["after"]
    monkeypatch.setattr(closeness, "ROWS", (row,))
    monkeypatch.setattr(closeness, "chosen", lambda find: 1e-3)
    assert "Nothing is recorded yet." in closeness.render_page({}.get, "")
    stored = {closeness.key(cell): record for cell in closeness.cells({}.get)}
    text = closeness.render_page(stored.get, f"{page.BEGIN}\nThey are close.\n{page.END}")
    assert "They are close." in text and "Not complete" not in text
    assert text.count(f"| {MSCLIP.name} | 3 | ") == 2, "before and after"


def recorded(cell: Cell, good: int, macs: int) -> Record:
    """A record as a run leaves it, with so many of ten photos right."""
    right = "1" * good + "0" * (10 - good)
    answer = {"mean": good / 10, "chance": 0.1, "right": right, "asked": 1}
    questions = ("photos/top1", "drawings/recall@1", "drawings/recall@5")
    return {
        "key": cell.key,
        **{"row": cell.row.name, "rate": cell.rate, "steps": cell.steps, "seed": cell.seed, "macs": macs},
        **{"different_pairs": 48, "counts": {"model": {"total": 3_000_000}}, "pairs_per_second": 100.0},
        **{"answers": dict.fromkeys(questions, answer), "validation": -abs(cell.rate - 1e-3) - 1},
        **{"seconds": {"train": 60.0, "ask": 1.0}, "machine": {"python": "3", "day": "2026-01-01"}},
    }


def test_rates_come_first_then_rows_then_equal_arithmetic(tmp_path: Path):
    results = Results(tmp_path)

    def find(cell: Cell) -> Record | None:
        return results.get(cell.key)

    rows = (NOTHING, MSCLIP, SCRATCH[11])
    first = list(cells(rows, find))
    assert [cell.rate for cell in first[:6]] == [rate for rate in RATES for _ in range(2)]
    assert chosen(find) is None
    while left := [cell for cell in cells(rows, find) if find(cell) is None]:
        macs = 120 if cell_is_larger(left[0]) else 100
        results.add("cells", recorded(left[0], 6 if left[0].row is MSCLIP else 5, macs))
    for cell in to_time(rows):
        results.add("cells", recorded(cell, 5, 100))
    assert chosen(find) == 1e-3
    larger = at_equal_arithmetic(Cell(SCRATCH[11], 1e-3, 320, 1), 1e-3, find)
    assert larger is not None and larger.steps == 267 and find(larger) is not None
    assert at_equal_arithmetic(Cell(NOTHING, 1e-3, 320, 0), 1e-3, find) is None

    (tmp_path / "README.md").write_text(f"{page.BEGIN}\nSharing helps.\n{page.END}", encoding="utf-8")
    text = page.write(rows, find, tmp_path).read_text(encoding="utf-8")
    assert "Sharing helps." in text and "Not complete" not in text
    line = next(line for line in text.splitlines() if line.startswith(f"| {MSCLIP.name}"))
    assert line.split(" | ")[1:6] == ["3,000,000", "0.0", "320", "100", str(len(SEEDS))]
    assert "60.0 (" in line and "+10.0 (" in line
    drawn = figure.draw(rows, find, tmp_path)
    assert drawn is not None and drawn.read_bytes().startswith(b"\x89PNG")


def cell_is_larger(cell: Cell) -> bool:
    return cell.row is SCRATCH[11]


def test_the_command_makes_a_page_of_nothing_and_refuses_missing_folders(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    main(["--page"], tmp_path)
    assert "**Not complete.**" in (tmp_path / "README.md").read_text(encoding="utf-8")
    assert "README.md" in capsys.readouterr().out
    for given, says in (([], "--photos FOLDER is needed"), (["--photos", "nowhere"], "nowhere is not a folder")):
        with pytest.raises(SystemExit) as refused:
            main(given, tmp_path)
        assert says in str(refused.value)


def test_parts_take_every_cell_once():
    keys = [cell.key for cell in to_time(SCRATCH)]
    parts = [Part.read(f"{number}/3") for number in (1, 2, 3)]
    assert all(sum(part.takes(key) for part in parts) == 1 for key in keys)
    for wrong in ("0/2", "3/2", "a/b", "2"):
        with pytest.raises(ArgumentTypeError, match="such as 1/2"):
            Part.read(wrong)
