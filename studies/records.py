"""Records of studies: one line of JSON per cell, in a folder, with the machine that a number may depend on.

Input: records, each with the key of its cell. Output: the same, by key. Note: a recorded cell is never run again, so a
study may be interrupted at any time; a truncated last line is skipped.
"""

from __future__ import annotations

import json
import platform
import time
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

Record = dict[str, Any]
RENAMED = {"train": {"batch_size": "batch", "select": "keep"}}
"""Recipe keys by section, and their names when the first records were written"""


class Results:
    """JSON lines in a folder, one file per claim; the files of all claims are read."""

    def __init__(self, folder: Path):
        self.folder = folder
        self._by_key = {record["key"]: record for file in sorted(folder.glob("*.jsonl")) for record in _lines(file)}

    def get(self, key: str) -> Record | None:
        return self._by_key.get(key)

    def add(self, claim: str, record: Record) -> None:
        """Append the record to the claim's file, atomically with respect to interruption."""
        self.folder.mkdir(parents=True, exist_ok=True)
        with (self.folder / f"{claim}.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(record, ensure_ascii=False) + "\n")
        self._by_key[record["key"]] = record


def as_recorded(recipe: dict[str, Any]) -> dict[str, Any]:
    """A recipe with the key names of the first records, so that cell keys survive renamings."""
    recorded = dict(recipe)
    for section in recipe.keys() & RENAMED.keys():
        recorded[section] = {RENAMED[section].get(name, name): value for name, value in recipe[section].items()}
    return recorded


def _lines(file: Path) -> Iterator[Record]:
    """The objects of a file; a truncated last line is skipped."""
    for line in file.read_text(encoding="utf-8").splitlines():
        if line.endswith("}"):
            yield json.loads(line)


def machine() -> dict[str, Any]:
    """Hardware and software that a number may depend on; no host name."""
    packages = ("torch", "transformers", "peft", "numpy")
    return {
        "python": platform.python_version(),
        **{name: version(name) for name in packages},
        "processor": platform.machine(),
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "day": time.strftime("%Y-%m-%d"),
    }
