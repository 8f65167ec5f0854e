"""Whatever a recipe names comes from one table, or from outside as ``package.module:Name``, through the command."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import pytest
import torch

import toyplugins
from clasp import cli
from clasp.analysis.weight_interpolation import WeightInterpolation, interpolation_obstacles
from clasp.config.build import load
from clasp.config.recipe import read_recipe
from clasp.data import decoding, tokenizer
from clasp.data.feature_cache.dtypes import DTYPE_CODECS
from clasp.data.pairs import PAIR_FORMATS, open_pairs
from clasp.data.plugins import import_named, load_named
from clasp.models import heads, pooling
from clasp.models.tower import Tower
from clasp.models.tower_settings import PoolingMode
from clasp.models.transformer import blocks, convolutions
from clasp.models.tuning.methods import TUNING_METHODS
from clasp.models.tuning.peft_methods import PEFT_METHODS
from clasp.models.tuning.spec import parse_tuning_spec
from clasp.models.zoo.registry import TOWER_SOURCES
from clasp.plain_types import StorageDtype
from clasp.training.losses import LOSSES
from clasp.training.optimizer import DECAY_FILTERS, SCHEDULES
from clasp.training.settings import TrainSettings
from clasp.types import UserError
from toydata import toys, write_csv
from toyruns import delta, lines, recipe, save_towers
from toytowers import base, inputs

_OUTSIDE = [
    "loss.kind=toyplugins:biased_loss",
    "train.schedule=toyplugins:linear_schedule",
    "train.decay_filter=toyplugins:decays_image_head",
    'tune.image=["toyplugins:gain(start=1.5)"]',
    'tune.text=["toyplugins:last_norm"]',
    "data.format=toyplugins:open_stars",
    "image.tower=toyplugins:image_tower",
]


@dataclass
class Typed:
    """The exit code of a command and its two streams."""

    code: int
    out: str
    err: str


Command = Callable[..., Typed]


@pytest.fixture
def clasp(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], tmp_path: Path) -> Command:
    """Types a command, in this process and an empty folder."""
    monkeypatch.setenv("CLASP_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)

    def typed(*words: str) -> Typed:
        monkeypatch.setattr(sys, "argv", ["clasp", *words])
        capfd.readouterr()
        code = 0
        try:
            cli.main()
        except SystemExit as stop:
            code = stop.code if isinstance(stop.code, int) else 0
        return Typed(code, *capfd.readouterr())

    return typed


@pytest.fixture(scope="module")
def toml(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A recipe of tiny towers and of pairs in a form that clasp does not know."""
    folder = tmp_path_factory.mktemp("world")
    csv = write_csv(toys(32), folder)
    stars = csv.with_suffix(".stars")
    stars.write_text(csv.read_text("utf-8").replace(",", "*"), "utf-8")
    made = recipe(save_towers(folder / "towers"), stars, "train.epochs=2", "train.batch_size=8", "train.log_every=1")
    (folder / "toy.toml").write_text(made.to_toml())
    return str(folder / "toy.toml")


# --- from outside ----------------------------------------------------------------------------------------------------


def test_one_of_each_kind_trains(clasp: Command, toml: str):
    said = clasp("train", toml, *_OUTSIDE, "train.select=last", "--name", "new")
    assert said.code == 0, said.err
    run = Path("runs/new")
    rates = [row["lr"] for row in lines(run / "log.jsonl") if row["event"] == "step"]
    assert len(rates) == 6 and rates == pytest.approx([3e-3 * (1 - step / 6) for step in range(6)], rel=1e-3)
    trained = delta(run)
    assert {"bias", "image.net.gain.factor"} < set(trained)
    assert 1.4 < trained["image.net.gain.factor"] < 1.6 and trained["image.net.gain.factor"] != 1.5
    assert -2.1 < trained["bias"] < -1.9 and trained["bias"] != -2
    assert {name.rpartition(".")[2] for name in trained if name.startswith("text.net.")} == {"weight", "bias"}
    assert 'kind = "toyplugins:biased_loss"' in (run / "recipe.toml").read_text()
    with pytest.raises(UserError, match=r"names Python code, image.tower = 'toyplugins:image_tower'.* allow_code=True"):
        load(run)
    loaded = load(run, allow_code=True).encoder
    assert torch.equal(loaded.image.net.get_parameter("gain.factor"), trained["image.net.gain.factor"])
    assert clasp("index", str(run), str(read_recipe(toml).data.train)).code == 2
    said = clasp(
        "index", str(run), str(read_recipe(toml).data.train), "--allow-code"
    )  # the pairs of the recipe, so its format
    assert said.code == 0 and "32" in said.err, said.err


def test_a_method_and_a_tower_are_counted(clasp: Command, toml: str):
    said = clasp("params", toml, *_OUTSIDE, "tune.head=none", "head.standardize=false", "--json")
    facts = json.loads(said.out)
    assert (facts["image"]["trained"], facts["scale"]["trained"]) == (1, 2)
    others = [each for each in _OUTSIDE if not each.startswith("loss.kind=")]
    said = clasp("params", toml, *others, "loss.kind=toyplugins:halved_loss", "--json")
    assert json.loads(said.out)["scale"]["trained"] == 1, "a plain function: its logits have no bias"


@torch.no_grad()
def test_a_method_says_how_it_is_interpolated():
    own, tower = Tower(base("vit")), Tower(base("vit"))
    for name in tower.tune(["toyplugins:gain(start=3.0)", "norms"], seed=0):
        tower.get_parameter(name).requires_grad_(True).data += 0.5
    assert interpolation_obstacles(tower, own) == []
    with WeightInterpolation(tower, own).at(0.0):
        assert torch.equal(tower.pooled(inputs("vit")), own.pooled(inputs("vit")))
    other = Tower(base("vit"))
    other.tune(["dora(rank=1)", "oft(blocks=1, targets='mlp')"], seed=0)
    assert interpolation_obstacles(other, own) == ["dora", "oft"]


def test_a_warm_up_of_its_own(clasp: Command, toml: str):
    said = clasp("params", toml, "train.schedule=toyplugins:constant_schedule", "train.warmup_fraction=0.2")
    assert said.code == 2 and "leave warmup_fraction = 0.2 out, or set schedule = 'cosine'" in said.err


def test_indices_of_two_formats_are_two(tmp_path: Path):
    file, cache = write_csv(toys(6), tmp_path), tmp_path / "cache"
    for _ in range(2):
        assert len(open_pairs(file, cache=cache)) == len(open_pairs(file, format=".csv", cache=cache)) == 6
        assert len(open_pairs(file, format="toyplugins:open_every_other", cache=cache)) == 3
    with pytest.raises(UserError, match=r"data.format = 'toyplugins:open_nothing' gave a list"):
        open_pairs(file, format="toyplugins:open_nothing")


def test_a_module_in_the_current_folder_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "beside_the_recipe.py").write_text("def fall(step, context):\n    return 0.25\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [folder for folder in sys.path if folder])
    settings = TrainSettings(schedule="beside_the_recipe:fall")
    assert load_named(settings.schedule, SCHEDULES, "train.schedule")(0, None) == 0.25
    assert sys.path[-1] == str(tmp_path), "behind all others, so that it hides nothing"


# --- mistakes --------------------------------------------------------------------------------------------------------

_MISTAKES = {
    "loss.kind=infonc": ["loss.kind = 'infonc' should be 'infonce' or 'sigmoid'", "did you mean 'infonce'?"],
    "loss.kind=toyplugins:halvd_loss": ["toyplugins has no function 'halvd_loss'; nearest: halved_loss"],
    "loss.kind=toyplugin:halved_loss": ["'toyplugin:halved_loss': No module named 'toyplugin'", "current folder"],
    "loss.kind=toyplugins:NUMBER": ["toyplugins has no function 'NUMBER'"],
    "loss.kind=toy plugins:x": ["does not read as 'package.module:Name'"],
    "train.schedule=cosin": ["train.schedule = 'cosin' should be 'cosine' or 'lilt'", "did you mean 'cosine'?"],
    "train.schedule=toyplugins:linear_shedule": ["nearest: linear_schedule"],
    "train.decay_filter=matrix": ["train.decay_filter = 'matrix'", "'msclip'", "did you mean 'matrices'?"],
    "train.decay_filter=toyplugins:decays": ["train.decay_filter = 'toyplugins:decays'", "no function 'decays'"],
    'tune.text=["norm"]': ["'norm' should be 'full', 'none'", "or 'match'", "did you mean 'norms'?"],
    'tune.text=["toyplugins:gian"]': ["toyplugins has no function 'gian'; nearest: gain"],
    'tune.text=["toyplugins:gain(m=2)"]': ["toyplugins:gain has no option 'm'; it takes start, blocks"],
    'tune.text=["toyplugins:gain(2"]': ["does not read as a method"],
    "data.format=.cvs": ["data.format = '.cvs' should be 'folder', '.csv'", "did you mean '.csv'?"],
    "data.format=toyplugins:open_star": ["nearest: open_stars"],
    "image.tower=hff:a/b": ["did you mean hf:a/b?", "own:image, package.module:factory"],
    "image.tower=toyplugins:imagetower": ["nearest: image_tower"],
}


@pytest.mark.parametrize("override", _MISTAKES)
def test_an_unknown_name_is_one_line_with_the_nearest(clasp: Command, toml: str, override: str):
    said = clasp("params", toml, override)
    assert said.code == 2 and not said.out and said.err.count("\n") == 1, said
    for words in _MISTAKES[override]:
        assert words in said.err, said.err


# --- tables ----------------------------------------------------------------------------------------------------------


def test_every_row_is_a_choice(toml: str):
    for name in LOSSES:
        assert read_recipe(toml, [f"loss.kind={name}"]).loss.kind == name
    for name in SCHEDULES:
        assert TrainSettings(schedule=name).schedule == name
    for name in DECAY_FILTERS:
        assert TrainSettings(decay_filter=name).decay_filter == name
    for name in PAIR_FORMATS:
        assert read_recipe(toml, [f"data.format={name}"]).data.format == name
    for name in TUNING_METHODS:
        assert parse_tuning_spec(name).method == name


def test_errors_list_the_rows_of_the_tables(tmp_path: Path, clasp: Command, toml: str):
    (tmp_path / "pairs.doc").write_text("")
    with pytest.raises(UserError) as error:
        open_pairs(tmp_path / "pairs.doc")
    assert all(name in str(error.value) for name in PAIR_FORMATS)
    said = clasp("params", toml, "image.tower=dinov2")
    assert all(f"{scheme}:" in said.err for scheme in TOWER_SOURCES)


def test_a_method_of_peft_has_one_row():
    for name, row in PEFT_METHODS.items():
        assert TUNING_METHODS[name].passes_to_peft
        assert ("init" in TUNING_METHODS[name].defaults) is row.gradient_init


@pytest.mark.parametrize(
    ("choices", "table"),
    [
        (tokenizer.CaptionCleaning, tokenizer.CAPTION_CLEANERS),
        (decoding.Interpolation, decoding.RESAMPLING),
        (StorageDtype, DTYPE_CODECS),
        (PoolingMode, {*pooling.POOLING_FUNCTIONS, "attention", "pooler"}),
        (heads.HeadSettings.model_fields["kind"].annotation, heads.HEAD_MAPS),
        (blocks.BlockSettings.model_fields["activation"].annotation, blocks._ACTIVATIONS),
        (blocks.BlockSettings.model_fields["norm"].annotation, blocks._NORMS),
        (convolutions.ConvNormKind, convolutions._CONV_NORMS),
    ],
    ids=["cleaners", "interpolations", "dtypes", "poolings", "heads", "activations", "norms", "convolution norms"],
)
def test_literals_are_the_keys_of_their_tables(choices: Any, table: Iterable[str]):
    assert set(get_args(choices)) == set(table)


def test_what_is_named_from_outside_is_what_the_module_has():
    assert import_named("toyplugins:image_tower", "tower") is toyplugins.image_tower
    assert load_named("toyplugins:biased_loss", LOSSES, "loss.kind") is toyplugins.biased_loss
