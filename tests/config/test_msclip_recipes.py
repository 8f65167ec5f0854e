"""The recipes of MS-CLIP: every row of the paper to the unit through them, whole runs of them, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from clasp.config.build import build_model
from clasp.config.recipe import read_recipe
from clasp.models.dual_encoder import DualEncoder
from clasp.training.cost.flops import count_macs

COUNTS = json.loads((Path(__file__).parents[1] / "golden" / "param_counts.json").read_text("utf-8"))["msclip"][
    "variants"
]
WIDE = ("text.net.width=768", "text.net.heads=12")
ROWS: dict[str, tuple[str, ...]] = {
    "clip_b32_text512": ("clip-b32",),
    "clip_b32_text768": ("clip-b32", *WIDE),
    "share_attn_ffn_ln1_ln2": ("msclip-b32", "share.norm1=shared", "share.norm2=shared"),
    "share_attn_ffn_ln1": ("msclip-b32", "share.norm1=shared"),
    "share_attn_ffn_ln2": ("msclip-b32", "share.norm2=shared"),
    "msclip_b32": ("msclip-b32",),
    "share_ffn_only": ("msclip-b32", "share.attention=separate"),
    "share_attn_only": ("msclip-b32", "share.ffn=separate"),
    **{f"share_attn_ffn_last{n}": ("msclip-b32", f"share.layers=-{n}:") for n in (11, 10, 8, 6, 4, 2)},
    "msclip_b32_early": ("msclip-b32", "image.net.stem=batch", "share.layers=1:"),
    "msclip_b32_parallel": ("msclip-b32", "image.net.branch.kind=paper"),
    "msclip_s_b32": ("msclip-s-b32",),
    "msclip_s_b32_laion_config": ("msclip-s-b32",),
    "early_parallel_share_none": ("msclip-s-b32", "share.attention=separate", "share.ffn=separate"),
    "clip_b16_text512": ("clip-b32", "image.net.patch=16"),
    "msclip_b16": ("msclip-b32", "image.net.patch=16"),
    "msclip_s_b16": ("msclip-s-b16",),
}


def row(name: str) -> DualEncoder:
    recipe, *changes = ROWS[name]
    return build_model(read_recipe(f"msclip/{recipe}", changes), meta=True)


def test_every_row_of_the_paper_is_here():
    assert set(ROWS) == set(COUNTS)


@pytest.mark.parametrize("name", ROWS)
def test_parameters_and_macs_to_the_unit(name: str):
    model = row(name)
    counts = model.parameter_counts()
    image, text = model.image.net, model.text.net
    total = counts.pop("model")
    with torch.device("meta"):
        pixels, ids = torch.zeros(1, 3, 224, 224), torch.zeros(1, 77, dtype=torch.long)
    assert {
        "parameters": total.total,
        "parameters_without_token_embedding": total.total - text.token_embed.weight.numel(),
        "image_macs": count_macs(lambda: model.image_head(image(pixels)[:, 0])),
        "text_macs": count_macs(lambda: model.text_head(text(ids, ids).last_hidden_state[:, -1])),
    } == {key: value for key, value in COUNTS[name].items() if isinstance(value, int) and key != "patch_size"}
    assert total.trained == total.total == sum(part.total for part in counts.values())
    assert total.delta_bytes == 4 * total.total


def test_the_sharing_is_told():
    assert str(row("msclip_s_b32").sharing) == (
        "layer  attention  ffn       norm1     norm2\n"
        "0      separate   separate  separate  separate\n"
        "1-11   shared     shared    separate  separate\n"
        "final norm: separate; head: separate"
    )
    assert "shared" not in row("clip_b32_text512").parameter_counts()
