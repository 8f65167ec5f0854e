"""The cost of a run in stages: sums over all of them, with the time and energy between them."""

from __future__ import annotations

import pytest

from clasp.training.cost.ledger import CostSession, RunCost, StepFlops
from clasp.training.cost.meters import Measurement
from clasp.training.cost.stages import join_stage_costs

PARTS = {"model": {"total": 10, "trained": 1}}


def stage(pairs: int, seconds: float, flops: int | None, energy: float | None = 0.1) -> RunCost:
    session = CostSession(0, pairs // 4, pairs, None, 1.0, {"training": seconds}, 50, "rss", energy, "meter", {})
    work = None if flops is None else StepFlops(flops, 2 * flops, 4, 4, ())
    return RunCost(PARTS, work, {}, 7, (session,))


def test_all_stages_and_what_was_between_are_summed():
    kept = stage(0, 2.0, None)
    whole = join_stage_costs(kept, [stage(8, 3.0, 40), stage(24, 4.0, 80), kept], 12.0, Measurement(0.5, "meter"))
    assert whole.seconds == {"training": 9.0, "between stages": 3.0}
    assert whole.energy_kwh == pytest.approx(0.5) and whole.peak_bytes == 50 and whole.delta_bytes == 7
    assert (whole.forward_flops, whole.backward_flops) == (17.5, 35.0), "a quarter of the pairs at 10, the others at 20"


def test_energy_is_unknown_where_a_part_was_not_measured():
    kept = stage(8, 3.0, 40)
    assert join_stage_costs(kept, [kept, stage(0, 1.0, None, None)], 5.0, Measurement(1.0, "m")).energy_kwh is None
    assert join_stage_costs(kept, [kept], 5.0, Measurement(None, "none here")).energy_kwh is None
    assert join_stage_costs(stage(0, 1.0, None), [stage(0, 1.0, None)], 0.5, Measurement(None, "")).work is None
