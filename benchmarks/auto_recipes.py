"""``clasp train auto`` against single recipes: the same pairs and minutes, on three data sets.

    python -m benchmarks.auto_recipes --photos FOLDER --work FOLDER        # the runs that are missing, then the page
    python -m benchmarks.auto_recipes … --minutes 1 --only emoji --recipes heads,partial/lora

Input: the folder of the photographs (tinyimagenet, flickr8k-sample), one for the runs. Output: ``auto_recipes.md``: the
primary metric of each run on test pairs, and its difference from that of ``auto`` with a paired interval. Note:
each run starts with an empty feature cache, and its time includes filling it, which is finished even where it takes
longer; a single recipe has its own learning rates, and as many epochs, or steps of the first, as its measured steps
allow, of which validation selects the best; towers are those of each recipe, on Tiny-ImageNet the same. Runs that are
there are not repeated; those of other minutes or another seed are refused. ``--only`` makes one data set's section of
the page anew and keeps the others. Not part of ``make bench``: it needs photographs and most of an hour of a machine of
its own.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks import class_photos, harness
from clasp.commands.auto import climb
from clasp.commands.auto_stages import AutoCallbacks
from clasp.commands.environment import configure_environment
from clasp.commands.step_timing import time_steps
from clasp.commands.train import train_recipe
from clasp.config.auto_plan import Left
from clasp.config.build import ModelAndPreprocessing, build_feature_source, load
from clasp.config.datasets import open_training_pairs
from clasp.config.recipe import Recipe, read_recipe, recipe_from_dict
from clasp.data.pairs import open_pairs
from clasp.data.samples.emoji import unpack_emoji_sample
from clasp.evaluation.comparison import Comparison, compare_scored, primary_comparison
from clasp.evaluation.from_pairs import multilingual_task, retrieval_task
from clasp.evaluation.tasks import EvaluationTask, ScoredQueries
from clasp.models.dual_encoder import DualEncoder
from clasp.training.run_folder import RunFolder
from clasp.types import UserError, no_progress_bar

HERE = Path(__file__).parent
AUTO = "auto"
SINGLES = ("heads", "peft/mlp", "peft/adapters", "partial/lora", "partial/last")
"""Frozen towers with linear and with MLP heads, adapters, low rank, and upper blocks: recipes without a model hub"""
_RESERVE = 0.08  # of the time left, for saving and the final evaluation: that of auto
_EVALUATIONS = 10  # at most, as in auto
_SECONDS_FILE = "seconds.json"


@dataclass(frozen=True)
class Dataset:
    """Training pairs, what every recipe is given, and the task on the test pairs."""

    name: str
    about: str
    overrides: Callable[[Path, Path], list[str]]
    """(photos, work) -> overrides of every recipe: the pairs, and towers unless each recipe has its own"""
    task: Callable[[Path, Path, ModelAndPreprocessing, Recipe], EvaluationTask]
    """(photos, work, parts, recipe) -> the test task"""
    singles: Sequence[str] = SINGLES


# --- data sets -------------------------------------------------------------------------------------------------------


def _tiny_imagenet(photos: Path, work: Path) -> list[str]:
    folder = work / "tinyimagenet"
    if not (folder / "test.jsonl").exists():
        shards = photos / "tinyimagenet"
        pairs = open_pairs(str(shards / "tinyimagenet-train-{00..03}.tar"))
        test = open_pairs(str(shards / "tinyimagenet-val.tar"))
        class_photos.write_splits(pairs, test, folder, label="class", template="a photo of a {}")
    towers = ["image.tower=pip:dinov2-small-focus", "image.size=56", "text.tower=pip:minilm-l6"]
    return [*towers, f"data.train={folder / 'train.jsonl'}", f"data.val={folder / 'val.jsonl'}"]


def _classify(photos: Path, work: Path, parts: ModelAndPreprocessing, recipe: Recipe) -> EvaluationTask:
    return class_photos.zero_shot(class_photos.open_split(work / "tinyimagenet", "test"), parts, data="test")


def _emoji(photos: Path, work: Path) -> list[str]:
    sample = unpack_emoji_sample(work / "sample", quick=False)
    return [f"data.train={sample.pairs('train')}", f"data.val={sample.pairs('val')}"]


def _name(photos: Path, work: Path, parts: ModelAndPreprocessing, recipe: Recipe) -> EvaluationTask:
    pairs = open_pairs(unpack_emoji_sample(work / "sample", quick=False).pairs("test"))
    languages = sorted({caption.language for pair in pairs for caption in pair.captions})
    return multilingual_task(pairs, build_feature_source(parts, recipe), languages=languages, data="test")


def _flickr(photos: Path, work: Path) -> list[str]:
    return [f"data.train={photos / 'flickr8k-sample' / 'flickr8k-sample-train.tar'}"]


def _retrieve(photos: Path, work: Path, parts: ModelAndPreprocessing, recipe: Recipe) -> EvaluationTask:
    pairs = open_pairs(photos / "flickr8k-sample" / "flickr8k-sample-val.tar")
    return retrieval_task(pairs, build_feature_source(parts, recipe), data="test")


DATASETS = (
    Dataset(
        "tinyimagenet",
        "Tiny-ImageNet, DINOv2 ViT-S/14 at 56 px and MiniLM-L6 in every row",
        _tiny_imagenet,
        _classify,
        (*SINGLES, "hub/base", "hub/full"),
    ),
    Dataset("emoji", "Emoji in 20 languages, each recipe with its own towers", _emoji, _name),
    Dataset("flickr8k", "Flickr8k sample, each recipe with its own towers", _flickr, _retrieve),
)


# --- runs ------------------------------------------------------------------------------------------------------------


def train(dataset: Dataset, method: str, given: argparse.Namespace) -> None:
    """One run in ``WORK/DATASET/METHOD`` within the minutes, unless it is there."""
    run = given.work / dataset.name / "runs" / method.replace("/", "-")
    if (run / _SECONDS_FILE).exists():
        _read_seconds(run, given)
        return
    print(f"{time.strftime('%H:%M:%S')} {dataset.name}: {method} ...", file=sys.stderr, flush=True)
    os.environ["CLASP_CACHE"] = str(run.with_name(f"{run.name}-cache"))
    overrides = [*dataset.overrides(given.photos, given.work), f"train.seed={given.seed}"]
    began = time.monotonic()
    if method == AUTO:
        climb(read_recipe(AUTO, [*overrides, f"auto.minutes={given.minutes!r}"]), run, AutoCallbacks(say=print))
    else:
        _train_single(_given(method, overrides), run, 60 * given.minutes)
    about = {"minutes": given.minutes, "seed": given.seed, "seconds": time.monotonic() - began, **harness.machine()}
    (run / _SECONDS_FILE).write_text(json.dumps(about))


def _read_seconds(run: Path, given: argparse.Namespace) -> float:
    """Of a run that is there. Raises ``UserError`` where it was of other minutes or another seed."""
    about = json.loads((run / _SECONDS_FILE).read_text())
    for name, wanted in (("minutes", given.minutes), ("seed", given.seed)):
        if name not in about or about[name] != wanted:
            found = about.get(name, "unknown")
            raise UserError(f"{run} is a run of {name} {found}, not {wanted:g}: name another --work, or delete it")
    return about["seconds"]


def _given(method: str, overrides: Sequence[str]) -> Recipe:
    """A recipe of the repository; where the data set has towers, without the settings of the recipe's own."""
    values = read_recipe(method).to_dict()
    if any(override.startswith("image.tower=") for override in overrides):
        for side in ("image", "text"):
            values[side] = {"tower": next(o for o in overrides if o.startswith(f"{side}.tower=")).partition("=")[2]}
    return recipe_from_dict(values, method).with_overrides(overrides)


def _train_single(recipe: Recipe, run: Path, seconds: float) -> None:
    """As many epochs as fit, or steps of the first, as ``auto`` fits them; the features are cached within the time."""
    began = time.monotonic()
    timing = time_steps(recipe, open_training_pairs(recipe), no_progress_bar)
    left = Left(seconds - (time.monotonic() - began), None)
    epochs, steps = left.epochs(timing, 1 - _RESERVE), left.few_steps(timing, 1 - _RESERVE)
    fitted = [f"train.epochs={max(1, epochs)}", f"train.evaluate_every={max(1, -(-epochs // _EVALUATIONS))}"]
    if not epochs:
        fitted.append(f"train.max_steps={max(1, steps)}")
    train_recipe(recipe.with_overrides(fitted), run, say=print)


# --- the page --------------------------------------------------------------------------------------------------------


def scores(dataset: Dataset, method: str, given: argparse.Namespace) -> tuple[EvaluationTask, list[ScoredQueries]]:
    """The test queries of one run."""
    run = given.work / dataset.name / "runs" / method.replace("/", "-")
    model = load(run)
    assert isinstance(model.encoder, DualEncoder)
    parts = ModelAndPreprocessing(model.encoder, model.transform, model.tokenizer)
    recipe = recipe_from_dict(RunFolder(run).recipe(), str(run))
    task = dataset.task(given.photos, given.work, parts, recipe)
    return task, task.scored(model.encoder)


def section(dataset: Dataset, given: argparse.Namespace) -> str:
    """The table of one data set: a row for each recipe, compared with ``auto`` on the same test queries."""
    os.environ["CLASP_CACHE"] = str(given.work / "test-cache")
    task, auto = scores(dataset, AUTO, given)
    rows = [(AUTO, primary_comparison(task, compare_scored(task, auto, auto)))]
    for method in _singles(dataset, given):
        theirs = scores(dataset, method, given)[1]
        rows.append((method, primary_comparison(task, compare_scored(task, auto, theirs))))
    head = f"recipe | {task.primary}, % | auto − recipe, points (95 %) | seconds"
    lines = [head, "--- | --- | --- | ---", *(_line(dataset, name, each, given) for name, each in rows)]
    table = "\n".join(f"| {line} |" for line in lines)
    return "\n\n".join([f"## {dataset.about}", _facts(given), table])


def _facts(given: argparse.Namespace) -> str:
    about = harness.machine()
    versions = ", ".join(f"{name} {version}" for name, version in about["versions"].items())
    return (
        f"{about['date']}; {about['processor']}, {about['threads']} threads. {versions}. {given.minutes:g} min for "
        f"each run from an empty feature cache, seed {given.seed}; the test pairs were read once, for this table."
    )


def _line(dataset: Dataset, method: str, compared: Comparison, given: argparse.Namespace) -> str:
    run = given.work / dataset.name / "runs" / method.replace("/", "-")
    seconds = _read_seconds(run, given)
    low, high = compared.interval
    change = "" if method == AUTO else f"{100 * compared.difference:+.1f} ({100 * low:+.1f} to {100 * high:+.1f})"
    return f"{method} | {100 * compared.second:.1f} | {change} | {seconds:,.0f}"


def page(given: argparse.Namespace, before: str) -> str:
    """The whole page; data sets that are not asked for keep their section of ``before``. The test set of each that is
    asked for is opened here, once for all rows."""
    kept = {part.partition("\n")[0]: part.strip() for part in f"\n{before}".split("\n## ")[1:]}
    command = "    python -m benchmarks.auto_recipes --photos FOLDER --work FOLDER"
    intervals = "Intervals: paired bootstrap over groups of test pairs."
    parts = ["# `auto` against single recipes in the same time", command, intervals]
    for dataset in DATASETS:
        if dataset in _chosen(given):
            parts.append(section(dataset, given))
        elif dataset.about in kept:
            parts.append(f"## {kept[dataset.about]}")
    return "\n\n".join(parts) + "\n"


def _chosen(given: argparse.Namespace) -> list[Dataset]:
    return [dataset for dataset in DATASETS if not given.only or dataset.name in given.only]


def _singles(dataset: Dataset, given: argparse.Namespace) -> Sequence[str]:
    return given.recipes or dataset.singles


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.auto_recipes", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--photos", type=Path, required=True, help="folder of tinyimagenet and flickr8k-sample")
    parser.add_argument("--work", type=Path, required=True, help="folder of the runs; those that are there are kept")
    parser.add_argument("--minutes", type=float, default=3.0, help="of each run (default 3)")
    parser.add_argument("--only", action="append", choices=[dataset.name for dataset in DATASETS])
    parser.add_argument(
        "--recipes", type=lambda text: text.split(","), help="single recipes, with commas (default all)"
    )
    parser.add_argument("--runs-only", action="store_true", help="train, and leave the test pairs closed")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=HERE, help="folder of auto_recipes.md")
    return parser.parse_args()


def main() -> None:
    configure_environment()
    given = arguments()
    try:
        for name in given.recipes or ():
            read_recipe(name)  # a name that is none is refused before anything is trained
        for dataset in _chosen(given):
            for method in (AUTO, *_singles(dataset, given)):
                train(dataset, method, given)
    except UserError as error:
        sys.exit(str(error))
    if given.runs_only:
        return
    given.out.mkdir(parents=True, exist_ok=True)
    path = given.out / "auto_recipes.md"
    text = page(given, path.read_text(encoding="utf-8") if path.exists() else "")
    path.write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
