"""Training and encoding in bfloat16, where the processor computes it: clasp and its peers under the same autocast.

LoRA, and adapters with norms, in both towers, against VisionTextDualEncoder with peft as well as it can be set up, and
against sentence-transformers' Router of two towers with its cached loss; the step as a share of the machine's bfloat16
products; and encoding against peers whose weights are bfloat16, and against clasp itself in float32.
Note: on a processor without bfloat16 instructions the script says so and measures nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks import encode, harness, peer_models, sample_data, tuning_methods
from benchmarks.harness import Contestant, Measured, Peak, Row, sized
from benchmarks.peer_models import Rival
from benchmarks.peers import attempt, imported
from clasp.config.build import ModelAndPreprocessing
from clasp.models.inference import EmbeddingModel, EncoderPrecision
from clasp.models.precision import detect_precision
from clasp.training.attention_kernel import choose_attention_kernel, use_attention_kernel
from clasp.training.cost.flops import count_total_flops

BATCHES = (sized(32, 4), sized(64, 8))
SIZE = sized(2048, 256)
FASTER, SMALLER, SHARE = 1.6, 0.75, 0.6
DUAL = "VisionTextDualEncoder + peft, set up as well as it can be, autocast"
ROUTER = "sentence-transformers Router + peft, CachedMultipleNegativesRankingLoss, autocast"
BF16 = EncoderPrecision("bfloat16", "bfloat16")


def autocast() -> Any:
    return torch.autocast("cpu", torch.bfloat16)


# --- contestants -----------------------------------------------------------------------------------------------------


def our_step(kind: str, batch: int) -> harness.Run:
    """A step of ``clasp train`` with the attention kernel that it chooses on this machine."""
    mine = tuning_methods.ours(kind, batch, "bfloat16")
    pairs = next(iter(mine.batches.epoch(0)))
    kernel = choose_attention_kernel("auto", "bfloat16", torch.device("cpu")).attention

    def step() -> int:
        with use_attention_kernel(kernel):
            return mine.step(pairs)

    return step


def dual_step(kind: str, batch: int) -> harness.Run:
    theirs = tuning_methods.rival(kind, "best")
    tensors = tuning_methods.batch_of("best", batch)
    return _under_autocast(theirs, tensors)


def router_step(kind: str, batch: int) -> harness.Run:
    """LoRA in both routes, with norms for ``lwa``; linear heads; every pair in one piece, which is the fastest."""
    imported("sentence_transformers")
    from peft import LoraConfig, inject_adapter_in_model  # noqa: TID251  # it is the peer here
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.base.modules import Dense, Router
    from sentence_transformers.base.modules.transformer import Transformer
    from sentence_transformers.sentence_transformer.losses import CachedMultipleNegativesRankingLoss
    from sentence_transformers.sentence_transformer.modules.pooling import Pooling

    parts = sample_data.untouched()
    routes = {}
    for route, folder, pooling in (
        ("image", peer_models.saved_image(parts), "cls"),
        ("text", peer_models.saved_text(parts), "mean"),
    ):
        tower = Transformer(str(folder))
        tower.requires_grad_(False)
        inject_adapter_in_model(LoraConfig(r=8, target_modules=sorted(tuning_methods.ATTENTION)), tower.model)
        head = Dense(384, sample_data.WIDTH, bias=False, activation_function=nn.Identity())
        routes[route] = [tower, Pooling(384, pooling_mode=pooling), head]
    model = SentenceTransformer(modules=[Router(routes, default_route="text")], device="cpu")
    for module in model.modules() if kind == "lwa" else ():
        if isinstance(module, nn.LayerNorm):
            module.requires_grad_(True)
    loss = CachedMultipleNegativesRankingLoss(model, mini_batch_size=batch)
    labels = torch.arange(batch)

    def step(pixels: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
        image = {"pixel_values": pixels, "modality": "image"}
        return loss([image, {"input_ids": ids, "attention_mask": mask, "modality": "text"}], labels)

    model.eval()  # no dropout, as the other contestants
    return _under_autocast(Rival(model, step, fused=True, clip=1.0), tuning_methods.batch_of("best", batch))


def _under_autocast(rival: Rival, tensors: tuple[Tensor, Tensor, Tensor]) -> harness.Run:
    plain = rival.loss

    def loss(*inputs: Tensor) -> Tensor:
        with autocast():
            return plain(*inputs)

    rival.loss = loss
    return partial(rival.step, *tensors)


STEPS: dict[str, Callable[[str, int], harness.Run]] = {"clasp": our_step, DUAL: dual_step, ROUTER: router_step}


# --- rows ------------------------------------------------------------------------------------------------------------


def rows() -> Sequence[Row]:
    found = detect_precision(torch.device("cpu"))
    if found.precision != "bfloat16" and not harness.quick():
        print(f"nothing to measure: {found.reason}")
        return []
    training = [row for kind in tuning_methods.WORK for batch in BATCHES for row in speed(kind, batch)]
    return [*training, *(row for kind in tuning_methods.WORK for row in memory(kind)), *encoding()]


def speed(kind: str, batch: int) -> list[Row]:
    made = {name: attempt(partial(maker, kind, batch)) for name, maker in STEPS.items()}
    runs = {name: run for name, run in made.items() if not isinstance(run, str)}
    left, right = torch.randn(2, SIZE, SIZE).bfloat16().unbind()

    def products() -> int:
        for _ in range(4):
            torch.mm(left, right)
        return 4

    rates = harness.race([*(Contestant(name, run) for name, run in runs.items()), Contestant("products", products)])
    flops = count_total_flops(runs["clasp"])
    profile = harness.profiled(runs["clasp"])
    work = f"{tuning_methods.WORK[kind]}, bfloat16, batch {batch}"
    mine = Measured("clasp", tuple(1e-9 * flops * rate / batch for rate in rates["clasp"].values))
    machine = Measured("products", tuple(2e-9 * SIZE**3 * rate for rate in rates["products"].values))
    against = f"bfloat16 products of {SIZE} × {SIZE} matrices"
    note = f"{1e-9 * flops:,.0f} GFLOP a step"
    found = [Row(work, "GFLOP/s", mine, against, machine, SHARE, "higher", note, profile)]
    for name in (DUAL, ROUTER):
        note = made[name] if isinstance(made[name], str) else tuning_methods.unlike(kind).removeprefix("; ")
        found.append(Row(work, "pairs/s", rates["clasp"], name, rates.get(name), FASTER, "higher", str(note), profile))
    return found


def memory(kind: str) -> list[Row]:
    peaks = {name: attempt(partial(harness.peak_elsewhere, "bfloat16", f"{name}: {kind}")) for name in STEPS}
    mine = peaks["clasp"]
    assert isinstance(mine, Peak), mine
    work = f"{tuning_methods.WORK[kind]}, bfloat16: peak memory of the process"
    found = []
    for name in (DUAL, ROUTER):
        theirs = peaks[name]
        size = Measured("", (theirs.process,)) if isinstance(theirs, Peak) else None
        note = f"batch {BATCHES[-1]}" if isinstance(theirs, Peak) else theirs
        found.append(Row(work, "MB", Measured("", (mine.process,)), name, size, SMALLER, "lower", note))
    return found


def encoding() -> list[Row]:
    parts = sample_data.untouched()
    found = []
    for work, unit, target, ours, peers in (
        ("encode images, bfloat16", "images/s", encode.FASTER_IMAGES, _our_images, encode.IMAGE_PEERS),
        ("encode captions, bfloat16", "captions/s", encode.FASTER_CAPTIONS, _our_captions, encode.CAPTION_PEERS),
    ):
        made = {name: attempt(partial(maker, parts, torch.bfloat16)) for name, maker in peers.items()}
        contestants = [Contestant("clasp", ours(parts, BF16)), Contestant("float32", ours(parts, EncoderPrecision()))]
        contestants += [Contestant(name, run) for name, run in made.items() if not isinstance(run, str)]
        rates = harness.race(contestants)
        profile = harness.profiled(contestants[0].run)
        for name, run in made.items():
            note = run if isinstance(run, str) else "its weights in bfloat16"
            found.append(Row(work, unit, rates["clasp"], name, rates.get(name), target, "higher", note, profile))
        found.append(Row(work, unit, rates["clasp"], "clasp, float32", rates["float32"], 2.2, "higher", "", profile))
    return found


def _our_images(parts: ModelAndPreprocessing, precision: EncoderPrecision) -> harness.Run:
    model = EmbeddingModel(parts.model.eval(), parts.transform, parts.tokenizer, precision=precision)
    paths = encode.photos(encode.IMAGES)
    return lambda: len(model.encode_image(paths))


def _our_captions(parts: ModelAndPreprocessing, precision: EncoderPrecision) -> harness.Run:
    model = EmbeddingModel(parts.model.eval(), parts.transform, parts.tokenizer, precision=precision)
    texts = sample_data.captions(encode.CAPTIONS)
    return lambda: len(model.encode_text(texts))


PEAKS = {
    f"{name}: {kind}": lambda maker=maker, kind=kind: harness.peak_of(maker(kind, BATCHES[-1]))
    for name, maker in STEPS.items()
    for kind in tuning_methods.WORK
}

if __name__ == "__main__":
    harness.main(rows, PEAKS)
