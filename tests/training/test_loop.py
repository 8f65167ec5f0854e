"""The loop on a toy of two layers with dropout: repeats itself, stops and goes on bitwise, and says what it does."""

from __future__ import annotations

import json
import math
import os
import signal
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clasp.training import optimizer as optim
from clasp.training import step
from clasp.training.interrupt import GracefulStop
from clasp.training.loop import FitOptions, count_evaluations, fit
from clasp.training.settings import LrFactors, TrainSettings
from clasp.training.state import FitResult, TrainPosition, TrainState
from clasp.types import Batch, Embeddings, LossParts, Pixels, PooledFeatures, SkippedSample, Tokens, UserError
from toytrackers import callbacks

PAIRS, BATCH, STEPS_AN_EPOCH = 24, 8, 3
SETTINGS = TrainSettings(batch_size=BATCH, epochs=4, lr=0.02, precision="float32", log_every=2, evaluate_every=1)


KINDS = {
    "image.head.weight": "tower",
    "image.head.bias": "tower",
    "text.head.weight": "head",
    "text.head.bias": "head",
    "log_scale": "scale",
}


class Toy(nn.Module):
    """Two towers of one frozen and one trained layer, dropout between, and a scale."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.image = nn.ModuleDict({"trunk": nn.Linear(6, 16), "head": nn.Linear(16, 4)})
        self.text = nn.ModuleDict({"trunk": nn.Linear(5, 16), "head": nn.Linear(16, 4)})
        self.log_scale = nn.Parameter(torch.tensor(2.0))
        self.image["trunk"].requires_grad_(False)
        self.text["trunk"].requires_grad_(False)
        self.selection = frozenset(name for name, parameter in self.named_parameters() if parameter.requires_grad)
        self.moving: dict[str, Tensor] = {}

    def embed(self, tower: nn.ModuleDict, values: Tensor) -> Tensor:
        return F.normalize(tower["head"](F.dropout(tower["trunk"](values).relu(), 0.3, self.training)), dim=-1)

    def embed_image(self, inputs: PooledFeatures) -> Tensor:
        return self.embed(self.image, inputs.values)

    def embed_text(self, inputs: PooledFeatures) -> Tensor:
        return self.embed(self.text, inputs.values)

    def scale_and_bias(self) -> tuple[Tensor, None]:
        return self.log_scale.exp(), None

    def forward(self, batch: Batch) -> Embeddings:
        return Embeddings(self.embed_image(batch.image), self.embed_text(batch.text), *self.scale_and_bias())

    def after_step(self) -> None:
        with torch.no_grad():
            self.log_scale.clamp_(1.95, 2.01)


class Stream:
    """24 pairs whose captions are a fixed map of the images, in a new order each epoch; ``before`` sees each batch."""

    def __init__(self, seed: int = 0, before: Callable[[int], None] | None = None) -> None:
        generator = torch.Generator().manual_seed(1)
        self.images = torch.randn(PAIRS, 6, generator=generator)
        self.texts = self.images @ torch.randn(6, 5, generator=generator)
        self.seed, self.before = seed, before

    def __len__(self) -> int:
        return STEPS_AN_EPOCH

    def epoch(self, number: int, start: int = 0) -> Iterator[Batch]:
        order = torch.randperm(PAIRS, generator=torch.Generator().manual_seed(1000 * self.seed + number))
        for index in range(start, len(self)):
            if self.before:
                self.before(number * len(self) + index)
            yield self.rows(order[index * BATCH : (index + 1) * BATCH])

    def rows(self, rows: Tensor) -> Batch:
        groups, ids = torch.stack([rows, rows], dim=1), tuple(str(row) for row in rows.tolist())
        return Batch(ids, PooledFeatures(self.images[rows]), PooledFeatures(self.texts[rows]), groups)


def kill(signal_number: int, at: int) -> Callable[[int], None]:
    """Sends this process a signal while batch ``at`` is fetched."""

    def before(number: int) -> None:
        if number == at:
            os.kill(os.getpid(), signal_number)

    return before


def contrast(
    image: Tensor, text: Tensor, scale: Tensor, bias: Tensor | None = None, *, groups: Tensor | None = None
) -> LossParts:
    assert image.dtype == text.dtype == scale.dtype == torch.float32
    logits, target = scale * image @ text.T, torch.arange(len(image), device=image.device)
    one, other = F.cross_entropy(logits, target), F.cross_entropy(logits.T, target)
    return LossParts((one + other) / 2, one, other)


def weights(model: Toy) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def same(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def frozen_in_time(state: TrainState) -> TrainState:
    """What a checkpoint does: tensors copied out, facts through JSON, and read back."""
    tensors = {name: tensor.clone() for name, tensor in state.tensors().items()}
    return TrainState.from_tensors(json.loads(json.dumps(state.metadata())), tensors)


def accuracy(model: Toy) -> dict[str, float]:
    stream = Stream()
    with torch.no_grad():
        image, text = model.embed(model.image, stream.images), model.embed(model.text, stream.texts)
    return {"accuracy": (image @ text.T).argmax(1).eq(torch.arange(PAIRS)).float().mean().item()}


Lines = list[dict[str, Any]]


def run(
    settings: TrainSettings = SETTINGS, stream: Stream | None = None, **options: Any
) -> tuple[Toy, FitResult, Lines]:
    model, lines = Toy(), Lines()
    whole = {name: options.pop(name) for name in ("kinds", "resume_state") if name in options}
    fitted = fit(model, stream or Stream(), contrast, settings, callbacks(lines, **options), FitOptions(**whole))
    return model, fitted, lines


# --- it trains, and it repeats itself --------------------------------------------------------------------------------


def test_learns_and_only_the_selection_moves() -> None:
    before = weights(Toy())
    assert accuracy(Toy().eval())["accuracy"] < 0.2
    model, fitted, _ = run(SETTINGS.model_copy(update={"epochs": 60, "lr": 0.05}))
    assert not model.training and accuracy(model)["accuracy"] > 0.4
    moved = {name for name, tensor in weights(model).items() if not torch.equal(tensor, before[name])}
    assert moved == model.selection
    assert 1.949 < model.log_scale.item() < 2.011, "after_step must clamp the scale"
    assert fitted.position == TrainPosition(60, 0, 180) and fitted.pairs == 180 * BATCH and not fitted.interrupted


def test_equals_the_obvious_loop() -> None:
    model, other = run()[0], Toy()
    matrices = [p for n, p in other.named_parameters() if n in other.selection and p.ndim > 1]
    vectors = [p for n, p in other.named_parameters() if n in other.selection and p.ndim < 2]
    parameters = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(parameters, lr=0.0, betas=(0.9, 0.98), eps=1e-8)
    for number in range(12):
        batch = list(Stream().epoch(number // 3))[number % 3]
        factor = (number + 1) / 1 if number < 1 else 0.5 * (1 + math.cos(math.pi * (number - 1) / 11))
        for group in optimizer.param_groups:
            group["lr"] = 0.02 * factor
        torch.manual_seed(step.step_seed(0, number))
        out = other(batch)
        optimizer.zero_grad()
        contrast(out.image, out.text, out.scale).total.backward()
        torch.nn.utils.clip_grad_norm_(matrices + vectors, 1.0)
        optimizer.step()
        other.after_step()
    for name, tensor in weights(other).items():
        torch.testing.assert_close(weights(model)[name], tensor)


def test_two_runs_are_bitwise_equal_and_seeds_differ() -> None:
    one = weights(run()[0])
    torch.manual_seed(77)  # what ran before must not matter
    assert same(one, weights(run()[0]))
    assert not same(one, weights(run(SETTINGS.model_copy(update={"seed": 1}))[0]))


def test_evaluation_cannot_disturb_training() -> None:
    def evaluate() -> dict[str, float]:
        return {"luck": torch.rand(1).item()}

    quiet = weights(run()[0])
    noisy = run(SETTINGS.model_copy(update={"select": "last"}), evaluate=evaluate, primary="luck")[0]
    assert same(quiet, weights(noisy))


# --- it stops and goes on --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stop_at", [0, 1, 2, 5, 8, 11])
@pytest.mark.parametrize("keep", ["best", "last"])
@pytest.mark.parametrize("way", ["own", "lilt"])
def test_stopped_and_continued_is_bitwise_the_uninterrupted_run(stop_at: int, keep: str, way: str) -> None:
    settings, kinds = SETTINGS.model_copy(update={"select": keep}), dict[str, str]()
    if way == "lilt":
        changes = {
            "schedule": "lilt",
            "decay_filter": "lilt",
            "min_lr_ratio": 0.1,
            "lr_factors": LrFactors(tower=0.3, scale=2.0),
        }
        settings, kinds = settings.model_copy(update=changes), KINDS
    scores = [0.0, 0.1, 0.5, 0.4, 0.2]  # before the first step, then by epoch: the best in the second

    def scored(fresh: Iterator[float]) -> dict[str, Any]:
        return {"evaluate": lambda: {"score": next(fresh)}, "primary": "score"}

    states: list[TrainState] = []
    whole, fitted, _ = run(
        settings, kinds=kinds, save=lambda state: states.append(frozen_in_time(state)), **scored(iter(scores))
    )

    saved: list[TrainState] = []
    half, stopped, lines = run(
        settings,
        kinds=kinds,
        stream=Stream(before=kill(signal.SIGINT, stop_at)),
        save=lambda state: saved.append(frozen_in_time(state)),
        **scored(iter(scores)),
    )
    assert stopped.interrupted and stopped.position.step == stop_at + 1 and stopped.metrics == {}
    assert lines[-1]["event"] == "stop" and lines[-1]["interrupted"]
    assert [state.position for state in saved] == [TrainPosition(), stopped.position]
    assert same(saved[1].weights, {name: weights(half)[name] for name in half.selection})

    rest, finished, _ = run(
        settings,
        kinds=kinds,
        resume_state=saved[1],
        save=lambda state: saved.append(frozen_in_time(state)),
        **scored(iter(scores[1 + stop_at // STEPS_AN_EPOCH :])),
    )
    assert same(weights(whole), weights(rest))
    assert same(states[-1].tensors(), saved[-1].tensors()) and states[-1].metadata() == saved[-1].metadata()
    assert (fitted.weights_position, fitted.metrics) == (finished.weights_position, finished.metrics)
    assert fitted.weights_position == (TrainPosition(1, 3, 6) if keep == "best" else TrainPosition(4, 0, 12))

    first = run(settings, kinds=kinds, resume_state=saved[0], **scored(iter(scores[1:])))[0]
    assert same(weights(first), weights(whole)), "from the state saved before the first step"

    again, nothing, _ = run(settings, kinds=kinds, resume_state=saved[-1], **scored(iter(())))
    assert nothing.pairs == 0 and same(weights(again), weights(whole)), "a finished run goes on to the same end"


@pytest.mark.parametrize("most", [1, 3, 5, 12, 99])
def test_training_ends_after_the_most_steps(most: int) -> None:
    scores = iter([0.0, 0.1, 0.2, 0.3, 0.4])
    settings, states = SETTINGS.model_copy(update={"max_steps": most, "select": "last"}), list[TrainState]()
    options = {"evaluate": lambda: {"score": next(scores)}, "primary": "score"}
    trained, fitted, lines = run(settings, save=lambda state: states.append(frozen_in_time(state)), **options)
    taken = min(most, 12)
    assert fitted.position.step == taken and lines[-1]["step"] == taken
    evaluated = [line["step"] for line in lines if line["event"] == "evaluation"]
    assert evaluated == [0, *range(STEPS_AN_EPOCH, taken, STEPS_AN_EPOCH), taken]
    rates = [line["lr"] for line in lines if line["event"] == "step"]
    assert rates[-1] == min(rates[1:] or rates), "the schedule ends with the steps"
    again = run(settings, resume_state=states[-1])[0]
    assert same(weights(again), weights(trained)), "a finished run takes no further step"


def test_stopped_before_the_last_evaluation_of_the_most_steps_and_continued() -> None:
    settings, states = SETTINGS.model_copy(update={"max_steps": 5}), list[TrainState]()
    whole, _, _ = run(settings)
    _, stopped, _ = run(
        settings,
        stream=Stream(before=kill(signal.SIGINT, 4)),
        save=lambda state: states.append(frozen_in_time(state)),
    )
    assert stopped.interrupted and stopped.position.step == 5
    rest, finished, _ = run(settings, resume_state=states[-1])
    assert not finished.interrupted and same(weights(rest), weights(whole))


def test_handlers_come_back_and_sigterm_stops_too() -> None:
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    _, fitted, _ = run(stream=Stream(before=kill(signal.SIGTERM, 4)))
    assert fitted.interrupted and fitted.position == TrainPosition(1, 2, 5)
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before


def test_second_signal_raises_at_once() -> None:
    before = signal.getsignal(signal.SIGINT)

    def twice(number: int) -> None:
        if number == 2:
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)

    saved: list[TrainState] = []
    with pytest.raises(KeyboardInterrupt):
        run(stream=Stream(before=twice), save=saved.append)
    assert [state.position.step for state in saved] == [0] and signal.getsignal(signal.SIGINT) is before


def test_sigterm_may_come_twice() -> None:
    """As it does to a process whose launcher dies, at times."""

    def twice(number: int) -> None:
        if number == 2:
            os.kill(os.getpid(), signal.SIGTERM)
            os.kill(os.getpid(), signal.SIGTERM)

    saved: list[TrainState] = []
    fitted = run(stream=Stream(before=twice), save=saved.append)[1]
    assert fitted.interrupted and saved[-1].position.step >= 2


def test_a_forked_process_ends_on_sigterm_and_leaves_ctrl_c_to_its_parent(monkeypatch: pytest.MonkeyPatch) -> None:
    killed: list[int] = []
    with GracefulStop() as stop:
        monkeypatch.setattr(os, "getpid", lambda: -1)
        monkeypatch.setattr(os, "kill", lambda process, number: killed.append(number))
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGTERM)
        assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    assert killed == [signal.SIGTERM] and stop.requested is None


def test_a_thread_trains_without_touching_signals() -> None:
    results: list[FitResult] = []
    thread = threading.Thread(target=lambda: results.append(run()[1]))
    thread.start()
    thread.join()
    assert results[0].position.step == 12


def test_state_of_another_run_is_refused() -> None:
    saved: list[TrainState] = []
    run(save=lambda state: saved.append(frozen_in_time(state)))
    fewer = {name: tensor for name, tensor in saved[0].weights.items() if name != "log_scale"}
    with pytest.raises(UserError, match="'log_scale' is missing there and"):
        run(resume_state=replace(saved[0], weights=fewer))


def test_saves_by_the_clock() -> None:
    saved: list[TrainPosition] = []
    run(SETTINGS.model_copy(update={"save_every_minutes": 1e-9}), save=lambda state: saved.append(state.position))
    assert [position.step for position in saved] == [*range(13), 12]


# --- it stops before it spoils anything ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("poison", "message"), [("loss", "the loss is nan"), ("gradient", "the gradient is not finite")]
)
def test_a_step_that_is_not_finite_is_not_taken(poison: str, message: str) -> None:
    count = 0

    def poisoned(
        image: Tensor, text: Tensor, scale: Tensor, bias: Tensor | None = None, *, groups: Tensor | None = None
    ) -> LossParts:
        nonlocal count
        parts = contrast(image, text, scale)
        count += 1
        if count < 5:
            return parts
        # the root of zero is zero, and its slope is not finite
        return parts._replace(
            total=parts.total * math.nan if poison == "loss" else parts.total + (image.sum() * 0).sqrt()
        )

    model, lines, saved = Toy(), Lines(), list[TrainState]()
    message = rf"{message} at step 5 of 12 \(lr 0.017\).*nothing was overwritten; try train.lr=0.007"
    with pytest.raises(UserError, match=message):
        fit(model, Stream(), poisoned, SETTINGS, callbacks(lines, save=saved.append))
    assert [state.position.step for state in saved] == [0], "what was saved before stays as it was"
    assert lines[-1]["event"] == "step" and lines[-1]["step"] == 4, "the steps before it are logged"
    good, fitted, _ = run(stream=Stream(before=kill(signal.SIGINT, 3)))
    assert fitted.position.step == 4 and same(weights(model), weights(good)), "the weights are those of the step before"


# --- what it keeps, and what it says ---------------------------------------------------------------------------------


def test_best_is_restored_last_is_left_and_nan_never_wins() -> None:
    seen: list[dict[str, Tensor]] = []

    def train(keep: str, *scores: float) -> tuple[Toy, FitResult, Lines]:
        model, lines, left = Toy(), Lines(), iter(scores)
        seen.clear()

        def evaluate() -> dict[str, float]:
            assert not model.training
            seen.append(weights(model))
            return {"other": 1.0, "score": next(left)}

        settings = SETTINGS.model_copy(update={"select": keep})
        fitted = fit(model, Stream(), contrast, settings, callbacks(lines, evaluate=evaluate, primary="score"))
        return model, fitted, lines

    model, fitted, lines = train("best", math.nan, math.nan, 0.5, 0.5, 0.1)
    assert same(weights(model), seen[2]) and fitted.metrics == {"other": 1.0, "score": 0.5}
    assert [line["best"] for line in lines if line["event"] == "evaluation"] == [True, False, True, False, False]
    assert lines[-1] | {"event": "stop", "held_step": 6, "interrupted": False} == lines[-1]
    model, fitted, _ = train("last", 1.0, 0.9, 0.5, 0.5, 0.1)
    assert same(weights(model), seen[4]) and fitted.metrics["score"] == 0.1


def test_the_start_may_be_the_best_there_is() -> None:
    scores = iter([0.9, 0.1, 0.2, 0.3, 0.4])
    model, fitted, _ = run(SETTINGS, evaluate=lambda: {"score": next(scores)}, primary="score")
    assert same(weights(model), weights(Toy())) and fitted.weights_position == TrainPosition(0, 0, 0)


def test_evaluates_every_so_many_epochs_and_after_the_last() -> None:
    def epochs(every: int | str, total: int) -> list[int]:
        settings = SETTINGS.model_copy(update={"epochs": total, "evaluate_every": every})
        lines = run(settings, evaluate=lambda: {"score": 1.0}, primary="score")[2]
        return [line["epoch"] for line in lines if line["event"] == "evaluation"]

    assert epochs(2, 5) == [0, 2, 4, 5]
    assert epochs("auto", 5) == [0, 1, 2, 3, 4, 5]
    assert epochs("auto", 25) == [0, 3, 6, 9, 12, 15, 18, 21, 24, 25]
    assert epochs("end", 5) == [5] and epochs("end", 0) == [0]
    assert count_evaluations(SETTINGS.model_copy(update={"evaluate_every": "end"})) == 1


def test_log_lines_are_json_and_follow_the_schedule() -> None:
    _, _, lines = run(SETTINGS.model_copy(update={"log_every": 5}))
    json.dumps(lines, allow_nan=False)
    assert [line["event"] for line in lines] == ["start", "pieces", "step", "step", "step", "stop"]
    steps = [line for line in lines if line["event"] == "step"]
    assert [line["step"] for line in steps] == [5, 10, 12] and [line["epoch"] for line in steps] == [2, 4, 4]
    for line in steps:
        assert line["lr"] == pytest.approx(
            0.02 * optim.warmup_cosine(line["step"] - 1, optim.ScheduleContext(12, 4, 1, 0.0))
        )
        assert 0 <= line["data_seconds_share"] <= 1 and line["pairs_per_second"] > 0
        assert math.exp(1.949) < line["scale"] < math.exp(2.011) and line["gradient_norm"] > 0


def test_skipped_samples_are_named_once_and_short_batches_pass() -> None:
    class Holes(Stream):
        """Batch 1 of every epoch has lost one sample, batch 2 all but one."""

        def epoch(self, number: int, start: int = 0) -> Iterator[Batch]:
            for index, batch in enumerate(super().epoch(number, start), start):
                keep = {0: 8, 1: 7, 2: 1}[index]
                lost = tuple(SkippedSample(f"bad {index}.{n}", "truncated") for n in range(8 - keep))
                rows = torch.tensor([int(name) for name in batch.ids[:keep]])
                yield replace(self.rows(rows), skipped=lost)

    said: list[str] = []

    class Ear:
        def start(self, steps: int) -> None: ...
        def step(self, progress: Any) -> None: ...
        def stop(self) -> None: ...
        def note(self, line: str) -> None:
            said.append(line)

    model, fitted, lines = run(stream=Holes(), reporter=Ear())
    assert fitted.position == TrainPosition(4, 0, 12) and fitted.pairs == 4 * (8 + 7)
    assert len(fitted.skipped) == 8 and fitted.skipped[0] == SkippedSample("bad 1.0", "truncated")
    steps = [line for line in lines if line["event"] == "step"]
    named = [SkippedSample(line["id"], line["reason"]) for line in lines if line["event"] == "skipped"]
    assert tuple(named) == fitted.skipped and steps[-1]["skipped"] == 8
    spoken = [line for line in said if line.startswith(("skipped", "more"))]
    assert spoken[0] == "skipped bad 1.0: truncated" and len(spoken) == 6 and spoken[-1].startswith("more samples")
    assert all(math.isfinite(tensor.sum().item()) for tensor in weights(model).values())


def test_lr_factors_slow_their_kind_only() -> None:
    start = weights(Toy())
    settings = SETTINGS.model_copy(update={"epochs": 1, "lr_factors": LrFactors(tower=1e-6)})
    after = weights(run(settings, kinds=KINDS)[0])
    assert 0 < (after["image.head.weight"] - start["image.head.weight"]).abs().max() < 1e-6
    assert (after["text.head.weight"] - start["text.head.weight"]).abs().max() > 1e-3
    assert same(weights(run(kinds=KINDS)[0]), weights(run()[0])), "all 1.0: kinds decide nothing"
    with pytest.raises(AssertionError, match="need the kinds"):
        run(settings)
    with pytest.raises(AssertionError, match="of no kind"):
        run(settings, kinds={"log_scale": "scale"})


def test_lilt_settings_reach_the_steps() -> None:
    settings = SETTINGS.model_copy(update={"schedule": "lilt", "min_lr_ratio": 0.1, "log_every": 1})
    rates = [line["lr"] / 0.02 for line in run(settings)[2] if line["event"] == "step"]
    assert rates == pytest.approx([rate for rate in (0.1, 0.8682, 0.55, 0.2318) for _ in range(3)], rel=1e-4)
    slow = SETTINGS.model_copy(update={"lr": 1e-3})  # so that the scale stays clear of its bounds
    one, other = (weights(run(slow.model_copy(update={"decay_filter": decay}))[0]) for decay in ("matrices", "lilt"))
    assert {name for name in one if not torch.equal(one[name], other[name])} >= {"log_scale"}
    assert other["log_scale"] < one["log_scale"] < 2.0


def test_advice_leaves_out_a_warm_up_that_is_not_to_be_set() -> None:
    def broken(
        image: Tensor, text: Tensor, scale: Tensor, bias: Tensor | None = None, *, groups: Tensor | None = None
    ) -> LossParts:
        parts = contrast(image, text, scale)
        return parts._replace(total=parts.total * math.nan)

    for schedule, expected in (("cosine", True), ("lilt", False)):
        with pytest.raises(UserError) as told:
            settings = SETTINGS.model_copy(update={"schedule": schedule})
            fit(Toy(), Stream(), broken, settings, callbacks([]))
        assert ("train.warmup_fraction" in str(told.value)) is expected


def test_clipping_shortens_long_gradients_only() -> None:
    def trained(clip_norm: float | str) -> dict[str, Tensor]:
        return weights(run(SETTINGS.model_copy(update={"clip_norm": clip_norm}))[0])

    assert same(trained("none"), trained(1e6)) and not same(trained("none"), trained(0.1))


def test_every_gradient_longer_than_the_limit_is_clipped(monkeypatch: pytest.MonkeyPatch) -> None:
    def norms(clip_norm: float | str) -> list[float]:
        lines = run(SETTINGS.model_copy(update={"clip_norm": clip_norm, "log_every": 1}))[2]
        return [line["gradient_norm"] for line in lines if line["event"] == "step"]

    clip, clipped = torch.nn.utils.clip_grads_with_norm_, []
    monkeypatch.setattr(
        torch.nn.utils, "clip_grads_with_norm_", lambda *given: [clip(*given), clipped.append(float(given[2]))]
    )
    limit = sorted(norms("none"))[4]
    assert not clipped
    found = norms(limit)
    assert set(clipped) >= {norm for norm in found if norm > limit} and 0 < len(clipped) < len(found)


def test_bfloat16_reaches_the_layers_and_not_the_weights_or_the_loss() -> None:
    seen: list[torch.dtype] = []
    model = Toy()
    model.image["head"].register_forward_hook(lambda module, inputs, output: seen.append(output.dtype))
    settings = SETTINGS.model_copy(update={"precision": "bfloat16", "epochs": 1})
    fitted = fit(model, Stream(), contrast, settings, callbacks([]))
    assert set(seen) == {torch.bfloat16} and fitted.precision == "bfloat16"
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert type(model).forward is Toy.forward and "forward" not in vars(model), "nothing is left wrapped"
    assert not same(weights(model), weights(run(settings.model_copy(update={"precision": "float32"}))[0]))


@pytest.mark.parametrize("sides", ["", "image", "text", "image text"])
def test_frozen_weights_are_cast_for_batches_that_run_a_tower(sides: str) -> None:
    pooled, ids = PooledFeatures(torch.zeros(2, 3)), torch.zeros(2, 4, dtype=torch.long)
    image = Pixels(torch.zeros(2, 3, 8, 8)) if "image" in sides else pooled
    text = Tokens(ids, ids == 0) if "text" in sides else pooled
    assert step.runs_a_tower(Batch(("a", "b"), image, text, ids[:, :2])) == bool(sides)


def test_what_can_only_be_our_mistake() -> None:
    class Short(Stream):
        def __len__(self) -> int:
            return 4

        def epoch(self, number: int, start: int = 0) -> Iterator[Batch]:
            return (batch for batch in list(Stream().epoch(number, start))[:2])

    with pytest.raises(AssertionError, match="2 of 4 batches"):
        run(stream=Short())
    with pytest.raises(AssertionError, match="which metric decides"):
        run(evaluate=lambda: {"score": 1.0})
    with pytest.raises(AssertionError, match=r"'best' is not one of the metrics \['score'\]"):
        run(evaluate=lambda: {"score": 1.0}, primary="best")
    with pytest.raises(AssertionError, match="plan_training"):
        run(TrainSettings())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_two_runs_are_bitwise_equal_on_a_gpu() -> None:
    assert same(weights(run()[0]), weights(run()[0]))
