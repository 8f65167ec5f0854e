"""How well ``clasp pair`` predicts the ranking of trained runs: rank correlations over the packaged towers.

Input: the folder of the photo sets (``flickr8k-sample``, ``tinyimagenet``). Output: ``pair_picker.md``. For every pair
of a packaged image tower and a packaged text tower, whole or cut to its lower blocks: what ``clasp pair`` measures on
the training photos, and the metric on other photos of heads trained by gradient steps and of low-rank updates in both
towers. Note: three image and three text towers are nine pairs, but not nine independent ones; intervals resample
towers. A cell that is measured is kept in ``pair_picker.jsonl`` beside the page, with size, settings of the training,
date, torch and machine, and not measured again with the same size and settings: the study may be stopped at any time.

    python -m studies.pair_picker FOLDER            # both sets, heads and low-rank updates
    python -m studies.pair_picker FOLDER --quick    # heads on Flickr8k, not written: ten minutes on two cores
    python -m studies.pair_picker                   # the page of what is recorded
"""

from __future__ import annotations

import argparse
import json
import platform
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from studies.formatting import line
from studies.records import Record

from clasp.commands.evaluate import evaluate_run
from clasp.commands.pair import rank_tower_pairs
from clasp.commands.train import train_recipe
from clasp.config.recipe import recipe_from_dict
from clasp.errors import counted
from clasp.report.pair_table import TowerPair, cka_excess, neighbour_excess
from clasp.report.tables import main_metric


class Candidate(NamedTuple):
    """A tower, cut after ``layer`` blocks; ``None``: whole."""

    tower: str
    layer: int | None = None

    @property
    def title(self) -> str:
        return self.tower.removeprefix("pip:") + ("" if self.layer is None else f", {self.layer} blocks")


IMAGES = (
    Candidate("pip:efficientnet-lite0"),
    Candidate("pip:dinov2-small-focus"),
    Candidate("pip:dinov2-small-focus", 4),
)
TEXTS = (
    Candidate("pip:minilm-l6"),
    Candidate("pip:minilm-l6", 3),
    Candidate("pip:multilingual-e5-small"),
)
SIZE = 56  # pixels, so that the study takes minutes on two cores
RESAMPLES = 10_000


@dataclass(frozen=True)
class PhotoSet:
    """Pairs to train on, others to evaluate on, the task, and what is trained; files below the folder that is given."""

    train: str
    held_out: str
    task: str
    options: tuple[str, ...]
    trained: tuple[str, ...]


SETS = {
    "Flickr8k": PhotoSet(
        "flickr8k-sample/flickr8k-sample-train.tar",
        "flickr8k-sample/flickr8k-sample-val.tar",
        "retrieval",
        (),
        ("heads", "low rank"),
    ),
    "Tiny-ImageNet": PhotoSet(
        "tinyimagenet/tinyimagenet-train-00.tar",
        "tinyimagenet/tinyimagenet-val.tar",
        "zeroshot",
        ("label=class",),
        ("heads",),
    ),
}
QUICK = {"Flickr8k": replace(SETS["Flickr8k"], trained=("heads",))}
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
PREDICTORS: dict[str, Callable[[TowerPair], float]] = {
    "closed form": lambda pair: pair.metric,
    "k-NN": lambda pair: neighbour_excess(pair.nearest) if pair.nearest is not None else 0.0,
    "CKA": lambda pair: cka_excess(pair.most_aligned) if pair.most_aligned is not None else 0.0,
}
RECORDS = Path(__file__).with_suffix(".jsonl")
Grid = Float[np.ndarray, "images texts"]


def main() -> None:
    """Measure, train and evaluate what is not recorded; write the page."""
    parser = argparse.ArgumentParser(prog="python -m studies.pair_picker", description=__doc__)
    parser.add_argument("folder", type=Path, nargs="?", help="of the photo sets; left out, the page alone is written")
    parser.add_argument("--quick", action="store_true")
    given = parser.parse_args()
    sets = QUICK if given.quick else SETS
    if given.folder is not None:
        for cell in cells(sets):
            if find_record(cell) is None:
                record(cell, sets[cell.photos], given.folder)
    text = render_page(sets)
    if not given.quick:  # the page is of all sets
        RECORDS.with_suffix(".md").write_text(text, encoding="utf-8")
    print(text)


class Cell(NamedTuple):
    """One pair of towers on one set: measured by ``clasp pair`` (``what`` = ``pair``), or trained."""

    photos: str
    what: str
    image: Candidate
    text: Candidate

    @property
    def key(self) -> list[str]:
        return [self.photos, self.what, self.image.title, self.text.title]

    @property
    def settings(self) -> dict[str, Any]:
        return TRAINED.get(self.what, {})


PAIRS = tuple((image, text) for image in IMAGES for text in TEXTS)


def cells(sets: Mapping[str, PhotoSet]) -> list[Cell]:
    """All cells: of each set what is measured, then what is trained."""
    return [
        Cell(name, what, image, text)
        for name, photos in sets.items()
        for what in ("pair", *photos.trained)
        for image, text in PAIRS
    ]


def find_record(cell: Cell) -> Record | None:
    """What is recorded of a cell at this size and with these settings."""
    lines = RECORDS.read_text(encoding="utf-8").splitlines() if RECORDS.exists() else []
    wanted = {"key": cell.key, "size": SIZE, "settings": cell.settings}
    return next((r for r in map(json.loads, lines) if all(r[name] == value for name, value in wanted.items())), None)


def record(cell: Cell, photos: PhotoSet, folder: Path) -> None:
    """Measure or train a cell, and append its record."""
    began = time.process_time()
    if cell.what == "pair":
        values = _measured(cell.image, cell.text, photos, folder)
    else:
        values = {"metric": _trained(cell.image, cell.text, cell.settings, photos, folder)}
    found = {
        **{"key": cell.key, "size": SIZE, "settings": cell.settings, "values": values},
        "cpu_seconds": round(time.process_time() - began),
        **{"date": time.strftime("%Y-%m-%d"), "torch": torch.__version__},
        "machine": f"{platform.machine()}, {torch.get_num_threads()} threads",
    }
    print(*cell.key, values, flush=True)
    with RECORDS.open("a", encoding="utf-8") as file:
        file.write(json.dumps(found) + "\n")


def render_page(sets: Mapping[str, PhotoSet]) -> str:
    """The page of what is recorded."""
    known = [found for cell in cells(sets) if (found := find_record(cell)) is not None]
    missing = [cell for cell in cells(sets) if find_record(cell) is None]
    about = (
        f"`python -m studies.pair_picker FOLDER{' --quick' if sets is QUICK else ''}`. Measured: "
        f"{'; '.join(sorted(set(map(_conditions, known))))}.\n\n"
        "Closed form, k-NN and CKA: the columns of `clasp pair` on the training photos. Heads: the metric on other "
        "photos, of heads after 20 epochs on frozen towers; low rank: of `lora(rank=8)` and norms in both towers after "
        "two; one seed. Rank correlation: Spearman's over nine pairs of towers; in brackets the 95 % interval of a "
        f"bootstrap with {RESAMPLES:,} resamples of image towers and of text towers, since pairs with a tower in "
        "common are not independent; where cells are missing, over the pairs that are there, with their number and no "
        "interval. Noise of the metrics is not in it. Lost: the metric of the best pair minus that of the pair that "
        "the column ranks first."
    )
    parts = ["# Does the ranking of towers predict the trained result?", about]
    if missing:
        some = "; ".join(", ".join(cell.key) for cell in missing[:4]) + (" …" if len(missing) > 4 else "")
        parts.append(f"**Not complete**: {len(missing)} of {counted(len(cells(sets)), 'cell')} missing: {some}.")
    begun = {record["key"][0] for record in known}
    return "\n\n".join([*parts, *(_section(name, sets[name]) for name in sets if name in begun)]) + "\n"


def _conditions(record: Record) -> str:
    return f"{record['date']}, {record['size']} px, torch {record['torch']}, {record['machine']}"


def _section(name: str, photos: PhotoSet) -> str:
    """The table of one set, with the rank correlations of what is trained for more than half of the pairs."""
    values = {what: _column(name, what) for what in ("pair", *photos.trained)}
    predicted = {title: [found and found[title] for found in values["pair"]] for title in PREDICTORS}
    trained = {title: [found and found["metric"] for found in values[title]] for title in photos.trained}
    rows = [line(["image", "text", *predicted, *trained]), "|---|---|" + "---|" * (len(predicted) + len(trained))]
    for row in sorted(range(len(PAIRS)), key=lambda row: -(predicted["closed form"][row] or 0)):
        of_row = [column[row] for column in (*predicted.values(), *trained.values())]
        numbers = ["–" if value is None else f"{value:.3f}" for value in of_row]
        rows.append(line([*(candidate.title for candidate in PAIRS[row]), *numbers]))
    ranked = [title for title in trained if sum(value is not None for value in trained[title]) > len(PAIRS) / 2]
    if ranked and None not in values["pair"]:
        titles = [f"{what}, {title}" for title in ranked for what in ("rank correlation", "lost")]
        rows += ["", line(["ranked by", *titles]), "|---|" + "---|" * len(titles)]
        for title, column in predicted.items():
            rows.append(line([title, *(text for each in ranked for text in _told(column, trained[each]))]))
    return "\n".join([f"## {name}, {photos.task}", "", *rows])


def _column(name: str, what: str) -> list[dict[str, float] | None]:
    """The values of every pair, ``None`` where there is no record."""
    found = [find_record(Cell(name, what, image, text)) for image, text in PAIRS]
    return [None if each is None else each["values"] for each in found]


def _measured(image: Candidate, text: Candidate, photos: PhotoSet, folder: Path) -> dict[str, float]:
    """What ``clasp pair`` measures of one pair, by the title of its column."""
    layers = [
        f"{side}.layer={candidate.layer}"
        for side, candidate in (("image", image), ("text", text))
        if candidate.layer is not None
    ]
    overrides = [f"data.train={folder / photos.train}", f"image.size={SIZE}", *layers]
    (pair,) = rank_tower_pairs([image.tower], [text.tower], overrides)
    return {title: measure(pair) for title, measure in PREDICTORS.items()}


def _trained(image: Candidate, text: Candidate, settings: dict[str, Any], photos: PhotoSet, folder: Path) -> float:
    """The primary metric of a trained pair on the held-out photos."""
    given = {
        "image": {"tower": image.tower, "size": SIZE} | ({} if image.layer is None else {"layer": image.layer}),
        "text": {"tower": text.tower} | ({} if text.layer is None else {"layer": text.layer}),
        "data": {"train": str(folder / photos.train)},
        **settings,
    }
    with tempfile.TemporaryDirectory() as place:
        run = train_recipe(recipe_from_dict(given, "the study"), Path(place) / "run", say=_quiet).run
        results = evaluate_run(run, photos.task, [f"data={folder / photos.held_out}", *photos.options], say=_quiet)
    last = results[-1]  # of retrieval, the mean of both directions
    return last.metrics[main_metric(last)]


def _quiet(line: str) -> None:
    """Status lines of runs are not printed."""


def _told(predicted: Sequence[float], trained: Sequence[float | None]) -> tuple[str, str]:
    """The rank correlation over the pairs that are trained, with its interval if these are all, and what is lost."""
    there = [(one, other) for one, other in zip(predicted, trained, strict=True) if other is not None]
    one, other = np.array(there).T
    lost = other.max() - other[one.argmax()]
    if len(there) < len(PAIRS):
        return f"{spearman(one, other):.2f} ({len(there)} pairs)", f"{lost:.3f}"
    shape = (len(IMAGES), len(TEXTS))
    value, low, high = correlation_interval(one.reshape(shape), other.reshape(shape))
    return f"{value:.2f} ({low:.2f} to {high:.2f})", f"{lost:.3f}"


def correlation_interval(one: Grid, other: Grid, resamples: int = RESAMPLES) -> tuple[float, float, float]:
    """Spearman's correlation over all pairs of towers, and the percentile interval of a bootstrap over image towers and
    text towers; resamples in which all ranks are equal are left out."""
    generator = np.random.Generator(np.random.PCG64(0))
    places = [[generator.integers(count, size=count) for count in one.shape] for _ in range(resamples)]
    images, texts = (np.stack(side) for side in zip(*places, strict=True))
    drawn = [grid[images[:, :, None], texts[:, None, :]].reshape(resamples, -1) for grid in (one, other)]
    low, high = np.nanpercentile(spearman(*drawn), [2.5, 97.5])
    return float(spearman(one.ravel(), other.ravel())), float(low), float(high)


def spearman(x: Float[np.ndarray, "*rows n"], y: Float[np.ndarray, "*rows n"]) -> Float[np.ndarray, "*rows"]:
    """The correlation of the ranks in each row, equal values having their mean rank; NaN where all are equal."""
    ranked = (
        (values[..., :, None] > values[..., None, :]).sum(-1) + (values[..., :, None] >= values[..., None, :]).sum(-1)
        for values in (x, y)
    )
    one, other = (ranks - ranks.mean(-1, keepdims=True) for ranks in ranked)
    with np.errstate(invalid="ignore"):
        return (one * other).sum(-1) / np.sqrt((one**2).sum(-1) * (other**2).sum(-1))


if __name__ == "__main__":
    main()
