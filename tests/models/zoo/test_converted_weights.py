"""Converted towers in the cache: read back bitwise with their hashes, made again where the file is not what it was."""

from __future__ import annotations

import logging
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from clasp.models.tower import Tower
from clasp.models.weight_hashes import hash_tensors
from clasp.models.zoo import converted_weights
from clasp.models.zoo.converted_weights import ConvertedWeights, read_converted
from clasp.models.zoo.pip_packages import load_pip_backbone


class _Source:
    """A package's file that counts how often it is read."""

    def __init__(self) -> None:
        self.reads = 0

    def __call__(self) -> dict[str, Tensor]:
        self.reads += 1
        rows = torch.arange(48.0).reshape(6, 8)
        return {"odd": torch.arange(3, dtype=torch.int64), "table": rows.T, "bias": torch.linspace(-1, 1, 16)}


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(converted_weights, "cache_folder", lambda: tmp_path)
    return tmp_path / "towers"


def _load(source: _Source) -> ConvertedWeights:
    return read_converted("toy", "ab" * 32, source)


def _file(folder: Path) -> Path:
    return next(folder.glob("*.safetensors"))


def test_converted_once_and_read_back_bitwise(folder, monkeypatch):
    source = _Source()
    first = _load(source)
    with monkeypatch.context() as patch:
        patch.setattr(
            converted_weights, "hash_tensors", lambda tensors: pytest.fail("hashed though the file is as written")
        )
        again = _load(source)
    assert source.reads == 1 and list(again.tensors) == list(first.tensors) == list(first.hashes)
    assert again.hashes == first.hashes == hash_tensors(_Source()())
    for name, tensor in _Source()().items():
        assert torch.equal(again.tensors[name], tensor) and again.tensors[name].data_ptr() % 64 == 0
    assert sorted(path.suffix for path in folder.iterdir()) == [".json", ".safetensors"]


def test_writing_to_a_tensor_leaves_the_file_as_it_was():
    source = _Source()
    _load(source)
    _load(source).tensors["bias"].zero_()
    assert torch.equal(_load(source).tensors["bias"], _Source()()["bias"]) and source.reads == 1


def test_a_copy_is_hashed_and_trusted(folder):
    source = _Source()
    whole = _load(source)
    path = _file(folder)
    data = path.read_bytes()
    path.unlink()
    path.write_bytes(data)  # another inode, another time
    assert _load(source).hashes == whole.hashes and source.reads == 1


def test_of_another_sha256_is_another_file(folder):
    _load(_Source())
    read_converted("toy", "cd" * 32, _Source())
    assert len(list(folder.glob("*.safetensors"))) == 2


def _truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 5)


def _alter(path: Path) -> None:
    """One weight changed in place, and the time of modification set back."""
    before = path.stat()
    with path.open("r+b") as file:
        file.seek(-4, os.SEEK_END)
        file.write(b"\x00\x01\x02\x03")
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def _drop_a_tensor(path: Path) -> None:
    tensors = load_file(path)
    save_file({"bias": tensors["bias"].clone()}, path)


def _damage_record(path: Path) -> None:
    path.with_suffix(".json").write_text('{"state": [1]}')


@pytest.mark.parametrize("damage", [_truncate, _alter, _drop_a_tensor, _damage_record])
def test_damaged_is_converted_again_with_one_line(damage, folder, caplog):
    source = _Source()
    whole = _load(source)
    damage(_file(folder))
    with caplog.at_level(logging.WARNING):
        again = _load(source)
    assert (
        source.reads == 2 and again.hashes == whole.hashes and torch.equal(again.tensors["bias"], _Source()()["bias"])
    )
    assert [record.message for record in caplog.records if "torn or altered" in record.message] and len(
        caplog.records
    ) == 1
    caplog.clear()
    _load(source)
    assert source.reads == 2 and not caplog.records


def test_a_cache_that_cannot_be_written_is_said(folder, caplog):
    folder.parent.joinpath("towers").write_text("a file where the folder should be")
    source = _Source()
    assert torch.equal(_load(source).tensors["bias"], _Source()()["bias"])
    assert "cannot be written" in caplog.text and "toy" in caplog.text


def test_recorded_hashes_of_a_tower_are_those_of_its_weights():
    backbone = load_pip_backbone("efficientnet-lite0")
    assert backbone.weight_hashes == hash_tensors(backbone.net.state_dict())
    tower = Tower(backbone)
    assert tower.weight_hashes == hash_tensors(tower.net.state_dict())
