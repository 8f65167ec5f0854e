"""A checkpoint that another paper's code left becomes a run, to be evaluated, indexed and searched like any other.

In go a kind, a file and a folder that is not there yet; out comes the run. What a plain tower has lies in its
``towers/``, which its recipe calls ``file:{run}/towers/…``; what was added or trained is its delta.
Unusual: a run is made beside its place and moved there when it is whole.
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
from clasp.training.run_folder import RunFolder, translate_disk_errors
from clasp.types import UserError

# each takes the checkpoint, the run to write (its folder is not there yet) and what is wanted of it
IMPORTERS: dict[str, Callable[[Path, RunFolder, ImportOptions], ImportReport]] = {
    "lilt": import_lilt,
    "msclip": import_msclip,
}


@dataclass(frozen=True, slots=True)
class ImportResult:
    """What came of a checkpoint."""

    run: Path
    report: ImportReport


def import_checkpoint(kind: str, checkpoint: Path, run: Path, options: ImportOptions) -> ImportResult:
    """Make ``run`` of ``checkpoint``; ``kind`` is a key of ``IMPORTERS``.

    Raises ``UserError``, and then leaves nothing on the disk.
    """
    if kind not in IMPORTERS:
        near = difflib.get_close_matches(kind, IMPORTERS, n=1)
        hint = f"did you mean {near[0]}? " if near else ""
        raise UserError(f"unknown kind of checkpoint {kind!r}; {hint}kinds: {', '.join(IMPORTERS)}")
    if run.exists() and not (run.is_dir() and not any(run.iterdir())):
        raise UserError(f"{run} is there already; choose another folder with -o, or delete it")
    near_by = next(folder for folder in run.absolute().parents if folder.is_dir())
    with translate_disk_errors(run), tempfile.TemporaryDirectory(prefix=f".{run.name}-", dir=near_by) as room:
        staged = RunFolder(Path(room) / run.name)
        told = IMPORTERS[kind](checkpoint, staged, options)
        facts = {"kind": kind, "file": checkpoint.name, "sha256": _sha256(checkpoint), **told.facts}
        staged.write("imported.json", json.dumps(facts, indent=1, default=str))
        staged.write("README.md", _readme(run, checkpoint, told))
        run.parent.mkdir(parents=True, exist_ok=True)
        os.replace(staged.path, run)
    return ImportResult(run, told)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _readme(run: Path, checkpoint: Path, told: ImportReport) -> str:
    """The text of the run's ``README.md``."""
    counts = [f"{part}: {c.trained:,} of {c.total:,} parameters train" for part, c in told.counts.items()]
    lines = "\n".join(f"- {line}" for line in (*told.lines, *counts))
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
