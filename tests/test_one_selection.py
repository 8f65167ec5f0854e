"""One selection, four uses: what gets gradients, what the optimizer holds, what the delta saves and what is counted.

Real pairs of towers, opened from disk by a recipe: built, moved by one step, saved, loaded and refused.
"""

from __future__ import annotations

from itertools import cycle
from pathlib import Path

import pytest
import torch

from clasp.config.build import build_model, build_model_and_preprocessing, load
from clasp.models.tuning import spec
from clasp.models.tuning.methods import TUNING_METHODS
from clasp.types import UserError
from selection_checks import CAPTIONS, recipe, train_save_count, train_save_load
from toymethods import CANNOT, METHODS, OTHER_PEFT, SEVERAL
from toysavedtowers import save
from toytowers import IMAGE_NETS, NETS, OURS, TEXT_NETS, base

SIDES = ("image", "text")
ROWS = (*METHODS, *OTHER_PEFT)
PAIRS = [*zip(IMAGE_NETS, cycle(TEXT_NETS), strict=False)]  # every tower once, and one twice
SAVED_PAIRS = [*(pair for pair in PAIRS if not {*pair} & {*OURS}), ("clip", "siglip")]


@pytest.fixture(scope="session")
def saved(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A folder for each tower that ``transformers`` can save."""
    names = {name for pair in SAVED_PAIRS for name in pair}
    return {name: save(name, tmp_path_factory.mktemp(name)) for name in sorted(names)}


# --- every method on every tower -------------------------------------------------------------------------------------


def test_the_table_is_whole():
    """A new method or tower has its rows, and an exception is of a row."""
    assert {spec.parse_tuning_spec(method).method for method in ROWS} == set(TUNING_METHODS)
    assert {name for pair in PAIRS for name in pair} == set(NETS)
    assert set(CANNOT) <= {(name, method) for name in NETS for method in ROWS}


@pytest.mark.parametrize(
    ("pair", "method"),
    [(pair, method) for i, pair in enumerate(PAIRS) for j, method in enumerate(ROWS) if (i + j) % 2 == 0],
    ids=lambda word: word if isinstance(word, str) else "+".join(word),
)
def test_every_method_on_every_other_pair(tmp_path: Path, pair: tuple[str, str], method: str):
    """Both towers are tuned by the method; one that cannot refuses, and is left as it came.

    Every tower has every method in ``nn/test_tuning.py``; here it is half of them, through all four uses.
    """
    towers = [f"toyfactories:{name}" for name in pair]
    tuned = {}
    for side, name in zip(SIDES, pair, strict=True):
        tuned[side] = ["none"] if (name, method) in CANNOT else [method]
        if (name, method) in CANNOT:
            with pytest.raises(UserError, match=CANNOT[name, method]) as refused:
                build_model(recipe(*towers, [], tune={side: [method]}))
            assert "\n" not in str(refused.value)
    given = recipe(*towers, [], tune=tuned)
    check = train_save_load if pair == PAIRS[0] else train_save_count  # one pair also comes back
    selection = check(given, tmp_path / "run", CAPTIONS).model.selection
    assert {side for side in SIDES if any(name.startswith(f"{side}.net.") for name in selection)} == {
        side for side in SIDES if tuned[side] != ["none"]
    }


@pytest.mark.parametrize("pair", SAVED_PAIRS, ids="+".join)
def test_from_disk(saved: dict[str, Path], tmp_path: Path, pair: tuple[str, str]):
    """Counted from a configuration, opened from a folder."""
    image, text = (f"hf:{saved[name]}" for name in pair)
    parts = train_save_load(recipe(image, text, ["norms", "lora(rank=2, targets='all')"]), tmp_path / "run", CAPTIONS)
    assert set().union(*parts.model.new_parameter_names.values()) <= parts.model.selection
    for side in SIDES:
        assert any(name.startswith(f"{side}.net.") and "lora_" in name for name in parts.model.selection)


@pytest.mark.parametrize(
    ("pair", "methods"),
    [(pair, methods) for pair, methods in zip(PAIRS, cycle(SEVERAL), strict=False)],
    ids=lambda words: " ".join(words),
)
def test_several_methods_on_every_tower(tmp_path: Path, pair: tuple[str, str], methods: tuple[str, ...]):
    """A method given twice, for other blocks, is as good as once; a tower without attention takes the first alone."""
    towers = [f"toyfactories:{name}" for name in pair]
    tuned = {side: list(methods) for side in SIDES}
    if pair[0] in ("convnext", "efficientnet"):
        tuned["image"] = [methods[0].replace("targets='attention'", "targets='all'")]
    check = train_save_load if pair == PAIRS[0] else train_save_count
    selection = check(recipe(*towers, [], tune=tuned), tmp_path / "run", CAPTIONS).model.selection
    assert {name.split(".net.")[0] for name in selection if ".net." in name} == set(SIDES)


# --- more than one method, other parts -------------------------------------------------------------------------------


@pytest.mark.parametrize("start", ["copy", "random"])
def test_combined_methods_come_back_too(saved: dict[str, Path], tmp_path: Path, start: str):
    tuned = ["adapters", f"deep(1, init='{start}')", "biases", "lora(rank=2)", "prompts(2)"]
    image, text = f"file:{saved['vit']}", f"file:{saved['bert']}"
    given = recipe(
        image,
        text,
        tuned,
        loss={"kind": "sigmoid"},
        head={"kind": "mlp", "width": 16, "standardize": True},
    ).with_overrides(["image.pool=attention", "text.layer=1"])
    train_save_load(given, tmp_path / "run", CAPTIONS)


def test_what_stays_frozen_is_not_saved_yet_comes_back(saved: dict[str, Path], tmp_path: Path):
    """New parts that do not train are made again from the seed."""
    given = recipe(f"hf:{saved['vit']}", f"hf:{saved['bert']}", ["norms"]).with_overrides(["tune.head=none"])
    parts = train_save_load(given, tmp_path / "run", CAPTIONS)
    assert not any("head" in name for name in parts.model.delta())


def test_efficientnet_and_e5(tmp_path: Path):
    """The packaged pair of the demo, with its real weights; not loaded again, since e5 alone is 470 MB."""
    given = recipe("pip:efficientnet-lite0", "pip:multilingual-e5-small", ["norms", "lora(rank=2)"])
    given = given.with_overrides(["""tune.image=["norms", "lora(rank=2, targets='all')"]""", "image.size=64"])
    captions = ["ein Hund im Schnee", "mbwa", "a cat on a mat, asleep", "दो बिल्लियाँ"]
    parts = train_save_count(given, tmp_path / "run", captions)
    kinds = {part for name in parts.model.selection for part in name.split(".")}
    assert {"lora_A", "lora_B", "_bn1", "LayerNorm", "image_head", "text_head", "log_scale"} <= kinds
    assert parts.tokenizer.settings.prefix == "query: "
    assert parts.model.parameter_counts()["model"].percent < 7


# --- another base ----------------------------------------------------------------------------------------------------


def test_another_base_is_refused_by_name_and_hash(tmp_path: Path):
    save("vit", tmp_path / "vit")
    save("bert", tmp_path / "bert")
    given = recipe(f"hf:{tmp_path / 'vit'}", f"hf:{tmp_path / 'bert'}", ["lora(rank=2)", "norms"])
    parts = train_save_load(given, tmp_path / "run", CAPTIONS)
    changed = base("bert").net
    name, weight = "encoder.layer.1.output.dense.weight", changed.get_parameter("encoder.layer.1.output.dense.weight")
    with torch.no_grad():
        weight[3, 5] += 1e-6
    changed.save_pretrained(tmp_path / "bert")
    with pytest.raises(UserError) as caught:
        load(tmp_path / "run")
    says = str(caught.value)
    total = len(parts.model.text.weight_hashes)
    assert f"other weights of the text tower hf:{tmp_path / 'bert'}" in says
    assert f"1 of {total} tensors differ ({name} is " in says
    assert f"was {parts.model.text.weight_hashes[name]}" in says and "\n" not in says


def test_another_model_in_the_same_place_is_refused(tmp_path: Path):
    for name in ("vit", "bert"):
        save(name, tmp_path / name)
    given = recipe(f"hf:{tmp_path / 'vit'}", f"hf:{tmp_path / 'bert'}", ["none"])
    train_save_load(given, tmp_path / "run", CAPTIONS)
    save("xlm-roberta", tmp_path / "bert")
    with pytest.raises(UserError, match="other weights of the text tower"):
        load(tmp_path / "run")


@pytest.mark.parametrize("resize", ["squash", "pad"])
def test_a_cropping_tower_can_be_shown_the_whole_picture(tmp_path: Path, resize: str):
    save("vit", tmp_path / "vit", size={"shortest_edge": 36}, crop_size=32, do_center_crop=True)
    save("bert", tmp_path / "bert")
    given = recipe(f"hf:{tmp_path / 'vit'}", f"hf:{tmp_path / 'bert'}", ["none"]).with_overrides(
        [f"image.resize={resize}"]
    )
    transform = build_model_and_preprocessing(given).transform
    assert (transform.resize, transform.crop_fraction, transform.size) == (resize, 1.0, 32)
