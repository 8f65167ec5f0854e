"""Two processes of one thread each beside one process with two threads: ``clasp train`` with the same global batch.

The command is run as it is typed, three times in turns, each time with an empty feature cache; the numbers are those of
its ``cost.json``: seconds of a stage, which have the waiting for the other process in them, and no start-up. The recipe
trains low-rank updates in both towers and evaluates before the first step, after the last, and the saved weights, whose
bootstrap intervals the first process computes alone. Note: on two cores nothing can be won but what threads lose.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from benchmarks import harness, sample_data
from benchmarks.harness import REPEATS, Measured, Row, sized
from clasp.config.recipe import Recipe
from clasp.training.cost.ledger import RunCost, read_cost

BATCH = sized(64, 8)
PAIRS = sized(512, 32)
STEPS = sized(6, 2)
ONE, TWO = "1 process × 2 threads", "2 processes × 1 thread"
_COMMANDS: Mapping[str, tuple[str, list[str]]] = {TWO: ("1", ["--processes", "2"]), ONE: ("2", [])}
_TUNED = ['tune.image=["lora(rank=8)"]', 'tune.text=["lora(rank=8)"]', f"train.max_steps={STEPS}"]
# clasp needs no torchvision; that of the peers may not import here (benchmarks.peers), and transformers would try
_WITHOUT_TORCHVISION = "import sys\nsys.modules['torchvision'] = None\n"
_NOTE = f"global batch {BATCH}; two cores"


def rows() -> Sequence[Row]:
    tuned = measure(recipe(*_TUNED))
    return [
        _row("low-rank r=8, both towers", "pairs/s", tuned, lambda cost: _pairs(cost) / cost.seconds["training"]),
        _row(f"three evaluations of {PAIRS // 2} pairs, and intervals", "s", tuned, lambda c: c.seconds["evaluation"]),
    ]


def recipe(*changes: str) -> Recipe:
    """Half of the pairs train, half validate; heads are not initialised in closed form, which one process does."""
    sample_data.pairs(PAIRS)
    source = [f"data.train={sample_data.WORK / f'pairs-{PAIRS}.jsonl'}", f"data.image_root={sample_data.WORK}"]
    settings = [f"train.batch_size={BATCH}", f"train.micro_batch={BATCH}", "train.precision=float32"]
    fixed = ["data.val_fraction=0.5", "head.standardize=false", "train.evaluate_every=1000"]
    return sample_data.recipe(*source, *settings, *fixed, *changes)


def measure(recipe: Recipe) -> dict[str, list[RunCost]]:
    """What the run cost, by the processes, once for each repeat."""
    found: dict[str, list[RunCost]] = {name: [] for name in _COMMANDS}
    for number in range(sized(REPEATS, 1)):
        for name in list(_COMMANDS)[:: 1 if number % 2 else -1]:
            found[name].append(_train(recipe, *_COMMANDS[name]))
            print(f"  {name}: {found[name][-1].seconds}", file=sys.stderr)
    return found


def _train(recipe: Recipe, threads: str, arguments: Sequence[str]) -> RunCost:
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "run.toml"
        file.write_text(recipe.to_toml(), encoding="utf-8")
        command = [sys.executable, "-m", "clasp", "train", str(file), "--name", "run", "--runs", folder, *arguments]
        (Path(folder) / "sitecustomize.py").write_text(_WITHOUT_TORCHVISION, encoding="utf-8")
        surroundings = {
            **os.environ,
            "OMP_NUM_THREADS": threads,
            "CLASP_CACHE": str(Path(folder) / "cache"),
            "PYTHONPATH": os.pathsep.join(filter(None, [folder, os.environ.get("PYTHONPATH")])),
        }
        done = subprocess.run(command, env=surroundings, capture_output=True, text=True, check=False)
        if done.returncode:
            lines = done.stderr.strip().splitlines()
            raise RuntimeError(f"{' '.join(command)}: {lines[-1] if lines else done.returncode}")
        return read_cost(Path(folder) / "run")


def _row(work: str, unit: str, found: Mapping[str, Sequence[RunCost]], of: Callable[[RunCost], float]) -> Row:
    two, one = (Measured(name, tuple(of(cost) for cost in found[name])) for name in (TWO, ONE))
    return Row(f"{work}: {TWO}", unit, two, ONE, one, None, "higher" if unit == "pairs/s" else "lower", _NOTE)


def _pairs(cost: RunCost) -> int:
    return sum(session.pairs for session in cost.sessions)


if __name__ == "__main__":
    harness.main(rows)
