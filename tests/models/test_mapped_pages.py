"""Pages of mapped weights are given back and read again; what was written to them is never lost."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from clasp.models.mapped_pages import release_mapped_pages

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="Linux only")
COUNT = 1 << 22  # 16 MB


@pytest.fixture
def mapped(tmp_path: Path) -> Tensor:
    save_file({"weight": torch.arange(COUNT, dtype=torch.float32)}, tmp_path / "weights.safetensors")
    return load_file(tmp_path / "weights.safetensors")["weight"]


def resident() -> float:
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith("Rss:"))


def test_resident_memory_falls_and_values_stay(mapped: Tensor) -> None:
    total = mapped.double().sum()
    before = resident()
    release_mapped_pages([mapped])
    assert before - resident() > 12
    assert mapped.double().sum() == total


@pytest.mark.parametrize("place", [0, COUNT // 2, -1], ids=["first", "middle", "last"])
def test_what_was_written_is_kept(mapped: Tensor, place: int) -> None:
    mapped[place] = -7
    release_mapped_pages([mapped])
    assert mapped[place] == -7 and mapped[1] == 1


def test_a_withheld_page_map_costs_nothing(mapped: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def refused(path: str, *_: object, **__: object) -> None:
        asked.append(path)
        raise PermissionError(path)

    with monkeypatch.context() as patch:
        patch.setattr("builtins.open", refused)
        release_mapped_pages([torch.empty(3, device="meta")])
        assert not asked, "there is nothing to give back"
        release_mapped_pages([mapped])
    assert asked == ["/proc/self/pagemap"] and mapped[1] == 1


def test_memory_of_its_own_is_left_alone() -> None:
    tensors = [torch.ones(COUNT), torch.ones(3), torch.ones(0), torch.ones(COUNT).share_memory_()]
    release_mapped_pages(tensors)
    assert all(bool((tensor == 1).all()) for tensor in tensors)
