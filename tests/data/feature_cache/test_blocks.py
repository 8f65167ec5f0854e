"""Every flipped bit of a cache file is found, and only the rows of its block are computed again."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from clasp.data.feature_cache import blocks
from clasp.data.feature_cache.arrays import ArrayWriter, load_or_compute

ROWS, WIDTH = 100, 8


class Filled:
    """Fills rows in batches of ten; counts the batches."""

    def __init__(self) -> None:
        self.batches: list[int] = []

    def __call__(self, writer: ArrayWriter) -> None:
        writer.notes = {"skipped": [[3, "a", "b"]], **writer.notes}
        for first in range(0, ROWS, 10):
            rows = np.arange(first, first + 10)
            if writer.needs(rows):
                self.batches.append(first)
                writer.write(rows, torch.arange(10 * WIDTH).float().view(10, WIDTH) + first)


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocks, "BLOCK_BYTES", 300)  # rows of 32 bytes: no multiple of a row


def flip(path: Path, byte: int, bit: int = 0) -> None:
    data = bytearray(path.read_bytes())
    data[byte] ^= 1 << bit
    path.write_bytes(data)


def test_a_flipped_bit_is_said_and_only_its_rows_are_computed_again(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    key, fill = {"what": "toy"}, Filled()
    made = load_or_compute(tmp_path, key, (ROWS, WIDTH), fill)
    whole = made.take(np.arange(ROWS))
    header = made.path.stat().st_size - ROWS * WIDTH * 4
    for byte in (header, header + 32 * 35 + 5, made.path.stat().st_size - 1):
        flip(made.path, byte, 6)
        fill.batches.clear()
        caplog.clear()
        again = load_or_compute(tmp_path, key, (ROWS, WIDTH), fill)
        assert "rows are damaged" in caplog.text and 1 <= len(fill.batches) <= 3
        assert torch.equal(again.take(np.arange(ROWS)), whole) and again.metadata["skipped"] == [[3, "a", "b"]]
    fill.batches.clear()
    caplog.clear()
    load_or_compute(tmp_path, key, (ROWS, WIDTH), fill)
    assert not fill.batches and not caplog.text


def test_a_flipped_bit_of_the_metadata_or_the_header_too(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    key, fill = {"what": "toy"}, Filled()
    made = load_or_compute(tmp_path, key, (ROWS, WIDTH), fill)
    whole = made.take(np.arange(ROWS))
    note = made.path.with_suffix(".json")
    for path, byte in ((note, note.read_bytes().index(b'"a"') + 1), (note, 0), (made.path, 3), (made.path, 30)):
        flip(path, byte)
        caplog.clear()
        assert torch.equal(load_or_compute(tmp_path, key, (ROWS, WIDTH), fill).take(np.arange(ROWS)), whole)
        assert "computing it again" in caplog.text


def test_a_file_of_an_earlier_version_is_read(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    key, fill = {"what": "toy"}, Filled()
    made = load_or_compute(tmp_path, key, (ROWS, WIDTH), fill)
    about = json.loads(made.path.with_suffix(".json").read_text())
    older = {name: value for name, value in about.items() if name not in ("blocks", "checksum")}
    made.path.with_suffix(".json").write_text(json.dumps(older))
    fill.batches.clear()
    load_or_compute(tmp_path, key, (ROWS, WIDTH), fill)
    assert not fill.batches and not caplog.text
