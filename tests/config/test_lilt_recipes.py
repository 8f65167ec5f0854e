"""The recipes of LilT as they train: names, counts, one selection in four uses; and each quirk where it acts."""

from __future__ import annotations

from pathlib import Path

import pytest
import safetensors.torch
import torch

import clasp
from clasp.config.build import build_model, build_model_and_preprocessing
from clasp.config.recipe import Recipe, read_recipe, recipe_from_dict
from clasp.config.recipe_files import builtin_recipes
from clasp.training.distributed import Processes
from clasp.training.losses import build_loss
from clasp.training.run_folder import RunFolder
from clasp.training.step import Stepper
from clasp.types import Batch, Pixels
from lilt_reference import COUNTS, NAMES, TOWERS, TUNED, our_name, save_text, tuned
from selection_checks import recipe as toy_recipe
from toydata import toys, write_csv
from toyruns import delta, lines, run, save_towers

# recipe: its towers and its row of the golden file
FILES = {
    "base": ("base_base", "projections"),
    "clip": ("base_base", "clip_full"),
    "lit": ("base_base", "lit"),
    "heads": ("base_base", "projections"),
    "layernorm": ("base_base", "ln"),
    "bitfit": ("base_base", "bitfit"),
    "last": ("base_base", "last_layer"),
    "da": ("base_base", "da_ln"),
    "lwa": ("base_base", "lwa_ln"),
    "lwa-8": ("base_base", "lwa_rf8_ln"),
    "lwa-16": ("base_base", "lwa_rf16_ln"),
    "lwa-bitfit": ("base_base", "lwa_ln_bitfit"),
    "lwa-image": ("base_base", "lwa_vision_only_ln"),
    "lwa-text": ("base_base", "lwa_text_only_ln"),
    "lwa-tiny": ("tiny_tiny", "lwa_ln"),
    "lwa-small": ("small_small", "lwa_ln"),
    "lwa-large": ("large_large", "lwa_ln"),
    "lwa-multilingual": ("base_multilingual", "lwa_ln"),
}
CAPTIONS = ["w5 w6 w7", "w8"]


@pytest.fixture(scope="module")
def text_tower(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_text(tmp_path_factory.mktemp("bert-tiny"))


def tiny(text_tower: Path, *overrides: str) -> Recipe:
    """The paper's recipe on its tiny towers, for batches of two."""
    towers = ["image.tower=lilt_reference:image", f"text.tower=file:{text_tower}"]
    return read_recipe("lilt/base", [*towers, "train.batch_size=2", "loss.negatives=2", *overrides])


# --- as they train ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("row", COUNTS["tiny_tiny"])
def test_a_row_as_it_trains(row: str, text_tower: Path, tmp_path: Path):
    """Names, totals, gradients, the optimizer's groups, what moves and what is saved, on real weights."""
    given = tiny(text_tower, *tuned(row))
    parts = build_model_and_preprocessing(given)
    model, counts, golden = parts.model, parts.model.parameter_counts(), COUNTS["tiny_tiny"][row]
    assert (counts["model"].total, counts["model"].trained) == (golden["total"], golden["trained"])
    for ours, theirs in (("image", "vision"), ("text", "text")):
        assert (counts[ours].total, counts[ours].trained) == (golden[f"{theirs}_total"], golden[f"{theirs}_trained"])
    if row in NAMES:
        assert model.selection == {our_name(name) for name in NAMES[row]}

    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    processes = Processes(device=torch.device("cpu"))
    settings = given.train.model_copy(update={"micro_batch": 2})
    stepper = Stepper(
        model, build_loss(given.loss), settings, processes, "float32", steps=15, kinds=model.parameter_kinds
    )
    pixels = torch.randn(2, 3, 256, 256, generator=torch.Generator().manual_seed(0))
    batch = Batch(("a", "b"), Pixels(pixels), parts.tokenizer(CAPTIONS), torch.tensor([[0, 0], [1, 1]]))
    model.train()
    stepper.backward(batch, 0)
    learned = {name for name, p in model.named_parameters() if p.grad is not None}
    stepper.optimizer.step()
    names = {id(p): name for name, p in model.named_parameters()}
    held = [names[id(p)] for group in stepper.optimizer.param_groups for p in group["params"]]
    saved = RunFolder(tmp_path / "run")
    saved.start(given.to_toml(), model, parts.transform, parts.tokenizer, pairs="none")
    saved.save(model)
    assert learned == model.selection
    assert len(held) == len(set(held)) and set(held) == model.selection
    assert set(model.parameter_kinds) == model.selection
    assert {name for name, p in model.named_parameters() if not torch.equal(p, before[name])} == model.selection
    assert set(safetensors.torch.load_file(tmp_path / "run" / "delta.safetensors")) == model.selection


def test_every_list_of_names_is_of_a_row():
    assert set(NAMES) <= set(COUNTS["tiny_tiny"]) == set(TUNED)


@pytest.mark.parametrize("name", FILES)
def test_a_file_is_its_row(name: str):
    given = read_recipe(f"lilt/{name}")
    towers, row = FILES[name]
    assert (given.image.tower, given.text.tower) == TOWERS[towers]
    assert (given.tune.image, given.tune.text) == TUNED[row][:2]
    counts, golden = build_model(given, meta=True).parameter_counts(), COUNTS[towers][row]
    assert (counts["model"].total, counts["model"].trained) == (golden["total"], golden["trained"])
    comment = builtin_recipes()[f"lilt/{name}"].read_text().splitlines()[:3]
    assert all(line.startswith("# ") for line in comment)
    assert comment[2].startswith(f"# {golden['trained']:,} parameters train ({golden['percent_trained']:.2f} %")


def test_every_file_is_here_and_differs_from_the_paper_in_towers_and_tuning_only():
    names = {name.removeprefix("lilt/") for name in builtin_recipes() if name.startswith("lilt/")}
    assert set(FILES) <= names
    paper = read_recipe("lilt/base")
    for name in FILES:
        given = read_recipe(f"lilt/{name}")
        image = given.image.model_copy(update={"tower": paper.image.tower})
        text = given.text.model_copy(update={"tower": paper.text.tower})
        assert given.model_copy(update={"tune": paper.tune, "image": image, "text": text}) == paper


def test_deltas_are_as_small_as_the_paper_has_them():
    """Of the bytes of the two towers: layerwise adapters at most 8 %, norms at most 0.5 %."""
    towers = build_model(read_recipe("lilt/clip"), meta=True).parameter_counts()
    base = 4 * (towers["image"].total + towers["text"].total)
    for name, most in (("lwa", 0.08), ("da", 0.08), ("layernorm", 0.005)):
        assert (
            build_model(read_recipe(f"lilt/{name}"), meta=True).parameter_counts()["model"].delta_bytes <= most * base
        )


# --- the quirks ------------------------------------------------------------------------------------------------------


def test_the_settings_of_the_paper():
    """Facts of the released code, and none of its quirks anywhere else."""
    paper = read_recipe("lilt/base")
    plain = recipe_from_dict({"image": {"tower": "pip:x"}, "text": {"tower": "pip:y"}}, "plain")
    quirks = {
        "image.mean": (0.48145466, 0.4578275, 0.40821073),
        "image.std": (0.26862954, 0.26130258, 0.27577711),
        "text.template": "cls",
        "text.token_types": False,
        "text.dropout": True,
        "text.clean": "lilt",
        "loss.positives": "diagonal",
        "loss.negatives": 128,
        "loss.scale": "temperature",
        "loss.scale_range": (2, 1000),
        "train.schedule": "lilt",
        "train.decay_filter": "lilt",
    }
    for key, value in quirks.items():
        section, name = key.split(".")
        assert getattr(getattr(paper, section), name) == value, key
        assert getattr(getattr(plain, section), name) != value, key
        for other in builtin_recipes():
            if not other.startswith(("lilt/", "msclip/")):  # the other paper has some of them too
                assert getattr(getattr(read_recipe(other), section), name) != value, (other, key)
    train, augment = paper.train, paper.data.augment
    assert (train.batch_size, train.epochs, train.lr, train.weight_decay) == (512, 15, 1e-4, 0.02)
    assert (train.betas, train.eps, train.clip_norm, train.min_lr_ratio) == ((0.9, 0.999), 1e-8, "none", 0.1)
    assert (train.precision, train.select, paper.data.captions) == ("float32", "last", "all")
    assert 1 / paper.loss.init_logit_scale == 0.07 and paper.head.width == 256 and paper.head.kind == "linear"
    assert (paper.image.size, paper.image.resize, paper.text.max_tokens) == (256, "squash", 25)
    assert augment is not None and (augment.crop_scale, augment.flip) == ((0.2, 1), 0.5)
    assert augment.randaugment == (2, 7)


def test_pixels_and_tokens_are_the_papers(text_tower: Path):
    parts = build_model_and_preprocessing(tiny(text_tower))
    assert parts.transform.mean == (0.48145466, 0.4578275, 0.40821073)
    assert parts.transform.std == (0.26862954, 0.26130258, 0.27577711)
    assert (parts.transform.size, parts.transform.resize, parts.transform.interpolation) == (256, "squash", "bicubic")
    assert parts.tokenizer.encode(["W5, w6!"]) == [[1, 5, 6]]  # begins with the class token, has no end token
    assert max(map(len, parts.tokenizer.encode(["w7 " * 40]))) == 25
    assert not any("token_type" in name for name, _ in parts.model.named_parameters())
    parts.model.train()
    assert parts.model.text.net.training and not parts.model.image.net.training


def test_a_mean_of_ones_own_is_for_any_tower():
    given = toy_recipe("toyfactories:vit", "toyfactories:bert", ["none"])
    assert build_model_and_preprocessing(given).transform.mean == (0.5, 0.4, 0.3)
    changed = build_model_and_preprocessing(given.with_overrides(["image.mean=[0.1, 0.2, 0.3]"])).transform
    assert (changed.mean, changed.std) == ((0.1, 0.2, 0.3), (0.2, 0.3, 0.4))


def test_a_run_of_the_whole_recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Every quirk at once, from pairs to a folder that loads."""
    monkeypatch.setenv("CLASP_CACHE", str(tmp_path / "cache"))
    towers, pairs = save_towers(tmp_path / "towers"), write_csv(toys(48), tmp_path / "pairs")
    given = read_recipe(
        "lilt/lwa",
        [
            f"image.tower=file:{towers / 'image'}",
            "image.size=32",
            f"text.tower=file:{towers / 'text'}",
            "head.width=16",
            f"data.train={pairs}",
            "train.batch_size=16",
            "train.epochs=2",
            "train.log_every=1",
            "loss.negatives=8",
        ],
    )
    run(given, tmp_path / "run")
    temperature = delta(tmp_path / "run")["temperature"].item()
    assert 0.069 < temperature < 0.071 and temperature != pytest.approx(0.07, abs=1e-7)
    steps = [row for row in lines(tmp_path / "run" / "log.jsonl") if row["event"] == "step"]
    assert steps[0]["scale"] == pytest.approx(1 / 0.07) and 1 < steps[0]["loss"] < 5
    assert steps[0]["lr"] == pytest.approx(1e-5) and steps[-1]["lr"] == pytest.approx(1e-5 + 9e-5 / 2)
    loaded = clasp.load(tmp_path / "run").encoder
    assert loaded.temperature.item() == temperature and "log_scale" not in dict(loaded.named_parameters())


# --- kinds -----------------------------------------------------------------------------------------------------------


def kinds_of(tuning: list[str], **changes: dict) -> dict[str, str]:
    model = build_model_and_preprocessing(toy_recipe("toyfactories:vit", "toyfactories:bert", tuning, **changes)).model
    assert set(model.parameter_kinds) == model.selection
    return model.parameter_kinds


def test_kinds_of_what_a_recipe_adds():
    kinds = kinds_of(["adapters", "norms", "deep(1)"], loss={"kind": "sigmoid", "scale": "temperature"})
    assert kinds["temperature"] == kinds["bias"] == "scale"
    assert kinds["image_head.map.weight"] == kinds["text_head.map.bias"] == "head"
    assert kinds["image.net.layers.0.adapter1.down.weight"] == "new"
    assert kinds["image.net.layers.2.layernorm_before.weight"] == "new", "a norm of a new block"
    assert kinds["image.net.layers.1.layernorm_before.weight"] == "norm"
    assert kinds["text.net.embeddings.LayerNorm.bias"] == kinds["image.net.layernorm.weight"] == "norm"
    assert "tower" not in kinds.values()


def test_kinds_of_the_base():
    kinds = kinds_of(["biases", "last(1)"])
    assert kinds["text.net.encoder.layer.0.attention.output.LayerNorm.bias"] == "norm"
    assert kinds["text.net.encoder.layer.0.attention.output.dense.bias"] == "tower"
    assert kinds["text.net.encoder.layer.1.output.dense.weight"] == "tower"
    assert "new" not in kinds.values() and kinds["log_scale"] == "scale"


def test_kinds_of_what_peft_wraps():
    kinds = kinds_of(["full", "lora(rank=2, targets='all')"])
    wrapped = {name: kind for name, kind in kinds.items() if ".base_layer." in name}
    low_rank = {name: kind for name, kind in kinds.items() if "lora_" in name}
    assert wrapped and set(wrapped.values()) == {"tower"}
    assert low_rank and set(low_rank.values()) == {"new"}


def test_a_learned_pooling_is_of_the_heads():
    given = toy_recipe("toyfactories:vit", "toyfactories:bert", ["none"]).with_overrides(["image.pool=attention"])
    kinds = build_model_and_preprocessing(given).model.parameter_kinds
    assert kinds["image.pooling.query"] == "head" and set(kinds.values()) == {"head", "scale"}
