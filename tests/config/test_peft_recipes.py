"""The recipes for what came after LilT: each builds as it says; those that join new settings also train a little."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers as hf

from clasp.config.build import build_model
from clasp.config.recipe import read_recipe
from clasp.config.recipe_files import builtin_recipes
from clasp.models.heads import GatedLinear, LinearWithMLP
from toydata import toys, write_csv
from toyruns import delta, lines, run, save_image_tower, save_text_tower

NAMES = sorted(name for name in builtin_recipes() if name.startswith(("beyond/", "top/")))
OURS = {  # in the towers, image and text; heads and scale train besides
    "peft/towers": (0, 0),
    # two bottlenecks of 384 to 96 and two norms in each of 12 blocks; the norm behind, or before, all of them
    "peft/adapters": (12 * 2 * (2 * 384 * 96 + 96 + 384) + 25 * 2 * 384,) * 2,
    # DINOv2's block has two layer scales; its tail is the final norm
    "peft/deep": (12 * 384**2 + 13 * 384 + 4 * 384, 12 * 384**2 + 13 * 384),
    # four layers of attention in each block, 384 wide both ways
    "peft/lora": ((6 * 4 + 6 * 12) * 4 * 768, (12 + 6 * 4 + 5 * 12) * 4 * 768),
    "peft/dora": (12 * 4 * (8 * 768 + 384),) * 2,
    "partial/lora": (4 * 8 * 4 * 768,) * 2,
    "partial/lwa": (4 * 2 * (2 * 384 * 96 + 96 + 384) + 8 * 2 * 384,) * 2,
}
PAGE = "peft/towers"
SAME_AS_ADAPTERS = ("peft/positives", "peft/rates", "peft/sigmoid")


@pytest.mark.parametrize("name", NAMES)
def test_builds_on_shapes_alone(name: str):
    counts = build_model(read_recipe(name), meta=True).parameter_counts()
    of = "peft/adapters" if name in SAME_AS_ADAPTERS else name
    if of in OURS:
        assert (counts["image"].trained, counts["text"].trained) == OURS[of]
    assert counts["model"].percent < 7, "LilT's budget"
    assert counts["scale"].trained == (2 if name == "peft/sigmoid" else 1)
    if name != PAGE:
        model = counts["model"]
        assert f"# {model.trained:,} parameters train ({model.percent:.2f} %)." in builtin_recipes()[name].read_text()
        assert name.removeprefix("beyond/") in builtin_recipes()[PAGE].read_text(), "the page names it"


def test_they_set_what_they_say():
    heads = {name: build_model(read_recipe(f"peft/{name}"), meta=True).image_head.map for name in ("glu", "mlp")}
    assert isinstance(heads["glu"], GatedLinear) and isinstance(heads["mlp"], LinearWithMLP)
    sigmoid, rates, positives = (read_recipe(f"peft/{name}") for name in ("sigmoid", "rates", "positives"))
    assert sigmoid.loss.kind == "sigmoid" and sigmoid.train.batch_size == 4096 and sigmoid.train.micro_batch == "auto"
    assert sigmoid.loss.negatives == "all", "every image meets every caption"
    factors = rates.train.lr_factors
    assert factors.new > factors.norm, "what is new moves faster than what is to be kept"
    assert positives.data.captions == "all" and positives.loss.positives == "groups"


# --- trained ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Towers of 12 blocks and pairs; the cache that all of them share."""
    folder = tmp_path_factory.mktemp("towers")
    save_image_tower(folder / "image")
    save_text_tower(folder / "text")
    sizes = dict(hidden_size=16, num_hidden_layers=12, num_attention_heads=2, intermediate_size=32)
    image = hf.ViTModel(hf.ViTConfig(**sizes, image_size=32, patch_size=16))
    text = hf.BertModel(hf.BertConfig.from_pretrained(folder / "text", **sizes))
    for net, part in ((image, "image"), (text, "text")):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            for p in net.parameters():
                p.data += 0.1 * torch.randn_like(p)
        net.save_pretrained(folder / part)
    write_csv(toys(40), folder / "pairs")
    return folder


@pytest.mark.parametrize("name", ["peft/lora", "peft/positives", "peft/rates", "peft/sigmoid"])
def test_trains(name: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("CLASP_CACHE", str(folder / "cache"))
    made = read_recipe(
        name,
        [
            f"image.tower=file:{folder / 'image'}",
            f"text.tower=file:{folder / 'text'}",
            f"data.train={folder / 'pairs' / 'pairs.csv'}",
            "train.batch_size=16",
            "train.epochs=2",
            "train.select=last",
            "train.precision=float32",
        ],
    )
    run(made, tmp_path / "run")
    before = dict(build_model(made).named_parameters())
    trained = delta(tmp_path / "run")
    moved = [name for name, tensor in trained.items() if not torch.equal(tensor, before[name])]
    assert len(moved) > 0.9 * len(trained), sorted(set(trained) - set(moved))
    losses = [row["loss"] for row in lines(tmp_path / "run" / "log.jsonl") if row["event"] == "step"]
    assert losses and all(loss == loss for loss in losses)
