"""Tiles against all logits at once: values, gradients, precision at the extremes, and the bytes both take."""

from __future__ import annotations

from weakref import finalize

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from clasp.training.losses import LOSSES, contrastive, info_nce, tiles
from reference_losses import NAIVE

GROUPINGS = ["diagonal", "several", "one caption"]


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    monkeypatch.setattr(tiles, "TILE_SIZE_CPU", 5)


def example(rows, grouping="several", width=6, seed=0):
    """float64 leaves (image, text, scale, bias) and groups; every text resembles its image."""
    generator = torch.Generator().manual_seed(seed)
    image, noise = torch.randn(2, rows, width, generator=generator, dtype=torch.float64)
    groups = {
        "diagonal": None,
        "several": torch.stack([torch.arange(rows) // 3 - 7, torch.randint(rows, (rows,), generator=generator)], dim=1),
        "one caption": torch.stack([torch.arange(rows), torch.zeros(rows, dtype=torch.long)], dim=1),
    }[grouping]
    leaves = [F.normalize(image, dim=1), F.normalize(image + noise, dim=1), torch.tensor(9.0), torch.tensor(-2.0)]
    return [leaf.double() for leaf in leaves], groups


def measured(loss, leaves, groups, part=0):
    """A part of the loss and its gradients."""
    leaves = [leaf.detach().requires_grad_() for leaf in leaves]
    value = loss(*leaves, groups=groups)[part]
    return [value.detach(), *torch.autograd.grad(value, leaves)]


def assert_equal(ours, theirs, **tolerance):
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, **tolerance)


@pytest.mark.parametrize("rows", [1, 3, 64, 100])
@pytest.mark.parametrize("width", [1, 32, 256])
def test_one_tile_is_the_same_bits(monkeypatch, rows, width):
    monkeypatch.setattr(tiles, "TILE_SIZE_CPU", 128)
    leaves, groups = example(rows, width=width)
    leaves = [leaf.float() for leaf in leaves]
    alone = measured(info_nce, leaves, groups)
    monkeypatch.setattr(contrastive, "tile_size", lambda _: 0)
    assert all(map(torch.equal, alone, measured(info_nce, leaves, groups)))


# --- exact ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("grouping", GROUPINGS)
@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("rows", [1, 4, 5, 6, 10, 23])
def test_tiles_equal_all_at_once(rows, name, grouping):
    leaves, groups = example(rows, grouping)
    for part in range(3):
        ours, theirs = (measured(losses[name], leaves, groups, part) for losses in (LOSSES, NAIVE))
        assert_equal(ours, theirs, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", LOSSES)
def test_gradients_are_those_of_the_value(name):
    leaves, groups = example(7)
    for leaf in leaves:
        leaf.requires_grad_()
    assert torch.autograd.gradcheck(lambda *inputs: tuple(LOSSES[name](*inputs, groups=groups)), leaves)


@pytest.mark.parametrize("name", LOSSES)
def test_parts_weighted_differently_share_one_backward(name):
    leaves, groups = example(12)

    def weighted(loss):
        return lambda *inputs, groups: [sum(w * part for w, part in zip((1, 3, -2), loss(*inputs, groups=groups)))]  # noqa: B905

    ours, theirs = (measured(weighted(losses[name]), leaves, groups) for losses in (LOSSES, NAIVE))
    assert_equal(ours, theirs, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("grouping", GROUPINGS)
@pytest.mark.parametrize("name", LOSSES)
def test_collapsed_embeddings(name, grouping):
    leaves, groups = example(11, grouping)
    leaves[0] = leaves[1] = leaves[0][:1].expand(11, -1)
    ours, theirs = (measured(losses[name], leaves, groups) for losses in (LOSSES, NAIVE))
    assert_equal(ours, theirs, rtol=1e-12, atol=1e-12)


# --- rounding ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("grouping", GROUPINGS)
@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_float32_at_a_scale_of_100_is_true_to_float32_rounding(dtype, name, grouping):
    """Against float64 of the same numbers: gradients to a few roundings of the largest, values of the scale."""
    leaves, groups = example(40, grouping)
    leaves[0], leaves[1] = leaves[0].to(dtype), leaves[1].to(dtype)
    leaves[2], leaves[3] = torch.tensor(100.0), torch.tensor(-10.0)
    value, *gradients = measured(LOSSES[name], leaves, groups)
    expected, *slopes = measured(NAIVE[name], [leaf.double() for leaf in leaves], groups)
    assert value.dtype == torch.float32
    torch.testing.assert_close(value.double(), expected, rtol=3e-6, atol=3e-6)
    assert [gradient.dtype for gradient in gradients] == [leaf.dtype for leaf in leaves]
    for gradient, slope in zip(gradients, slopes, strict=True):
        room = max(3e-5, 2 * torch.finfo(gradient.dtype).eps) * slope.abs().max().item()
        torch.testing.assert_close(gradient.double(), slope, rtol=0, atol=room + 1e-6)


@pytest.mark.parametrize("name", LOSSES)
def test_logits_at_both_ends_of_the_scale(name):
    """A row at -100 beside one at +100: neither may vanish or overflow; half the pairs are as wrong as can be."""
    sign = torch.tensor([1.0, -1.0]).repeat(6)[:, None]
    image = F.normalize(torch.ones(12, 4), dim=1) * sign
    leaves = [image, -image, torch.tensor(100.0), torch.tensor(0.0)]
    ours = measured(LOSSES[name], leaves, None)
    theirs = measured(NAIVE[name], [leaf.double() for leaf in leaves], None)
    assert all(tensor.isfinite().all() for tensor in ours)
    assert_equal([tensor.double() for tensor in ours], theirs, rtol=1e-5, atol=1e-6)


def test_certain_pairs_have_a_loss_of_zero():
    """The logit of a positive and the sum it is taken from are the same numbers, so they cancel."""
    image = torch.eye(12)
    for part in LOSSES["infonce"](image, image, torch.tensor(100.0)):
        assert 0 <= part.item() < 1e-12


@pytest.mark.parametrize("name", LOSSES)
def test_autocast_touches_neither_direction(name):
    leaves = [leaf.float() for leaf in example(12)[0]]
    plain = measured(LOSSES[name], leaves, None)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = measured(LOSSES[name], leaves, None)  # backward as well
    assert all(torch.equal(a, b) for a, b in zip(plain, inside, strict=True))


@pytest.mark.parametrize("name", LOSSES)
def test_twice_is_the_same(name):
    leaves, groups = example(23)
    first, second = (measured(LOSSES[name], [leaf.float() for leaf in leaves], groups) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


# --- memory --------------------------------------------------------------------------------------------------------


class CountBytes(TorchDispatchMode):
    """Counts the bytes of all storages that are alive, and remembers the most there were."""

    def __init__(self):
        super().__init__()
        self.alive = self.peak = 0
        self.known = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                self.count(tensor.untyped_storage())
        return out

    def count(self, storage):
        if storage._cdata in self.known:
            return
        self.known.add(storage._cdata)
        self.alive += storage.nbytes()
        self.peak = max(self.peak, self.alive)
        finalize(storage, self.forget, storage._cdata, storage.nbytes())

    def forget(self, key, size):
        self.known.discard(key)
        self.alive -= size


def peak_bytes(loss, rows, width):
    """Of forward and backward, embeddings and their gradients included; nothing is computed."""
    with FakeTensorMode(), CountBytes() as counted:
        leaves = [torch.empty(rows, width, requires_grad=True) for _ in range(2)]
        leaves += [torch.empty((), requires_grad=True) for _ in range(2)]
        torch.autograd.grad(loss(*leaves, groups=torch.zeros(rows, 2, dtype=torch.long))[0], leaves)
    return counted.peak


@pytest.mark.parametrize("name", LOSSES)
def test_a_batch_of_32768_takes_a_twentieth_of_the_memory(name, monkeypatch):
    monkeypatch.setattr(tiles, "TILE_SIZE_CPU", tiles.TILE_SIZE_GPU)  # the larger of the two, and fewer to count
    rows, width = 32768, 512
    naive, tiled = (peak_bytes(losses[name], rows, width) for losses in (NAIVE, LOSSES))
    assert naive > 2 * 4 * rows**2, "the count must see the logits"
    assert tiled < naive / 20
    # embeddings, scaled images, gradients and what autograd adds to them; three tiles
    assert tiled < 4 * (10 * rows * width + 3 * tiles.TILE_SIZE_CPU**2 + 100 * rows)


@pytest.mark.parametrize("tile", [5, 1024])
@pytest.mark.parametrize("name", LOSSES)
def test_nothing_that_is_kept_for_backward_is_larger_than_the_embeddings(name, tile, monkeypatch):
    monkeypatch.setattr(tiles, "TILE_SIZE_CPU", tile)
    leaves, groups = example(200)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x.numel()) or x, lambda x: x):
        LOSSES[name](*[leaf.requires_grad_() for leaf in leaves], groups=groups)
    assert max(kept) == leaves[0].numel()
