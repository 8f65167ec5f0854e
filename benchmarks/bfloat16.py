"""Training and encoding in bfloat16, where the processor computes it: clasp and its peers under the same autocast.

LoRA, and adapters with norms, in both towers, against VisionTextDualEncoder with peft as its example has it and as well
as it can be set up, and against sentence-transformers' Router of two towers with its cached loss; encoding against
peers whose weights are bfloat16, and against clasp itself in float32; and both as a share of the machine's bfloat16
products.
Note: on a processor without bfloat16 instructions the script says so and measures nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor, nn

from benchmarks import encode, harness, peer_models, sample_data, tuning_methods
from benchmarks.harness import Contestant, Measured, Peak, Row, sized
from benchmarks.peer_models import Rival
from benchmarks.peers import attempt, imported
from clasp.models.inference import EncoderPrecision
from clasp.models.precision import detect_precision
from clasp.training.cost.flops import count_total_flops

BATCHES = (sized(32, 4), sized(64, 8))
SMALLER, SHARE, FASTER_THAN_FLOAT32 = 0.75, 0.6, 2.2
DUAL = "VisionTextDualEncoder + peft, set up as well as it can be, autocast"
EXAMPLE = "VisionTextDualEncoder + peft as its example, autocast"
ROUTER = "sentence-transformers Router + peft, CachedMultipleNegativesRankingLoss, autocast"
FASTER = {EXAMPLE: tuning_methods.FASTER["example"], DUAL: 1.6, ROUTER: 1.6}
BF16 = EncoderPrecision("bfloat16", "bfloat16")


# --- contestants -----------------------------------------------------------------------------------------------------


def our_step(kind: str, batch: int) -> harness.Run:
    mine = tuning_methods.ours(kind, batch, "bfloat16")
    return partial(mine.step, next(iter(mine.batches.epoch(0))))


def dual_step(kind: str, batch: int, setup: str = "best") -> harness.Run:
    theirs = tuning_methods.rival(kind, setup, "bfloat16")
    return partial(theirs.step, *tuning_methods.batch_of(setup, batch))


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
    rival = Rival(model, step, fused=True, clip=1.0, precision="bfloat16")
    return partial(rival.step, *tuning_methods.batch_of("best", batch))


STEPS: dict[str, Callable[[str, int], harness.Run]] = {
    "clasp": our_step,
    EXAMPLE: partial(dual_step, setup="example"),
    DUAL: dual_step,
    ROUTER: router_step,
}


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
    contestants = [Contestant(name, run) for name, run in runs.items()]
    rates = harness.race([*contestants, harness.products("bfloat16")])
    flops = {name: count_total_flops(run) for name, run in runs.items()}
    profile = harness.profiled(runs["clasp"])
    work = f"{tuning_methods.WORK[kind]}, batch {batch}"
    share = rates["clasp"], rates["products"], SHARE, profile, "bfloat16"
    found = []
    for name, target in FASTER.items():
        note, theirs = str(made[name]), rates.get(name)
        if theirs is not None:
            note = f"theirs counts {flops[name] / flops['clasp']:.2f} × our FLOPs{tuning_methods.unlike(kind)}"
        found.append(Row(work, "pairs/s", rates["clasp"], name, theirs, target, "higher", note, profile, "bfloat16"))
    return [*found, harness.share_of_machine(work, flops["clasp"] / batch, *share)]


def memory(kind: str) -> list[Row]:
    peaks = {name: attempt(partial(harness.peak_elsewhere, "bfloat16", f"{name}: {kind}")) for name in STEPS}
    mine = peaks["clasp"]
    assert isinstance(mine, Peak), mine
    work = f"{tuning_methods.WORK[kind]}: peak memory of the process"
    bound = "the activations of the same layers, kept on either side"
    found = []
    for name in FASTER:
        theirs = peaks[name]
        size = Measured("", (theirs.process,)) if isinstance(theirs, Peak) else None
        note = f"batch {BATCHES[-1]}" if isinstance(theirs, Peak) else theirs
        ours = Measured("", (mine.process,))
        found.append(Row(work, "MB", ours, name, size, SMALLER, "lower", note, bound, "bfloat16"))
    return found


def encoding() -> list[Row]:
    parts = sample_data.untouched()
    found = []
    for work, unit, target, ours, peers in (
        ("encode images", "images/s", encode.FASTER_IMAGES, encode.our_images, encode.IMAGE_PEERS),
        ("encode captions", "captions/s", encode.FASTER_CAPTIONS, encode.our_captions, encode.CAPTION_PEERS),
    ):
        made = {name: attempt(partial(maker, parts, torch.bfloat16)) for name, maker in peers.items()}
        contestants = [Contestant("clasp", ours(parts, BF16)), Contestant("float32", ours(parts, EncoderPrecision()))]
        contestants += [Contestant(name, run) for name, run in made.items() if not isinstance(run, str)]
        rates = harness.race([*contestants, harness.products("bfloat16")])
        flops = count_total_flops(contestants[0].run) / contestants[0].run()
        profile = harness.profiled(contestants[0].run)
        wanted: dict[str, tuple[float, str]] = {
            name: (target, run if isinstance(run, str) else "its weights in bfloat16") for name, run in made.items()
        }
        for name, (least, note) in {**wanted, "float32": (FASTER_THAN_FLOAT32, "clasp itself")}.items():
            theirs = rates.get(name)
            found.append(Row(work, unit, rates["clasp"], name, theirs, least, "higher", note, profile, "bfloat16"))
        share = rates["clasp"], rates["products"], None, profile, "bfloat16"
        found.append(harness.share_of_machine(work, flops, *share))
    return found


def peak(maker: Callable[[str, int], harness.Run], kind: str) -> Peak:
    run = maker(kind, BATCHES[-1])
    sample_data.untouched.cache_clear()  # a peer has its own copy
    return harness.peak_of(run)


PEAKS = {f"{name}: {kind}": partial(peak, maker, kind) for name, maker in STEPS.items() for kind in tuning_methods.WORK}

if __name__ == "__main__":
    harness.main(rows, PEAKS)
