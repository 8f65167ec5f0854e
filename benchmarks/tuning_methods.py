"""LoRA, and adapters with norms, in both towers, on captions of realistic lengths: pairs per second and memory.

Against VisionTextDualEncoder with peft, as in its example script (captions padded to 128, dropout on) and in the
fastest configuration (padded to the longest of the batch, no dropout, fused AdamW). Both sides tune the same layers.
Note: peft has no bottleneck adapters, so adapters with norms are compared with LoRA and norms.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

from torch import Tensor, nn

from benchmarks import harness, peer_models, sample_data
from benchmarks.harness import Contestant, Measured, Peak, Row, sized
from benchmarks.peer_models import EXAMPLE_LENGTH, Rival
from benchmarks.peers import attempt
from clasp.plain_types import Precision
from clasp.training.cost.flops import count_total_flops

BATCH = sized(32, 4)
BATCH_OF_MEMORY = sized(64, 4)
FASTER = {"example": 2.5, "best": 1.3}
SMALLER = 0.8
SETUPS = {
    "example": f"VisionTextDualEncoder + peft as its example (padded to {EXAMPLE_LENGTH}, dropout)",
    "best": "the same, set up as well as it can be (padded to the batch's longest, no dropout, fused AdamW)",
}
WORK = {"lora": "low-rank r=8, both towers", "lwa": "adapters + norms, both towers"}
SPECS = {"lora": '["lora(r=8)"]', "lwa": '["adapters", "norms"]'}

ATTENTION = {"query", "key", "value", "attention.output.dense", "q_proj", "k_proj", "v_proj", "attention.o_proj"}


def ours(kind: str, batch: int = BATCH, precision: Precision = "float32") -> sample_data.Ours:
    recipe = sample_data.recipe(f"tune.image={SPECS[kind]}", f"tune.text={SPECS[kind]}", "data.feature_cache=off")
    cache = Path(tempfile.gettempdir())
    return sample_data.Ours(recipe, sample_data.pairs(batch), batch=batch, cache=cache, precision=precision)


def rival(kind: str, setup: str, precision: Precision = "float32") -> Rival:
    """The dual encoder with LoRA on the same layers as ours, and for ``lwa`` with trainable norms."""
    from peft import LoraConfig, get_peft_model  # noqa: TID251  # it is the peer here

    model = peer_models.dual_encoder(sample_data.untouched())
    heads = ["visual_projection", "text_projection"]
    targets = sorted(ATTENTION)
    model = get_peft_model(model, LoraConfig(r=8, target_modules=targets, modules_to_save=heads))
    if kind == "lwa":
        for module in model.modules():
            if isinstance(module, nn.LayerNorm):
                module.requires_grad_(True)
    return peer_models.dual_encoder_rival(model, example=setup == "example", precision=precision)


def same_layers(mine: sample_data.Ours, theirs: Rival) -> None:
    """Checks that both sides have equally many LoRA layers."""
    counts = [
        sum(name.endswith(("lora_A", "lora_A.default", "lora_A.default.weight")) for name, _ in net.named_parameters())
        for net in (mine.model, theirs.model)
    ]
    assert counts[0] == counts[1] > 0, counts


def batch_of(setup: str, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """Pixels, ids and mask, padded as in the setup."""
    plain = sample_data.plain(sample_data.untouched(), count)
    return plain.pixels, *plain.tokens(range(count), EXAMPLE_LENGTH if setup == "example" else None)


def rows() -> Sequence[Row]:
    return [row for kind in WORK for row in (*speed(kind), *memory(kind))]


def speed(kind: str) -> list[Row]:
    mine = ours(kind)
    batch = next(iter(mine.batches.epoch(0)))
    step = partial(mine.step, batch)
    made = {setup: attempt(partial(rival, kind, setup)) for setup in SETUPS}
    contestants = [Contestant("clasp", step)]
    for setup, theirs in made.items():
        if isinstance(theirs, Rival):
            if kind == "lora":
                same_layers(mine, theirs)
            contestants.append(Contestant(setup, partial(theirs.step, *batch_of(setup, BATCH))))
    rates = harness.race(contestants)
    flops = {contestant.name: count_total_flops(contestant.run) for contestant in contestants}
    profile = harness.profiled(step)
    found = []
    for setup, theirs in made.items():
        note, bound = str(theirs), ""
        if isinstance(theirs, Rival):
            note = f"batch {BATCH}; theirs counts {flops[setup] / flops['clasp']:.2f} × our FLOPs{unlike(kind)}"
            bound = f"arithmetic, which is the same but for padding; {profile}"
        rate, target = rates.get(setup), FASTER[setup]
        found.append(Row(WORK[kind], "pairs/s", rates["clasp"], SETUPS[setup], rate, target, "higher", note, bound))
    return found


def memory(kind: str) -> list[Row]:
    mine = harness.peak_elsewhere("tuning_methods", f"clasp-{kind}")
    found = []
    for setup, name in SETUPS.items():
        theirs = attempt(partial(harness.peak_elsewhere, "tuning_methods", f"{setup}-{kind}"))
        note, sizes = str(theirs), (None, None)
        if isinstance(theirs, Peak):
            note = f"batch {BATCH_OF_MEMORY}; above what was there before: {mine.grown:,.0f} and {theirs.grown:,.0f}"
            sizes = (_one(theirs.process), _one(theirs.kept))
        bound = "the activations of the same layers, kept on either side"
        for what, own, other in (
            ("peak memory of the process", mine.process, sizes[0]),
            ("kept for the backward pass", mine.kept, sizes[1]),
        ):
            work = f"{WORK[kind]}: {what}"
            found.append(Row(work, "MB", _one(own), name, other, SMALLER, "lower", note + unlike(kind), bound))
    return found


def unlike(kind: str) -> str:
    return "; peft has no bottleneck adapters: theirs is low-rank r=8 + norms" if kind == "lwa" else ""


def _one(value: float) -> Measured:
    return Measured("", (value,))


def peak_of_ours(kind: str) -> Peak:
    mine = ours(kind, BATCH_OF_MEMORY)
    batch = next(iter(mine.batches.epoch(0)))
    peak = harness.peak_of(partial(mine.step, batch))
    return replace(peak, kept=1e-6 * mine.kept(batch))


def peak_of_rival(kind: str, setup: str) -> Peak:
    theirs, batch = rival(kind, setup), batch_of(setup, BATCH_OF_MEMORY)
    sample_data.untouched.cache_clear()  # the peer has its own copy
    peak = harness.peak_of(partial(theirs.step, *batch))
    return replace(peak, kept=1e-6 * theirs.kept(*batch))


PEAKS = {
    **{f"clasp-{kind}": partial(peak_of_ours, kind) for kind in WORK},
    **{f"{setup}-{kind}": partial(peak_of_rival, kind, setup) for kind in WORK for setup in SETUPS},
}

if __name__ == "__main__":
    harness.main(rows, PEAKS)
