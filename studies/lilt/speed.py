"""Rows timed: a few steps of each, in a process of its own, so that no row has the memory or the caches of another.

In: a cell to time. Out: its record. The machine should have nothing else to do.
"""

from __future__ import annotations

from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

from studies.lilt.cells import Cell, Runner, World
from studies.lilt.claims import Claim
from studies.records import Record, Results


def run_alone(claim: Claim, cell: Cell, runner: Runner) -> Record:
    """``Runner.run`` in a fresh process, which writes the record; known here too afterwards."""
    with ProcessPoolExecutor(max_workers=1, mp_context=get_context("spawn")) as process:
        process.submit(_run, claim.name, cell, runner.name, runner.world, runner.results.folder).result()
    runner.results = Results(runner.results.folder)
    record = runner.record(cell)
    assert record is not None, "the other process wrote it down"
    return record


def _run(claim: str, cell: Cell, name: str, world: World, results: Path) -> Record:
    return Runner(name, world, Results(results)).run(claim, cell)
