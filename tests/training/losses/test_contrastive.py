"""Losses against answers worked by hand, and against slow explicit loops (values and gradients, float64)."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from clasp.training.losses import LOSSES, info_nce, sigmoid_loss
from clasp.training.losses.tiles import dense_group_ids, iterate_logit_tiles

LOG2 = math.log(2)
ONE = torch.tensor(1.0, dtype=torch.float64)


def with_odds(table):
    """Embeddings whose logits at scale 1 are the logs of a table, so that softmax and sigmoid are fractions."""
    logits = torch.tensor(table, dtype=torch.float64).log()
    return torch.eye(len(table), dtype=torch.float64), logits.T.contiguous()


def example(seed=0, rows=7, width=5):
    generator = torch.Generator().manual_seed(seed)
    draw = torch.randn(2, rows, width, generator=generator, dtype=torch.float64)
    image, text = F.normalize(draw, dim=-1)
    groups = torch.stack([torch.randint(4, (rows,), generator=generator), torch.arange(rows) // 2 * 3], dim=1)
    return image, text, groups


# --- by hand -------------------------------------------------------------------------------------------------------


def test_info_nce_of_two_pairs():
    image, text = with_odds([[3, 1], [1, 1]])
    loss = info_nce(image, text, ONE)
    # rows: 3 of 4, 1 of 2; the table is symmetric
    assert loss.image_to_text.item() == pytest.approx((math.log(4 / 3) + LOG2) / 2)
    assert loss.text_to_image.item() == pytest.approx((math.log(4 / 3) + LOG2) / 2)


def test_info_nce_of_three_pairs_two_of_one_image():
    image, text = with_odds([[1, 2, 1], [2, 2, 4], [1, 1, 6]])
    loss = info_nce(image, text, ONE, groups=torch.tensor([[5, 0], [5, 1], [6, 2]]))
    rows = [(2 + 1) / 2 * LOG2, 2 * LOG2, math.log(8 / 6)]  # sums 4, 8, 8
    columns = [(2 + 1) / 2 * LOG2, math.log(5 / 2), math.log(11 / 6)]  # sums 4, 5, 11
    assert loss.image_to_text.item() == pytest.approx(sum(rows) / 3)
    assert loss.text_to_image.item() == pytest.approx(sum(columns) / 3)
    assert loss.total.item() == pytest.approx(sum(rows + columns) / 6)


def test_sigmoid_of_two_pairs_and_its_bias():
    image, text = with_odds([[3, 1], [1, 3]])
    # two positives at 3:1, two negatives at 1:1, divided by two
    assert sigmoid_loss(image, text, ONE).total.item() == pytest.approx(math.log(4 / 3) + LOG2)
    # the bias doubles all odds: 6:1 and 2:1
    biased = sigmoid_loss(image, text, ONE, torch.tensor(LOG2, dtype=torch.float64))
    assert biased.total.item() == pytest.approx(math.log(7 / 6) + math.log(3))
    assert biased.image_to_text == biased.text_to_image == biased.total


def test_sigmoid_of_three_pairs_two_with_one_caption():
    image, text = with_odds([[1, 2, 1], [2, 2, 4], [1, 1, 6]])
    loss = sigmoid_loss(image, text, ONE, groups=torch.tensor([[0, 8], [1, 8], [2, 9]]))
    right = [1 / 2, 2 / 3, 2 / 3, 2 / 3, 6 / 7]  # (0,0) (0,1) (1,0) (1,1) (2,2)
    wrong = [1 / 2, 1 / 5, 1 / 2, 1 / 2]  # (0,2) (1,2) (2,0) (2,1)
    assert loss.total.item() == pytest.approx(-sum(map(math.log, right + wrong)) / 3)


def test_scale_multiplies_the_cosines():
    image = text = torch.eye(2, dtype=torch.float64)
    for scale in (1.0, 10.0):
        loss = info_nce(image, text, scale * ONE)
        assert loss.total.item() == pytest.approx(math.log(1 + math.exp(-scale)))


# --- several positives ---------------------------------------------------------------------------------------------


def positives_of(groups):
    kin = dense_group_ids(torch.tensor(groups), torch.float64)
    (tile,) = iterate_logit_tiles(
        torch.eye(len(groups), dtype=torch.float64), torch.eye(len(groups), dtype=torch.float64), kin, kin
    )
    return tile.positive.int().tolist()


def test_positives_agree_in_either_column():
    expected = [[1, 1, 0, 0], [1, 1, 1, 0], [0, 1, 1, 0], [0, 0, 0, 1]]  # mutual, but not passed on from 0 to 2
    assert positives_of([[1, 1], [1, 2], [3, 2], [4, 4]]) == expected


def test_a_number_means_nothing_across_columns():
    assert positives_of([[1, 2], [2, 1]]) == [[1, 0], [0, 1]]


def test_numbers_too_large_for_a_float_are_told_apart():
    assert positives_of([[2**62, -(2**62)], [2**62 + 1, -(2**62) + 1]]) == [[1, 0], [0, 1]]


@pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)
def test_groups_all_different_are_no_groups(loss):
    image, text, _ = example()
    apart = torch.arange(len(image))[:, None].expand(-1, 2)
    for plain, grouped in zip(loss(image, text, 7 * ONE), loss(image, text, 7 * ONE, groups=apart), strict=True):
        assert grouped.item() == pytest.approx(plain.item(), rel=1e-12)


@pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)
def test_a_batch_of_positives_only_is_finite(loss):
    image, text, _ = example()
    image.requires_grad_()
    total = loss(image, text, 100 * ONE, -10 * ONE, groups=torch.zeros(len(image), 2, dtype=torch.long)).total
    total.backward()
    assert total.isfinite()
    assert image.grad is not None and image.grad.isfinite().all()


@pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)
def test_another_caption_of_the_same_image_is_not_pushed_away(loss):
    """Raising the score of a group-mate lowers the loss; without groups it raises it."""
    image = torch.eye(3, dtype=torch.float64)
    text = torch.eye(3, dtype=torch.float64).requires_grad_()
    groups = torch.tensor([[0, 0], [0, 1], [2, 2]])
    (with_groups,) = torch.autograd.grad(loss(image, text, ONE, groups=groups).total, text)
    (without,) = torch.autograd.grad(loss(image, text, ONE).total, text)
    assert with_groups[1, 0] < 0 < without[1, 0]
    assert with_groups[2, 0] > 0


# --- against slow versions -----------------------------------------------------------------------------------------


def are_positives(groups, i, j):
    if groups is None:
        return i == j
    return bool(groups[i, 0] == groups[j, 0] or groups[i, 1] == groups[j, 1])


def slow_info_nce(image, text, scale, bias, groups):
    def one_way(queries, gallery):
        losses = []
        for i, query in enumerate(queries):
            logits = [scale * query.dot(item) + bias for item in gallery]
            right = [logit for j, logit in enumerate(logits) if are_positives(groups, i, j)]
            losses.append(torch.stack(logits).exp().sum().log() - sum(right) / len(right))
        return sum(losses) / len(losses)

    there, back = one_way(image, text), one_way(text, image)
    return (there + back) / 2, there, back


def slow_sigmoid(image, text, scale, bias, groups):
    total = 0
    for i, x in enumerate(image):
        for j, y in enumerate(text):
            sign = 1 if are_positives(groups, i, j) else -1
            total = total + torch.log(1 / (1 + torch.exp(sign * (-scale * x.dot(y) - bias))))
    total = -total / len(image)
    return total, total, total


SLOW = {"infonce": slow_info_nce, "sigmoid": slow_sigmoid}


@pytest.mark.parametrize("grouped", [False, True], ids=["diagonal", "grouped"])
@pytest.mark.parametrize("name", LOSSES)
def test_values_and_gradients_equal_explicit_loops(name, grouped):
    image, text, groups = example()
    groups = groups if grouped else None
    leaves = [image, text, torch.tensor(6.5, dtype=torch.float64), torch.tensor(-1.5, dtype=torch.float64)]
    for leaf in leaves:
        leaf.requires_grad_()
    fast, slow = LOSSES[name](*leaves, groups=groups), SLOW[name](*leaves, groups)
    for ours, theirs in zip(fast, slow, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
        for a, b in zip(
            torch.autograd.grad(ours, leaves, retain_graph=True),
            torch.autograd.grad(theirs, leaves, retain_graph=True),
            strict=True,
        ):
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


def test_the_bias_cancels_in_info_nce():
    image, text, groups = example()
    with_bias = info_nce(image, text, 5 * ONE, 3 * ONE, groups=groups).total
    assert with_bias.item() == pytest.approx(info_nce(image, text, 5 * ONE, groups=groups).total.item(), rel=1e-12)


@pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)
def test_order_of_the_batch_does_not_matter(loss):
    image, text, groups = example()
    order = torch.randperm(len(image), generator=torch.Generator().manual_seed(1))
    shuffled = loss(image[order], text[order], 5 * ONE, groups=groups[order]).total
    assert shuffled.item() == pytest.approx(loss(image, text, 5 * ONE, groups=groups).total.item(), rel=1e-12)


@pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)
def test_autocast_and_half_precision_leave_logits_precise(loss):
    image, text = (x.float() for x in example()[:2])
    scale = torch.tensor(100.0)
    plain = loss(image, text, scale).total
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(loss(image, text, scale).total, plain)
    half = loss(image.bfloat16(), text.bfloat16(), scale).total
    assert half.dtype == torch.float32
    assert torch.equal(half, loss(image.bfloat16().float(), text.bfloat16().float(), scale).total)
