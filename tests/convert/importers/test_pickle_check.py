"""Crafted checkpoints: each is refused in one line, before torch makes anything of it, and costs no memory."""

from __future__ import annotations

import io
import pickle
import resource
import struct
import warnings
import zipfile
from collections import Counter, OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from clasp.commands.import_checkpoint import import_checkpoint
from clasp.convert.importers.run_writer import ImportOptions
from clasp.convert.importers.safe_pickle import safe_load_pickle
from clasp.types import UserError

GOLDEN = Path(__file__).parents[2] / "golden"
FILES = {"lilt": GOLDEN / "lilt_lwa_ln.checkpoint.pth", "msclip": GOLDEN / "msclip_plain.state_dict.pth"}
EYE = torch.eye(4)


def _nested() -> Any:
    return torch.nested.nested_tensor([torch.ones(2), torch.ones(3)])


TENSORS: dict[str, Callable[[torch.Tensor], Any]] = {
    "sparse": lambda tensor: EYE.to_sparse(),
    "csr": lambda tensor: EYE.to_sparse_csr(),
    "csc": lambda tensor: EYE.to_sparse_csc(),
    "bsr": lambda tensor: EYE.to_sparse_bsr(2),
    "meta": lambda tensor: tensor.to("meta"),
    "nested": lambda tensor: _nested(),
    "float8": lambda tensor: tensor.to(torch.float8_e4m3fn),
    "quantised": lambda tensor: torch.quantize_per_tensor(EYE, 0.1, 0, torch.qint8),
    "complex": lambda tensor: tensor.to(torch.complex64),
    "uint16": lambda tensor: torch.zeros(4, dtype=torch.uint16),
    "expanded": lambda tensor: torch.zeros(1).expand(1 << 40),
    "expanded to the shape": lambda tensor: torch.zeros(()).expand(tensor.shape),
    "empty": lambda tensor: torch.zeros(0),
    "other shape": lambda tensor: torch.zeros(3, 5, 7),
    "not finite": lambda tensor: torch.full_like(tensor, torch.inf),
    "a number": lambda tensor: 3,
    "bytearray": lambda tensor: bytearray(10),
    "counter": lambda tensor: Counter("aab"),
    "set": lambda tensor: {1, 2},
    "module": lambda tensor: torch.nn.Linear(2, 2),
}


@pytest.mark.parametrize("craft", TENSORS)
@pytest.mark.parametrize("kind", FILES)
def test_what_stands_for_a_tensor_is_refused_in_one_line(kind: str, craft: str, tmp_path: Path) -> None:
    found = torch.load(FILES[kind], weights_only=True)
    tensors = found["model"] if kind == "lilt" else found
    name = next(name for name in tensors if tensors[name].ndim > 1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        tensors[name] = TENSORS[craft](tensors[name])
        torch.save(found, tmp_path / "crafted.pth")
    with pytest.raises(UserError, match=r"crafted\.pth") as refused:
        import_checkpoint(kind, tmp_path / "crafted.pth", tmp_path / "run", ImportOptions())
    assert "\n" not in str(refused.value)
    assert not (tmp_path / "run").exists()


def _pickled(*codes: bytes) -> bytes:
    return b"\x80\x02" + b"".join(codes) + b"."


def _call(name: str, *numbers: int) -> bytes:
    module, _, function = name.rpartition(".")
    arguments = b"(" + b"".join(b"J" + struct.pack("<i", number) for number in numbers) + b"t"
    return f"c{module}\n{function}\n".encode() + arguments + b"R"


def _legacy(contents: bytes) -> bytes:
    """A file as torch wrote before it wrote zips, without storages."""
    heads = [0x1950A86A20F9469CFC6C, 1001, {"little_endian": True}]
    return b"".join(pickle.dumps(head, 2) for head in heads) + contents + pickle.dumps([], 2)


def _storage(numbers: int) -> bytes:
    pid = ["storage", "FloatStorage", "0", "cpu", numbers, None]
    parts = [b"ctorch\nFloatStorage\n" if part == "FloatStorage" else pickle.dumps(part, 2)[2:-1] for part in pid]
    return b"(" + b"".join(parts) + b"tQ"


def _zipped(contents: bytes, method: int = zipfile.ZIP_STORED) -> bytes:
    made = io.BytesIO()
    with zipfile.ZipFile(made, "w", method) as archive:
        archive.writestr("archive/data.pkl", contents)
        archive.writestr("archive/version", "3\n")
    return made.getvalue()


GIGABYTES = 2_000_000_000
BYTES: dict[str, tuple[Callable[[], bytes], str]] = {
    "bytearray": (lambda: _pickled(_call("builtins.bytearray", GIGABYTES)), "refers to builtins.bytearray"),
    "bytearray, python 2": (lambda: _pickled(_call("__builtin__.bytearray", GIGABYTES)), "builtins.bytearray"),
    "tensor class": (lambda: _pickled(_call("torch.FloatTensor", GIGABYTES)), "refers to torch.FloatTensor"),
    "storage class": (lambda: _zipped(_pickled(_call("torch.FloatStorage", GIGABYTES))), "is not a checkpoint"),
    "legacy storage": (lambda: _legacy(_pickled(_storage(GIGABYTES))), "claim 8,000,000,000 bytes"),
    "zipped storage": (lambda: _zipped(_pickled(_storage(GIGABYTES))), "claim 8,000,000,000 bytes"),
    "negative storage": (lambda: _zipped(_pickled(_storage(-4))), "is not a checkpoint"),
    "compressed": (lambda: _zipped(_pickled(b"N" * (1 << 24)), zipfile.ZIP_DEFLATED), "entries are compressed"),
    "long": (lambda: _zipped(_pickled(b"X" + struct.pack("<I", 1 << 24) + bytes(1 << 24))), "over 16,777,216 bytes"),
    "memo": (lambda: _pickled(b"Nr" + struct.pack("<I", 0xFFFFFFF0)), "is not a checkpoint"),
    "frame": (lambda: b"\x80\x04\x95" + struct.pack("<Q", 1 << 40) + b"N.", "is not a checkpoint"),
    "length of a string": (lambda: _pickled(b"X" + struct.pack("<I", 0xFFFFFFF0)), "is not a checkpoint"),
    "nested key": (lambda: _zipped(_pickled(b"}" + b")" + b"\x85" * 100_000 + b"Ns")), "a key in it is not"),
    "nested list": (lambda: _zipped(_pickled(b"]" * 100_000 + b"a" * 99_999)), "nested without end"),
    "empty": (lambda: b"", "is not a checkpoint"),
    "two contents": (lambda: _two_contents(), "is not a checkpoint"),
}


def _two_contents() -> bytes:
    made = io.BytesIO()
    with zipfile.ZipFile(made, "w") as archive:
        archive.writestr("a/data.pkl", _pickled(b"N"))
        archive.writestr("b/data.pkl", _pickled(b"N"))
    return made.getvalue()


@pytest.mark.parametrize("craft", BYTES)
def test_crafted_bytes_cost_no_memory(craft: str, tmp_path: Path) -> None:
    make, words = BYTES[craft]
    (tmp_path / "crafted.pth").write_bytes(make())
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(UserError) as refused:
        safe_load_pickle(tmp_path / "crafted.pth")
    assert words in str(refused.value) and "\n" not in str(refused.value)
    grown = 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
    assert grown < 300e6, f"{grown / 1e6:.0f} MB"


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
def test_what_a_checkpoint_may_hold_loads_as_before(legacy: bool, tmp_path: Path) -> None:
    floats = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
    kinds = (*floats, torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool)
    tensors = {str(kind): torch.arange(6).to(kind).view(2, 3).T for kind in kinds}
    others = {"parameter": torch.nn.Parameter(torch.ones(3)), "epoch": 3, "lr": [1e-3, None, True], "bytes": b"\xff\0"}
    held = OrderedDict({**tensors, **others})
    torch.save(held, tmp_path / "a.pth", _use_new_zipfile_serialization=not legacy)
    found = safe_load_pickle(tmp_path / "a.pth")
    assert found.keys() == held.keys() and found["lr"] == held["lr"] and found["bytes"] == held["bytes"]
    for name, tensor in tensors.items():
        assert torch.equal(found[name], tensor) and found[name].dtype == tensor.dtype
