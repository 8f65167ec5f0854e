"""What must hold for any recipe: one selection in four uses, and a run that comes back bitwise."""

from __future__ import annotations

import io
import re
from dataclasses import asdict
from pathlib import Path

import safetensors.torch
import torch
from PIL import Image

from clasp.assemble import Assembled, assemble, build, load
from clasp.embed import Model
from clasp.losses import LOSSES
from clasp.recipe import Recipe, from_dict
from clasp.train import optim
from clasp.train.checkpoint import Run
from clasp.types import Batch, Pixels

CAPTIONS = ["w5 w6 w7", "w8", "w9 w10 w11 w12", "w13 w6"]
BEFORE_ZEROS = r"lora_A|adapter\d\.down|head\.map\.inner"


def recipe(image: str, text: str, tuned: list[str], **changes) -> Recipe:
    sections = {"image": {"tower": image}, "text": {"tower": text}, "tune": {"image": tuned, "text": tuned}, **changes}
    return from_dict({"head": {"width": 16}, **sections}, "a test")


def step(parts: Assembled, captions: list[str]) -> dict[str, set[str]]:
    """One step of training by hand on random pixels; returns the names by use."""
    model = parts.model
    size = parts.transform.size
    pixels = torch.randn(len(captions), 3, size, size, generator=torch.Generator().manual_seed(0))
    numbers = torch.arange(len(captions))
    batch = Batch(tuple(captions), Pixels(pixels), parts.tokenizer(captions), torch.stack((numbers, numbers), dim=1))
    held = optim.selected(dict(model.named_parameters()), model.selection)
    optimizer = optim.adamw(
        optim.groups(held, weight_decay=0.1), lr=0.01, betas=(0.9, 0.98), eps=1e-6, device=torch.device("cpu")
    )
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    model.train()
    out = model(batch)
    LOSSES["infonce"](out.image, out.text, out.scale, out.bias, groups=batch.groups).total.backward()
    optimizer.step()
    model.after_step()
    names = {id(p): name for name, p in model.named_parameters()}
    return {
        "gradients": {name for name, p in model.named_parameters() if p.grad is not None},
        "optimizer": {names[id(p)] for group in optimizer.param_groups for p in group["params"]},
        "moved": {name for name, p in model.named_parameters() if not torch.equal(p, before[name])},
    }


def train_save_load(given: Recipe, folder: Path, captions: list[str]) -> Assembled:
    """All that must hold for any recipe."""
    parts = assemble(given)
    model, run = parts.model, Run(folder)
    used = step(parts, captions)
    run.start(given.to_toml(), model, parts.transform, parts.tokenizer, pairs="none")
    run.save(model)
    delta = safetensors.torch.load_file(folder / "delta.safetensors")

    assert used["gradients"] == used["optimizer"] == set(delta) == set(model.delta()) == model.selection
    assert used["moved"] <= model.selection
    # what feeds a part that starts at zero has no gradient but zeros in the first step
    assert {name for name in model.selection - used["moved"] if not re.search(BEFORE_ZEROS, name)} == set()
    counts = model.counts()
    assert counts["model"].trained == sum(t.numel() for t in delta.values())
    assert counts["model"].delta_bytes == sum(t.numel() * t.element_size() for t in delta.values())
    assert counts["model"].total == sum(p.numel() for p in model.parameters())
    for column in ("total", "trained", "delta_bytes"):
        whole, *rest = (asdict(count)[column] for count in counts.values())
        assert whole == sum(rest)
    assert build(given, meta=True).counts() == counts, "counted without weights"

    model.eval()
    ours = Model(model, parts.transform, parts.tokenizer)
    theirs = load(folder)
    assert theirs.fingerprint == ours.fingerprint
    assert torch.equal(theirs.encode_text(captions), ours.encode_text(captions))
    assert torch.equal(theirs.encode_image(pictures()), ours.encode_image(pictures()))
    return parts


def pictures() -> list[bytes]:
    """Three small PNGs, none square."""
    encoded = []
    for number in range(3):
        values = torch.randint(0, 256, (40, 50 + number, 3), generator=torch.Generator().manual_seed(number))
        file = io.BytesIO()
        Image.fromarray(values.to(torch.uint8).numpy()).save(file, "PNG")
        encoded.append(file.getvalue())
    return encoded
