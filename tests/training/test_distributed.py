"""Two to four processes (gloo, CPU) compute the gradient of one process with the same batches, and train as it does."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from clasp.training.distributed import STEP_TIMEOUT, WAIT_TIMEOUT, LostProcessError, Processes, connect, open_processes
from clasp.training.loop import FitOptions, fit
from clasp.training.loss_settings import LossSettings
from clasp.training.losses import build_loss
from clasp.training.settings import TrainSettings
from clasp.training.step import Stepper
from clasp.types import Batch, Embeddings, PooledFeatures, UserError
from toyprocesses import fork_context, start
from toytrackers import callbacks

PAIRS = 13  # parts of unequal size for every number of processes
LOSSES = {
    "infonce": LossSettings(),
    "sigmoid": LossSettings(kind="sigmoid"),
    "diagonal": LossSettings(positives="diagonal"),
    "sub-batches": LossSettings(negatives=4),
}
SETTINGS = TrainSettings(
    batch_size=PAIRS, micro_batch=PAIRS, epochs=3, lr=0.02, precision="float32", evaluate_every=1, clip_norm=0.5
)


class Two(nn.Module):
    """Two towers of two layers, a scale and a bias; a parameter that nothing reaches."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.image = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 4))
        self.text = nn.Sequential(nn.Linear(5, 16), nn.Tanh(), nn.Linear(16, 4))
        self.log_scale, self.bias = nn.Parameter(torch.tensor(2.0)), nn.Parameter(torch.tensor(-1.0))
        self.unreached = nn.Parameter(torch.ones(3))
        self.selection = frozenset(name for name, _ in self.named_parameters())
        self.moving: dict[str, Tensor] = {}

    def embed_image(self, inputs: PooledFeatures) -> Tensor:
        return F.normalize(self.image(inputs.values), dim=-1)

    def embed_text(self, inputs: PooledFeatures) -> Tensor:
        return F.normalize(self.text(inputs.values), dim=-1)

    def scale_and_bias(self) -> tuple[Tensor, Tensor]:
        return self.log_scale.exp(), self.bias * 1

    def forward(self, batch: Batch) -> Embeddings:
        return Embeddings(self.embed_image(batch.image), self.embed_text(batch.text), *self.scale_and_bias())

    def after_step(self) -> None:
        pass


def whole_batch(number: int) -> Batch:
    generator = torch.Generator().manual_seed(number)
    image, text = torch.randn(PAIRS, 6, generator=generator), torch.randn(PAIRS, 5, generator=generator)
    groups = torch.stack((torch.arange(PAIRS) % 11, torch.arange(PAIRS) % 9 + 100), dim=1)
    return Batch(tuple(map(str, range(PAIRS))), PooledFeatures(image), PooledFeatures(text), groups)


def part(batch: Batch, rank: int, size: int) -> Batch:
    rows = slice(PAIRS * rank // size, PAIRS * (rank + 1) // size)
    image, text = PooledFeatures(batch.image.values[rows]), PooledFeatures(batch.text.values[rows])
    return Batch(batch.ids[rows], image, text, batch.groups[rows], pairs_of_all=PAIRS)


class Parts:
    """Two batches an epoch, this process's part of each."""

    def __init__(self, processes: Processes):
        self.processes = processes

    def __len__(self) -> int:
        return 2

    def epoch(self, number: int, start: int = 0) -> Iterator[Batch]:
        for step in range(start, 2):
            yield part(whole_batch(10 * number + step), self.processes.rank, self.processes.size)


def gradients(processes: Processes, loss: LossSettings, micro_batch: int) -> dict[str, Tensor | None]:
    model, settings = Two(), SETTINGS.model_copy(update={"micro_batch": micro_batch})
    stepper = Stepper(model, build_loss(loss), settings, processes, "float32", steps=9, kinds={})
    value = stepper.backward(part(whole_batch(0), processes.rank, processes.size), 0).loss
    processes.sum_gradients(list(stepper.weights.values()))
    return {"loss": value, **{name: p.grad for name, p in model.named_parameters()}}


def trained(processes: Processes) -> dict[str, Tensor]:
    model = Two()
    evaluate = callbacks(
        [],
        evaluate=lambda: processes.first(lambda: {"score": model.log_scale.item()}),
        primary="score",
    )
    fit(model, Parts(processes), build_loss(LossSettings()), SETTINGS, evaluate, FitOptions(processes=processes))
    return {name: p.detach() for name, p in model.named_parameters()}


def train_and_measure(processes: Processes) -> dict[str, Any]:
    found: dict[str, Any] = {
        (name, micro_batch): gradients(processes, loss, micro_batch)
        for name, loss in LOSSES.items()
        for micro_batch in (PAIRS, 2)
    }
    return {**found, "trained": trained(processes)}


def signals(processes: Processes) -> dict[str, Any]:
    numbers = processes.gather_numbers(processes.rank, 7)
    copied = torch.full((2,), float(processes.rank))
    processes.copy_from_first([copied])
    turns = processes.in_turn(lambda: time.monotonic())
    return {
        "signal": processes.agree_on_signal("SIGTERM" if processes.rank == 1 else None),
        "none": processes.agree_on_signal(None),
        "numbers": numbers,
        "first": processes.first(lambda: f"of {processes.rank}"),
        "copied": copied.tolist(),
        "turns": processes.gather_objects(turns),
    }


def differ(processes: Processes) -> None:
    processes.require_same({"pairs": "a", "weights": "b" if processes.rank else "c"})


def fail_on_the_first(processes: Processes) -> None:
    def fail() -> None:
        raise UserError("no such file")

    processes.first(fail)


def fail_on_the_second(processes: Processes) -> None:
    def fail() -> None:
        if processes.rank:
            raise UserError("no such file")

    processes.in_turn(fail)


def fail_on_the_second_within(processes: Processes) -> None:
    with processes.alike():
        fail_on_the_second(processes)


def diverge(processes: Processes) -> None:
    class Wrong(Two):
        def scale_and_bias(self) -> tuple[Tensor, Tensor]:
            return self.log_scale * torch.nan, self.bias * 1

    settings = SETTINGS.model_copy(update={"select": "last"})
    fit(Wrong(), Parts(processes), build_loss(LossSettings()), settings, callbacks([]), FitOptions(processes=processes))


def lose(processes: Processes) -> None:
    """The first loses the second, which is in another exchange."""
    with processes.alike():
        if processes.is_first:
            raise LostProcessError("process 1 did not answer")
        processes.gather_numbers(1)


def vanish_before_all_are_connected(folder: str) -> None:
    """The second joins the first group, and ends before the group of long waits."""
    Path(folder, "started").touch()
    dist.init_process_group("gloo", f"file://{folder}/meet", rank=1, world_size=2)
    Path(folder, "joined").touch()
    os._exit(9)


def vanish(processes: Processes) -> None:
    dist.barrier()  # as a process that is connected sees it
    if processes.rank:
        os._exit(9)
    processes.gather_numbers(1)


@pytest.fixture(scope="module")
def alone() -> dict[str, Any]:
    return train_and_measure(Processes(device=torch.device("cpu")))


_SIZES = [2, pytest.param(3, marks=pytest.mark.faults), 4]


@pytest.fixture(scope="module", params=_SIZES, ids=lambda size: f"{size} processes")
def together(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each process found."""
    folder = tmp_path_factory.mktemp("together")
    assert start(request.param, folder, train_and_measure) == [0] * request.param
    return [torch.load(folder / f"{rank}.pt") for rank in range(request.param)]


@pytest.mark.parametrize("micro_batch", [PAIRS, 2], ids=["whole parts", "gradient caching"])
@pytest.mark.parametrize("loss", LOSSES)
def test_gradients_are_those_of_one_process(
    alone: dict[str, Any], together: list[dict[str, Any]], loss: str, micro_batch: int
) -> None:
    expected = alone[loss, PAIRS]
    for found in together:
        theirs = found[loss, micro_batch]
        assert theirs["unreached"] is None, "a parameter that no process reaches keeps no gradient"
        for name, gradient in expected.items():
            if gradient is not None:
                torch.testing.assert_close(theirs[name], gradient, rtol=1e-5, atol=1e-6, msg=name)
        assert all(torch.equal(theirs[name], g) for name, g in together[0][loss, micro_batch].items() if g is not None)


def test_weights_are_those_of_one_process(alone: dict[str, Any], together: list[dict[str, Any]]) -> None:
    """After six steps and three evaluations by the first; bitwise the same on all."""
    for found in together:
        for name, weight in alone["trained"].items():
            torch.testing.assert_close(found["trained"][name], weight, rtol=1e-4, atol=1e-5)
            assert torch.equal(found["trained"][name], together[0]["trained"][name])


def test_one_process_exchanges_nothing() -> None:
    processes = Processes(device=torch.device("cpu"))
    assert not dist.is_initialized()
    assert processes.first(lambda: 3) == processes.in_turn(lambda: 3) == 3
    assert processes.gather_numbers(4, 5) == [(4, 5)] and processes.gather_objects("a") == ["a"]
    assert processes.agree_on_signal("SIGINT") == "SIGINT" and processes.seed_key == ()


def test_processes_agree(tmp_path: Path) -> None:
    assert start(3, tmp_path, signals) == [0, 0, 0]
    for rank in range(3):
        found = torch.load(tmp_path / f"{rank}.pt", weights_only=False)
        turns = found.pop("turns")
        assert turns[0] == min(turns), "the first process goes first"
        assert found == {
            "signal": "SIGTERM",
            "none": None,
            "numbers": [(0, 7), (1, 7), (2, 7)],
            "first": "of 0",
            "copied": [0.0, 0.0],
        }


@pytest.mark.parametrize(
    ("job", "reporting", "message"),
    [
        (fail_on_the_first, 0, "no such file"),
        (fail_on_the_second, 1, "no such file"),
        (fail_on_the_second_within, 1, "no such file"),
        (differ, 0, "process 1 of 2 has other weights than process 0"),
        (diverge, 0, "the loss is nan at step 1"),
    ],
    ids=["the first", "the second", "the second within", "other data", "diverged"],
)
def test_an_error_is_reported_once_and_ends_all(
    tmp_path: Path, job: Callable[[Processes], Any], reporting: int, message: str
) -> None:
    began = time.monotonic()
    assert start(2, tmp_path, job) == [2, 2]
    assert time.monotonic() - began < 60
    assert [path.name for path in tmp_path.glob("*.txt")] == [f"{reporting}.txt"]
    assert message in (tmp_path / f"{reporting}.txt").read_text(encoding="utf-8")


def test_a_process_that_dies_ends_the_others(tmp_path: Path) -> None:
    began = time.monotonic()
    assert start(2, tmp_path, vanish) == [2, 9]
    assert time.monotonic() - began < 60, "noticed at once, not at the time-out"
    assert (tmp_path / "0.txt").read_text(encoding="utf-8").startswith("process 0 of 2 ends, since another has ended")


def test_a_process_that_dies_while_they_connect_ends_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("clasp.training.distributed.STEP_TIMEOUT", timedelta(seconds=3))
    other = fork_context().Process(target=vanish_before_all_are_connected, args=(str(tmp_path),))
    other.start()
    while not (tmp_path / "started").exists():  # which is no part of the three seconds
        assert other.is_alive()
        time.sleep(0.01)
    try:
        with pytest.raises(LostProcessError, match="process 0 of 2 cannot connect with the others: one has ended"):
            connect(0, 2, gpus=False, meeting=f"file://{tmp_path}/meet")
    finally:
        if dist.is_initialized():  # by the first group, unless the other was faster
            dist.destroy_process_group()
        other.join(60)
        other.kill()
    assert other.exitcode == 9 and (tmp_path / "joined").exists()


def test_waits_are_long_once_all_are_connected(tmp_path: Path) -> None:
    waiting = connect(0, 1, gpus=False, meeting=f"file://{tmp_path}/meet")
    try:
        times = [group._get_backend(torch.device("cpu")).options._timeout for group in (dist.group.WORLD, waiting)]
    finally:
        dist.destroy_process_group()
    assert times == [STEP_TIMEOUT, WAIT_TIMEOUT]


def test_a_process_that_is_lost_is_not_waited_for(tmp_path: Path) -> None:
    began = time.monotonic()
    assert start(2, tmp_path, lose) == [2, 2]
    assert time.monotonic() - began < 60
    assert (tmp_path / "0.txt").read_text(encoding="utf-8") == "process 1 did not answer"


@pytest.mark.parametrize("given", [{}, {"LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "two"}, {"WORLD_SIZE": "two"}])
def test_an_environment_that_is_not_torchruns_is_one_line(given: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"RANK": "0", "WORLD_SIZE": "2", **given}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match="start the processes with torchrun or --processes"), open_processes():
        pass
