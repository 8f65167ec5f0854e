"""``clasp export``: the model of a run in the format of another library.

Input: a run folder, a format of ``EXPORTERS`` (or ``package.module:Name``) and a folder to write. Output: that folder,
with what was measured. Note: it is written to a temporary folder next to its destination, a hidden one, and moved there
when it is complete and on disk; ``kill -9`` leaves the hidden one.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from clasp.convert.exporters.hub_folder import check_push, export_hub
from clasp.convert.exporters.job import ExportOptions, ExportReport, ExportTarget, open_job
from clasp.convert.exporters.merged_towers import export_merged
from clasp.convert.exporters.onnx_graphs import export_onnx, require_onnx_extra
from clasp.convert.exporters.sentence_transformers import export_sentence_transformers
from clasp.data.atomic_files import sync_folder, sync_tree
from clasp.data.plugins import load_named
from clasp.errors import require_printable_path
from clasp.training.run_folder import RunFolder, translate_disk_errors
from clasp.training.unfinished import unfinished_lines
from clasp.types import MessageCallback, UserError

EXPORTERS: dict[str, ExportTarget] = {
    "onnx": ExportTarget(export_onnx, frozenset({"quantize"}), require_onnx_extra),
    "merged": ExportTarget(export_merged),
    "sentence-transformers": ExportTarget(export_sentence_transformers),
    "hub": ExportTarget(export_hub, frozenset({"push"}), check_push),
}
"""Format to its exporter; a new one is a line here"""

_OPTION_NAMES = {"quantize": "--int8", "push": "--push"}


def export_run(
    run: Path, target: str, out: Path, options: ExportOptions | None = None, *, say: MessageCallback = lambda line: None
) -> ExportReport:
    """Export ``run`` to the folder ``out``; ``target`` is a key of ``EXPORTERS``, or names an ``ExportTarget``.

    Raises ``UserError``, and then leaves nothing on disk.
    """
    options = options or ExportOptions()
    row = _find_target(target)
    for name, value in asdict(options).items():
        if value is not None and name not in row.options:
            takes = [key for key, each in EXPORTERS.items() if name in each.options]
            raise UserError(f"{_OPTION_NAMES[name]} is for --to {' or '.join(takes)}, not for --to {target}")
    require_printable_path(out)
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise UserError(f"{out} is there already; choose another folder with -o, or delete it")
    RunFolder(run).recipe()
    if row.check is not None:
        row.check(options)
    for line in unfinished_lines(run):
        say(line)
    job = open_job(run, options, say)
    parent = next(folder for folder in out.absolute().parents if folder.is_dir())
    with translate_disk_errors(out), tempfile.TemporaryDirectory(prefix=f".{out.name}-", dir=parent) as temporary:
        staged = Path(temporary) / out.name
        staged.mkdir()
        report = row.export(job, staged)
        out.parent.mkdir(parents=True, exist_ok=True)
        sync_tree(staged)
        os.replace(staged, out)
        sync_folder(out.parent)
    return report


def _find_target(target: str) -> ExportTarget:
    found: Any = load_named(target, EXPORTERS, "--to")
    if isinstance(found, ExportTarget):
        return found
    export: Callable[..., ExportReport] = found  # a function of the user's module
    return ExportTarget(export)
