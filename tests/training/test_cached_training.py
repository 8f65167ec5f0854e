"""Training on what the trunks said once is training on the trunks: the same weights, whatever the boundary."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from clasp.commands.train import train_recipe
from clasp.config.recipe import Recipe, read_recipe
from clasp.models import cache_policy
from clasp.models.backbone import Backbone
from clasp.models.tower import Tower
from clasp.models.tower_settings import ImageTowerSettings
from clasp.models.zoo.registry import load_backbone
from clasp.training.cost.frozen import CAPTION_SAMPLE_SIZE
from clasp.training.memory import ActivationMemory
from clasp.types import Pixels
from toydata import toys, write_csv
from toyruns import delta, recipe, run

TOYS = toys(48)
BOUNDARIES = {
    "top blocks": ['tune.image=["last(1)"]', 'tune.text=["last(1)"]'],
    "deep": ['tune.image=["deep(1)"]', 'tune.text=["deep(1)"]'],
    "adapters and norms on top": [
        "tune.image=[\"adapters(blocks='1:')\",\"norms(blocks='1:')\"]",
        'tune.text=["none"]',
    ],
    "low rank below a head only": ['tune.image=["none"]', "tune.text=[\"lora(rank=2, blocks='1:')\"]"],
    "heads": [],
    "a learned pooling": ["image.pool=attention"],
    "fewer patches above": ["image.patch_dropout=0.5", 'tune.image=["last(1)"]'],
    "a layer below": ["image.extra_layers=[1]", 'tune.image=["last(1)"]'],
}


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("CLASP_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def pairs(tmp_path: Path) -> Path:
    return write_csv(TOYS, tmp_path / "pairs")


def trained(made: Recipe, folder: Path) -> dict[str, torch.Tensor]:
    run(made.with_overrides(["train.select=last", "train.epochs=2"]), folder)
    return delta(folder)


@pytest.mark.parametrize("boundary", BOUNDARIES)
def test_cached_is_live_to_float32_rounding(boundary: str, towers: Path, pairs: Path, tmp_path: Path):
    made = recipe(towers, pairs, *BOUNDARIES[boundary])
    live = trained(made.with_overrides(["data.feature_cache=off"]), tmp_path / "live")
    cached = trained(made.with_overrides(["data.feature_cache=float32"]), tmp_path / "cached")
    assert live.keys() == cached.keys()
    for name, tensor in live.items():
        if name.endswith(("k_proj.bias", "key.bias")):
            continue  # cancels in the softmax: its gradient is rounding alone, which AdamW makes as large as any
        # four steps of AdamW, which divides by the size of a gradient and so magnifies rounding where it is small
        assert (tensor - cached[name]).abs().max() < 2e-4, name


def base_of(towers: Path) -> Backbone:
    return load_backbone(ImageTowerSettings(tower=f"file:{towers / 'image'}"))


@pytest.mark.parametrize(("storage", "far"), [("float16", 2e-3), ("bfloat16", 2e-2), ("int8", 2e-2)])
def test_what_a_smaller_storage_moves(storage: str, far: float, towers: Path, pairs: Path, tmp_path: Path, cache: Path):
    made = recipe(towers, pairs, *BOUNDARIES["top blocks"])
    exact = trained(made.with_overrides(["data.feature_cache=float32"]), tmp_path / "exact")
    close = trained(made.with_overrides([f"data.feature_cache={storage}"]), tmp_path / "close")
    moved = {name: (tensor - close[name]).norm() / tensor.norm() for name, tensor in exact.items()}
    assert 0 < max(moved.values()) and float(np.median(list(moved.values()))) < far
    sizes = sorted({path.stat().st_size for path in (cache / "features").glob("*.npy")})
    assert len(sizes) >= 4, "two towers in two storages"


@pytest.mark.parametrize("boundary", ["top blocks", "deep", "heads"])
def test_the_trunk_runs_once(boundary: str, towers: Path, pairs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    rows = counted_rows(monkeypatch)
    made = recipe(towers, pairs, *BOUNDARIES[boundary], "train.epochs=5", "data.feature_cache=float16")
    run(made, tmp_path / "one")
    images, captions = rows["image"], rows["text"]
    # the images once, a probe or two for shapes; captions once in training and once in validation, some to be counted
    assert len(TOYS) <= images <= len(TOYS) + 8
    few, different = CAPTION_SAMPLE_SIZE + 4, len({toy.caption for toy in TOYS})
    assert few < different and captions <= 2 * different + few
    run(made.with_overrides(["train.lr=1e-3"]), tmp_path / "two")
    assert rows["image"] - images <= 8 and rows["text"] - captions <= few, "a second run finds them"


def counted_rows(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """Rows that came out of the first block of each tower having been computed there."""
    rows, init = {"image": 0, "text": 0}, Tower.__init__

    def watched(self: Tower, *args, **kwargs):
        init(self, *args, **kwargs)
        first = self.net.get_submodule(self._structure.blocks[0].path)
        inner = next(module for module in first.modules() if isinstance(module, nn.Linear))

        def count(module: nn.Module, args: tuple, output: torch.Tensor) -> None:
            rows[self.modality] += len(output)

        inner.register_forward_hook(count)

    monkeypatch.setattr(Tower, "__init__", watched)
    return rows


def test_features_of_another_attention_kernel_are_others(
    towers: Path, pairs: Path, tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
):
    """A plain run after a fused one is what it is alone."""
    made = recipe(towers, pairs, "train.precision=bfloat16", "train.attention=plain")
    fused = trained(made.with_overrides(["train.attention=fused"]), tmp_path / "fused")
    files = len(list(cache.glob("features/*.npy")))
    warm = trained(made, tmp_path / "warm")
    assert len(list(cache.glob("features/*.npy"))) == 2 * files
    monkeypatch.setenv("CLASP_CACHE", str(tmp_path / "cold"))
    cold = trained(made, tmp_path / "alone")
    assert all(torch.equal(warm[name], cold[name]) for name in warm | cold)
    assert any(not torch.equal(warm[name], fused[name]) for name in warm), "kernels differ in their last bits"


def test_states_that_would_fill_the_disk_are_computed_anew(
    towers: Path, pairs: Path, tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(cache_policy.shutil, "disk_usage", lambda folder: usage._replace(free=11_000))
    said: list[str] = []
    few = [f"tune.{side}=[\"norms(blocks='1:')\"]" for side in ("image", "text")]  # there is room for their states
    few += ["head.width=4", "head.standardize=false", "train.select=last", "train.epochs=1"]
    made = recipe(towers, pairs, *few)
    train_recipe(made, tmp_path / "run", say=said.append)
    assert any("recomputed in every epoch" in line and "11,000 that are free" in line for line in said), said
    assert not list(cache.glob("features/*.npy"))


def test_kept_states_are_announced_with_their_size(towers: Path, pairs: Path, tmp_path: Path, cache: Path):
    said: list[str] = []
    train_recipe(recipe(towers, pairs, *BOUNDARIES["top blocks"], "train.epochs=1"), tmp_path / "run", say=said.append)
    announced = next(line for line in said if line.startswith("states of images after 1 blocks"))
    size = int(announced.split(": ")[1].split(" bytes")[0].replace(",", ""))
    image = 17 * 32 * 2  # tokens, numbers, bytes
    assert size % image == 0 and size // image < len(TOYS), "of the training pairs"
    files = [path for path in (cache / "features").glob("*.npy") if path.stat().st_size - 128 == size]
    assert len(files) == 1, "and so large is its file"
    lines = [line.partition(" bytes of ")[0] for line in said if line.startswith("states of images")]
    assert len(lines) == len(set(lines)), "both sides of a batch are built once, and the heads start from them"


@pytest.mark.parametrize("part", [[], ['tune.image=["last(1)"]']])
def test_kept_views_of_augmented_images(part: list[str], towers: Path, pairs: Path, tmp_path: Path, monkeypatch):
    rows = counted_rows(monkeypatch)
    made = recipe(towers, pairs, *part, "data.augment.rotate=10", "data.cached_augmentations=3", "train.epochs=6")
    run(made, tmp_path / "views")
    train = 36
    assert rows["image"] <= 4 * train + len(TOYS) + 40, "four views of each, the plain ones for validation and start"
    one, other = (
        delta(tmp_path / "views"),
        trained(made.with_overrides(["data.cached_augmentations=0"]), tmp_path / "anew"),
    )
    assert one.keys() == other.keys()


def test_memory_of_a_step_is_that_of_the_blocks_above(towers: Path):
    """Counted, not timed: what is kept for the backward pass does not know of the blocks below the boundary."""
    kept: dict[str, int] = {}
    for method in ("last(1)", "full"):
        tower = Tower(base_of(towers))
        names = tower.tune([method], seed=0)
        for name, parameter in tower.named_parameters():
            parameter.requires_grad_(name in names)
        with ActivationMemory(tower.parameters()) as counter:
            tower.pooled(Pixels(torch.randn(16, 3, 32, 32)))
        kept[method] = counter.bytes
    assert kept["last(1)"] < 0.6 * kept["full"]


def test_all_layers_are_numbers_in_the_recipe_of_the_run(towers: Path, pairs: Path, tmp_path: Path):
    made = recipe(towers, pairs, "image.extra_layers=all", "text.extra_layers=all", "head.init=cca")
    run(made, tmp_path / "all")
    saved = read_recipe(tmp_path / "all" / "recipe.toml")
    assert saved.image.extra_layers == saved.text.extra_layers == [1]
    run(saved, tmp_path / "again")
    ours, theirs = delta(tmp_path / "all"), delta(tmp_path / "again")
    assert all(torch.equal(ours[name], theirs[name]) for name in ours | theirs)
