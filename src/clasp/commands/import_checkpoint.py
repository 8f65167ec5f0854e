"""Imports a checkpoint of another paper's code as a run, to be evaluated, indexed and searched like any other.

Input: a kind, a file and a run folder that does not exist yet. Output: the run. The base towers are in its ``towers/``,
which its recipe refers to as ``file:{run}/towers/…``; added or trained parameters are its delta. Note: the run is
written to a temporary folder next to its destination and moved there when it is complete.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import os
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from clasp.convert.importers.lilt import import_lilt
from clasp.convert.importers.msclip import import_msclip
from clasp.convert.importers.run_writer import ImportOptions, ImportReport
from clasp.data.atomic_files import translate_disk_errors
from clasp.errors import counted, require_printable_path
from clasp.training.run_folder import RunFolder
from clasp.types import UserError

# each takes the checkpoint, the run to write (its folder does not exist yet) and the options
IMPORTERS: dict[str, Callable[[Path, RunFolder, ImportOptions], ImportReport]] = {
    "lilt": import_lilt,
    "msclip": import_msclip,
}


@dataclass(frozen=True, slots=True)
class ImportResult:
    """The imported run and the importer's report."""

    run: Path
    report: ImportReport


def import_checkpoint(kind: str, checkpoint: Path, run: Path, options: ImportOptions) -> ImportResult:
    """Import ``checkpoint`` as ``run``; ``kind`` is a key of ``IMPORTERS``.

    Raises ``UserError``, and then leaves nothing on disk.
    """
    if kind not in IMPORTERS:
        near = difflib.get_close_matches(kind, IMPORTERS, n=1)
        hint = f"did you mean {near[0]}? " if near else ""
        raise UserError(f"unknown kind of checkpoint {kind!r}; {hint}kinds: {', '.join(IMPORTERS)}")
    require_printable_path(run)
    if run.exists() and not (run.is_dir() and not any(run.iterdir())):
        raise UserError(f"{run} is there already; choose another folder with -o, or delete it")
    parent = next(folder for folder in run.absolute().parents if folder.is_dir())
    with translate_disk_errors(run), tempfile.TemporaryDirectory(prefix=f".{run.name}-", dir=parent) as temporary:
        staged = RunFolder(Path(temporary) / run.name)
        report = IMPORTERS[kind](checkpoint, staged, options)
        facts = {"kind": kind, "file": checkpoint.name, "sha256": _sha256(checkpoint), **report.facts}
        staged.write("imported.json", json.dumps(facts, indent=1, default=str))
        staged.write("README.md", _readme(run, checkpoint, report))
        run.parent.mkdir(parents=True, exist_ok=True)
        os.replace(staged.path, run)
    return ImportResult(run, report)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _readme(run: Path, checkpoint: Path, report: ImportReport) -> str:
    """The text of the run's ``README.md``."""
    counts = [f"{part}: {c.trained:,} of {counted(c.total, 'parameter')} trained" for part, c in report.counts.items()]
    lines = "\n".join(f"- {line}" for line in (*report.lines, *counts))
    return f"""# {run.name}

An image–text model imported with clasp from `{checkpoint.name}`.

{lines}

```python
import clasp
model = clasp.load("{run}")
images = model.encode_image(["a.jpg"])
texts = model.encode_text(["a caption"])
model.similarity(images, texts)
```

`towers/` holds the two towers without what was added to them, `delta.safetensors` what was added or trained. The folder
may be moved as a whole. `imported.json` has the settings and the sha256 of the checkpoint, whose licence its weights
keep.
"""
