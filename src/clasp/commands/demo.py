"""``clasp demo``: align two packaged towers on the sample, ask about concepts and languages never seen, search, draw.

Everything here goes through what any user has: a recipe, pairs on disk, ``align``, evaluations, the search engine. A
second run reads what the first one computed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from clasp.commands.train import align, cache_folder, inputs_of
from clasp.config.build import Assembled, load, with_fresh_heads
from clasp.config.recipe import Recipe, read_recipe
from clasp.data.pairs import open_pairs
from clasp.data.samples.emoji import HELD, HELD_LOW, QUICK_TRAINED, TRAINED, TRAINED_LOW, Sample, unpack
from clasp.evaluation.from_pairs import by_language
from clasp.evaluation.tasks import Multilingual, Result
from clasp.models.dual_encoder import DualEncoder
from clasp.models.features import Inputs
from clasp.models.inference import Model
from clasp.report.contact_sheet import contact_sheet
from clasp.report.terminal import bar, counts_table, say, table
from clasp.search.engine import Engine
from clasp.search.flat_store import FlatStore
from clasp.training.run_folder import Run
from clasp.training.trackers.console import to_stderr

SETS = {
    "trained": TRAINED,
    "low-resource, trained": TRAINED_LOW,
    "low-resource, never trained": HELD_LOW,
    "low-resource": (*TRAINED_LOW, *HELD_LOW),
    "others, never trained": HELD,
}
QUICK_SETS = {"trained": QUICK_TRAINED, "low-resource, never trained": HELD_LOW}
# concepts that nothing was trained on, in trained languages and (*) in languages never trained on
SEARCHES = (
    ("en", "1f98a"), ("sw", "1f34c"), ("zu", "1f353"), ("vi", "1f42c"),
    ("cy", "1f3a9"), ("lo", "1f577"), ("it", "1f381"), ("yo", "1f6cf"),
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Told:
    """The end of the story, for whoever wants to check it."""

    run: Path
    results: list[Result]
    untrained: dict[str, float]
    picture: Path


def tell(out: Path, *, quick: bool = False) -> Told:
    """Run the demo; the run folder and the picture go to ``out``."""
    out = out.with_name(f"{out.name}-quick") if quick else out
    sample = unpack(cache_folder(), quick=quick)
    recipe = demo_recipe(sample, quick=quick)
    say("names for pictures of things never seen, in languages never trained on; both towers stay as they are")
    _align_once(recipe, out)
    model = load(out)
    assert isinstance(model.encoder, DualEncoder)
    counts_table(model.encoder.counts())
    inputs = inputs_of(Assembled(model.encoder, model.transform, model.tokenizer), recipe, bar=bar)
    task = question(sample, inputs, quick=quick)
    results = task.results(model.encoder)
    untrained = task(with_fresh_heads(model.encoder, recipe))
    Run(out).append("results.jsonl", [asdict(result) for result in results])
    show(results, untrained, quick=quick)
    picture = _search(model, out, sample)
    say(f"eight searches among pictures of things never seen, in eight languages: {picture}")
    say("now your own pictures (cat.jpg beside cat.txt, a folder per class, a .csv, a .jsonl, …):")
    say("  clasp train start data.train=FOLDER")
    return Told(out, results, untrained, picture)


def demo_recipe(sample: Sample, *, quick: bool) -> Recipe:
    """``recipes/demo.toml`` on the unpacked sample."""
    smaller = ["image.size=96", "train.epochs=20"] if quick else []
    return read_recipe("demo", [f"data.train={sample.pairs('train')}", f"data.val={sample.pairs('val')}", *smaller])


def question(sample: Sample, inputs: Inputs, *, quick: bool) -> Multilingual:
    """Image to text among the names of the 138 test concepts, per language and per set of languages."""
    pairs = open_pairs(sample.questions())
    sets = QUICK_SETS if quick else SETS
    languages = sorted({language for members in sets.values() for language in members})
    inputs.read_ahead(c.text for pair in pairs for c in pair.captions if c.language in languages)
    questions = {language: by_language(pairs, language, inputs, ["image_to_text"]) for language in languages}
    primary = f"macro:{next(iter(sets))}/image_to_text/recall@5"
    images = inputs.images(pairs)
    return Multilingual(data="demo test concepts", images=images, questions=questions, primary=primary, sets=sets)


def show(results: Sequence[Result], untrained: Mapping[str, float], *, quick: bool) -> None:
    """The tables of the demo on standard output."""

    def row(result: Result, title: str) -> list[str]:
        low, high = result.interval["recall@5"]
        return [
            title,
            f"{100 * result.metrics['recall@1']:.1f}",
            f"{100 * result.metrics['recall@5']:.1f}",
            f"{100 * low:.1f} to {100 * high:.1f}",
            f"{100 * untrained[f'{result.language}/image_to_text/recall@5']:.1f}",
            f"{100 * result.chance['recall@5']:.1f}",
        ]

    columns = ("languages", "R@1", "R@5", "95 % interval", "untrained heads", "chance")
    main = [row(r, "English") for r in results if r.language == "en"]
    main += [row(r, r.language.removeprefix("macro:")) for r in results if r.language.startswith("macro:")]
    table("naming pictures of concepts never seen: image to text among 138, per cent", columns, main)
    trained = set(QUICK_SETS["trained"]) if quick else {*TRAINED, *TRAINED_LOW}
    each = [row(r, f"{r.language}{'' if r.language in trained else ' *'}") for r in results if ":" not in r.language]
    table("per language (* never trained on)", columns, each)


def _align_once(recipe: Recipe, out: Path) -> None:
    """Train, go on with a run that was stopped, or leave a finished one as it is."""
    stopped = (out / "state").exists()
    if (out / "delta.safetensors").exists() and not stopped:
        say(f"{out} holds this demo's run already; delete the folder to train again")
    elif align(recipe, out, say=say, bar=bar, reporter=to_stderr(), resume=stopped).fitted.interrupted:
        say("stopped and saved; the same command goes on")
        raise SystemExit(130)


def _search(model: Model, out: Path, sample: Sample) -> Path:
    """Names of concepts never seen, in eight languages, against all pictures of the test concepts."""
    pairs = open_pairs(sample.questions())
    names = {(c.language, pair.group): c.text for pair in pairs for c in pair.captions}
    english = {pair.group: names["en", pair.group] for pair in pairs}
    store = FlatStore(out / "index")
    try:
        engine = Engine.anew(model, store)
        with bar("pictures into the index") as progress:
            engine.index(pairs, progress)
        rows = []
        for language, concept in SEARCHES:
            words = names[language, concept]
            hits = engine.search(text=words, k=8)
            found = engine.sheet([(words, hits)], good=lambda _, hit, concept=concept: hit.meta["group"] == concept)
            untrained = "" if language in {*TRAINED, *TRAINED_LOW} else ", never trained on"
            rows += [row._replace(note=f"{english[concept]} ({language}{untrained})") for row in found]
        contact_sheet(rows, out / "searches.png")
    finally:
        store.close()
    return out / "searches.png"
