"""The cost of a run that was trained in stages, of which one was kept: all of them, and what was between.

Input: the cost of each stage, seconds and energy of the whole. Output: one ``RunCost``: parameters and delta of the
kept stage, sessions of all, and one session for the time outside of stages. Note: FLOPs per pair are the mean over the
pairs of all stages with gradient steps; ``cost.json`` of a stage has its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from clasp.training.cost.ledger import CostSession, RunCost, StepFlops
from clasp.training.cost.meters import Measurement


def join_stage_costs(kept: RunCost, stages: Sequence[RunCost], seconds: float, energy: Measurement) -> RunCost:
    """``kept`` is one of the ``stages``, which are in the order in which they were trained; ``seconds`` and ``energy``
    (kWh) are those of the whole, stages included."""
    sessions = [session for stage in stages for session in stage.sessions]
    once = {side: part for stage in stages for side, part in stage.once.items()}
    joined = replace(kept, work=_mean_work(stages), once=once, sessions=tuple(sessions))
    spent, in_stages = sum(joined.seconds.values()), joined.energy_kwh
    known = energy.value is not None and in_stages is not None
    between = CostSession(
        first_step=0,
        steps=0,
        pairs=0,
        pairs_per_second=None,
        step_seconds=0.0,
        seconds={"between stages": max(0.0, seconds - spent)},
        peak_bytes=joined.peak_bytes,
        peak=kept.sessions[-1].peak,
        energy_kwh=max(0.0, (energy.value or 0.0) - (in_stages or 0.0)) if known else None,
        energy=energy.method,
        machine=kept.sessions[-1].machine,
    )
    return replace(joined, sessions=(*sessions, between))


def stage_pairs(stage: RunCost) -> int:
    """The pairs of all gradient steps of a stage."""
    return sum(session.pairs for session in stage.sessions)


def _mean_work(stages: Sequence[RunCost]) -> StepFlops | None:
    """FLOPs of a step, the mean over the pairs of all steps; the batch is that of the last stage with steps."""
    worked = [(stage.work, stage_pairs(stage)) for stage in stages if stage.work is not None and stage_pairs(stage)]
    if not worked:
        return None
    last, pairs = worked[-1][0], sum(count for _, count in worked)
    forward = sum(work.forward / work.pairs * count for work, count in worked) / pairs
    backward = sum(work.backward / work.pairs * count for work, count in worked) / pairs
    left_out = tuple(dict.fromkeys(name for work, _ in worked for name in work.left_out))
    return replace(last, forward=round(last.pairs * forward), backward=round(last.pairs * backward), left_out=left_out)
