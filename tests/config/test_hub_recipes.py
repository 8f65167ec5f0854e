"""The recipes for towers from a hub: counts offline, and each family trained on tiny towers of the same classes."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
import transformers as hf
from safetensors.torch import load_file
from torch.nn.attention import SDPBackend, sdpa_kernel

from clasp.config.build import build_model, load
from clasp.config.recipe import read_recipe
from clasp.config.recipe_files import builtin_recipes
from clasp.models.dual_encoder import DualEncoder
from clasp.training.cost.flops import count_flops
from clasp.training.memory import ActivationMemory
from clasp.types import Pixels, Tokens
from toydata import toys, write_csv
from toyruns import lines, run
from toysavedtowers import WordToy, save_preprocessor, save_tokenizer

ROOT = Path(__file__).parents[2]
sys.path.append(str(ROOT / "docs"))
import hub  # noqa: E402

NAMES = sorted(name for name in builtin_recipes() if name.startswith("hub/"))
WITH_TIMM = "hub/vit-in21k-timm"  # counted in tests_timm
TOTALS = {  # published parameter counts, in millions, of image and text tower
    "hub/base": (86.6, 277.5), "hub/dinov2-small": (22.1, 277.5), "hub/dinov2-large": (304.4, 277.5),
    "hub/dinov3-small": (21.6, 277.5), "hub/dinov3-base": (85.7, 277.5), "hub/bge-m3": (86.6, 566.7),
    "hub/siglip2-bert": (92.9, 110.0), "hub/vit-in21k": (85.8, 277.5), "hub/clip-b32": (87.5, 63.2),
}  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_counts_of_the_first_lines(name: str):
    text = builtin_recipes()[name].read_text()
    read_recipe(name)
    assert f"`{name}`" in (ROOT / "docs" / "hub.md").read_text(), "the page has its row"
    if name != WITH_TIMM:
        model = build_model(read_recipe(name), meta=True).parameter_counts()["model"]
        assert f"# {model.trained:,} parameters train ({model.percent:.2f} %)." in text


@pytest.mark.parametrize("name", TOTALS)
def test_sizes_are_the_published_ones(name: str):
    untuned = read_recipe(name, ['tune.image=["none"]', 'tune.text=["none"]'])
    counts = build_model(untuned, meta=True).parameter_counts()
    for side, millions in zip(("image", "text"), TOTALS[name], strict=True):
        assert counts[side].total / 1e6 == pytest.approx(millions, abs=0.65), side  # BERT's pooler is not in ours


# --- tiny towers of the same classes ---------------------------------------------------------------------------------

_SIZES = dict(hidden_size=32, num_hidden_layers=3, num_attention_heads=2, intermediate_size=64)
_IMAGE = dict(**_SIZES, image_size=28, patch_size=7)
_TEXT = dict(**_SIZES, vocab_size=64, pad_token_id=0, bos_token_id=1, eos_token_id=63)
_DINOV2 = dict(hidden_size=32, num_hidden_layers=3, num_attention_heads=2, image_size=28, patch_size=7)
TINY = {
    "dinov2": lambda: hf.Dinov2Model(hf.Dinov2Config(**_DINOV2)),
    "dinov3": lambda: hf.DINOv3ViTModel(hf.DINOv3ViTConfig(**_IMAGE, num_register_tokens=4)),
    "siglip": lambda: hf.SiglipModel(
        hf.SiglipConfig(text_config=dict(**_TEXT, projection_size=32), vision_config=_IMAGE)
    ),
    "vit": lambda: hf.ViTModel(hf.ViTConfig(**_IMAGE)),
    "clip": lambda: hf.CLIPModel(hf.CLIPConfig(text_config=_TEXT, vision_config=_IMAGE, projection_dim=512)),
    "xlm-roberta": lambda: hf.XLMRobertaModel(hf.XLMRobertaConfig(**_TEXT)),
    "bert": lambda: hf.BertModel(hf.BertConfig(**_TEXT)),
}
FAMILIES = {  # recipe: the image and the text tower that stand for its own
    "hub/base": ("dinov2", "xlm-roberta"), "hub/adapters": ("dinov2", "xlm-roberta"),
    "hub/full": ("dinov2", "xlm-roberta"), "hub/dinotxt": ("dinov2", "xlm-roberta"),
    "hub/dinov3-base": ("dinov3", "xlm-roberta"), "hub/siglip2-bert": ("siglip", "bert"),
    "hub/vit-in21k": ("vit", "xlm-roberta"), "hub/clip-b32": ("clip", "clip"),
}  # fmt: skip


@pytest.fixture(scope="module")
def towers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All of ``TINY``, and pairs."""
    folder = tmp_path_factory.mktemp("towers")
    for name, build in TINY.items():
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            net = build()
            for p in net.parameters():
                p.data += 0.05 * torch.randn_like(p)
            if name in ("clip", "siglip"):
                net.logit_scale.data.fill_(2.0)
        net.save_pretrained(folder / name)
        save_preprocessor(folder / name, size={"height": 28, "width": 28})
        save_tokenizer(folder / name, template="<s> $A </s>")
    write_csv([WordToy(*toy) for toy in toys(32)], folder / "pairs")
    return folder


def tiny(name: str, towers: Path, *overrides: str):
    scheme = "clip" if name == "hub/clip-b32" else "file"
    image, text = (f"{scheme}:{towers / family}" for family in FAMILIES[name])
    places = [f"image.tower={image}", f"text.tower={text}", f"data.train={towers / 'pairs' / 'pairs.csv'}"]
    return read_recipe(name, [*places, *overrides])


@pytest.mark.parametrize("name", FAMILIES)
def test_trains_two_steps_and_reloads_bitwise(name: str, towers: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("CLASP_CACHE", str(tmp_path / "cache"))
    settings = ["train.batch_size=14", "train.epochs=1", "train.select=last", "train.precision=float32"]
    made = tiny(name, towers, *settings)
    run(made, tmp_path / "run")
    steps = [row for row in lines(tmp_path / "run" / "log.jsonl") if row["event"] == "step"]
    assert steps and all(row["loss"] == row["loss"] for row in steps)
    trained, before = load_file(tmp_path / "run" / "delta.safetensors"), dict(build_model(made).named_parameters())
    moved = [part for part, tensor in trained.items() if not torch.equal(tensor, before[part])]
    assert len(moved) > 0.9 * len(trained)
    first, second = load(tmp_path / "run"), load(tmp_path / "run")
    assert first.fingerprint == second.fingerprint
    loaded = dict(first.encoder.named_parameters()) if isinstance(first.encoder, DualEncoder) else {}
    assert all(torch.equal(loaded[part], tensor) for part, tensor in trained.items())
    captions = ["w5 w6", "w7"]
    assert torch.equal(first.encode_text(captions), second.encode_text(captions))


@pytest.mark.parametrize("name", ["hub/base", "hub/dinotxt", "hub/clip-b32"])
def test_costs_on_shapes_are_those_of_a_run(name: str, towers: Path, monkeypatch: pytest.MonkeyPatch):
    """FLOPs and saved bytes of ``docs/hub.py``, which sees no weights, against the same pair with weights."""
    monkeypatch.setattr(hub, "IMAGE_SIZE", 28)
    counted = hub.count_cost(build_model(tiny(name, towers), meta=True))
    model = build_model(tiny(name, towers))
    pixels, ids = Pixels(torch.randn(1, 3, 28, 28)), torch.full((1, hub.CAPTION_TOKENS), 5)
    ids[:, -1] = 63
    tokens = Tokens(ids, torch.ones_like(ids, dtype=torch.bool))

    def embed() -> torch.Tensor:
        return (model.embed_image(pixels) * model.embed_text(tokens)).sum()

    with sdpa_kernel(SDPBackend.MATH):  # as on shapes
        real = count_flops(lambda: embed().backward())
        with ActivationMemory(model.parameters()) as memory:
            out = embed()
    assert counted.training == real.forward + real.backward
    assert out.requires_grad and counted.activations == pytest.approx(memory.bytes, rel=0.02)
