"""What must hold for any recipe: one selection in four uses, and a run that comes back bitwise."""

from __future__ import annotations

import io
import json
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from PIL import Image

from clasp.cli.train import params as params_verb
from clasp.config.build import ModelAndPreprocessing, build_model_and_preprocessing, load
from clasp.config.recipe import Recipe, recipe_from_dict
from clasp.models.inference import EmbeddingModel
from clasp.training import optimizer as optim
from clasp.training.losses import LOSSES
from clasp.training.run_folder import RunFolder
from clasp.types import Batch, Pixels

CAPTIONS = ["w5 w6 w7", "w8", "w9 w10 w11 w12", "w13 w6"]
PARTS = {  # how the names begin of what ``clasp params`` counts together
    "image": ("image.net.",),
    "text": ("text.net.",),
    "heads": ("image_head.", "text_head.", "image.pooling.", "text.pooling."),
    "scale": ("log_scale", "temperature", "bias"),
}


def recipe(image: str, text: str, tuned: list[str], **changes) -> Recipe:
    sections = {"image": {"tower": image}, "text": {"tower": text}, "tune": {"image": tuned, "text": tuned}, **changes}
    return recipe_from_dict({"head": {"width": 16}, **sections}, "a test")


def step(parts: ModelAndPreprocessing, captions: list[str], loss: str) -> dict[str, set[str]]:
    """One step of training by hand on random pixels; returns the names by use.

    The selection is stirred first: what feeds a part that starts at zero would have no gradient but zeros.
    """
    model = parts.model
    size = parts.transform.size
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randn(len(captions), 3, size, size, generator=generator)
    numbers = torch.arange(len(captions))
    batch = Batch(tuple(captions), Pixels(pixels), parts.tokenizer(captions), torch.stack((numbers, numbers), dim=1))
    held = optim.select_parameters(dict(model.named_parameters()), model.selection)
    optimizer = optim.build_adamw(
        optim.build_parameter_groups(held, weight_decay=0.1),
        lr=0.01,
        betas=(0.9, 0.98),
        eps=1e-6,
        device=torch.device("cpu"),
    )
    with torch.no_grad():
        for p in held.values():
            p += 0.02 * torch.randn(p.shape, generator=generator)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    model.train()
    out = model(batch)
    LOSSES[loss](out.image, out.text, out.scale, out.bias, groups=batch.groups).total.backward()
    optimizer.step()
    model.after_step()
    names = {id(p): name for name, p in model.named_parameters()}
    return {
        "wanting gradients": {name for name, p in model.named_parameters() if p.requires_grad},
        "given gradients": {name for name, p in model.named_parameters() if p.grad is not None},
        "given other gradients than zeros": {
            n for n, p in model.named_parameters() if p.grad is not None and p.grad.any()
        },
        "in the optimizer": {names[id(p)] for group in optimizer.param_groups for p in group["params"]},
        "moved": {name for name, p in model.named_parameters() if not torch.equal(p, before[name])},
    }


def train_save_load(given: Recipe, folder: Path, captions: list[str]) -> ModelAndPreprocessing:
    """All that must hold for any recipe."""
    parts = train_save_count(given, folder, captions)
    ours = EmbeddingModel(parts.model.eval(), parts.transform, parts.tokenizer)
    theirs = load(folder, allow_code=True)  # of factories of tests
    assert theirs.fingerprint == ours.fingerprint
    assert torch.equal(theirs.encode_text(captions), ours.encode_text(captions))
    assert torch.equal(theirs.encode_image(pictures()), ours.encode_image(pictures()))
    return parts


def train_save_count(given: Recipe, folder: Path, captions: list[str]) -> ModelAndPreprocessing:
    """The four uses: after one step, in a run folder, and as ``clasp params`` prints them."""
    parts = build_model_and_preprocessing(given)
    model, run = parts.model, RunFolder(folder)
    used = step(parts, captions, given.loss.kind)
    run.start(given.to_toml(), model, parts.transform, parts.tokenizer, pairs="none")
    run.save(model)
    delta = safetensors.torch.load_file(folder / "delta.safetensors")

    for use, names in {**used, "saved": set(delta)}.items():
        assert names == model.selection, f"{use}: {sorted(names ^ model.selection)[:5]}"
    printed = params(folder / "recipe.toml")
    whole = {column: printed.pop(column) for column in ("total", "trained", "delta_bytes", "percent")}
    assert set(printed) == set(PARTS)
    sizes = {name: p.numel() for name, p in model.named_parameters()}
    for part, count in {**printed, "": whole}.items():
        begins = PARTS.get(part, "")
        trained = [tensor for name, tensor in delta.items() if name.startswith(begins)]
        assert count["total"] == sum(size for name, size in sizes.items() if name.startswith(begins)), part
        assert count["trained"] == sum(tensor.numel() for tensor in trained), part
        assert count["delta_bytes"] == sum(tensor.numel() * tensor.element_size() for tensor in trained), part
        assert count["percent"] == pytest.approx(100 * count["trained"] / max(1, count["total"]), abs=1e-4), part
    assert all(sum(count[column] for count in printed.values()) == whole[column] for column in ("total", "trained"))
    return parts


def params(recipe: Path) -> dict[str, Any]:
    """What ``clasp params RECIPE --json`` prints."""
    with redirect_stdout(io.StringIO()) as printed:
        params_verb(str(recipe), as_json=True)
    return json.loads(printed.getvalue())


def pictures() -> list[bytes]:
    """Three small PNGs, none square."""
    encoded = []
    for number in range(3):
        values = torch.randint(0, 256, (40, 50 + number, 3), generator=torch.Generator().manual_seed(number))
        file = io.BytesIO()
        Image.fromarray(values.to(torch.uint8).numpy()).save(file, "PNG")
        encoded.append(file.getvalue())
    return encoded
