"""Parameters, FLOPs and memory of the recipes in ``recipes/hub``: the table of ``docs/hub.md``.

In: the recipes, on the meta device, with the published sizes of ``clasp.models.zoo.known_configs``; no hub, no weights.
Out: the table between the two markers of the page, written by ``PYTHONPATH=src python docs/hub.py``. Note: a pair is an
image of 224 px and a caption of 32 tokens, in float32, without activation checkpointing and without cached
features; a recipe whose package is not installed (timm) keeps the row that the page has.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from clasp.config.build import build_model
from clasp.config.recipe import read_recipe
from clasp.config.recipe_files import builtin_recipes
from clasp.models.dual_encoder import DualEncoder
from clasp.models.tower import Tower
from clasp.training.cost.flops import count_flops
from clasp.types import Pixels, Tokens, UserError

PAGE = Path(__file__).with_name("hub.md")
BEGIN, END = "<!-- table: written by PYTHONPATH=src python docs/hub.py -->", "<!-- end of table -->"
HEADER = (
    "| recipe | towers, M | trained, M | % | delta, MB | GFLOPs forward | GFLOPs training | activations, MB |\n"
    "|---|---|---|---|---|---|---|---|"
)
CAPTION_TOKENS = 32
IMAGE_SIZE = 224  # the size of each tower's own preprocessing, also DINOv2's, whose position embedding is of 518


class Cost(NamedTuple):
    """FLOPs of one pair, and the bytes that its forward pass saves for the backward pass."""

    forward: int
    training: int
    activations: int


def count_cost(model: DualEncoder) -> Cost:
    """One pair through both towers and heads, forward and backward, on the meta device."""
    pixels = Pixels(torch.empty(1, 3, IMAGE_SIZE, IMAGE_SIZE, device="meta"))
    ids = torch.ones(1, CAPTION_TOKENS, dtype=torch.long, device="meta")
    tokens = Tokens(ids, torch.ones(1, CAPTION_TOKENS, dtype=torch.bool, device="meta"))

    def embed() -> Tensor:
        image, text = (_pooled(model.image, pixels), _pooled(model.text, tokens))
        return (model.image_head(image) * model.text_head(text)).sum()

    with torch.no_grad():
        forward = count_flops(embed)
    training = count_flops(lambda: embed().backward())
    left_out = {*forward.left_out, *training.left_out}
    assert not left_out, f"no formula for {', '.join(sorted(left_out))}"
    return Cost(forward.forward, training.forward + training.backward, saved_bytes(embed, model.parameters()))


def _pooled(tower: Tower, inputs: Pixels | Tokens) -> Tensor:
    if isinstance(inputs, Tokens):  # without the mask, all ones, whose values transformers would read
        states = tower.net(input_ids=inputs.ids).last_hidden_state
        return tower.pool(states, inputs.mask)
    states = tower(inputs)
    return tower.pool(states, torch.ones(states.shape[:2], dtype=torch.bool, device="meta"))


def saved_bytes(run: Callable[[], Tensor], weights: Any) -> int:
    """Bytes of the storages that ``run`` saves for the backward pass; a meta tensor has no address, but a storage."""
    known, saved = {weight.untyped_storage()._cdata for weight in weights}, {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        saved[storage._cdata] = storage  # kept, so that no address is used again
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        out = run()
    del out
    return sum(storage.nbytes() for address, storage in saved.items() if address not in known)


def row(name: str) -> str:
    """One line of the table."""
    model = build_model(read_recipe(name), meta=True)
    count, cost = model.parameter_counts()["model"], count_cost(model)
    return (
        f"| `{name}` | {count.total / 1e6:.1f} | {count.trained / 1e6:.2f} | {count.percent:.2f} | "
        f"{count.delta_bytes / 1e6:.1f} | {cost.forward / 1e9:.1f} | {cost.training / 1e9:.1f} | "
        f"{cost.activations / 1e6:.0f} |"
    )


def table(page: str) -> str:
    """The table; a row that cannot be counted here is taken from ``page``."""
    rows = []
    for name in builtin_recipes():
        if name.startswith("hub/"):
            try:
                rows.append(row(name))
            except UserError:
                rows += re.findall(rf"^\| `{name}` .*$", page, re.MULTILINE)
    return "\n".join([BEGIN, HEADER, *rows, END])


def render(page: str) -> str:
    """The page with its table counted anew."""
    start, end = page.index(BEGIN), page.index(END) + len(END)
    return page[:start] + table(page) + page[end:]


if __name__ == "__main__":
    PAGE.write_text(render(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
