"""The forward pass of MS-CLIP-S and CLIP, ViT-B/32: clasp against a plain implementation with the same weights and
inputs.

Random weights, and captions sampled from the demo's data in CLIP's vocabulary (14 tokens on average; Flickr8k has 15).
The plain implementation is that of the released code: attention as two products with an explicit map, an additive mask,
and 77 tokens for every caption. Clasp uses PyTorch's attention, and unpadded captions. Both give the same embeddings to
1e-5 in float32, or nothing is timed. Images and captions are timed separately; a row for both adds their times.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from benchmarks import harness, sample_data
from benchmarks.harness import Contestant, Measured, Row, sized
from clasp.config.build import build_model_and_preprocessing
from clasp.config.recipe import read_recipe
from clasp.models.precision import computing_in
from clasp.plain_types import Precision
from clasp.training.cost.flops import count_macs

RECIPES = ("msclip/msclip-s-b32", "msclip/clip-b32")
BATCH = sized(32, 2)
CAPTIONS = 1_114  # the size of the sample
CONTEXT = 77
TARGET = 1.5
SAME = 1e-5
PLAIN = "the same weights, eager attention, always 77 tokens"
PARTS = ("images", "captions")


def rows() -> Sequence[Row]:
    return [row for precision in harness.precisions() for name in RECIPES for row in compare(name, precision)]


def compare(name: str, precision: Precision) -> list[Row]:
    parts = build_model_and_preprocessing(read_recipe(name))
    model = parts.model.eval()
    pixels = torch.randn(BATCH, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    texts = sample_data.captions(CAPTIONS)
    tokens = parts.tokenizer(texts[:: CAPTIONS // BATCH][:BATCH])
    whole = F.pad(tokens.ids, (0, CONTEXT - tokens.ids.shape[1]))
    ends = tokens.mask.sum(dim=1) - 1
    work: dict[tuple[str, str], Callable[[], Tensor]] = {
        ("clasp", "images"): lambda: model.encode_image(pixels),
        ("clasp", "captions"): lambda: model.encode_text(tokens.ids, tokens.mask),
        (PLAIN, "images"): lambda: plain_image(model, pixels),
        (PLAIN, "captions"): lambda: plain_text(model, whole, ends),
    }
    with torch.inference_mode():
        for part in PARTS:  # verify that the embeddings are equal
            torch.testing.assert_close(work["clasp", part](), work[PLAIN, part](), rtol=0, atol=SAME)
    with torch.inference_mode(), computing_in(precision, torch.device("cpu")):
        rates = harness.race([Contestant(f"{who}: {part}", _counted(run)) for (who, part), run in work.items()])
        macs = {key: count_macs(run) for key, run in work.items()}
        bound = harness.profiled(lambda: sum(len(work["clasp", part]()) for part in PARTS))
    about = f"batch {BATCH}; captions of {_spread(tokens.mask)} tokens"
    title, found = name.rpartition("/")[2], []
    for chosen in (PARTS, *((part,) for part in PARTS)):
        ours, theirs = (_together([rates[f"{who}: {part}"] for part in chosen]) for who in ("clasp", PLAIN))
        counts = [sum(macs[who, part] for part in chosen) for who in (PLAIN, "clasp")]
        note = f"{about}; the plain way counts {counts[0] / counts[1]:.2f} times the FLOPs"
        target, unit = (TARGET, "pairs/s") if chosen == PARTS else (None, f"{chosen[0]}/s")
        title_of = f"{title}: forward pass of {' and '.join(chosen)}"
        found.append(Row(title_of, unit, ours, PLAIN, theirs, target, "higher", note, bound, precision))
    return found


def _spread(mask: Tensor) -> str:
    """Caption lengths as text: minimum, maximum, mean."""
    lengths = mask.sum(dim=1)
    return f"{int(lengths.min())} to {int(lengths.max())} (mean {float(lengths.float().mean()):.0f})"


def _together(rates: Sequence[Measured]) -> Measured:
    """The combined rate of consecutive work, repeat by repeat: the times add up."""
    values = zip(*(rate.values for rate in rates), strict=True)
    return Measured("", tuple(1 / sum(1 / each for each in repeat) for repeat in values))


def _counted(run: Callable[[], Tensor]) -> Callable[[], int]:
    return lambda: len(run())


# --- plain implementation --------------------------------------------------------------------------------------------


def plain_image(model: Any, pixels: Float[Tensor, "B 3 height width"]) -> Float[Tensor, "B E"]:
    net = model.image.net
    x = net.patch_embed(pixels)
    x = torch.cat((net.cls_token.expand(len(x), -1, -1), x), dim=1) + net.pos_embed
    x, maps = net.norm_pre(x), pixels
    for number, block in enumerate(net.blocks):
        if net.parallel is not None and number in net.parallel.stage_by_block:
            x, maps = net.parallel(number, x, maps)
        x = plain_block(block, x, None)
    return F.normalize(model.image_head(net.norm(x)[:, 0]), dim=-1)


def plain_text(model: Any, ids: Int[Tensor, "B N"], ends: Int[Tensor, " B"]) -> Float[Tensor, "B E"]:
    net = model.text.net
    x = net.norm_pre(net.token_embed(ids) + net.pos_embed)
    unseen = torch.full((CONTEXT, CONTEXT), -torch.inf).triu(1)
    for block in net.blocks:
        x = plain_block(block, x, unseen)
    return F.normalize(model.text_head(net.norm(x)[torch.arange(len(x)), ends]), dim=-1)


def plain_block(block: Any, x: Float[Tensor, "B N D"], unseen: Tensor | None) -> Float[Tensor, "B N D"]:
    x = x + plain_attention(block.attn, block.norm1(x), unseen)
    return x + block.mlp(block.norm2(x))


def plain_attention(attn: Any, x: Float[Tensor, "B N D"], unseen: Tensor | None) -> Float[Tensor, "B N D"]:
    """Explicit attention by head, as in ``nn.MultiheadAttention`` with ``need_weights=True``."""
    B, N, D = x.shape
    heads, width = attn.heads, D // attn.heads
    q, k, v = (part.reshape(B, N, heads, width).transpose(1, 2) for part in attn.qkv(x).chunk(3, dim=-1))
    scores = q * width**-0.5 @ k.transpose(-2, -1)
    if unseen is not None:
        scores = scores + unseen
    return attn.proj((scores.softmax(dim=-1) @ v).transpose(1, 2).reshape(B, N, D))


if __name__ == "__main__":
    harness.main(rows)
