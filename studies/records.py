"""What studies write down: one line of JSON a cell, in a folder, and the machine that a number may depend on.

In: records, each with the key of its cell. Out: the same, found by key. Unusual: whatever is there is never run again,
so a study may be stopped at any time; a last line that was cut short by a stop is passed over.
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
"""Recipe keys by section, and what they were called when the first records were written"""


class Results:
    """Lines of JSON in a folder, a file a claim; all are read, whichever claim asks."""

    def __init__(self, folder: Path):
        self.folder = folder
        self._by_key = {record["key"]: record for file in sorted(folder.glob("*.jsonl")) for record in _lines(file)}

    def get(self, key: str) -> Record | None:
        return self._by_key.get(key)

    def add(self, claim: str, record: Record) -> None:
        """Write it at the end of the claim's file, whole or not at all after a stop."""
        self.folder.mkdir(parents=True, exist_ok=True)
        with (self.folder / f"{claim}.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(record, ensure_ascii=False) + "\n")
        self._by_key[record["key"]] = record


def as_recorded(recipe: dict[str, Any]) -> dict[str, Any]:
    """A recipe with the key names of the first records, so that the key of a cell outlives a renaming."""
    recorded = dict(recipe)
    for section in recipe.keys() & RENAMED.keys():
        recorded[section] = {RENAMED[section].get(name, name): value for name, value in recipe[section].items()}
    return recorded


def _lines(file: Path) -> Iterator[Record]:
    """The objects of a file; a last line that was cut short by a stop is passed over."""
    for line in file.read_text(encoding="utf-8").splitlines():
        if line.endswith("}"):
            yield json.loads(line)


def machine() -> dict[str, Any]:
    """What a number may depend on, and no name of any machine."""
    packages = ("torch", "transformers", "peft", "numpy")
    return {
        "python": platform.python_version(),
        **{name: version(name) for name in packages},
        "processor": platform.machine(),
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "day": time.strftime("%Y-%m-%d"),
    }
