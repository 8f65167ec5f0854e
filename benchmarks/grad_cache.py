"""Gradient caching with batch 4,096 and micro-batches of 64, against CachedMultipleNegativesRankingLoss.

Both sides run the same small towers and the same symmetric loss on the same batch; captions have realistic lengths.
Reported are time, peak memory in separate processes, and the distance of each gradient from that of an unsplit batch
(at a size that fits in memory). sentence-transformers pads its input to one length and trims the padding of each
micro-batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks import harness, sample_data
from benchmarks.harness import Contestant, Measured, Peak, Row, sized
from benchmarks.peers import attempt, imported
from clasp.models.backbone import Backbone
from clasp.models.dual_encoder import DualEncoder
from clasp.models.head_settings import HeadSettings
from clasp.models.tower import Tower
from clasp.training import grad_cache
from clasp.training.losses import info_nce
from clasp.types import Batch, Pixels, Tokens

BATCH = sized(4096, 64)
SMALL = sized(256, 32)  # for the gradient of the unsplit batch
PIECE = sized(64, 8)
SIZE, WIDTH, BLOCKS = 32, 192, 4
SCALE = 20.0
PEER = "sentence-transformers CachedMultipleNegativesRankingLoss"
WORK = f"batch {BATCH:,} from pieces of {PIECE}"


def model() -> DualEncoder:
    """A ViT of 17 tokens and a BERT, four blocks of width 192 each; all weights of towers and heads are trained."""
    from transformers import BertConfig, BertModel, Dinov2Config, Dinov2Model

    torch.manual_seed(0)
    shape = {"hidden_size": WIDTH, "num_hidden_layers": BLOCKS, "num_attention_heads": 3}
    image = Dinov2Model(Dinov2Config(**shape, image_size=SIZE, patch_size=8, use_mask_token=False))
    text = BertModel(BertConfig(**shape, intermediate_size=4 * WIDTH), add_pooling_layer=False)
    towers = (
        Tower(Backbone("small ViT", "image", image.eval(), "", "cls")),
        Tower(Backbone("small BERT", "text", text.eval(), "", "mean")),
    )
    made = DualEncoder(*towers, HeadSettings(width=256), seed=0)
    names = {name for tower in ("image", "text") for name in (f"{tower}.net.", f"{tower}_head.")}
    made.select(name for name, _ in made.named_parameters() if name.startswith(tuple(names)))
    with torch.no_grad():
        made.log_scale.fill_(torch.tensor(SCALE).log())
    return made


def pairs(count: int) -> Batch:
    generator = torch.Generator().manual_seed(1)
    pixels = torch.randn(count, 3, SIZE, SIZE, generator=generator)
    tokens = sample_data.untouched().tokenizer(sample_data.captions(count))
    sample_data.untouched.cache_clear()  # free its memory
    groups = torch.arange(count)[:, None].expand(count, 2).contiguous()
    return Batch(tuple(map(str, range(count))), Pixels(pixels), tokens, groups)


def clasp(model: DualEncoder, batch: Batch, piece: int = PIECE) -> int:
    model.zero_grad()
    work = grad_cache.MicroBatchEmbedder(model, torch.device("cpu"), "float32", lambda side, number: None)
    grad_cache.backward_in_micro_batches(work, batch, info_nce, piece)
    return len(batch.ids)


def one_piece(model: DualEncoder, batch: Batch) -> None:
    model.zero_grad()
    out = model(batch)
    info_nce(out.image, out.text, out.scale, groups=batch.groups).total.backward()


def peer(model: DualEncoder) -> Any:
    """Their loss over a SentenceTransformer of one module, which dispatches to the tower of its input."""
    imported("sentence_transformers")
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.base.modules.module import Module
    from sentence_transformers.sentence_transformer.losses import CachedMultipleNegativesRankingLoss

    class Either(Module):
        def __init__(self) -> None:
            super().__init__()
            self.encoder = model

        def forward(self, features: dict[str, Tensor], **options: Any) -> dict[str, Tensor]:
            if "pixel_values" in features:
                vectors = self.encoder.embed_image(Pixels(features["pixel_values"]))
            else:
                vectors = self.encoder.embed_text(Tokens(features["input_ids"], features["attention_mask"].bool()))
            return {**features, "sentence_embedding": vectors}

        def save(self, output_path: str, *args: Any, **options: Any) -> None:
            raise NotImplementedError

    whole = SentenceTransformer(modules=[Either()], device="cpu")
    both = ("query_to_doc", "doc_to_query")
    return CachedMultipleNegativesRankingLoss(
        whole, scale=SCALE, mini_batch_size=PIECE, directions=both, partition_mode="per_direction"
    )


def theirs(loss: Any, model: DualEncoder, batch: Batch) -> int:
    assert isinstance(batch.image, Pixels)
    assert isinstance(batch.text, Tokens)
    model.zero_grad()
    features = [
        {"pixel_values": batch.image.values},
        {"input_ids": batch.text.ids, "attention_mask": batch.text.mask.long()},
    ]
    loss(features, torch.arange(len(batch.ids))).backward()
    return len(batch.ids)


def rows() -> Sequence[Row]:
    mine, other = model(), model()
    loss = attempt(partial(peer, other))
    batch = pairs(BATCH)
    contestants = [Contestant("clasp", partial(clasp, mine, batch))]
    if not isinstance(loss, str):
        contestants.append(Contestant("peer", partial(theirs, loss, other, batch)))
    rates = harness.race(contestants, warm=False)  # a run takes long
    taken = {name: Measured(name, tuple(BATCH / rate for rate in rate.values)) for name, rate in rates.items()}
    note = loss if isinstance(loss, str) else "two small towers of 4 blocks, width 192"
    profile = harness.profiled(contestants[0].run)
    return [
        Row(WORK, "s", taken["clasp"], PEER, taken.get("peer"), 1.0, "lower", note, profile),
        memory(),
        exactness(mine, other, loss),
    ]


def memory() -> Row:
    mine = harness.peak_elsewhere("grad_cache", "clasp")
    other = attempt(partial(harness.peak_elsewhere, "grad_cache", "peer"))
    work = f"{WORK}: memory above the inputs"
    ours = Measured("", (mine.grown,))
    if isinstance(other, str):
        return Row(work, "MB", ours, PEER, None, 1.0, "lower", other)
    return Row(work, "MB", ours, PEER, Measured("", (other.grown,)), 1.0, "lower", "gradients included")


def exactness(mine: DualEncoder, other: DualEncoder, loss: Any) -> Row:
    """Maximum relative distance of a weight's gradient from that of the unsplit batch."""
    batch = pairs(SMALL)
    whole = deepcopy(mine)
    one_piece(whole, batch)
    clasp(mine, batch)
    ours = Measured("", (farthest(mine, whole),))
    work = f"batch {SMALL} from pieces of {PIECE}: gradient off that of one piece"
    if isinstance(loss, str):
        return Row(work, "of its norm", ours, PEER, None, None, "lower", loss)
    theirs(loss, other, batch)
    note = "exact up to float32" if ours.median < 1e-4 else "**not exact**"
    return Row(work, "of its norm", ours, PEER, Measured("", (farthest(other, whole),)), None, "lower", note)


def farthest(model: DualEncoder, whole: DualEncoder) -> float:
    found = []
    largest = max(float(p.grad.norm()) for p in whole.parameters() if p.grad is not None)
    for ours, right in zip(model.parameters(), whole.parameters(), strict=True):
        if (
            right.grad is not None and float(right.grad.norm()) > 1e-6 * largest
        ):  # key biases have no gradient except rounding
            assert ours.grad is not None
            found.append(float((ours.grad - right.grad).norm() / right.grad.norm()))
    return max(found)


def peak_of_clasp() -> Peak:
    mine, batch = model(), pairs(BATCH)
    return harness.peak_of(partial(clasp, mine, batch))


def peak_of_peer() -> Peak:
    other, batch = model(), pairs(BATCH)
    return harness.peak_of(partial(theirs, peer(other), other, batch))


if __name__ == "__main__":
    harness.main(rows, {"clasp": peak_of_clasp, "peer": peak_of_peer})
