"""``make bench``: runs every benchmark in its own process; then writes results.json and README.md.

A failing script is reported in the table with the last line of its error output. With ``CLASP_BENCH=quick`` sizes are
tiny, the numbers are meaningless, and neither file is written.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.harness import HEADER, machine, precisions, quick

HERE = Path(__file__).parent
BEGIN, END = "<!-- results: written by make bench -->", "<!-- end of results -->"
COMPARED = (
    "bfloat16",
    "tuning_methods",
    "flops_utilization",
    "encode",
    "heads_only",
    "feature_cache",
    "locked_image",
    "loss",
    "grad_cache",
    "msclip_forward",
)
KNOWN = ("processes", "scaling")
SURROUNDINGS = {"HF_HUB_OFFLINE": "1", "PYTHONWARNINGS": "ignore", "TOKENIZERS_PARALLELISM": "false"}


def main() -> None:
    began = time.monotonic()
    done: dict[str, Any] = {}
    for script in (*COMPARED, *KNOWN):  # written after each script, so that an interrupted run has partial results
        done[script] = run(script)
        results = {"machine": machine(), "minutes": round((time.monotonic() - began) / 60, 1), "scripts": done}
        if not quick():
            write(results)
    print(written(results))


def write(results: dict[str, Any]) -> None:
    """Write ``results.json``, and the table in ``README.md``."""
    (HERE / "results.json").write_text(json.dumps(results, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    readme = HERE / "README.md"
    before, _, rest = readme.read_text(encoding="utf-8").partition(BEGIN)
    text = written(results)
    readme.write_text(f"{before}{BEGIN}\n\n{text}\n\n{END}{rest.partition(END)[2]}", encoding="utf-8")


def run(script: str) -> dict[str, Any]:
    """A script's rows, its duration in seconds, and the last line of its error output if it failed."""
    print(f"{script} ...", file=sys.stderr, flush=True)
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "rows.json"
        command = [sys.executable, "-m", f"benchmarks.{script}", "--json", str(path)]
        done = subprocess.run(
            command, env={**SURROUNDINGS, **os.environ}, stderr=subprocess.PIPE, text=True, check=False
        )
        found = json.loads(path.read_text()) if path.exists() else {"rows": [], "cells": []}
    errors = [line for line in done.stderr.splitlines() if line.strip()]
    error = (errors or [f"ended with {done.returncode}"])[-1] if done.returncode else None
    return {"seconds": round(time.monotonic() - began), "error": error, **found}


def written(results: dict[str, Any]) -> str:
    """The results as Markdown."""
    about, scripts = results["machine"], results["scripts"]
    versions = ", ".join(f"{name} {version}" for name, version in about["versions"].items())
    lines = [
        f"{about['date']}; {about['processor']}, {about['cores']} cores, {about['threads']} threads, "
        f"{about['memory_GB']} GB; {about['system']}; {about['precision']}. {versions}. "
        f"All of it took {results['minutes']} minutes.",
        "",
        *(line for precision in precisions() for line in _section(scripts, precision)),
        "### Without a target",
        "",
        *_table(scripts, KNOWN, "float32"),
        "",
        "![time and memory against pairs, batch, blocks and tokens](scaling.png)",
    ]
    return "\n".join(lines)


def _section(scripts: dict[str, Any], precision: str) -> list[str]:
    return [f"### In {precision}", "", *_table(scripts, COMPARED, precision), ""]


def _table(scripts: dict[str, Any], names: tuple[str, ...], precision: str) -> list[str]:
    """The rows of some scripts that are in this precision; a script that failed is in the first table."""
    lines = [["script", *HEADER], ["---"] * (1 + len(HEADER))]
    for name in (name for name in names if name in scripts):
        found = zip(scripts[name]["rows"], scripts[name]["cells"], strict=True)
        lines += [[name, *cells] for row, cells in found if row["precision"] == precision]
        if scripts[name]["error"] and (names == KNOWN or precision == precisions()[0]):
            lines.append([name, f"**failed**: {scripts[name]['error']}", *[""] * (len(HEADER) - 1)])
    return ["| " + " | ".join(line) + " |" for line in lines]


if __name__ == "__main__":
    main()
