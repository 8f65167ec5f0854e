"""What class pairs give where no photo was trained on: zero-shot classification in 20 languages, search by captions.

Input: photos in ten classes whose names are emoji concepts (CIFAR-10) and photos with captions (Flickr8k), as any
pairs that clasp opens. Output: ``class_pairs.md``. Every row is the recipe ``photos``; nothing of the photos asked is
known to the model: its centres are those of its packaged drawings and of its class names. Class names in other
languages are CLDR's emoji names. Rows: without class pairs, with them, and the same with the classes permuted.

    python -m studies.class_pairs CLASSES CAPTIONS
"""

from __future__ import annotations

import argparse
import gzip
import json
import platform
import tempfile
import time
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import replace
from importlib.resources import files
from pathlib import Path
from unittest.mock import patch

import torch

from clasp.commands.train import train_recipe
from clasp.config.build import ModelAndPreprocessing, build_feature_source, load
from clasp.config.recipe import Recipe, read_recipe
from clasp.data.pairs import Pairs, open_pairs
from clasp.evaluation.from_pairs import retrieval_task
from clasp.evaluation.results import EvaluationResult
from clasp.evaluation.tasks import MultilingualTask
from clasp.evaluation.zeroshot import ZeroShotQueries
from clasp.models.classifier import Classifier, ClassPairs
from clasp.models.classifier import class_pairs as class_pairs_of
from clasp.models.dual_encoder import DualEncoder
from clasp.models.features import FeatureSource
from clasp.training import class_pairs

CONCEPTS = {
    "airplane": "2708", "automobile": "1f697", "bird": "1f426", "cat": "1f408", "deer": "1f98c",
    "dog": "1f415", "frog": "1f438", "horse": "1f40e", "ship": "1f6a2", "truck": "1f69a",
}  # fmt: skip
"""CIFAR-10's classes and their emoji; a truck is the delivery truck"""
LANGUAGES = tuple("en de fr es ru tr ar hi ja zh th sw vi id ko fa he uk el bn".split())
LOW_RESOURCE = tuple("sw am yo zu ha ig cy eu gd km my si lo so mn qu".split())
ROWS = {"drawings alone": ["data.class_weight=0"], "class pairs": [], "class pairs, permuted": []}


def main() -> None:
    """Train and evaluate every row and write the page."""
    parser = argparse.ArgumentParser()
    parser.add_argument("classes")
    parser.add_argument("captions")
    given = parser.parse_args()
    classes, captions = open_pairs(given.classes), open_pairs(given.captions)
    rows = {}
    with tempfile.TemporaryDirectory() as folder:
        for name, settings in ROWS.items():
            recipe = read_recipe("photos", settings)
            run = Path(folder) / name.replace(" ", "-")
            with nullcontext() if "permuted" not in name else patch.object(class_pairs, "class_pairs", _permuted):
                train_recipe(recipe, run, say=print)
            rows[name] = evaluate(recipe, run, classes, captions)
            print(name, flush=True)
    page = Path(__file__).with_suffix(".md")
    page.write_text(render(rows), encoding="utf-8")
    print(page.read_text(encoding="utf-8"))


def _permuted(classifier: Classifier) -> ClassPairs:
    """Class pairs whose names belong to other classes: the control."""
    order = torch.randperm(len(classifier.weight), generator=torch.Generator().manual_seed(0)).tolist()
    concepts = tuple(
        replace(concept, classes=tuple(order[number] for number in concept.classes)) for concept in classifier.concepts
    )
    return class_pairs_of(replace(classifier, concepts=concepts))


def evaluate(
    recipe: Recipe, run: Path, classes: Pairs, captions: Pairs
) -> tuple[dict[str, EvaluationResult], dict[str, EvaluationResult]]:
    """Results of zero-shot classification by language, and of retrieval by direction."""
    model = load(run)
    assert isinstance(model.encoder, DualEncoder)
    inputs = build_feature_source(ModelAndPreprocessing(model.encoder, model.transform, model.tokenizer), recipe)
    classified = _classification(classes, inputs).results(model.encoder)
    found = retrieval_task(captions, inputs, data="captions").results(model.encoder)
    return {row.language: row for row in classified}, {row.task: row for row in found}


def _classification(pairs: Pairs, inputs: FeatureSource) -> MultilingualTask:
    queries = {}
    for language in dict.fromkeys((*LANGUAGES, *LOW_RESOURCE)):
        names = class_names(language)
        queries[language] = ZeroShotQueries(
            labels={pair.id: names[str(pair.meta["class"])] for pair in pairs},
            classes=list(names.values()),
            templates=["{}"],
            read=inputs.read,
        )
    sets = {"20 languages": LANGUAGES, "16 low-resource languages": LOW_RESOURCE}
    primary = "macro:20 languages/top1"
    return MultilingualTask(data="photos", images=inputs.images(pairs), queries=queries, primary=primary, sets=sets)


def class_names(language: str) -> dict[str, str]:
    """The name of each class: in English its own, in other languages that of its emoji."""
    if language == "en":
        return {name: name for name in CONCEPTS}
    content = (files("clasp.data.samples") / "files" / "captions.jsonl.gz").read_bytes()
    concepts = {row["concept"]: row for row in map(json.loads, gzip.decompress(content).decode().splitlines())}
    return {name: concepts[code]["locales"][language]["name"] for name, code in CONCEPTS.items()}


def render(rows: Mapping[str, tuple[dict[str, EvaluationResult], dict[str, EvaluationResult]]]) -> str:
    """The page."""
    lines = [
        "# Class pairs: photos named and found, though none was trained on\n",
        f"`python -m studies.class_pairs CLASSES CAPTIONS`, {time.strftime('%Y-%m-%d')}, {platform.machine()}, torch "
        f"{torch.__version__}. Per cent, 95 % interval in brackets. Nothing is drawn at random but the permutation.\n",
        "| pairs | zero-shot, English | 20 languages | 16 low-resource languages | text → image R@1 | R@5 | R@10 |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, (classified, found) in rows.items():
        cells = [_cell(classified["en"], "top1")]
        cells += [_cell(classified[f"macro:{kind}"], "top1") for kind in ("20 languages", "16 low-resource languages")]
        cells += [_cell(found["retrieval/text_to_image"], f"recall@{k}") for k in (1, 5, 10)]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    chosen = rows["class pairs"][0]
    each = [f"{language} {100 * chosen[language].metrics['top1']:.1f}" for language in (*LANGUAGES, *LOW_RESOURCE)]
    lines.append(f"\nClass pairs, zero-shot by language: {', '.join(dict.fromkeys(each))}.")
    return "\n".join(lines) + "\n"


def _cell(result: EvaluationResult, metric: str) -> str:
    low, high = (100 * bound for bound in result.interval[metric])
    return f"{100 * result.metrics[metric]:.1f} ({low:.1f}–{high:.1f})"


if __name__ == "__main__":
    main()
