"""``clasp demo``: align two packaged towers on the emoji sample, evaluate on held-out concepts and languages, search.

Input: none. Output: a run folder, a table and a contact sheet of searches. Uses the public interfaces only: a recipe,
pairs on disk, ``train_recipe``, evaluations, the search engine. Note: a second run reuses the first one's results.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from clasp.commands.search import contact_sheet_rows
from clasp.commands.train import train_recipe
from clasp.config.build import ModelAndPreprocessing, build_feature_source, load, with_untrained_heads
from clasp.config.datasets import cache_folder
from clasp.config.recipe import Recipe, read_recipe
from clasp.data.pairs import open_pairs
from clasp.data.samples.emoji import (
    HELD_OUT_LANGUAGES,
    HELD_OUT_LOW_RESOURCE,
    QUICK_TRAINED_LANGUAGES,
    TRAINED_LANGUAGES,
    TRAINED_LOW_RESOURCE,
    EmojiSample,
    unpack_emoji_sample,
)
from clasp.evaluation.from_pairs import language_queries
from clasp.evaluation.language_sets import macro_set
from clasp.evaluation.results import EvaluationResult
from clasp.evaluation.tasks import MultilingualTask
from clasp.models.dual_encoder import DualEncoder
from clasp.models.features import FeatureSource
from clasp.models.inference import EmbeddingModel
from clasp.report.contact_sheet import contact_sheet
from clasp.report.tables import LabelledResult, fold_languages, format_metric, more_note, result_table
from clasp.report.terminal import (
    print_parameter_counts,
    print_status,
    print_table,
    progress_bar,
    relative_path,
    terminal_reporter,
)
from clasp.search.engine import SearchEngine
from clasp.search.flat_store import FlatStore
from clasp.training.run_folder import RunFolder

_LANGUAGE_SETS = {
    "trained": TRAINED_LANGUAGES,
    "low-resource, trained": TRAINED_LOW_RESOURCE,
    "low-resource, never trained": HELD_OUT_LOW_RESOURCE,
    "low-resource": (*TRAINED_LOW_RESOURCE, *HELD_OUT_LOW_RESOURCE),
    "others, never trained": HELD_OUT_LANGUAGES,
}
_QUICK_LANGUAGE_SETS = {"trained": QUICK_TRAINED_LANGUAGES, "low-resource, never trained": HELD_OUT_LOW_RESOURCE}
_DEMO_METRIC = "recall@5"
# held-out concepts, in trained languages and in languages never trained on
DEMO_QUERIES = (
    ("en", "1f98a"), ("sw", "1f34c"), ("zu", "1f353"), ("vi", "1f42c"),
    ("cy", "1f3a9"), ("lo", "1f577"), ("it", "1f381"), ("yo", "1f6cf"),
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class DemoResult:
    """The results of the demo."""

    run: Path
    results: list[EvaluationResult]
    untrained: dict[str, float]
    picture: Path


def run_demo(out: Path, *, quick: bool = False) -> DemoResult:
    """Run the demo; the run folder and the picture go to ``out``."""
    out = out.with_name(f"{out.name}-quick") if quick else out
    sample = unpack_emoji_sample(cache_folder(), quick=quick)
    recipe = demo_recipe(sample, quick=quick)
    print_status("names for images of held-out concepts, in languages never trained on; both towers stay frozen")
    _train_once(recipe, out)
    model = load(out)
    assert isinstance(model.encoder, DualEncoder)
    print_parameter_counts(model.encoder.parameter_counts())
    inputs = build_feature_source(
        ModelAndPreprocessing(model.encoder, model.transform, model.tokenizer), recipe, bar=progress_bar
    )
    task = build_demo_task(sample, inputs, quick=quick)
    results = task.results(model.encoder)
    untrained = task(with_untrained_heads(model.encoder, recipe))
    RunFolder(out).append("results.jsonl", [asdict(result) for result in results])
    print_demo_results(results, untrained, quick=quick)
    picture = _search(model, out, sample)
    print_status(f"eight searches among images of held-out concepts, in eight languages: {relative_path(picture)}")
    print_status("now your own images (cat.jpg beside cat.txt, a folder per class, a .csv, a .jsonl, …):")
    print_status("  clasp train start data.train=FOLDER")
    return DemoResult(out, results, untrained, picture)


def demo_recipe(sample: EmojiSample, *, quick: bool) -> Recipe:
    """``recipes/demo.toml`` on the unpacked sample."""
    smaller = ["image.size=96", "train.epochs=20"] if quick else []
    return read_recipe("demo", [f"data.train={sample.pairs('train')}", f"data.val={sample.pairs('val')}", *smaller])


def build_demo_task(sample: EmojiSample, inputs: FeatureSource, *, quick: bool) -> MultilingualTask:
    """Image to text among the names of the 138 test concepts, per language and per set of languages."""
    pairs = open_pairs(sample.multilingual_test())
    sets = _QUICK_LANGUAGE_SETS if quick else _LANGUAGE_SETS
    languages = sorted({language for members in sets.values() for language in members})
    inputs.precompute_texts(c.text for pair in pairs for c in pair.captions if c.language in languages)
    queries = {language: language_queries(pairs, language, inputs.texts, ["image_to_text"]) for language in languages}
    primary = f"macro:{next(iter(sets))}/image_to_text/{_DEMO_METRIC}"
    images = inputs.images(pairs)
    return MultilingualTask(data="demo test concepts", images=images, queries=queries, primary=primary, sets=sets)


def print_demo_results(results: Sequence[EvaluationResult], untrained: Mapping[str, float], *, quick: bool) -> None:
    """The table of the demo on standard output: English, the sets of languages, the worst and the best language."""
    trained = set(_QUICK_LANGUAGE_SETS["trained"]) if quick else {*TRAINED_LANGUAGES, *TRAINED_LOW_RESOURCE}

    def untrained_heads(result: EvaluationResult) -> str:
        return format_metric(_DEMO_METRIC, untrained[f"{result.language}/image_to_text/{_DEMO_METRIC}"])

    english = [LabelledResult("English", result) for result in results if result.language == "en"]
    sets = [LabelledResult(title, each) for each in results if (title := macro_set(each.language))]
    languages = [
        LabelledResult(each.language if each.language in trained else f"{each.language}, never trained", each)
        for each in results
        if macro_set(each.language) is None
    ]
    summary = fold_languages([*sets, *languages], _DEMO_METRIC)
    beside = {"untrained heads": untrained_heads}
    table = result_table("languages", [*english, *summary.rows], (_DEMO_METRIC, "recall@1"), beside)
    notes = [*table.notes, *more_note(summary.left_out, "results.jsonl in the run folder")]
    title = "naming images of held-out concepts: image to text among 138"
    print_table(title, table.columns, table.rows, notes)


def _train_once(recipe: Recipe, out: Path) -> None:
    """Train, resume an interrupted run, or reuse a finished one."""
    stopped = (out / "state").exists()
    if (out / "delta.safetensors").exists() and not stopped:
        print_status(f"{relative_path(out)} holds this demo's run already; delete the folder to train again")
    elif train_recipe(
        recipe, out, say=print_status, bar=progress_bar, reporter=terminal_reporter(), resume=stopped
    ).fitted.interrupted:
        print_status("interrupted, state saved; resume with the same command")
        raise SystemExit(130)


def _search(model: EmbeddingModel, out: Path, sample: EmojiSample) -> Path:
    """Search all images of the test concepts by names of held-out concepts, in eight languages."""
    pairs = open_pairs(sample.multilingual_test())
    names = {(c.language, pair.group): c.text for pair in pairs for c in pair.captions}
    english = {pair.group: names["en", pair.group] for pair in pairs}
    store = FlatStore(out / "index")
    try:
        engine = SearchEngine.for_indexing(model, store)
        with progress_bar("indexing images") as progress:
            engine.index(pairs, progress)
        rows = []
        for language, concept in DEMO_QUERIES:
            query = names[language, concept]
            hits = engine.search(text=query, k=8)
            found = contact_sheet_rows(
                [(query, hits)], is_correct=lambda _, hit, concept=concept: hit.meta["group"] == concept
            )
            untrained = "" if language in {*TRAINED_LANGUAGES, *TRAINED_LOW_RESOURCE} else ", never trained on"
            rows += [row._replace(note=f"{english[concept]} ({language}{untrained})") for row in found]
        contact_sheet(rows, out / "searches.png")
    finally:
        store.close()
    return out / "searches.png"
