"""How well ``clasp pair`` predicts the ranking of trained runs: rank correlations on the packaged towers.

Input: the folder of the photo sets (``flickr8k-sample``, ``tinyimagenet``). Output: ``pair_picker.md``. For every pair
of a packaged image tower and a packaged text tower: what ``clasp pair`` measures on the training photos, and the metric
on other photos of heads trained by gradient steps and of low-rank updates in both towers. Note: four pairs of towers
have 24 orders, so that a correlation of 1 has p = 1/24 for each set.

    python -m studies.pair_picker FOLDER
"""

from __future__ import annotations

import argparse
import platform
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from studies.formatting import line

from clasp.commands.evaluate import evaluate_run
from clasp.commands.pair import rank_tower_pairs
from clasp.commands.train import train_recipe
from clasp.config.recipe import recipe_from_dict
from clasp.report.pair_table import TowerPair, cka_excess, neighbour_excess
from clasp.report.tables import main_metric

IMAGES = ("pip:efficientnet-lite0", "pip:dinov2-small-focus")
TEXTS = ("pip:minilm-l6", "pip:multilingual-e5-small")
SIZE = 112  # pixels, so that the study takes minutes on two cores


@dataclass(frozen=True)
class PhotoSet:
    """Pairs to train on, others to evaluate on, and the task; files below the folder that is given."""

    train: str
    held_out: str
    task: str
    options: tuple[str, ...] = ()


SETS = {
    "Flickr8k": PhotoSet(
        "flickr8k-sample/flickr8k-sample-train.tar", "flickr8k-sample/flickr8k-sample-val.tar", "retrieval"
    ),
    "Tiny-ImageNet": PhotoSet(
        "tinyimagenet/tinyimagenet-train-00.tar", "tinyimagenet/tinyimagenet-val.tar", "zeroshot", ("label=class",)
    ),
}
HEAD = {"kind": "linear", "width": 128, "standardize": True, "init": "cca"}
TRAINED: dict[str, dict[str, Any]] = {
    "heads": {
        "tune": {"image": ["none"], "text": ["none"]},
        "head": {**HEAD, "noise": 1.0, "dropout": 0.3},
        "train": {"epochs": 20, "lr": 3e-4},
    },
    "low rank": {
        "tune": {"image": ["lora(rank=8)", "norms"], "text": ["lora(rank=8)", "norms"]},
        "head": HEAD,
        "train": {"epochs": 2, "lr": 2e-3},
    },
}
PREDICTORS = {
    "closed form": lambda pair: pair.metric,
    "k-NN": lambda pair: neighbour_excess(pair.nearest),
    "CKA": lambda pair: cka_excess(pair.most_aligned),
}


def main() -> None:
    """Measure, train and evaluate every pair on every set; write the page."""
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    folder, began = parser.parse_args().folder, time.monotonic()
    parts = [_section(name, photos, folder) for name, photos in SETS.items()]
    about = (
        f"`python -m studies.pair_picker FOLDER`, {time.strftime('%Y-%m-%d')}, {platform.machine()}, torch "
        f"{torch.__version__}, {torch.get_num_threads()} threads, {SIZE} px, {time.monotonic() - began:,.0f} s.\n\n"
        "Closed form, k-NN and CKA: `clasp pair` on the training photos. Heads, low rank: the metric on other photos, "
        "of heads after 20 epochs on frozen towers, and of `lora(rank=8)` and norms in both towers after two; one "
        "seed. Rank correlation: Spearman's, over four pairs of towers; 1 has p = 1/24."
    )
    page = Path(__file__).with_suffix(".md")
    page.write_text("\n\n".join(["# Does the ranking of towers predict the trained result?", about, *parts]) + "\n")
    print(page.read_text(encoding="utf-8"))


def _section(name: str, photos: PhotoSet, folder: Path) -> str:
    """The table of one set, and the rank correlations."""
    found = rank_tower_pairs(IMAGES, TEXTS, [f"data.train={folder / photos.train}", f"image.size={SIZE}"], say=print)
    trained = {
        title: [_trained(pair, settings, photos, folder) for pair in found] for title, settings in TRAINED.items()
    }
    predicted = {title: [measure(pair) for pair in found] for title, measure in PREDICTORS.items()}
    rows = [line(["image", "text", *predicted, *trained]), "|---|---|" + "---|" * (len(predicted) + len(trained))]
    for row, pair in enumerate(found):
        numbers = [f"{values[row]:.3f}" for values in (*predicted.values(), *trained.values())]
        rows.append(line([pair.image, pair.text, *numbers]))
    rows += ["", line(["rank correlation with", *trained]), "|---|" + "---|" * len(trained)]
    for title, values in predicted.items():
        rows.append(line([title, *(f"{spearman(values, theirs):.2f}" for theirs in trained.values())]))
    return "\n".join([f"## {name}, {photos.task}", "", *rows])


def _trained(pair: TowerPair, settings: Mapping[str, Any], photos: PhotoSet, folder: Path) -> float:
    """The primary metric of a trained pair on the held-out photos."""
    given = {
        "image": {"tower": pair.image, "size": SIZE},
        "text": {"tower": pair.text},
        "data": {"train": str(folder / photos.train)},
        **settings,
    }
    with tempfile.TemporaryDirectory() as place:
        run = train_recipe(recipe_from_dict(given, "the study"), Path(place) / "run", say=print).run
        results = evaluate_run(run, photos.task, [f"data={folder / photos.held_out}", *photos.options], say=print)
    last = results[-1]  # of retrieval, the mean of both directions
    print(pair.image, pair.text, main_metric(last), last.metrics[main_metric(last)], flush=True)
    return last.metrics[main_metric(last)]


def spearman(x: Sequence[float], y: Sequence[float]) -> float:
    """The correlation of the ranks; there are no ties."""
    ranks = torch.stack([torch.tensor(values, dtype=torch.float64).argsort().argsort() for values in (x, y)]).double()
    return float(torch.corrcoef(ranks)[0, 1])


if __name__ == "__main__":
    main()
