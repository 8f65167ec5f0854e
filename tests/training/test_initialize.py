"""Low-rank updates that start from the gradient: the right directions, nothing else changed, and runs that repeat."""

from __future__ import annotations

import copy
import os
import signal
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from clasp.commands import fit_run
from clasp.commands import train as main_job
from clasp.config.build import build_feature_source, build_model_and_preprocessing, load
from clasp.config.datasets import open_training_pairs
from clasp.config.recipe import Recipe
from clasp.data.loader import PairLoader
from clasp.data.readers import PairIndex
from clasp.models.dual_encoder import DualEncoder
from clasp.training.initialize import GRADIENT_BATCHES, initialize_low_rank
from clasp.training.losses import build_loss
from clasp.training.trackers.console import SilentReporter, TrainProgress
from clasp.types import Batch, HiddenStates, Loss, UserError
from reference_losses import naive_info_nce
from toyruns import delta, recipe, run

RANK = 2


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CLASP_CACHE", str(tmp_path / "cache"))


class Ready(NamedTuple):
    """A model before its low-rank updates are started, and what they start from."""

    model: DualEncoder
    batches: PairLoader
    loss: Loss
    recipe: Recipe

    def start(self) -> dict[str, Tensor]:
        initialize_low_rank(self.model, self.batches, self.loss, self.recipe.tune, self.recipe.train)
        return {name: p.detach().clone() for name, p in self.model.named_parameters()}


def ready(towers: Path, pairs: Path, *overrides: str, method: str = "lora", start: str = "gradient") -> Ready:
    spec = f"[\"{method}(rank={RANK}, blocks='1:', init='{start}')\"]"
    made = recipe(towers, pairs, f"tune.image={spec}", f"tune.text={spec}", "head.standardize=false", *overrides)
    parts = build_model_and_preprocessing(made)
    parts.model.eval()
    if made.train.activation_checkpointing == "blocks":
        parts.model.image.enable_activation_checkpointing()
        parts.model.text.enable_activation_checkpointing()
    train, _ = open_training_pairs(made)
    inputs, listing = build_feature_source(parts, made), PairIndex(train)
    sides = inputs.batch_reader(train, listing, None)
    assert made.train.batch_size != "auto"
    batches = PairLoader(sides, batch_size=made.train.batch_size, seed=made.train.seed)
    return Ready(parts.model, batches, build_loss(made.loss), made)


def few(batches: PairLoader) -> list[Batch]:
    return [batch for _, batch in zip(range(GRADIENT_BATCHES), batches.epoch(0), strict=False)]


def slow_gradients(given: Ready) -> dict[str, Tensor]:
    """Of every wrapped weight: whole batches, the logits as a matrix, one weight at a time."""
    model = copy.deepcopy(given.model)
    wrapped = [name for name, _ in model.named_parameters() if name.endswith(".base_layer.weight")]
    gradients = {}
    for name in wrapped:
        model.select([name])
        total = torch.zeros(())
        for batch in few(given.batches):
            out = model(batch)
            total = total + naive_info_nce(out.image, out.text, out.scale, groups=batch.groups)[0]
        (gradients[name],) = torch.autograd.grad(total, [model.get_parameter(name)])
    return gradients


# --- where it starts -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["lora", "dora", "rslora"])
def test_a_spans_the_top_right_singular_vectors(method: str, towers: Path, pairs: Path):
    given = ready(towers, pairs, method=method)
    drawn = {name: p.detach().clone() for name, p in given.model.named_parameters()}
    slow = slow_gradients(given)
    started = given.start()
    assert len(slow) == 8, "query, key, value and output of one block in each tower"
    for name, gradient in slow.items():
        a = name.replace("base_layer", "lora_A.default")
        _, values, rows = torch.linalg.svd(gradient.double())
        assert values[RANK - 1] > 1.01 * values[RANK], "the subspace is well told from the rest"
        ours = torch.linalg.qr(started[a].double().T).Q
        overlap = torch.linalg.svdvals(rows[:RANK] @ ours)  # cosines of the angles between the two subspaces
        assert overlap.min() > 0.999, (name, overlap)
        torch.testing.assert_close(started[a].norm(), drawn[a].norm())
    others = [name for name in drawn if not name.endswith("lora_A.default.weight")]
    assert all(torch.equal(started[name], drawn[name]) for name in others), "the base stays the base, and B zero"
    trained = {name for name, p in given.model.named_parameters() if p.requires_grad}
    assert trained == given.model.selection and not any(p.grad is not None for p in given.model.parameters())
    assert not given.model.training


def test_the_model_begins_as_what_it_was(towers: Path, pairs: Path):
    given = ready(towers, pairs)
    batch = next(given.batches.epoch(0))
    before = given.model(batch)
    given.start()
    after = given.model(batch)
    assert torch.equal(before.image, after.image) and torch.equal(before.text, after.text)


WAYS = {
    "in pieces": ["train.micro_batch=5"],
    "from kept states": ["data.feature_cache=float32"],
    "in blocks computed twice": ["train.activation_checkpointing=blocks"],
    "in bfloat16": ["train.precision=bfloat16"],
}


@pytest.mark.parametrize("way", WAYS)
def test_the_same_directions(way: str, towers: Path, pairs: Path):
    """However the gradient is computed: as from live inputs in one piece."""
    plain = ready(towers, pairs, "data.feature_cache=off")
    other = ready(towers, pairs, "data.feature_cache=off", *WAYS[way])
    assert isinstance(next(other.batches.epoch(0)).image, HiddenStates) == (way == "from kept states")
    one, two = plain.start(), other.start()
    for name in (name for name in one if name.endswith("lora_A.default.weight")):
        bases = [torch.linalg.qr(each[name].double().T).Q for each in (one, two)]
        cosines = torch.linalg.svdvals(bases[0].T @ bases[1])
        assert cosines.min() > (0.97 if way == "in bfloat16" else 0.9999), (name, cosines)


def test_only_those_that_ask(towers: Path, pairs: Path):
    random = ready(towers, pairs, start="random")
    before = {name: p.detach().clone() for name, p in random.model.named_parameters()}
    assert all(torch.equal(p, before[name]) for name, p in random.start().items())
    spec = "[\"lora(rank=1, blocks=':1')\", \"lora(rank=2, blocks='1:', init='gradient')\"]"
    given = ready(towers, pairs, f"tune.image={spec}", 'tune.text=["norms"]')
    before = {name: p.detach().clone() for name, p in given.model.named_parameters()}
    moved = {name for name, p in given.start().items() if not torch.equal(p, before[name])}
    assert moved == {name for name in before if ".layers.1." in name and name.endswith("lora_A.default.weight")}


def test_a_gradient_that_is_not_finite_is_refused(towers: Path, pairs: Path):
    given = ready(towers, pairs)
    with torch.no_grad():
        given.model.get_parameter("image_head.map.weight").fill_(torch.nan)
    with pytest.raises(UserError, match=r"not finite at .*train\.precision=float32") as refused:
        given.start()
    assert "\n" not in str(refused.value)
    assert {name for name, p in given.model.named_parameters() if p.requires_grad} == given.model.selection


# --- what it is good for ---------------------------------------------------------------------------------------------


def lowered_by_one_step(start: str, seed: int, towers: Path, pairs: Path) -> float:
    """How much lower the loss on other batches is after one step of the low-rank updates alone."""
    given = ready(towers, pairs, f"train.seed={seed}", "train.batch_size=32", start=start)
    given.start()
    model = given.model
    model.select([name for name in model.selection if "lora_" in name])

    def loss(batch: Batch) -> Tensor:
        out = model(batch)
        return given.loss(out.image, out.text, out.scale, out.bias, groups=batch.groups).total

    others = [batch for epoch in range(5, 9) for batch in given.batches.epoch(epoch)]
    with torch.no_grad():
        before = torch.stack([loss(batch) for batch in others]).mean()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    loss(next(given.batches.epoch(0))).backward()
    optimizer.step()
    with torch.no_grad():
        return float(before - torch.stack([loss(batch) for batch in others]).mean())


def test_the_first_step_goes_further_than_from_a_random_start(towers: Path, pairs: Path):
    random, gradient = (
        torch.tensor([lowered_by_one_step(start, seed, towers, pairs) for seed in range(4)])
        for start in ("random", "gradient")
    )
    assert gradient.mean() > 2 * random.mean() > 0, (gradient, random)
    assert (gradient > random).all()


# --- in a run --------------------------------------------------------------------------------------------------------


class StopAt(SilentReporter):
    """Presses Ctrl-C after a step."""

    def __init__(self, step: int) -> None:
        self.at = step

    def step(self, progress: TrainProgress) -> None:
        if progress.step == self.at:
            os.kill(os.getpid(), signal.SIGINT)


RUNS = {
    "live": ["data.feature_cache=off", "head.noise=0.3"],
    "from kept states": ["train.select=last"],
    "dora, sigmoid": [
        'tune.image=["dora(rank=2, init=\'gradient\')", "norms"]',
        "loss.kind=sigmoid",
        "head.standardize=false",
    ],
}


@pytest.mark.parametrize("way", RUNS)
def test_a_run_repeats_itself_stops_and_goes_on(
    way: str, towers: Path, pairs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    spec = "[\"lora(rank=2, blocks='1:', init='gradient')\"]"
    made = recipe(towers, pairs, f"tune.image={spec}", f"tune.text={spec}", "train.epochs=2")
    made = made.with_overrides(RUNS[way])
    run(made, tmp_path / "one")
    run(made, tmp_path / "two")
    whole = (tmp_path / "one" / "delta.safetensors").read_bytes()
    assert (tmp_path / "two" / "delta.safetensors").read_bytes() == whole
    stopped = main_job.train_recipe(made, tmp_path / "stopped", say=str, reporter=StopAt(4))
    assert stopped.fitted.interrupted
    monkeypatch.setattr(fit_run, "initialize_low_rank", refuse_to_be_called)
    run(stopped_recipe(tmp_path / "stopped"), tmp_path / "stopped", resume=True)
    assert (tmp_path / "stopped" / "delta.safetensors").read_bytes() == whole
    loaded = dict(load(tmp_path / "one").encoder.named_parameters())
    assert all(torch.equal(loaded[name], tensor) for name, tensor in delta(tmp_path / "one").items())


def refuse_to_be_called(*args: object) -> None:
    raise AssertionError("a run that goes on starts nothing")


def stopped_recipe(folder: Path) -> Recipe:
    return main_job.Recipe.model_validate(main_job.RunFolder(folder).read().recipe)
