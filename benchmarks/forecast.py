"""The error of ``clasp doctor --measure``: forecast and real seconds of small runs, ``python -m benchmarks.forecast``.

Three runs of different kinds on pairs of the packaged sample: heads from the feature cache, low-rank updates in both
towers, and the top block of one tower with an evaluation after every epoch. Each is forecast and then trained in this
process, both with an empty feature cache. Printed: seconds by stage, and the error of their sum, of which at most 20 %
is wanted. Note: on a machine that does something else, the error is that of the machine.
"""

from __future__ import annotations

import argparse
import os
import shutil
import tempfile
from pathlib import Path

from benchmarks import sample_data
from clasp.commands.doctor import diagnose
from clasp.commands.train import train_recipe
from clasp.config.recipe import Recipe
from clasp.data.cache_folder import cache_folder

_WANTED_ERROR = 0.2
_STAGES = ("features", "training", "evaluation")
RUNS: dict[str, list[str]] = {
    "heads from the cache": ["train.epochs=400", "train.batch_size=64"],
    "low-rank, both towers": [
        'tune.image=["lora(rank=4)"]',
        'tune.text=["lora(rank=4)"]',
        "train.epochs=2",
        "train.batch_size=16",
    ],
    "top block, an evaluation every epoch": [
        'tune.text=["last(1)"]',
        "data.val_fraction=0.5",
        "train.epochs=12",
        "train.evaluate_every=1",
        "train.batch_size=32",
    ],
}


def recipe(name: str, pairs: int) -> Recipe:
    """The recipe of a run on so many pairs."""
    sample_data.pairs(pairs)
    source = [f"data.train={sample_data.WORK / f'pairs-{pairs}.jsonl'}", f"data.image_root={sample_data.WORK}"]
    return sample_data.recipe(*source, "train.precision=float32", *RUNS[name])


def measure(name: str, pairs: int) -> tuple[dict[str, float], dict[str, float]]:
    """Forecast and real seconds by stage."""
    made = recipe(name, pairs)
    shutil.rmtree(cache_folder() / "features", ignore_errors=True)
    with tempfile.TemporaryDirectory() as folder:
        forecast = next(section for section in diagnose(made, measured=True) if section.about == "forecast")
        done = train_recipe(made, Path(folder) / "run", say=lambda line: None)
    return dict(forecast.facts["seconds"]), {stage: done.cost.seconds[stage] for stage in _STAGES}


def main() -> None:
    words = argparse.ArgumentParser(prog="python -m benchmarks.forecast", description=__doc__)
    words.add_argument("--pairs", type=int, default=320)
    words.add_argument("--runs", nargs="+", default=list(RUNS), choices=list(RUNS))
    given = words.parse_args()
    os.environ["CLASP_CACHE"] = str(sample_data.WORK / "cache")  # of its own, since the features in it are deleted
    print(f"| run | seconds | {' | '.join(_STAGES)} | in all | error |")
    print("|---|---|---|---|---|---|---|")
    for name in given.runs:
        forecast, real = measure(name, given.pairs)
        sums = [sum(seconds.values()) for seconds in (forecast, real)]
        error = sums[0] / sums[1] - 1
        for kind, seconds, total in zip(("forecast", "real"), (forecast, real), sums, strict=True):
            cells = " | ".join(f"{seconds[stage]:.2f}" for stage in _STAGES)
            verdict = f"{error:+.0%} {'reached' if abs(error) <= _WANTED_ERROR else '**missed**'}"
            print(f"| {name} | {kind} | {cells} | {total:.1f} | {verdict if kind == 'forecast' else ''} |", flush=True)


if __name__ == "__main__":
    main()
