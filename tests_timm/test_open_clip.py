"""``open_clip:`` against open_clip's own model, which needs torchvision: the same embeddings from the same file."""

from __future__ import annotations

import importlib
import importlib.metadata
import json
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch

from clasp.config.build import build_model_and_preprocessing
from clasp.config.recipe import recipe_from_dict
from clasp.types import Pixels

CONFIG = {
    "embed_dim": 24,
    "vision_cfg": {"image_size": 32, "layers": 2, "width": 32, "patch_size": 8, "head_width": 16},
    "text_cfg": {"context_length": 16, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2},
}


@pytest.fixture(scope="module")
def models() -> Any:
    """open_clip's module ``model``; its package imports a tokenizer too, which needs ftfy."""
    if "open_clip" not in sys.modules:
        package = types.ModuleType("open_clip")
        package.__path__ = [str(importlib.metadata.distribution("open_clip_torch").locate_file("open_clip"))]
        sys.modules["open_clip"] = package
    return importlib.import_module("open_clip.model")


@pytest.mark.parametrize("options", [{}, {"quick_gelu": True}, {"custom_text": True}], ids=str)
@pytest.mark.parametrize("run", [False, True], ids=["weights", "training-checkpoint"])
def test_embeddings_are_open_clips(models: Any, tmp_path: Path, options: dict, run: bool):
    facts = {name: value for name, value in CONFIG.items()}
    kind = models.CustomTextCLIP if "custom_text" in options else models.CLIP
    theirs = kind(**facts, quick_gelu=options.get("quick_gelu", False)).eval()
    with torch.no_grad():
        for p in theirs.parameters():
            p += 0.1 * torch.randn_like(p)
        theirs.logit_scale.fill_(3.0)
    state = theirs.state_dict()
    saved = {"epoch": 1, "state_dict": {f"module.{name}": t for name, t in state.items()}} if run else state
    torch.save(saved, tmp_path / "open_clip_pytorch_model.bin")
    (tmp_path / "open_clip_config.json").write_text(json.dumps({"model_cfg": {**CONFIG, **options}}))
    tower = {"tower": f"open_clip:{tmp_path}"}
    head = {"init": "pretrained", "width": 24, "bias": False}
    parts = build_model_and_preprocessing(
        recipe_from_dict({"image": tower, "text": tower, "tune": {"image": ["norms"]}, "head": head}, "a test")
    )
    pixels, tokens = torch.randn(2, 3, 32, 32), parts.tokenizer(["a cat", "two dogs in the snow"])
    padded = torch.nn.functional.pad(tokens.ids, (0, 16 - tokens.ids.shape[1]))
    with torch.no_grad():
        expected = theirs.encode_image(pixels, normalize=True), theirs.encode_text(padded, normalize=True)
        found = parts.model.embed_image(Pixels(pixels)), parts.model.embed_text(tokens)
    for ours, other in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, other, rtol=0, atol=1e-5)
    assert parts.model.scale_and_bias()[0].item() == pytest.approx(theirs.logit_scale.exp().item())
