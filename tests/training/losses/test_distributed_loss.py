"""A batch on two and on three processes (gloo, CPU) has the loss and the gradients of the batch on one."""

from __future__ import annotations

import multiprocessing
import os

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F

from clasp.training.losses import LOSSES, ProcessRing, tiles
from reference_losses import NAIVE

ROWS = 5  # of each process
GROUPS = {
    "diagonal": None,
    # a group over ranks 0 and 1, one over all; a caption over ranks 0 and 2, one within a rank
    "several": torch.tensor(
        [
            [[0, 10], [1, 11], [2, 12], [9, 13], [4, 14]],
            [[0, 20], [6, 21], [7, 21], [9, 23], [8, 24]],
            [[11, 10], [12, 31], [13, 32], [9, 33], [14, 34]],
        ]
    ).flatten(0, 1),
}


def example(size):
    generator = torch.Generator().manual_seed(size)
    image, text = F.normalize(torch.randn(2, size * ROWS, 6, generator=generator, dtype=torch.float64), dim=-1)
    return image, text, torch.tensor(7.0).double(), torch.tensor(-1.0).double()


def measured(loss, leaves, part, **options):
    leaves = [leaf.clone().requires_grad_() for leaf in leaves]
    value = loss(*leaves, **options)[part]
    return [value.detach(), *torch.autograd.grad(value, leaves)]


def work(rank, folder):
    """One process: every loss in the ring of all three, and in that of the last two."""
    torch.set_num_threads(1)
    tiles.TILE_SIZE_CPU = 3
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=3)
    answers = {}
    pair = dist.new_group([1, 2])
    for size, ring in ((3, ProcessRing.from_group()), (2, ProcessRing.from_group(pair) if rank else None)):
        if ring is None:
            continue
        own = slice(ring.rank * ROWS, (ring.rank + 1) * ROWS)
        image, text, scale, bias = example(size)
        for name, loss in LOSSES.items():
            for grouping, groups in GROUPS.items():
                for part in range(3):
                    here = None if groups is None else groups[: size * ROWS][own]
                    leaves = (image[own], text[own], scale, bias)
                    answers[size, name, grouping, part] = measured(loss, leaves, part, groups=here, ring=ring)
    torch.save(answers, f"{folder}/{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def answers(tmp_path_factory):
    """What each of three processes found. They are forks of a fresh process that has imported torch once."""
    folder = tmp_path_factory.mktemp("ring")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "clasp.training.losses"])
    processes = [context.Process(target=work, args=(rank, str(folder))) for rank in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(100)
        if process.is_alive():
            process.kill()
    assert [process.exitcode for process in processes] == [0, 0, 0]
    return [torch.load(os.path.join(folder, f"{rank}.pt")) for rank in range(3)]


@pytest.mark.parametrize("part", [0, 1, 2], ids=["total", "image_to_text", "text_to_image"])
@pytest.mark.parametrize("grouping", GROUPS)
@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("size", [2, 3])
def test_the_ring_equals_one_process(answers, size, name, grouping, part):
    groups = GROUPS[grouping]
    value, image, text, scale, bias = measured(
        NAIVE[name], example(size), part, groups=None if groups is None else groups[: size * ROWS]
    )
    found = [answers[rank][size, name, grouping, part] for rank in range(3 - size, 3)]
    for ours in found:
        torch.testing.assert_close(ours[0], value, rtol=1e-12, atol=1e-12)
    parts = [torch.stack(tensors) for tensors in zip(*found, strict=True)]
    torch.testing.assert_close(parts[1].flatten(0, 1), image, rtol=1e-11, atol=1e-12)
    torch.testing.assert_close(parts[2].flatten(0, 1), text, rtol=1e-11, atol=1e-12)
    torch.testing.assert_close(parts[3].sum(0), scale, rtol=1e-11, atol=1e-12)  # shares
    torch.testing.assert_close(parts[4].sum(0), bias, rtol=1e-11, atol=1e-12)
