"""Parameter counts of the LilT paper's models on meta tensors, to the unit: those of the reference implementation."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from clasp.assemble import build
from clasp.recipe import read_recipe, shipped

GOLDEN = json.loads((Path(__file__).parent / "golden" / "param_counts.json").read_text())["lilt"]["counts"]

TOWERS = {  # row of the golden file: our image and text towers
    "base_base": ("deit:base", "hf:princeton-nlp/unsup-simcse-bert-base-uncased"),
    "base_multilingual": ("deit:base", "hf:google-bert/bert-base-multilingual-cased"),
    "small_small": ("deit:small", "hf:prajjwal1/bert-small"),
    "large_large": ("deit:large", "hf:princeton-nlp/unsup-simcse-bert-large-uncased"),
    "tiny_tiny": ("deit:tiny", "hf:prajjwal1/bert-tiny"),
}
DEEP = "deep(1, init='random')"


def lwa(place: str, reduction: int = 4) -> str:
    return f"adapters(reduction={reduction}, place='{place}', start='random')"


LWA = (lwa("input"), lwa("output"))
# the reference's switches, as image and text tunings, then head and scale where they do not train
RECIPES: dict[str, tuple] = {
    "clip_full": (["full"], ["full"]),
    "lit": (["none"], ["full"]),
    "text_frozen": (["full"], ["none"]),
    "projections": (["none"], ["none"]),
    "temperature_only": (["none"], ["none"], "none"),
    "ln_proj_frozen": (["norms"], ["norms"], "none"),
    "ln_vision": (["norms"], ["none"]),
    "ln_text": (["none"], ["norms"]),
    "ln": (["norms"], ["norms"]),
    "bitfit_vision": (["biases"], ["none"]),
    "bitfit_text": (["none"], ["biases"]),
    "bitfit": (["biases"], ["biases"]),
    "bitfit_ln": (["biases", "norms"], ["biases", "norms"]),
    "last_layer": (["last(1)"], ["last(1)"]),
    "last_layer_ln": (["last(1)", "norms"], ["last(1)", "norms"]),
    "da": ([DEEP], [DEEP]),
    "da_ln": ([DEEP, "norms"], [DEEP, "norms"]),
    "da_bitfit": ([DEEP, "biases"], [DEEP, "biases"]),
    "da_ln_bitfit": ([DEEP, "norms", "biases"], [DEEP, "norms", "biases"]),
    "lwa": ([LWA[0]], [LWA[1]]),
    "lwa_ln": ([LWA[0], "norms"], [LWA[1], "norms"]),
    "lwa_bitfit": ([LWA[0], "biases"], [LWA[1], "biases"]),
    "lwa_ln_bitfit": ([LWA[0], "norms", "biases"], [LWA[1], "norms", "biases"]),
    "lwa_vision_only_ln": ([LWA[0], "norms"], ["norms"]),
    "lwa_text_only_ln": (["norms"], [LWA[1], "norms"]),
    "lwa_rf8_ln": ([lwa("input", 8), "norms"], [lwa("output", 8), "norms"]),
    "lwa_rf16_ln": ([lwa("input", 16), "norms"], [lwa("output", 16), "norms"]),
    "lwa_da_ln": ([LWA[0], DEEP, "norms"], [LWA[1], DEEP, "norms"]),
    # the reference matches substrings: "dense" is also in BERT's attention output, "attention" holds a norm of BERT's
    "unlock_dense": (["mlp"], ["match('*.dense.*')"]),
    "unlock_attn": (["attention"], ["match('*.attention.*')"]),
}
ROWS = [(towers, recipe) for towers, rows in GOLDEN.items() for recipe in rows]


def test_every_golden_row_is_here():
    assert {recipe for _, recipe in ROWS} == set(RECIPES)
    assert set(GOLDEN) == set(TOWERS)


@pytest.mark.parametrize(("towers", "recipe"), ROWS)
def test_counts(towers: str, recipe: str):
    image_tower, text_tower = TOWERS[towers]
    image, text, head = (*RECIPES[recipe], "full")[:3]
    overrides = [f"image.tower={image_tower}", f"text.tower={text_tower}", f"tune.image={image}", f"tune.text={text}"]
    counts = build(read_recipe("lilt/clip", [*overrides, f"tune.head={head}"]), meta=True).counts()
    golden = GOLDEN[towers][recipe]
    assert counts["model"].total == golden["total"]
    assert counts["model"].trained == golden["trained"]
    assert round(counts["model"].percent, 2) == golden["percent_trained"]
    assert counts["model"].delta_bytes == 4 * golden["trained"]
    for ours, theirs in (("image", "vision"), ("text", "text")):
        assert (counts[ours].total, counts[ours].trained) == (golden[f"{theirs}_total"], golden[f"{theirs}_trained"])
    assert counts["heads"].trained == golden["projections_trained"]
    assert counts["scale"].trained == golden["temperature_trained"]


@pytest.mark.parametrize(
    ("name", "recipe"),
    [
        ("clip", "clip_full"), ("lit", "lit"), ("heads", "projections"), ("layernorm", "ln"),
        ("bitfit", "bitfit"), ("da", "da_ln"), ("lwa", "lwa_ln"),
    ],
)  # fmt: skip
def test_recipe_files_are_the_base_rows(name: str, recipe: str):
    counts = build(read_recipe(f"lilt/{name}"), meta=True).counts()
    assert (counts["model"].total, counts["model"].trained) == (
        GOLDEN["base_base"][recipe]["total"],
        GOLDEN["base_base"][recipe]["trained"],
    )
    text = shipped()[f"lilt/{name}"].read_text()
    assert f"{counts['model'].trained:,}" in text, "the file says how many train"
