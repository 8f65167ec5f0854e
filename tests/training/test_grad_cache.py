"""Batches in pieces: the gradient of one piece to rounding, dropout and noise on, in the memory of one piece."""

from __future__ import annotations

import copy
import json
import random
import weakref
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from clasp.models.dual_encoder import DualEncoder, ProjectionHead
from clasp.models.head_settings import HeadSettings
from clasp.models.tower import Tower
from clasp.training import grad_cache, memory, micro_batches
from clasp.training.grad_cache import MicroBatchEmbedder
from clasp.training.loop import FitOptions, fit
from clasp.training.losses import LOSSES
from clasp.training.memory import ActivationMemory
from clasp.training.settings import TrainSettings
from clasp.training.state import TrainState
from clasp.training.step import seed_generators, step_seed
from clasp.types import Batch, Embeddings, HiddenStates, Loss, LossParts, Pixels, PooledFeatures, Tokens, UserError
from toytowers import base
from toytrackers import callbacks

CPU = torch.device("cpu")
HEAD = HeadSettings(kind="mlp", width=8, noise=0.1, dropout=0.1)
UNEVEN = torch.tensor([2, 9, 3, 3, 7, 2, 5, 9, 4, 2, 6])  # lengths of captions


class Two(nn.Module):
    """Two toy towers with dropout everywhere and heads with noise; nothing is rounded to float32 on the way."""

    def __init__(self, frozen: tuple[str, ...] = ()) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.image, self.text = Tower(base("vit"), dropout=True), Tower(base("bert"), dropout=True)
        self.image_head, self.text_head = ProjectionHead(32, HEAD), ProjectionHead(32, HEAD)
        self.log_scale, self.bias = nn.Parameter(torch.tensor(2.0)), nn.Parameter(torch.tensor(-1.0))
        for module in self.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.2
            if isinstance(module, ProjectionHead):
                nn.init.normal_(module.map.out.weight)
        for name, parameter in self.named_parameters():
            parameter.requires_grad_(not name.startswith(frozen))

    def embed_image(self, inputs: Any) -> Tensor:
        pooled = inputs.values if isinstance(inputs, PooledFeatures) else self.image.pooled(inputs)
        return F.normalize(self.image_head(pooled), dim=-1)

    def embed_text(self, inputs: Any) -> Tensor:
        pooled = inputs.values if isinstance(inputs, PooledFeatures) else self.text.pooled(inputs)
        return F.normalize(self.text_head(pooled), dim=-1)

    def scale_and_bias(self) -> tuple[Tensor, Tensor]:
        return self.log_scale.exp(), self.bias

    def forward(self, batch: Batch) -> Embeddings:
        return Embeddings(self.embed_image(batch.image), self.embed_text(batch.text), *self.scale_and_bias())

    @property
    def selection(self) -> frozenset[str]:
        return frozenset(name for name, parameter in self.named_parameters() if parameter.requires_grad)

    @property
    def moving(self) -> dict[str, Tensor]:
        return {}

    def after_step(self) -> None: ...


def work(model: Any, *, step: int = 5) -> MicroBatchEmbedder:
    return MicroBatchEmbedder(
        model, CPU, "float32", lambda side, piece: seed_generators(step_seed(0, step, side, piece), CPU)
    )


def tokens(lengths: Tensor, rows: Tensor | None = None) -> Tokens:
    generator = torch.Generator().manual_seed(2)
    ids = torch.randint(3, 60, (len(lengths), int(lengths.max())), generator=generator)
    return Tokens(ids, torch.arange(ids.shape[1]) < lengths[:, None], rows)


def batch_of(pairs: int = 11, *, repeated: bool = False, dtype: torch.dtype = torch.float64) -> Batch:
    """Uneven captions; pairs 0 and 3 are of one group; with ``repeated``, also captions that several pairs have."""
    generator = torch.Generator().manual_seed(1)
    image = Pixels(torch.randn(pairs, 3, 32, 32, generator=generator).to(dtype))
    lengths = UNEVEN.repeat(-(-pairs // len(UNEVEN)))[:pairs]
    captions = torch.arange(pairs)
    text = tokens(lengths)
    if repeated:
        captions = torch.randint(0, 7, (pairs,), generator=generator)
        text = tokens(lengths[:7], captions)
    groups = torch.stack([torch.arange(pairs), captions], dim=1)
    groups[3, 0] = 0
    return Batch(tuple(map(str, range(pairs))), image, text, groups)


def gradients_of(model: nn.Module, follow: Callable[[], Any]) -> dict[str, Tensor]:
    model.zero_grad()
    follow()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def whole(work: MicroBatchEmbedder, batch: Batch, loss: Loss, micro_batch: int) -> None:
    """The slow obvious way: the same pieces from the same seeds, all their graphs at once, one loss."""
    sides = []
    for name, inputs in (("image", batch.image), ("text", batch.text)):
        cut = micro_batches.split_micro_batches(inputs, micro_batch)
        rows = torch.cat([work.embed(name, number, piece) for number, piece in enumerate(cut.pieces)])
        sides.append(rows if cut.row_of_pair is None else rows[cut.row_of_pair])
    loss(*sides, *work.model.scale_and_bias(), groups=batch.groups).total.backward()


def agree(one: dict[str, Tensor], other: dict[str, Tensor], **tolerance: float) -> None:
    assert one.keys() == other.keys() and one
    for name in one:
        torch.testing.assert_close(one[name], other[name], msg=lambda text, name=name: f"{name}: {text}", **tolerance)


class Counting:
    """A loss that counts its calls."""

    def __init__(self, loss: Loss) -> None:
        self.loss, self.calls = loss, 0

    def __call__(self, *args: Any, **options: Any) -> LossParts:
        self.calls += 1
        return self.loss(*args, **options)


# --- exactness -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", LOSSES)
@pytest.mark.parametrize("repeated", [False, True])
@pytest.mark.parametrize("micro_batch", [1, 3, 4, 10])
def test_the_gradient_of_one_piece_with_dropout_and_noise_on(kind: str, repeated: bool, micro_batch: int) -> None:
    model, batch, loss = Two().double().train(), batch_of(repeated=repeated), Counting(LOSSES[kind])
    ours = gradients_of(model, lambda: grad_cache.backward_in_micro_batches(work(model), batch, loss, micro_batch))
    assert loss.calls == 1
    agree(
        ours, gradients_of(model, lambda: whole(work(model), batch, LOSSES[kind], micro_batch)), rtol=1e-12, atol=1e-12
    )
    assert set(ours) >= {"log_scale", "image.net.embeddings.cls_token", "text_head.map.inner.weight"}


@pytest.mark.parametrize("cached", [False, True])
def test_both_passes_drop_the_same_patches(cached: bool) -> None:
    model, batch = Two(frozen=("image.net.embeddings", "image.net.layers.0") if cached else ()).double(), batch_of()
    if cached:
        batch = replace(batch, image=model.image.prefix_states(batch.image, model.image.frozen_blocks))
    model.image.enable_patch_dropout(0.5)
    model.train()
    ours = gradients_of(model, lambda: grad_cache.backward_in_micro_batches(work(model), batch, LOSSES["infonce"], 3))
    slow = gradients_of(model, lambda: whole(work(model), batch, LOSSES["infonce"], 3))
    agree(ours, slow, rtol=1e-12, atol=1e-12)
    model.image.patch_dropout = None
    other = gradients_of(model, lambda: whole(work(model), batch, LOSSES["infonce"], 3))
    assert not torch.allclose(other["image_head.map.linear.weight"], slow["image_head.map.linear.weight"])


@pytest.mark.parametrize("kind", LOSSES)
@pytest.mark.parametrize("repeated", [False, True])
def test_without_randomness_the_gradient_of_the_batch_as_it_is(kind: str, repeated: bool) -> None:
    model, batch = Two().double().eval(), batch_of(repeated=repeated)

    def plainly() -> None:
        image, text = model.embed_image(batch.image), model.embed_text(batch.text)
        LOSSES[kind](image, text, *model.scale_and_bias(), groups=batch.groups).total.backward()

    ours = gradients_of(model, lambda: grad_cache.backward_in_micro_batches(work(model), batch, LOSSES[kind], 4))
    agree(ours, gradients_of(model, plainly), rtol=1e-11, atol=1e-12)


def test_the_model_itself_in_float32() -> None:
    model = DualEncoder(Tower(base("vit")), Tower(base("bert")), HEAD, seed=0, init_logit_bias=-10.0)
    model.select(name for name, _ in model.named_parameters())
    batch = batch_of(dtype=torch.float32)

    def plainly() -> None:
        out = model(batch)
        LOSSES["sigmoid"](out.image, out.text, out.scale, out.bias, groups=batch.groups).total.backward()

    model.eval()
    ours = gradients_of(model, lambda: grad_cache.backward_in_micro_batches(work(model), batch, LOSSES["sigmoid"], 4))
    agree(ours, gradients_of(model, plainly), rtol=1e-4, atol=1e-5)


def test_steps_and_pieces_draw_apart_and_repeat_themselves() -> None:
    model, batch = Two().double().train(), batch_of()

    def at(step: int) -> dict[str, Tensor]:
        return gradients_of(
            model, lambda: grad_cache.backward_in_micro_batches(work(model, step=step), batch, LOSSES["infonce"], 3)
        )

    once, again, later = at(5), at(5), at(6)
    assert all(torch.equal(once[name], again[name]) for name in once)
    assert not torch.equal(once["image_head.map.linear.weight"], later["image_head.map.linear.weight"])
    seeds = [step_seed(0, 5, side, piece) for side in ("image", "text") for piece in range(9)]
    assert len({*seeds, step_seed(0, 5)}) == 19


# --- in a run ---------------------------------------------------------------------------------------------------------


class Stream:
    """One epoch of four batches of eleven."""

    def __len__(self) -> int:
        return 4

    def epoch(self, number: int, start: int = 0) -> Iterator[Batch]:
        return (batch_of(dtype=torch.float32) for _ in range(start, 4))


def run(**options: Any) -> tuple[dict[str, Tensor], list[TrainState], list[dict[str, Any]]]:
    model, states, lines = Two(), list[TrainState](), list[dict[str, Any]]()

    def save(state: TrainState) -> None:  # as a checkpoint does: copied out, and read back
        tensors = {name: tensor.clone() for name, tensor in state.tensors().items()}
        states.append(TrainState.from_tensors(json.loads(json.dumps(state.metadata())), tensors))

    start = options.pop("start", None)
    settings = TrainSettings(batch_size=11, epochs=1, precision="float32", save_every_minutes=1e-9, **options)
    fit(model, Stream(), LOSSES["sigmoid"], settings, callbacks(lines, save=save), FitOptions(resume_state=start))
    return {name: parameter.detach() for name, parameter in model.named_parameters()}, states, lines


def test_a_run_in_pieces_goes_on_bitwise() -> None:
    whole_run, states, _ = run(micro_batch=3)
    assert [state.position.step for state in states] == [0, 1, 2, 3, 4, 4], "one before the first step"
    rest = run(micro_batch=3, start=states[1])[0]
    assert all(torch.equal(whole_run[name], rest[name]) for name in whole_run)
    in_one = run(micro_batch=11)[0]
    assert any(not torch.equal(whole_run[name], in_one[name]) for name in whole_run), "other draws of dropout"


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("can't allocate memory")], ids=["gpu", "cpu"]
)
def test_out_of_memory_halves_the_micro_batch_and_goes_on(error: RuntimeError, monkeypatch: pytest.MonkeyPatch) -> None:
    embed = Two.embed_image

    def in_little_memory(model: Two, inputs: Any) -> Tensor:
        if len(inputs.values) > 3:
            raise error
        return embed(model, inputs)

    monkeypatch.setattr(Two, "embed_image", in_little_memory)
    found, states, lines = run(micro_batch=11)
    (said,) = (line for line in lines if line["event"] == "pieces")
    assert said["micro_batch"] == 2
    expected = run(micro_batch=2)[0]
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    rest, _, lines = run(micro_batch=11, start=states[2])
    assert not [line for line in lines if line["event"] == "pieces"], "the halved size goes on"
    assert all(torch.equal(found[name], rest[name]) for name in rest)


def test_out_of_memory_with_one_pair_ends_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Two, "embed_image", lambda model, inputs: torch.empty(1 << 60))
    with pytest.raises(RuntimeError, match="allocate memory"):
        run(micro_batch=4)


def test_what_auto_chose_is_said_and_kept_by_a_run_that_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    bounded(monkeypatch, 2_000_000)
    chosen, states, lines = run()
    (line,) = [line for line in lines if line["event"] == "pieces"]
    assert 1 <= line["micro_batch"] < 11 and {state.micro_batch for state in states[1:]} == {line["micro_batch"]}
    bounded(monkeypatch, 10**12)
    rest, _, lines = run(start=states[1])
    assert not [line for line in lines if line["event"] == "pieces"], "not measured again"
    assert all(torch.equal(chosen[name], rest[name]) for name in chosen)
    assert [line["micro_batch"] for line in run()[2] if line["event"] == "pieces"] == [11]


# --- what is computed, and how often ---------------------------------------------------------------------------------


def counted(model: nn.Module, batch: Batch, micro_batch: int) -> tuple[list[int], list[int]]:
    """Rows in each call of the two embedding methods."""
    images, texts = list[int](), list[int]()
    calls = {"embed_image": images, "embed_text": texts}
    for name, rows in calls.items():
        method = getattr(model, name)
        vars(model)[name] = lambda inputs, m=method, r=rows: (
            r.append(micro_batches.count_unique_rows(inputs)),
            m(inputs),
        )[1]
    grad_cache.backward_in_micro_batches(work(model), batch, LOSSES["infonce"], micro_batch)
    for name in calls:
        del vars(model)[name]
    return images, texts


def test_all_pieces_but_the_last_are_computed_twice() -> None:
    images, texts = counted(Two().double().train(), batch_of(), 4)
    assert images == [4, 3, 4, 3, 4], "the last first, and its graph is kept"
    assert sum(texts) == 2 * 11 - 4 and texts[0] == 4, "four captions of the longest, more of the shorter ones"
    assert texts[1] > 4


def test_a_frozen_side_is_computed_once() -> None:
    model = Two(frozen=("image.", "image_head.")).double().train()
    images, texts = counted(model, batch_of(), 4)
    assert images == [4, 3, 4] and sum(texts) > 11
    assert all(parameter.grad is None for parameter in model.image.parameters())


def test_a_head_on_a_frozen_tower_is_computed_once_and_learns() -> None:
    model, batch = Two(frozen=("image.",)).double().train(), batch_of()
    assert counted(model, batch, 4)[0] == [4, 3, 4]
    ours = gradients_of(model, lambda: grad_cache.backward_in_micro_batches(work(model), batch, LOSSES["infonce"], 4))
    agree(ours, gradients_of(model, lambda: whole(work(model), batch, LOSSES["infonce"], 4)), rtol=1e-12, atol=1e-12)
    assert "image_head.map.linear.weight" in ours


def test_pooled_features_stay_in_one_piece_and_only_the_scale_may_train() -> None:
    model, batch = Two(frozen=("image", "text", "bias")).double().train(), batch_of()
    features = PooledFeatures(torch.randn(11, 32, dtype=torch.float64))
    cached = Batch(batch.ids, features, batch.text, batch.groups)
    images, texts = counted(model, cached, 4)
    assert images == [11] and sum(texts) == 11
    assert gradients_of(
        model, lambda: grad_cache.backward_in_micro_batches(work(model), cached, LOSSES["infonce"], 4)
    ).keys() == {"log_scale"}


def test_bfloat16_pieces_and_a_loss_in_float32() -> None:
    seen = list[torch.dtype]()

    def loss(image: Tensor, text: Tensor, scale: Tensor, bias: Any = None, *, groups: Any = None) -> LossParts:
        assert image.dtype == text.dtype == scale.dtype == bias.dtype == torch.float32
        return LOSSES["infonce"](image, text, scale, bias, groups=groups)

    model, batch = Two().train(), batch_of(dtype=torch.float32)
    model.image_head.map.linear.register_forward_hook(lambda module, inputs, output: seen.append(output.dtype))
    job = work(model)
    job = MicroBatchEmbedder(model, CPU, "bfloat16", job.seed)
    ours = gradients_of(model, lambda: grad_cache.backward_in_micro_batches(job, batch, loss, 4))
    assert set(seen) == {torch.bfloat16}
    assert all(gradient.isfinite().all() and gradient.dtype == torch.float32 for gradient in ours.values())
    whole_one = gradients_of(model, lambda: whole(job, batch, loss, 4))
    one, other = (torch.cat([g.flatten() for g in found.values()]) for found in (ours, whole_one))
    assert torch.cosine_similarity(one, other, dim=0) > 0.99


def test_a_tower_with_random_numbers_of_its_own_is_caught() -> None:
    class Restless(Two):
        def embed_image(self, inputs: Any) -> Tensor:
            rows = super().embed_image(inputs)
            return F.normalize(rows + random.random(), dim=-1)

    model = Restless().train()
    with pytest.raises(UserError, match=r"the image tower draws random numbers of its own.*train.micro_batch"):
        grad_cache.backward_in_micro_batches(work(model), batch_of(dtype=torch.float32), LOSSES["infonce"], 4)


# --- cutting ---------------------------------------------------------------------------------------------------------


def test_pieces_are_narrow_hold_no_more_tokens_and_lead_back() -> None:
    rows = torch.tensor([3, 0, 10, 10, 5, 1, 2, 4, 6, 7, 8, 9, 0])
    text = tokens(UNEVEN, rows)
    cut = micro_batches.split_micro_batches(text, 3)
    widths = [piece.ids.shape[1] for piece in cut.pieces]
    assert widths == sorted(widths) and widths[-1] == 9
    assert all(piece.ids.numel() <= 3 * 9 and piece.mask[:, -1].any() for piece in cut.pieces)
    assert cut.offsets == (0, *torch.tensor([len(piece.ids) for piece in cut.pieces]).cumsum(0).tolist())
    padded = torch.cat([F.pad(piece.ids * piece.mask, (0, 9 - piece.ids.shape[1])) for piece in cut.pieces])
    assert cut.row_of_pair is not None
    assert torch.equal(padded[cut.row_of_pair], (text.ids * text.mask)[rows])


def test_states_are_cut_as_captions_are_and_left_padding_is_kept() -> None:
    mask = torch.arange(9) < UNEVEN[:, None]
    states = HiddenStates(torch.randn(11, 9, 4), mask, depth=2, size=0)
    cut = micro_batches.split_micro_batches(states, 4)
    assert cut.row_of_pair is not None and all(isinstance(p, HiddenStates) and p.depth == 2 for p in cut.pieces)
    firsts = torch.cat([piece.values[:, 0] for piece in cut.pieces])
    assert torch.equal(firsts[cut.row_of_pair], states.values[:, 0])
    left = micro_batches.split_micro_batches(HiddenStates(states.values, mask.flip(1), 2, 0), 4)
    assert all(piece.values.shape[1] == 9 for piece in left.pieces if isinstance(piece, HiddenStates))


# --- memory ----------------------------------------------------------------------------------------------------------


class Live(TorchDispatchMode):
    """The most bytes at a time of tensors that came into being inside, each storage once; ``given`` were there."""

    def __init__(self, *given: Tensor) -> None:
        super().__init__()
        self.now = self.most = 0
        self.known = weakref.WeakSet(tensor.untyped_storage() for tensor in given)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in torch.utils._pytree.tree_leaves(out):
            if isinstance(tensor, Tensor) and tensor.untyped_storage() not in self.known:
                storage = tensor.untyped_storage()
                self.known.add(storage)
                weakref.finalize(storage, self._gone, storage.nbytes())
                self.now += storage.nbytes()
                self.most = max(self.most, self.now)
        return out

    def _gone(self, count: int) -> None:
        self.now -= count


def most_bytes(pairs: int, micro_batch: int, *, recompute: bool = False) -> int:
    """Of one batch: weights and their gradients are there before, the batch too."""
    model, batch = Two().train(), batch_of(pairs, dtype=torch.float32)
    if recompute:
        model.image.enable_activation_checkpointing()
        model.text.enable_activation_checkpointing()
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    assert isinstance(batch.image, Pixels) and isinstance(batch.text, Tokens)
    with Live(batch.image.values, batch.text.ids, batch.text.mask, batch.groups, *model.parameters()) as live:
        grad_cache.backward_in_micro_batches(work(model), batch, LOSSES["infonce"], micro_batch)
    return live.most


def test_memory_is_that_of_a_piece_and_not_of_the_batch() -> None:
    one, few, many = most_bytes(4, 4), most_bytes(16, 4), most_bytes(64, 4)
    assert many < 1.25 * one, (one, few, many)
    assert most_bytes(64, 64) > 8 * one, "without pieces it does grow"


def test_kept_counts_storages_once_leaves_weights_out_and_frees_the_graph() -> None:
    layer, x = nn.Linear(8, 16), torch.randn(4, 8)
    with ActivationMemory(layer.parameters()) as kept:
        hidden = layer(x)  # keeps x
        out = hidden.exp() + hidden.tanh() + hidden.square()  # keep their outputs, and hidden
    assert kept.bytes == 4 * (4 * 8 + 3 * 4 * 16)
    out.sum().backward()
    assert layer.weight.grad is not None
    with ActivationMemory(()):
        alone = torch.randn(3, requires_grad=True).exp()
    storage = weakref.ref(alone.untyped_storage())
    del alone
    assert storage() is None, "a graph that is not followed must go with its output"


def bounded(monkeypatch: pytest.MonkeyPatch, free: int | None) -> None:
    monkeypatch.setattr(grad_cache, "free_bytes", lambda device: free)


def test_choose_takes_what_fits_and_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    model, batch = Two().train(), batch_of(dtype=torch.float32)
    trained = sum(parameter.nbytes for parameter in model.parameters())
    with ActivationMemory(model.parameters()) as kept:
        lengths = torch.full((11,), 9)
        model.embed_image(batch.image), model.embed_text(tokens(lengths))
    a_pair = kept.bytes / 11
    chosen = dict[float, int]()
    for fits in (0.5, 1.1, 2.5, 10.9, 11.2, 1000):
        bounded(monkeypatch, 3 * trained + int(2 * fits * a_pair))
        choice = grad_cache.choose_micro_batch(work(model), batch, 11)
        chosen[fits] = choice.micro_batch
        assert " of memory is free" in choice.reason and "a pair keeps" in choice.reason
    assert chosen == {0.5: 1, 1.1: 1, 2.5: 2, 10.9: 8, 11.2: 11, 1000: 11}
    bounded(monkeypatch, None)
    assert grad_cache.choose_micro_batch(work(model), batch, 11).micro_batch == 11
    bounded(monkeypatch, 3 * trained + int(2 * 64.5 * a_pair))
    choice = grad_cache.choose_micro_batch(work(model), batch, 4096)
    assert choice.micro_batch == 64 and choice.reason.startswith(
        "4,096 pairs in pieces of 64, with the gradient of one"
    )


def test_free_memory_heeds_the_limit_of_a_container(tmp_path: Path) -> None:
    assert 2**20 < (memory.free_bytes(CPU) or 2**21) < 2**60
    meminfo, groups = tmp_path / "meminfo", tmp_path / "cgroup"
    meminfo.write_text("MemTotal: 9000 kB\nMemAvailable:    4000 kB\n")
    (groups / "memory").mkdir(parents=True)
    assert memory._free_host_bytes(meminfo, groups) == 4_096_000
    (groups / "memory.max").write_text("max\n")
    assert memory._free_host_bytes(meminfo, groups) == 4_096_000
    for name, text in {
        "memory.max": "3000000\n",
        "memory.current": "2500000\n",
        "memory.stat": "inactive_file 7\n",
    }.items():
        (groups / name).write_text(text)
    assert memory._free_host_bytes(meminfo, groups) == 500_007
    for name, text in {"limit_in_bytes": "200000", "usage_in_bytes": "300000"}.items():
        (groups / "memory" / f"memory.{name}").write_text(text)
    (groups / "memory" / "memory.stat").write_text("total_inactive_file 1\n")
    assert memory._free_host_bytes(meminfo, groups) == 0


# --- recomputing blocks ----------------------------------------------------------------------------------------------


def test_recomputed_blocks_have_the_same_gradient_and_keep_less() -> None:
    model, batch = Two().double().train(), batch_of()
    again = copy.deepcopy(model)
    again.image.enable_activation_checkpointing()
    again.text.enable_activation_checkpointing()
    again = copy.deepcopy(again)  # a copy computes its own blocks
    found, bytes_kept = [], []
    for each in (model, again):
        torch.manual_seed(3)
        with ActivationMemory(each.parameters()) as kept:
            rows = torch.cat([each.embed_image(batch.image), each.embed_text(batch.text)])
        found.append(gradients_of(each, lambda rows=rows: rows.square().sum(dim=0).exp().sum().backward()))
        bytes_kept.append(kept.bytes)
    agree(*found, rtol=1e-12, atol=1e-12)
    assert 4 * bytes_kept[1] < bytes_kept[0], bytes_kept
    names = [name for name, _ in model.named_parameters()]
    assert [
        name for name, _ in again.named_parameters()
    ] == names and again.state_dict().keys() == model.state_dict().keys()


def test_recomputing_and_pieces_go_together() -> None:
    model, batch = Two().double().train(), batch_of()
    plain = gradients_of(model, lambda: grad_cache.backward_in_micro_batches(work(model), batch, LOSSES["infonce"], 4))
    model.image.enable_activation_checkpointing()
    model.text.enable_activation_checkpointing()
    ours = gradients_of(model, lambda: grad_cache.backward_in_micro_batches(work(model), batch, LOSSES["infonce"], 4))
    agree(plain, ours, rtol=1e-12, atol=1e-12)
    assert most_bytes(16, 8, recompute=True) < 0.8 * most_bytes(16, 8)


def test_frozen_blocks_are_not_recomputed() -> None:
    tower = Tower(base("vit"))
    for name, parameter in tower.named_parameters():
        parameter.requires_grad_(".layers.1." in name)
    tower.enable_activation_checkpointing()
    assert ["forward" in vars(tower.net.get_submodule(f"layers.{n}")) for n in (0, 1)] == [False, True]
