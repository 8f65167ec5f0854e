"""``clasp report``: one self-contained HTML file about one or several runs.

Input: run folders and the path of the file. Output: the file. Note: only files of the runs are read, no model is
loaded; a path that cannot be written and a run named twice are found before the first run is read.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from clasp.report.html_report import render_html_report
from clasp.report.run_record import read_run_record
from clasp.types import UserError


def write_report(runs: Sequence[Path], out: Path) -> int:
    """Write the report of these runs to ``out``; returns its bytes. An existing file is replaced.

    Raises ``UserError``: a folder that is no run, one run twice, a damaged file, an ``out`` that cannot be written.
    """
    _require_writable(out)
    _require_distinct(runs)
    text = render_html_report([read_run_record(run, label) for run, label in zip(runs, run_labels(runs), strict=True)])
    part = out.with_name(f"{out.name}.part")
    try:
        part.write_text(text, encoding="utf-8")
        os.replace(part, out)
    except OSError as error:
        raise UserError(f"{out} cannot be written: {error.strerror}") from None
    finally:
        part.unlink(missing_ok=True)
    return out.stat().st_size


def run_labels(runs: Sequence[Path]) -> list[str]:
    """A label for each run: the name of its folder, with folders above it as far as names are equal otherwise."""
    parts = [run.resolve().parts for run in runs]
    depth = 1
    while len({each[-depth:] for each in parts}) < len(parts):
        depth += 1
    return ["/".join(each[-depth:]) for each in parts]


def _require_writable(out: Path) -> None:
    if out.suffix.lower() not in (".html", ".htm"):
        raise UserError(f"-o {out}: the report is an HTML file; name it with .html, e.g. {out.stem or 'report'}.html")
    if out.is_dir():
        raise UserError(f"-o {out} is a folder; name a file in it, e.g. {out / 'report.html'}")
    if not out.parent.is_dir():
        raise UserError(f"-o {out} cannot be written: there is no folder {out.parent}")
    if not os.access(out if out.exists() else out.parent, os.W_OK):
        raise UserError(f"-o {out} cannot be written: no permission")


def _require_distinct(runs: Sequence[Path]) -> None:
    places = [run.resolve() for run in runs]
    for number, run in enumerate(runs):
        if (first := places.index(places[number])) < number:
            also = "" if str(runs[first]) == str(run) else f", first as {runs[first]}"
            raise UserError(f"{run} is named twice{also}; a report has every run once")
