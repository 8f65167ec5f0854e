"""Parameter counts of the LilT paper's models on meta tensors, to the unit: those of the reference implementation."""

from __future__ import annotations

import pytest

from clasp.config.build import build_model
from clasp.config.recipe import read_recipe
from lilt_reference import COUNTS, TOWERS, TUNED, tuned

ROWS = [(towers, row) for towers, rows in COUNTS.items() for row in rows]


def test_every_golden_row_is_here():
    assert {row for _, row in ROWS} == set(TUNED)
    assert set(COUNTS) == set(TOWERS)


@pytest.mark.parametrize(("towers", "row"), ROWS)
def test_counts(towers: str, row: str):
    image, text = TOWERS[towers]
    given = read_recipe("lilt/base", [f"image.tower={image}", f"text.tower={text}", *tuned(row)])
    counts = build_model(given, meta=True).parameter_counts()
    golden = COUNTS[towers][row]
    assert counts["model"].total == golden["total"]
    assert counts["model"].trained == golden["trained"]
    assert round(counts["model"].percent, 2) == golden["percent_trained"]
    assert counts["model"].delta_bytes == 4 * golden["trained"]
    for ours, theirs in (("image", "vision"), ("text", "text")):
        assert (counts[ours].total, counts[ours].trained) == (golden[f"{theirs}_total"], golden[f"{theirs}_trained"])
    assert counts["heads"].trained == golden["projections_trained"]
    assert counts["scale"].trained == golden["temperature_trained"]
