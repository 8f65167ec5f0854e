"""open_clip's checkpoints as both towers: names, files, tags, and what is refused.

``tests_timm/test_open_clip.py`` compares with open_clip itself, which cannot be imported here.
"""

from __future__ import annotations

import importlib.metadata
import json
import re
from collections.abc import Callable
from pathlib import Path

import huggingface_hub.constants
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from clasp.config.build import build_model
from clasp.config.recipe import Recipe, recipe_from_dict
from clasp.models.tower_settings import ImageTowerSettings, TextTowerSettings
from clasp.models.zoo.open_clip_checkpoints import _read_tags
from clasp.models.zoo.registry import load_backbone
from clasp.types import UserError
from selection_checks import train_save_load

CAPTIONS = ["a cat", "two dogs", "a red house in the snow", "rain"]
CONFIG = {
    "embed_dim": 24,
    "vision_cfg": {"image_size": 32, "layers": 2, "width": 32, "patch_size": 8, "head_width": 16},
    "text_cfg": {"context_length": 16, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2},
}
PREPROCESSING = {"mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5], "interpolation": "bilinear", "resize_mode": "squash"}


def block_shapes(prefix: str) -> dict[str, tuple[int, ...]]:
    """Names and shapes of one block in open_clip, 32 wide."""
    parts = {"attn.in_proj_weight": (96, 32), "attn.in_proj_bias": (96,), "attn.out_proj.weight": (32, 32)}
    parts |= {"attn.out_proj.bias": (32,), "mlp.c_fc.weight": (128, 32), "mlp.c_fc.bias": (128,)}
    parts |= {"mlp.c_proj.weight": (32, 128), "mlp.c_proj.bias": (32,)}
    parts |= {f"ln_{n}.{leaf}": (32,) for n in (1, 2) for leaf in ("weight", "bias")}
    return {f"{prefix}.{name}": shape for name, shape in parts.items()}


def random_tensors() -> dict[str, Tensor]:
    """The state dict of ``CONFIG`` as open_clip has it."""
    shapes = {"visual.class_embedding": (32,), "visual.positional_embedding": (17, 32), "visual.proj": (32, 24)}
    shapes |= {"visual.conv1.weight": (32, 3, 8, 8), "token_embedding.weight": (49408, 32)}
    shapes |= {"positional_embedding": (16, 32), "text_projection": (32, 24)}
    norms = ("visual.ln_pre", "visual.ln_post", "ln_final")
    shapes |= {f"{norm}.{leaf}": (32,) for norm in norms for leaf in ("weight", "bias")}
    for number in range(2):
        shapes |= block_shapes(f"visual.transformer.resblocks.{number}")
        shapes |= block_shapes(f"transformer.resblocks.{number}")
    generator = torch.Generator().manual_seed(0)
    found = {name: 0.1 * torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    found |= {name: t + 1 for name, t in found.items() if re.search(r"ln_\w+\.weight$", name)}
    return {**found, "logit_scale": torch.tensor(3.0)}


def write(folder: Path, tensors: dict[str, Tensor] | None = None, **changes) -> Path:
    folder.mkdir(exist_ok=True)
    config = {"model_cfg": {**CONFIG, **changes}, "preprocess_cfg": PREPROCESSING}
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    save_file(random_tensors() if tensors is None else tensors, folder / "open_clip_model.safetensors")
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("open_clip"))


def made(tower: Path | str, *tuned: str) -> Recipe:
    towers = {side: {"tower": f"open_clip:{tower}"} for side in ("image", "text")}
    tune = {side: list(tuned) for side in ("image", "text")}
    head = {"init": "pretrained", "width": 24, "bias": False}
    return recipe_from_dict({**towers, "tune": tune, "head": head}, "a test")


@pytest.mark.parametrize("tuned", ["lora(rank=2)", "norms", "adapters(reduction=4)"])
def test_one_selection_four_uses(folder: Path, tmp_path: Path, tuned: str):
    parts = train_save_load(made(folder, tuned), tmp_path / "run", CAPTIONS)
    assert parts.transform.resize == "squash" and parts.transform.mean == (0.5, 0.5, 0.5)
    assert parts.tokenizer.max_tokens == 16


def test_heads_and_packed_projections_are_the_files(folder: Path):
    model, tensors = build_model(made(folder, "norms")), random_tensors()
    assert torch.equal(model.image_head.get_parameter("map.weight"), tensors["visual.proj"].T)
    key = model.text.net.get_parameter("encoder.layers.1.self_attn.k_proj.weight")
    assert torch.equal(key, tensors["transformer.resblocks.1.attn.in_proj_weight"][32:64])
    assert model.log_scale is not None and model.log_scale.item() == 3.0


def test_names_and_tags_of_the_package_need_no_import():
    """The published counts of two architectures; tags lead to hub repositories."""
    sizes = {"ViT-B-32/laion2b_s34b_b79k": 151_277_313, "ViT-B-16/openai": 149_620_737}
    for name, total in sizes.items():
        given = made(name, "norms").with_overrides(["head.width=512"])
        assert build_model(given, meta=True).parameter_counts()["model"].total == total
    tags = _read_tags()
    assert tags["ViT-B-32"]["laion2b_s34b_b79k"] == "laion/CLIP-ViT-B-32-laion2B-s34B-b79K"
    assert sum(map(len, tags.values())) > 100


def test_a_named_architecture_with_a_file(tmp_path: Path):
    torch.save({"state_dict": {"module.logit_scale": torch.tensor(3.0)}}, tmp_path / "epoch_1.pt")
    tower = f"open_clip:ViT-B-32@{tmp_path / 'epoch_1.pt'}"
    says("its weights lack text_model.embeddings.", lambda: load_backbone(ImageTowerSettings(tower=tower)))
    meta = load_backbone(TextTowerSettings(tower=tower), meta=True)
    assert sum(p.numel() for p in meta.net.parameters()) == 63_165_952


# --- wrong inputs ----------------------------------------------------------------------------------------------------


def says(what: str, call: Callable[[], object]) -> None:
    """One line, with ``what`` in it."""
    with pytest.raises(UserError, match=re.escape(what)) as caught:
        call()
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 500


def test_what_cannot_be_had(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def image(name: str | Path, meta: bool = False) -> object:
        return load_backbone(ImageTowerSettings(tower=f"open_clip:{name}"), meta=meta)

    says("open_clip has no model 'ViT-B-23'; nearest: ViT-B-32", lambda: image("ViT-B-23/openai"))
    says("laion2b_s34b_b79k", lambda: image("ViT-B-32/laion2b_s34b_b97k", meta=True))
    says("open_clip:ViT-B-32/TAG takes a tag", lambda: image("ViT-B-32"))
    says("there is no file nowhere.pt", lambda: image("ViT-B-32@nowhere.pt"))
    says("has a ResNet for images", lambda: image("RN50/openai", meta=True))
    says(
        "vision_cfg.timm_model_name = vit_base_patch16_siglip_224, which",
        lambda: image("ViT-B-16-SigLIP/webli", meta=True),
    )
    says("has no open_clip_config.json with model_cfg", lambda: image(tmp_path))
    (folder_without := tmp_path / "without").mkdir()
    (folder_without / "open_clip_config.json").write_text((folder / "open_clip_config.json").read_text())
    says("has neither open_clip_model.safetensors nor", lambda: image(folder_without))
    other = {**random_tensors(), "visual.attn_pool.query": torch.zeros(1)}
    says("its weights have visual.attn_pool.query, which", lambda: image(write(tmp_path / "other", other)))
    narrow = {**CONFIG, "vision_cfg": {**CONFIG["vision_cfg"], "mlp_ratio": 2.0}}
    says("mlp.fc1.bias is (128,) in its weights, and (64,)", lambda: image(write(tmp_path / "narrow", **narrow)))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    says("without a hub use pip:", lambda: image("ViT-B-32/laion2b_s34b_b79k"))

    def missing(name: str) -> None:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "distribution", missing)
    says("pip install --no-deps open_clip_torch", lambda: image("ViT-B-32/openai"))
