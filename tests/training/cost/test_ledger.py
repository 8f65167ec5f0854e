"""What a run cost: FLOPs against arithmetic by hand, memory that is known, sessions that add up, and no bit moved."""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import _len_torch_dispatch_stack
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from clasp import cli
from clasp.commands import train as main_job
from clasp.models.backbone import Backbone
from clasp.models.tower import Tower
from clasp.models.transformer.deit import VisionTransformer
from clasp.models.tuning.spec import freeze_except
from clasp.report.leaderboard import read_training_seconds
from clasp.training.cost import meters
from clasp.training.cost.flops import count_flops
from clasp.training.cost.ledger import CostLedger, CostSession, FrozenFlops, RunCost, StepFlops, format_si, read_cost
from clasp.training.cost.meters import EnergyMeter, PeakMemoryMeter
from clasp.training.loop import FitOptions, fit
from clasp.training.losses import LOSSES
from clasp.training.settings import TrainSettings
from clasp.training.state import TrainState
from clasp.training.step import Stepper
from clasp.training.trackers.console import SilentReporter, TrainProgress
from clasp.types import Batch, Embeddings, Pixels, PooledFeatures, UserError
from toydata import toys, write_csv
from toyruns import delta, recipe, run
from toytrackers import callbacks

TOYS = toys(64)
CPU = torch.device("cpu")
LINUX = pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells a peak that can be set back")


@pytest.fixture
def pairs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("CLASP_CACHE", str(tmp_path / "cache"))
    return write_csv(TOYS, tmp_path / "pairs")


# --- FLOPs -----------------------------------------------------------------------------------------------------------

# A vision transformer: width, tokens with the class token, blocks, sides of patch and image.
D, N, L, PATCH, SIZE = 64, 17, 3, 8, 32
PATCHES = 2 * (N - 1) * 3 * PATCH**2 * D
LINEAR = 2 * N * (3 + 1 + 4 + 4) * D**2  # query, key and value, projection, two layers of the MLP
ATTENTION = 2 * 2 * N * N * D  # scores and their sums of values


def vit() -> VisionTransformer:
    return VisionTransformer(size=SIZE, patch=PATCH, width=D, blocks=L, heads=4)


@pytest.mark.parametrize("kernel", ["fused", "plain"])
def test_a_transformer_by_hand(kernel: str) -> None:
    """Backward a product takes two; the scores of fused attention are computed once more; pixels need no gradient."""
    net, pixels = vit(), torch.randn(5, 3, SIZE, SIZE)
    backend = {"fused": torch.nn.attention.SDPBackend.FLASH_ATTENTION, "plain": torch.nn.attention.SDPBackend.MATH}
    with torch.nn.attention.sdpa_kernel(backend[kernel]):
        flops = count_flops(lambda: net(pixels).sum().backward())
    assert flops.forward == 5 * (PATCHES + L * (LINEAR + ATTENTION))
    scores_again = ATTENTION / 2 if kernel == "fused" else 0
    assert flops.backward == 5 * (PATCHES + L * (2 * LINEAR + 2 * ATTENTION + scores_again))
    assert flops.left_out == ()


def test_only_what_trains_has_a_backward_pass() -> None:
    """Of the last block: both gradients of what follows its first layer, of that layer those of its weights alone."""
    net = vit().requires_grad_(False)
    net.blocks[-1].requires_grad_(True)
    flops = count_flops(lambda: net(torch.randn(1, 3, SIZE, SIZE)).sum().backward())
    assert flops.forward == PATCHES + L * (LINEAR + ATTENTION)
    # the first norm trains too, so the gradient goes through the first layer of the block as well
    assert flops.backward == 2 * LINEAR + ATTENTION / 2 + 2 * ATTENTION
    net.blocks[-1].norm1.requires_grad_(False)
    less = count_flops(lambda: net(torch.randn(1, 3, SIZE, SIZE)).sum().backward())
    assert flops.backward - less.backward == 2 * N * 3 * D**2


@pytest.mark.parametrize(("method", "blocks"), [("full", 3), ("last(1)", 1)])
def test_dropped_patches_are_not_counted(method: str, blocks: int) -> None:
    """Above the frozen prefix, all products but the scores are of the tokens that are kept."""
    tower = Tower(Backbone("vit", "image", vit(), "toy", "mean"))
    freeze_except(tower, tower.tune([method], seed=0))
    pixels, kept = Pixels(torch.randn(5, 3, SIZE, SIZE)), 1 + 4

    def step() -> None:
        tower.pooled(pixels).sum().backward()

    tower.enable_patch_dropout(0.75)
    whole, fewer = count_flops(tower.eval() and step), count_flops(tower.train() and step)
    tokens = LINEAR * kept // N + 2 * 2 * kept * kept * D
    assert whole.forward == 5 * (PATCHES + L * (LINEAR + ATTENTION))
    assert fewer.forward == whole.forward - 5 * blocks * (LINEAR + ATTENTION - tokens)
    assert fewer.backward < whole.backward * (kept + 1) / N + 5 * 2 * PATCHES * (blocks == L)


def test_what_is_computed_again_counts_as_forward() -> None:
    net, x = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)), torch.randn(4, 8)
    once = count_flops(lambda: net(x).sum().backward())
    twice = count_flops(lambda: checkpoint(net, x, use_reentrant=False).sum().backward())
    assert (once.forward, once.backward) == (2 * 512, 3 * 512)  # no gradient of x
    assert (twice.forward, twice.backward) == (3 * 512, 3 * 512)  # the second layer's answer is not needed again


@pytest.mark.parametrize("kind", LOSSES)
def test_tiled_losses_are_counted_though_they_work_in_place(kind: str) -> None:
    image, text = (F.normalize(torch.randn(48, 32), dim=1).requires_grad_() for _ in range(2))
    flops = count_flops(lambda: LOSSES[kind](image, text, torch.tensor(5.0), torch.tensor(0.0)).total.backward())
    # logits; logits again, unless InfoNCE of one tile keeps what it needs of them, and two gradients of them
    assert flops == (2 * 48 * 48 * 32, (2 if kind == "infonce" else 3) * 2 * 48 * 48 * 32, ())


def test_convolutions_in_groups_are_not_counted_once_a_group() -> None:
    conv, x = nn.Conv2d(8, 8, 3, padding=1, groups=8), torch.randn(2, 8, 10, 10, requires_grad=True)
    one = 2 * 2 * 100 * 8 * 9
    assert count_flops(lambda: conv(x).sum().backward())[:2] == (one, 2 * one)
    back, y = nn.ConvTranspose2d(6, 4, 2, stride=2, groups=2), torch.randn(3, 6, 5, 5, requires_grad=True)
    one = 2 * 3 * 25 * 6 * 2 * 4
    assert count_flops(lambda: back(y).sum().backward())[:2] == (one, 2 * one)


def test_products_by_hand() -> None:
    a, b, v, u = torch.ones(3, 4), torch.ones(4, 5), torch.ones(4), torch.ones(3)
    batched = torch.ones(2, 3, 4), torch.ones(2, 4, 5)
    for product, flops in (
        (lambda: a @ b, 2 * 3 * 4 * 5),
        (lambda: a @ v, 2 * 3 * 4),
        (lambda: v @ v, 2 * 4),
        (lambda: batched[0] @ batched[1], 2 * 2 * 3 * 4 * 5),
        (lambda: torch.addbmm(torch.ones(3, 5), *batched), 2 * 2 * 3 * 4 * 5),
        (lambda: torch.ones(2, 3, 5).baddbmm_(*batched), 2 * 2 * 3 * 4 * 5),
        (lambda: torch.ones(3, 5).addmm_(a, b), 2 * 3 * 4 * 5),
        (lambda: torch.addmv(u, a, v), 2 * 3 * 4),
        (lambda: torch.addr(torch.ones(3, 4), u, v), 2 * 3 * 4),
        (lambda: torch.einsum("ij,jk->ik", a, b), 2 * 3 * 4 * 5),
        (lambda: F.linear(a, torch.ones(5, 4), torch.ones(5)), 2 * 3 * 4 * 5),
    ):
        for mode in (torch.enable_grad, torch.no_grad, torch.inference_mode):
            with mode():
                assert count_flops(product) == (flops, 0, ()), (flops, mode)


def test_as_pytorch_counts_where_it_is_right() -> None:
    net, x = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Flatten(), nn.Linear(8 * 36, 10)), torch.randn(2, 3, 8, 8)
    with FlopCounterMode(display=False) as theirs:
        net(x).sum().backward()
    assert sum(count_flops(lambda: net(x).sum().backward())[:2]) == theirs.get_total_flops()


def test_what_has_no_formula_is_named() -> None:
    flops = count_flops(lambda: nn.LSTM(4, 4)(torch.ones(3, 2, 4)))
    assert len(flops.left_out) == 1 and "rnn" in flops.left_out[0] and flops.forward == 0
    quiet = nn.Sequential(nn.LayerNorm(4), nn.GELU(), nn.Softmax(-1), nn.Upsample(scale_factor=2, mode="linear"))
    assert count_flops(lambda: quiet(torch.ones(1, 4, 4))) == (0, 0, ())


# --- a count that leaves no trace ------------------------------------------------------------------------------------


W = 64  # within the toy towers: wide enough that their graphs are no small thing to keep


class Toy(nn.Module):
    """Dropout, a frozen batch norm, and a temperature that a forward pass puts back into bounds."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.image = nn.Sequential(nn.Flatten(), nn.Linear(6, W), nn.BatchNorm1d(W), nn.Dropout(0.3), nn.Linear(W, 4))
        self.text = nn.Sequential(nn.Linear(5, W), nn.ReLU(), nn.Dropout(0.3), nn.Linear(W, 4))
        self.temperature = nn.Parameter(torch.tensor(0.2))
        self.image[2].requires_grad_(False)
        self.selection = frozenset(name for name, p in self.named_parameters() if p.requires_grad)
        self.moving: dict[str, Tensor] = {}

    def train(self, mode: bool = True) -> Toy:
        super().train(mode)
        self.image[2].eval()
        return self

    def embed_image(self, inputs: Pixels) -> Tensor:
        return F.normalize(self.image(inputs.values), dim=-1)

    def embed_text(self, inputs: PooledFeatures) -> Tensor:
        return F.normalize(self.text(inputs.values), dim=-1)

    def scale_and_bias(self) -> tuple[Tensor, None]:
        with torch.no_grad():
            self.temperature.clamp_(0.19, 0.2)
        return 1 / self.temperature, None

    def forward(self, batch: Batch) -> Embeddings:
        return Embeddings(self.embed_image(batch.image), self.embed_text(batch.text), *self.scale_and_bias())

    def after_step(self) -> None:
        pass


class Stream:
    """Batches of eight pairs, of images of two pixels."""

    def __init__(self, batches: int) -> None:
        self.batches = batches

    def __len__(self) -> int:
        return self.batches

    def epoch(self, number: int, start: int = 0) -> Iterator[Batch]:
        generator = torch.Generator().manual_seed(number)
        for index in range(self.batches):
            image, text = torch.randn(8, 3, 1, 2, generator=generator), torch.randn(8, 5, generator=generator)
            rows = torch.arange(8)
            if index >= start:
                yield Batch(tuple(map(str, rows)), Pixels(image), PooledFeatures(text), torch.stack([rows, rows], 1))


def ledger() -> CostLedger:
    return CostLedger(CPU, {"model": {"total": 9, "trained": 3}})


def fitted(
    book: CostLedger | None, batches: int = 2, **changes: object
) -> tuple[dict[str, Tensor], list[dict], Tensor]:
    """What a run of one epoch leaves: tensors, log, and where the generator is."""
    settings = TrainSettings(batch_size=8, epochs=1, lr=0.02, precision="float32", log_every=1, select="last")
    model, rows = Toy(), []
    torch.manual_seed(7)
    fit(
        model,
        Stream(batches),
        LOSSES["infonce"],
        settings.model_copy(update=changes),
        callbacks(rows),
        FitOptions(ledger=book),
    )
    return {**model.state_dict()}, rows, torch.get_rng_state()


@pytest.mark.parametrize(
    "changes", [{}, {"micro_batch": 4}, {"batches": 1, "lr": 3.0}], ids=["whole", "pieces", "bounds"]
)
def test_counting_moves_no_bit(changes: dict) -> None:
    """Weights, batch norm, the temperature that the last step left out of bounds, losses and generators."""
    book = ledger()
    (tensors, rows, generator), (others, other_rows, other_generator) = fitted(book, **changes), fitted(None, **changes)
    assert tensors.keys() == others.keys()
    assert all(torch.equal(tensors[name], others[name]) for name in tensors)
    assert torch.equal(generator, other_generator)
    told = ("event", "step", "loss", "lr", "scale", "gradient_norm")
    assert [[row.get(key) for key in told] for row in rows] == [[row.get(key) for key in told] for row in other_rows]
    assert book.cost().work is not None
    if "lr" in changes:
        assert not 0.19 <= tensors["temperature"] <= 0.2


def test_pieces_compute_the_towers_twice_but_for_the_last() -> None:
    """Of the images, of four pieces three go forward twice; pooled vectors are one piece in any case."""
    books = ledger(), ledger()
    fitted(books[0])
    fitted(books[1], micro_batch=2)
    whole, parts = (book.cost().work for book in books)
    assert whole is not None and (whole.pairs, whole.micro_batch) == (8, 8)
    assert parts is not None and (parts.pairs, parts.micro_batch) == (8, 2)
    image, text, loss = 8 * 2 * (6 * W + W * 4), 8 * 2 * (5 * W + W * 4), 2 * 8 * 8 * 4
    assert whole.forward == image + text + loss
    assert parts.forward == whole.forward + 0.75 * image
    # two gradients of the second layers, of the first ones that of the weights; the loss takes two products
    assert whole.backward == parts.backward == 8 * 2 * (6 * W + 2 * W * 4 + 5 * W + 2 * W * 4) + 2 * loss


# --- the books -------------------------------------------------------------------------------------------------------


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def test_every_second_is_of_one_stage() -> None:
    clock = Clock()
    book = CostLedger(CPU, {"model": {"total": 9, "trained": 3}}, clock=clock)

    def lasts(seconds: float) -> None:
        clock.now += seconds

    with book:
        lasts(1)
        book.timed_as("features", lasts)(2)
        with book.stage("training"):
            lasts(4)
            with book.stage("evaluation"):
                lasts(8)
                book.timed_as("features", lasts)(16)
            lasts(32)
            with pytest.raises(ZeroDivisionError), book.stage("saving"):
                lasts(64)
                _ = 1 / 0
            lasts(128)
        seconds = book.cost().seconds
    assert seconds == {"features": 18, "training": 164, "evaluation": 8, "saving": 64, "rest": 1}


def session(**changes: object) -> CostSession:
    facts = dict(first_step=0, steps=10, pairs=80, pairs_per_second=4.0, step_seconds=20.0, seconds={"training": 21.0})
    facts |= dict(peak_bytes=100, peak="so", energy_kwh=0.5, energy="so", machine={"cpu": "x"})
    return CostSession(**{**facts, **changes})  # type: ignore[arg-type]


def test_sessions_add_up_and_what_one_cannot_tell_none_can() -> None:
    one, two = session(), session(first_step=10, steps=30, pairs_per_second=2.0, peak_bytes=300, energy_kwh=0.25)
    cost = RunCost({"model": {"total": 9, "trained": 3}}, StepFlops(80, 160, 8, 8, ()), {}, 7, (one, two))
    assert (cost.peak_bytes, cost.energy_kwh, cost.seconds) == (300, 0.75, {"training": 42.0})
    assert cost.pairs_per_second == 2.0, "most of the steps were that slow"
    assert (cost.forward_flops, cost.backward_flops) == (10, 20)
    assert str(cost) == "30 FLOP a pair, peak 300 B, 2 pairs/s, 42 s, 750 Wh"
    assert cost.to_dict()["sum"] == {
        **dict(sessions=2, steps=40, pairs=160, trained_parameters=3, total_parameters=9, delta_bytes=7),
        **dict(forward_flops_per_pair=10, backward_flops_per_pair=20, peak_bytes=300, pairs_per_second=2.0),
        **dict(seconds={"training": 42.0}, energy_kwh=0.75),
    }
    lost = RunCost(
        cost.parameters, None, {"text": FrozenFlops(5, "all")}, None, (one, session(peak_bytes=None, energy_kwh=None))
    )
    assert lost.peak_bytes is lost.energy_kwh is lost.forward_flops is None
    assert str(lost) == "peak not measured, 4 pairs/s, 42 s"
    for each in (cost, lost):
        assert RunCost.from_dict(json.loads(each.to_json())) == each


def test_prefixes() -> None:
    said = [format_si(value, "B") for value in (0, 84, 999.6, 1234, 12.34e9, 999.96e6, 2.5e13)]
    assert said == ["0 B", "84 B", "1.00 kB", "1.23 kB", "12.3 GB", "1.00 GB", "25.0 TB"]


# --- memory ----------------------------------------------------------------------------------------------------------


@LINUX
def test_the_peak_is_that_of_training_above_what_was_there() -> None:
    mb = 2**20
    before = torch.ones(48 * mb // 4)
    book = ledger()
    with book.stage("evaluation"):
        del before
        torch.ones(400 * mb // 4)
    with book.stage("training"):
        torch.ones(96 * mb // 4)
        with book.stage("evaluation"):
            torch.ones(400 * mb // 4)
        torch.ones(16 * mb // 4)
    peak = book.cost().sessions[0].peak_bytes
    assert peak is not None and 95 * mb <= peak <= 130 * mb  # the kernel keeps its books to some pages a thread


def test_where_no_peak_can_be_set_back_none_is_given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(meters, "_CLEAR_REFS", tmp_path / "missing" / "clear_refs")
    peak = PeakMemoryMeter(CPU)
    peak.start()
    peak.stop()
    assert (
        peak.measurement.value is None and "does not let the peak of a process be set back" in peak.measurement.method
    )
    assert PeakMemoryMeter(torch.device("mps")).measurement.method == "not measured: PyTorch tells no peak for mps"


@LINUX
def test_a_peak_of_nothing_is_none() -> None:
    assert PeakMemoryMeter(CPU).measurement == (None, "not measured: nothing was trained")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_the_peak_of_a_gpu_is_that_of_its_tensors() -> None:
    peak, mb = PeakMemoryMeter(torch.device("cuda")), 2**20
    there = torch.ones(8 * mb // 4, device="cuda")
    torch.ones(256 * mb // 4, device="cuda")
    peak.start()
    torch.ones(64 * mb // 4, device="cuda")
    peak.stop()
    assert peak.measurement.value == torch.cuda.memory_allocated() + 64 * mb and len(there)


# --- energy ----------------------------------------------------------------------------------------------------------


def test_without_codecarbon_there_is_no_figure_but_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "codecarbon", None)
    with ledger() as book:
        [told] = book.cost().sessions
    assert told.energy_kwh is None
    assert told.energy.startswith("not measured: ") and told.energy.endswith('pip install "clasp-vl[energy]"')


def test_codecarbon_measures_without_a_file_a_word_or_a_connection(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("codecarbon", reason="the extra `energy`")

    def refused(*address: object) -> None:
        raise AssertionError(f"a connection to {address}")

    monkeypatch.setattr(socket.socket, "connect", refused)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CODECARBON_EMISSIONS_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setenv("CODECARBON_OUTPUT_METHODS", "csv,api")
    energy = EnergyMeter()
    assert energy.measurement.value is None
    energy.start()
    matrix = torch.randn(400, 400)
    for _ in range(40):
        matrix = F.normalize(matrix @ matrix)
    first = energy.measurement
    for _ in range(40):
        matrix = F.normalize(matrix @ matrix)
    energy.stop()
    last = energy.measurement
    assert first.value is not None and last.value is not None and 0 < first.value < last.value < 1e-3
    assert "of this process: " in last.method and "RAM estimated from its size" in last.method
    assert "CPU estimated from its load and TDP" in last.method or "CPU measured by RAPL" in last.method
    assert not list(tmp_path.iterdir())
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    "part, said",
    [
        ("CPU(Intel Rapl)", "CPU measured by RAPL (the whole package)"),
        ("CPU(Cpu Load)", "CPU estimated from its load and TDP"),
        ("CPU(AMD EPYC > 85W [generic])", "CPU estimated from its load and TDP"),
        ("GPU(NVIDIA H200)", "GPU measured by its driver (NVML or AMD SMI; the whole card)"),
        ("RAM()", "RAM estimated from its size"),
        ("Fan(new)", "Fan as codecarbon has it (Fan(new))"),
    ],
)
def test_what_was_measured_and_what_estimated(part: str, said: str) -> None:
    assert meters._describe_part(part) == said


# --- a run and its cost ----------------------------------------------------------------------------------------------

# Of the toy towers (toyruns): two blocks, 32 wide and 64 within, 17 tokens of an image in patches of 8.
TRUNK_BLOCK = 2 * 17 * (4 * 32 * 32 + 2 * 32 * 64) + 4 * 17 * 17 * 32
IMAGE = 2 * 16 * 3 * 8 * 8 * 32
HEADS = 2 * 2 * 32 * 16  # both of them, of one pair


def test_a_run_on_frozen_towers_says_what_a_step_takes_and_what_was_taken_once(
    towers: Path, pairs: Path, tmp_path: Path
) -> None:
    done = run(recipe(towers, pairs), tmp_path / "run")
    cost = read_cost(tmp_path / "run")
    assert cost == done.cost
    work = cost.work
    assert work is not None and (work.pairs, work.micro_batch, work.left_out) == (16, 16, ())
    loss = 2 * 16 * 16 * 16
    assert work.forward == 16 * HEADS + loss
    assert work.backward == 2 * 16 * HEADS + 2 * loss, "both gradients, since the features are standardized first"
    assert cost.once["image"].flops == IMAGE + 2 * TRUNK_BLOCK and "once for an image" in cost.once["image"].what
    # captions of 5 tokens: "[CLS] a red ring [SEP]"
    assert cost.once["text"].flops == 2 * (2 * 5 * (4 * 32 * 32 + 2 * 32 * 64) + 4 * 5 * 5 * 32)
    assert cost.parameters["model"] == {"total": 59457, "trained": 2 * (32 * 16 + 16 + 2 * 32) + 1}
    assert cost.delta_bytes == (tmp_path / "run" / "delta.safetensors").stat().st_size
    [only] = cost.sessions
    assert (only.steps, only.pairs, only.first_step) == (9, 144, 0)
    assert only.machine["threads"] == torch.get_num_threads() and only.machine["precision"] == "float32"
    assert all(only.seconds[stage] > 0 for stage in ("features", "training", "evaluation", "saving", "counting"))
    assert only.pairs_per_second and only.seconds["training"] > only.step_seconds > 0
    card = (tmp_path / "run" / "README.md").read_text()
    assert f"| {format_si(work.forward / 16, 'FLOP')} / {format_si(work.backward / 16, 'FLOP')} |" in card
    assert "| frozen and kept: all of file:" in card and "| energy |" in card and "None" not in card


def test_the_trunk_counts_in_every_step_where_it_is_not_kept(towers: Path, pairs: Path, tmp_path: Path) -> None:
    top = ['tune.image=["last(1)"]', "train.epochs=1"]
    kept = run(recipe(towers, pairs, *top), tmp_path / "kept").cost
    live = run(recipe(towers, pairs, *top, "data.feature_cache=off"), tmp_path / "live").cost
    assert kept.work and live.work and set(kept.once) == {"image", "text"} and not live.once
    assert kept.once["image"].flops == IMAGE + TRUNK_BLOCK and "blocks 1 to 1 of" in kept.once["image"].what
    assert kept.work.backward == live.work.backward
    # images one by one, and each different caption once; what goes on from kept states embeds one blank image
    captions = live.work.forward - kept.work.forward - 16 * kept.once["image"].flops + IMAGE
    different = captions / kept.once["text"].flops
    assert 1 < different <= 16 and different == int(different)
    fewer = run(recipe(towers, pairs, *top, "image.patch_dropout=0.5"), tmp_path / "fewer").cost
    assert fewer.work and fewer.once == kept.once
    smaller_block = 2 * 9 * (4 * 32 * 32 + 2 * 32 * 64) + 4 * 9 * 9 * 32
    assert kept.work.forward - fewer.work.forward == 16 * (TRUNK_BLOCK - smaller_block)


class StopAt(SilentReporter):
    """Presses Ctrl-C after a step."""

    def __init__(self, step: int) -> None:
        self.at = step

    def step(self, progress: TrainProgress) -> None:
        if progress.step == self.at:
            os.kill(os.getpid(), signal.SIGINT)


def test_a_stopped_run_and_its_resumption_add_up(towers: Path, pairs: Path, tmp_path: Path) -> None:
    made = recipe(towers, pairs, "head.noise=0.5")
    whole, folder = run(made, tmp_path / "whole").cost, tmp_path / "run"
    main_job.train_recipe(made, folder, say=str, reporter=StopAt(4))
    first = read_cost(folder)
    assert [each.steps for each in first.sessions] == [4] and first.delta_bytes
    again = main_job.Recipe.model_validate({**made.to_dict(), "train": read_recipe(folder)["train"]})
    cost = run(again, folder, resume=True).cost
    assert [(each.first_step, each.steps) for each in cost.sessions] == [(0, 4), (4, 5)]
    assert cost.sessions[0].seconds["training"] == pytest.approx(first.sessions[0].seconds["training"])
    assert cost.seconds["training"] == sum(each.seconds["training"] for each in cost.sessions)
    assert cost.work == whole.work == first.work and cost.once == whole.once
    assert sum(each.pairs for each in cost.sessions) == sum(each.pairs for each in whole.sessions)
    assert "seconds in 2 sessions" in (folder / "README.md").read_text()
    ours, theirs = delta(folder), delta(tmp_path / "whole")
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_a_gradient_is_counted_while_it_is_computed_and_once(
    towers: Path, pairs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where the run stops right after its first step."""
    made, folder, real, steps = recipe(towers, pairs), tmp_path / "run", Stepper.backward, []

    def backward(self: Stepper, batch: Batch, number: int) -> object:
        steps.append((number, _len_torch_dispatch_stack()))
        return real(self, batch, number)

    monkeypatch.setattr(Stepper, "backward", backward)
    main_job.train_recipe(made, folder, say=str, reporter=StopAt(1))
    work = read_cost(folder).work
    assert work is not None
    again = main_job.Recipe.model_validate({**made.to_dict(), "train": read_recipe(folder)["train"]})
    assert run(again, folder, resume=True).cost.work == work
    assert steps == [(0, 1), *((number, 0) for number in range(1, 9))]


def read_recipe(folder: Path) -> dict:
    return main_job.RunFolder(folder).recipe()


def test_a_killed_run_leaves_whole_books_and_goes_on_with_them(
    towers: Path, pairs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed while the books are written for the fourth time (the first is before any step): those of the third are
    there, and no half file."""
    made = recipe(towers, pairs, "train.save_every_minutes=1e-9")
    folder, replace, written = tmp_path / "run", os.replace, []

    def killed(source: Path, to: Path) -> None:
        written.append(Path(to).name)
        if written.count("cost.json") == 4:
            raise SystemExit("no power")
        replace(source, to)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", killed)
        with pytest.raises(SystemExit):
            run(made, folder)
    assert read_cost(folder).sessions[0].steps == 2 and read_cost(folder).delta_bytes is None
    assert not list(folder.glob("*.part"))
    again = main_job.Recipe.model_validate({**made.to_dict(), "train": read_recipe(folder)["train"]})
    cost = run(again, folder, resume=True).cost
    assert [(each.first_step, each.steps) for each in cost.sessions] == [(0, 2), (3, 6)], "step 3 is in no books"


def test_a_run_from_before_there_were_books_goes_on(towers: Path, pairs: Path, tmp_path: Path) -> None:
    made, folder = recipe(towers, pairs), tmp_path / "run"
    main_job.train_recipe(made, folder, say=str, reporter=StopAt(4))
    (folder / "cost.json").unlink()
    again = main_job.Recipe.model_validate({**made.to_dict(), "train": read_recipe(folder)["train"]})
    cost = run(again, folder, resume=True).cost
    assert [(each.first_step, each.steps) for each in cost.sessions] == [(4, 5)] and cost.work is not None


def test_books_that_are_missing_or_damaged(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"run has no cost.json: it is not a run, or was trained before"):
        read_cost(tmp_path / "run")
    for text in ("{", '{"format": 1}', "[]", '{"parameters": {}, "work": {"odd": 1}, "once": {}}'):
        (tmp_path / "cost.json").write_text(text)
        with pytest.raises(UserError, match=r"cost.json is damaged .* delete it") as error:
            read_cost(tmp_path)
        assert "\n" not in str(error.value)


def test_a_sweep_reads_the_seconds_of_training_and_evaluation(tmp_path: Path) -> None:
    assert read_training_seconds(tmp_path) is None, "nobody wrote them down"
    stages = {"features": 1.0, "training": 2.0, "evaluation": 4.0, "saving": 8.0}
    cost = RunCost({"model": {"total": 9, "trained": 3}}, None, {}, None, (session(seconds=stages),) * 2)
    (tmp_path / "cost.json").write_text(cost.to_json())
    assert read_training_seconds(tmp_path) == 12.0


def test_the_command_says_it_in_a_line(
    towers: Path, pairs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    toml = tmp_path / "toy.toml"
    toml.write_text(recipe(towers, pairs, "train.epochs=1").to_toml())
    monkeypatch.setattr(sys, "argv", ["clasp", "train", str(toml), "--runs", str(tmp_path / "runs"), "--name", "one"])
    with pytest.raises(SystemExit) as end:
        cli.main()
    said = [line for line in capfd.readouterr().err.splitlines() if line.startswith("cost: ")]
    assert not end.value.code and said == [f"cost: {read_cost(tmp_path / 'runs' / 'one')}"]
    assert " a pair, peak " in said[0] and " pairs/s, " in said[0]


def test_a_state_that_was_never_saved_has_no_books(
    towers: Path, pairs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run that fails before its first saving does not block its name."""

    def failing(self: main_job.RunFolder, state: TrainState) -> None:
        raise UserError("no space")

    with monkeypatch.context() as patch:
        patch.setattr(main_job.RunFolder, "save_state", failing)
        with pytest.raises(UserError, match="no space"):
            run(recipe(towers, pairs), tmp_path / "run")
    assert not (tmp_path / "run" / "cost.json").exists()
    run(recipe(towers, pairs), tmp_path / "run")
