"""``clasp demo``: align two packaged towers on the emoji sample, evaluate on held-out concepts and languages, search.

Input: none. Output: a run folder, a table and a contact sheet of searches. Uses the public interfaces only: a recipe,
pairs on disk, ``train_recipe``, evaluations, the search engine. Note: a second run reuses the first one's results.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from clasp.commands.demo_photos import installed_photos
from clasp.commands.demo_searches import (
    DRAWING_HITS,
    PHOTO_RANKS,
    DemoSearch,
    drawing_queries,
    language_title,
    search_drawings,
    search_photos,
    search_section,
)
from clasp.commands.train import train_recipe
from clasp.config.build import (
    ModelAndPreprocessing,
    build_feature_source,
    class_pairs_of_recipe,
    load,
    with_untrained_heads,
)
from clasp.config.recipe import Recipe, read_recipe
from clasp.data.cache_folder import cache_folder
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
from clasp.errors import require_printable_path
from clasp.evaluation.from_pairs import language_queries
from clasp.evaluation.language_sets import macro_set
from clasp.evaluation.results import EvaluationResult
from clasp.evaluation.tasks import MultilingualTask
from clasp.models.dual_encoder import DualEncoder
from clasp.models.features import FeatureSource
from clasp.report.console import print_status, print_table, progress_bar, relative_path
from clasp.report.contact_sheet import SheetSection, sectioned_sheet
from clasp.report.model_card import with_section
from clasp.report.tables import AnnotatedTable, LabelledResult, format_metric, result_table
from clasp.report.terminal import print_parameter_counts, terminal_reporter
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
_CARD_HEADING = "Held-out concepts, by language"
_SHEET_FILE = "searches.png"
_INSIDE_THE_TOWERS = (
    "Trained on: 7,197 photographs of 160 classes with captions; a ViT-S and an English text encoder, two CPU cores.",
    "Named correctly, of 803 photographs held out: 27.9 % by heads in closed form, 40.7 % after two minutes of "
    "clasp train auto, 45.7 % after five; of 2,400 test photographs 42.6 % after five.",
    "Measured once, not in this demo: python -m benchmarks.quality --budgets 1,1.5,2,5 (benchmarks/quality.md).",
)


@dataclass(frozen=True, slots=True)
class DemoResult:
    """The results of the demo."""

    run: Path
    results: list[EvaluationResult]
    untrained: dict[str, float]
    picture: Path
    drawings: list[DemoSearch]
    photos: list[DemoSearch]


def run_demo(out: Path, *, quick: bool = False) -> DemoResult:
    """Run the demo; the run folder and the picture go to ``out``.

    Raises ``UserError``, before any compute, where a package with photographs is missing, or ``out`` cannot be named.
    """
    require_printable_path(out)
    out = out.with_name(f"{out.name}-quick") if quick else out
    installed_photos()
    sample = unpack_emoji_sample(cache_folder(), quick=quick)
    recipe = demo_recipe(sample, quick=quick)
    print_status("both towers stay frozen; two linear heads are fitted in closed form on drawings of 1,114 concepts")
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
    RunFolder(out).append("results.jsonl", [result.to_row() for result in results])
    _complete_card(out, results, untrained, _trained_languages(quick=quick))
    summary = demo_table(results, untrained)
    title = "naming pictures of held-out concepts: image to text among 138"
    print_table(title, summary.columns, summary.rows, summary.notes)
    queries = _drawing_queries(model.encoder, inputs, recipe, sample)
    drawings, photos = search_drawings(model, out, sample, queries), search_photos(model, out)
    picture = draw_searches(drawings, photos, _trained_languages(quick=quick), out / _SHEET_FILE)
    print_status(f"photographs: {_photos_found(photos)}; drawings: {_drawings_found(drawings)}")
    print_status(f"all searches: {relative_path(picture)}; all languages: {relative_path(out / 'README.md')}")
    print_status("now your own images, without any captions:  clasp train photos; clasp index runs/photos FOLDER")
    print_status("with captions (cat.jpg beside cat.txt, a folder per class, a .csv, a .jsonl, …):")
    print_status("  clasp train start data.train=FOLDER")
    return DemoResult(out, results, untrained, picture, drawings, photos)


def demo_recipe(sample: EmojiSample, *, quick: bool) -> Recipe:
    """``recipes/demo.toml`` on the unpacked sample."""
    smaller = ["image.size=96"] if quick else []
    sources = [f"data.train={sample.pairs('train')}", f"data.val={sample.pairs('val')}"]
    return read_recipe("demo", [*sources, *smaller])


def build_demo_task(sample: EmojiSample, inputs: FeatureSource, *, quick: bool) -> MultilingualTask:
    """Image to text among the names of the 138 test concepts, per language and per set of languages."""
    pairs = open_pairs(sample.multilingual_test())
    sets = _QUICK_LANGUAGE_SETS if quick else _LANGUAGE_SETS
    languages = sorted({language for members in sets.values() for language in members})
    inputs.precompute_texts(c.text for pair in pairs for c in pair.captions if c.language in languages)
    queries = language_queries(list(pairs), languages, inputs.texts, ["image_to_text"])
    primary = f"macro:{next(iter(sets))}/image_to_text/{_DEMO_METRIC}"
    images = inputs.images(pairs)
    return MultilingualTask(data="demo test concepts", images=images, queries=queries, primary=primary, sets=sets)


def demo_table(results: Sequence[EvaluationResult], untrained: Mapping[str, float]) -> AnnotatedTable:
    """The table on standard output: English and the sets of languages."""
    english = [LabelledResult("English", result) for result in results if result.language == "en"]
    sets = [LabelledResult(title, each) for each in results if (title := macro_set(each.language))]
    return _table([*english, *sets], untrained)


def _drawing_queries(
    model: DualEncoder, inputs: FeatureSource, recipe: Recipe, sample: EmojiSample
) -> list[tuple[str, str]]:
    classes = class_pairs_of_recipe(recipe, model)
    assert classes is not None, "the demo's image tower has a classifier"
    concepts = [str(pair.group) for pair in open_pairs(sample.multilingual_test())]
    return drawing_queries(model, inputs, classes.pairs.texts, concepts)


def draw_searches(
    drawings: Sequence[DemoSearch], photos: Sequence[DemoSearch], trained: Sequence[str], path: Path
) -> Path:
    """Photographs, drawings, and a line on tuning, in one picture."""
    of_drawings = (
        "Searched: 413 drawings of 138 concepts, none of them among those that the maps were fitted to.",
        "Asked: for each language the concept whose name is nearest, by the text side alone, to the name of one of the "
        "image encoder's 1,000 classes.",
        f"Found: {_drawings_found(drawings)}.",
    )
    of_photos = (
        "Searched: 20 photographs that come inside scikit-image, scikit-learn and matplotlib. The maps were fitted "
        "without a photograph.",
        "Asked: what the documentation of these packages calls a photograph, as the nearest emoji name, in twelve "
        "languages in a fixed order.",
        f"Found: {_photos_found(photos)}.",
    )
    sections = [
        search_section("1.  Photographs, though the maps were fitted to none", of_photos, photos, trained, (92, 3)),
        search_section("2.  Drawings of concepts that were held out", of_drawings, drawings, trained, (68, 2)),
        SheetSection("3.  Tuning inside the towers, where there is enough to learn from", _INSIDE_THE_TOWERS, []),
    ]
    lines = (
        "A frozen image encoder (EfficientNet-Lite0), a frozen text encoder (multilingual-e5-small), and between them "
        "two linear maps, fitted in closed form: to drawings of 1,114 concepts with their names in "
        f"{len(trained)} languages, and to the names and weight vectors of the image encoder's own classes. Each "
        "search shows its hits, best first; a correct one has a blue frame.",
    )
    return sectioned_sheet("Search pictures in any language", lines, sections, path).path


def _drawings_found(searches: Sequence[DemoSearch]) -> str:
    found = sum(search.found_within(DRAWING_HITS) for search in searches)
    return f"{found} of {len(searches)} searches have a correct picture among the first {DRAWING_HITS}"


def _photos_found(searches: Sequence[DemoSearch]) -> str:
    first, near = (sum(search.found_within(ranks) for search in searches) for ranks in (1, PHOTO_RANKS))
    return f"{first} of {len(searches)} photographs at rank 1, {near} among the first {PHOTO_RANKS} of 20"


def _complete_card(
    out: Path, results: Sequence[EvaluationResult], untrained: Mapping[str, float], trained: Sequence[str]
) -> None:
    """Add the table of all languages to the run's model card, once."""
    folder = RunFolder(out)
    labelled = [LabelledResult(language_title(each.language or "", trained), each) for each in results]
    card = (out / "README.md").read_text(encoding="utf-8")
    folder.write("README.md", with_section(card, _CARD_HEADING, [_table(labelled, untrained)]))


def _table(rows: Sequence[LabelledResult], untrained: Mapping[str, float]) -> AnnotatedTable:
    def untrained_heads(result: EvaluationResult) -> str:
        return format_metric(_DEMO_METRIC, untrained[f"{result.language}/image_to_text/{_DEMO_METRIC}"])

    return result_table("languages", rows, (_DEMO_METRIC, "recall@1"), {"untrained heads": untrained_heads})


def _trained_languages(*, quick: bool) -> tuple[str, ...]:
    return QUICK_TRAINED_LANGUAGES if quick else (*TRAINED_LANGUAGES, *TRAINED_LOW_RESOURCE)


def _train_once(recipe: Recipe, out: Path) -> None:
    """Train, resume an interrupted run, or reuse a finished one."""
    stopped = RunFolder(out).has_state
    if (out / "delta.safetensors").exists() and not stopped:
        print_status(f"{relative_path(out)} holds this demo's run already; delete the folder to train again")
    elif train_recipe(
        recipe, out, say=print_status, bar=progress_bar, reporter=terminal_reporter(), resume=stopped
    ).fitted.interrupted:
        print_status("interrupted, state saved; resume with the same command")
        raise SystemExit(130)
