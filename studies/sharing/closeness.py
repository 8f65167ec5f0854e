"""``python -m studies.sharing.closeness``: does sharing bring images and texts closer, does attention carry over?

Input: as the study of sharing. Output: lines in ``results/closeness.jsonl``, and ``closeness.md``. Every cell is
trained as there; before and after, ``clasp.analysis`` measures it on drawings in the style that never trains, with
their names.
Note: sharing makes features alike before anything is learned, so both are shown; and each measure stands beside its
value for images paired with other names, for permuted modalities, and for heads paired at random.
"""

from __future__ import annotations

import argparse
import re
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import mean
from typing import Any

from studies.formatting import line
from studies.records import Record, Results, machine
from studies.sharing.datasets import World
from studies.sharing.grid import MSCLIP, NOTHING, SCRATCH, SEEDS, STEPS, Cell, chosen
from studies.sharing.page import BEGIN, END

from clasp.analysis.attention_roles import attention_agreement, head_roles
from clasp.analysis.layer_similarity import layer_similarity
from clasp.analysis.modality_clusters import modality_clusters
from clasp.analysis.tower_features import TowerFeatures, extract_tower_features
from clasp.commands.run_context import Preloaded
from clasp.commands.train import train_recipe
from clasp.config.build import ModelAndPreprocessing, build_feature_source, build_model_and_preprocessing
from clasp.config.recipe import Recipe
from clasp.data.readers import PairIndex
from clasp.errors import counted
from clasp.types import PooledFeatures

HERE = Path(__file__).parent
NEIGHBOURS = 10
COMPARED = (
    NOTHING.name,
    "attention only (as VLMo)",
    MSCLIP.name,
    "all, with norms and head (SharedCLIP)",
)
ROWS = tuple(row for name in COMPARED for row in SCRATCH if row.name == name)
"""Rows whose blocks stand side by side in both encoders"""


def main() -> None:
    """Run what is missing, and write the page."""
    parser = argparse.ArgumentParser(prog="python -m studies.sharing.closeness", description=__doc__)
    parser.add_argument("--photos", type=Path, help="the folder that holds cifar10")
    parser.add_argument("--emoji", type=Path, help="folder of the emoji corpus")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="begin no cell after so long")
    given, began = parser.parse_args(), time.monotonic()
    results = Results(HERE / "results")
    if given.photos is not None and given.emoji is not None:
        world = World(given.photos, given.emoji)
        for cell in cells(results.get):
            if results.get(key(cell)) is None and time.monotonic() - began < 60 * given.minutes:
                print(time.strftime("%H:%M:%S"), cell, flush=True)
                results.add("closeness", run(cell, world))
    page = HERE / "closeness.md"
    page.write_text(render_page(results.get, page.read_text(encoding="utf-8") if page.exists() else ""), "utf-8")


def cells(find: Callable[[str], Record | None]) -> list[Cell]:
    """The cells of the study of sharing that are measured, seed by seed."""

    def recorded(cell: Cell) -> Record | None:
        return find(cell.key)

    rate = chosen(recorded)
    assert rate is not None, "the study of sharing has chosen its learning rate"
    return [Cell(row, rate, STEPS, seed) for seed in SEEDS for row in ROWS]


def key(cell: Cell) -> str:
    """The key of a cell's measures."""
    return f"closeness-{cell.key}"


def run(cell: Cell, world: World) -> Record:
    """Train the cell, and measure it before and after."""
    recipe, began = cell.recipe, time.perf_counter()
    pairs = world.pairs(cell.steps * int(recipe.train.batch_size), cell.seed)
    parts = build_model_and_preprocessing(recipe, lambda: PairIndex(pairs[0]).texts)
    before = measure(parts, recipe, world)
    with tempfile.TemporaryDirectory() as folder:
        done = train_recipe(recipe, Path(folder) / "run", say=lambda line: None, preloaded=Preloaded(pairs, parts))
        if done.fitted.interrupted:
            raise KeyboardInterrupt  # a cell always starts from scratch
    return {
        "key": key(cell),
        **{"row": cell.row.name, "rate": cell.rate, "steps": cell.steps, "seed": cell.seed},
        "before": before,
        "after": measure(parts, recipe, world),
        "seconds": {"all": round(time.perf_counter() - began, 1)},
        "machine": machine(),
    }


def measure(parts: ModelAndPreprocessing, recipe: Recipe, world: World) -> dict[str, Any]:
    """The measures of a model on the drawings that are asked about, block by block; block 0 is the joint embedding."""
    model, pairs = parts.model.eval(), world.asked_drawings
    inputs = build_feature_source(parts, recipe.with_overrides(["data.feature_cache=off"]))
    names = {pair.id: pair.captions[0].text for pair in pairs}
    image = extract_tower_features(model.image, inputs.images(pairs)(), names)
    text = extract_tower_features(model.text, inputs.texts(names)(), names)
    assert image.block_ids == image.ids and text.block_ids == text.ids
    rows = [text.ids.index(id) for id in image.ids]
    of_images = {0: _joint(model.embed_image, image, slice(None)), **image.block_means}
    of_texts = {0: _joint(model.embed_text, text, rows), **{n: states[rows] for n, states in text.block_means.items()}}
    alike = [
        row
        for block in of_images
        for row in layer_similarity({block: of_images[block]}, {block: of_texts[block]}, neighbours=NEIGHBOURS)
    ]
    of_heads = head_roles(model.image, inputs.images(pairs)()), head_roles(model.text, inputs.texts(names)())
    attention = attention_agreement(*of_heads)
    return {
        "pairs": len(image.ids),
        "blocks": [asdict(row) for row in alike],
        "clusters": [asdict(row) for row in modality_clusters(of_images, of_texts)],
        "attention": None if attention is None else asdict(attention),
    }


def _joint(embed: Callable[[PooledFeatures], Any], features: TowerFeatures, rows: Any) -> Any:
    return embed(PooledFeatures(features.pooled[rows])).detach()


# --- page ------------------------------------------------------------------------------------------------------------

Measure = Callable[[dict[str, Any]], float]
"""A number of one ``measure``"""


def _of_blocks(name: str, part: str = "blocks") -> Measure:
    """Mean over blocks, without the joint embedding."""
    return lambda found: mean(row[name] for row in found[part] if row.get("image_block", row.get("block")))


def _of_embedding(name: str, part: str = "blocks") -> Measure:
    return lambda found: found[part][0][name]


def _attention(name: str, side: int | None = None) -> Measure:
    return lambda found: found["attention"][name] if side is None else found["attention"][name][side]


COLUMNS: dict[str, tuple[Measure, tuple[Measure, ...]]] = {
    "mutual k-NN, embedding": (_of_embedding("mutual_knn"), (_of_embedding("mutual_knn_shuffled"),)),
    "mutual k-NN, blocks": (_of_blocks("mutual_knn"), (_of_blocks("mutual_knn_shuffled"),)),
    "CKA, blocks": (_of_blocks("cka"), (_of_blocks("cka_shuffled"),)),
    "NMI of modality, embedding": (_of_embedding("nmi", "clusters"), (_of_embedding("nmi_shuffled", "clusters"),)),
    "NMI of modality, blocks": (_of_blocks("nmi", "clusters"), (_of_blocks("nmi_shuffled", "clusters"),)),
    "attention entropy": (_attention("entropy"), tuple(_attention("entropy_shuffled", side) for side in (0, 1))),
    "attention to own token": (
        _attention("own_token"),
        tuple(_attention("own_token_shuffled", side) for side in (0, 1)),
    ),
}
"""Title to the measure and its baseline: a mean, or the bounds of a range"""


HEADING = (
    "# Does sharing bring images and texts closer, and does attention carry over?\n\n"
    "    python -m studies.sharing.closeness --photos FOLDER --emoji FOLDER"
)
TOLD = (
    "Means over the seeds (lowest to highest seed) and, behind the stroke, the baseline: images with other names, "
    "permuted modalities, or, of attention, the range of 95 % where the heads of a layer are paired at random. Blocks: "
    "the mean over the blocks at the same place in both encoders. Attention: correlation over the heads, within layers."
)


def render_page(find: Callable[[str], Record | None], before: str) -> str:
    """The page of what is recorded, with the conclusion of the page ``before``."""
    asked, kept = cells(find), re.search(re.escape(BEGIN) + r"\n(.*?)\n?" + re.escape(END), before, re.S)
    found = {row.name: [r for c in asked if c.row == row and (r := find(key(c))) is not None] for row in ROWS}
    known = {name: records for name, records in found.items() if records}
    if not known:
        return f"{HEADING}\n\nNothing is recorded yet.\n"
    left = sum(find(key(cell)) is None for cell in asked)
    tables = [
        row
        for stage, title in (("after", "After training"), ("before", "Before training"))
        for row in (f"## {title}", "", *_table(known, stage), "")
    ]
    first = next(iter(known.values()))[0]
    days = sorted({record["machine"]["day"] for records in known.values() for record in records})
    seconds = sum(record["seconds"]["all"] for records in known.values() for record in records)
    return "\n".join(
        [
            HEADING,
            "",
            BEGIN,
            kept.group(1) if kept else "Not written yet.",
            END,
            "",
            *tables,
            f"{first['after']['pairs']} drawings and their names, {NEIGHBOURS} neighbours. {TOLD}",
            "",
            *([f"**Not complete**: {left} of {counted(len(asked), 'cell')} missing.", ""] if left else []),
            f"{', '.join(days)}; {seconds / 60:.0f} minutes on a busy machine.",
            "",
        ]
    )


def _table(known: dict[str, list[Record]], stage: str) -> list[str]:
    lines = [line(["", "seeds", *COLUMNS]), line(["---"] * (len(COLUMNS) + 2))]
    for name, records in known.items():
        measured = [record[stage] for record in records]
        lines.append(line([name, str(len(records)), *(_cell(measured, *column) for column in COLUMNS.values())]))
    return lines


def _cell(found: Sequence[dict[str, Any]], value: Measure, baseline: tuple[Measure, ...]) -> str:
    values = [value(each) for each in found]
    beside = " to ".join(f"{mean(map(bound, found)):.2f}" for bound in baseline)
    return f"{mean(values):.2f} ({min(values):.2f} to {max(values):.2f}) / {beside}"


if __name__ == "__main__":
    main()
