"""Timing of rows: a few steps of each, in its own process, so that no row shares memory or caches with another.

Input: a cell to time. Output: its record. The machine should be otherwise idle.
"""

from __future__ import annotations

from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

from studies.lilt.cells import Cell, Runner, World
from studies.lilt.claims import Claim
from studies.records import Record, Results


def run_alone(claim: Claim, cell: Cell, runner: Runner) -> Record:
    """``Runner.run`` in a new process, which writes the record; it is then also loaded in this one."""
    with ProcessPoolExecutor(max_workers=1, mp_context=get_context("spawn")) as process:
        process.submit(_run, claim.name, cell, runner.name, runner.world, runner.results.folder).result()
    runner.results = Results(runner.results.folder)
    record = runner.record(cell)
    assert record is not None, "the other process wrote it down"
    return record


def _run(claim: str, cell: Cell, name: str, world: World, results: Path) -> Record:
    return Runner(name, world, Results(results)).run(claim, cell)
