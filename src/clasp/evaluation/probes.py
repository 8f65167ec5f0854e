"""Probes of frozen features with labels: a k-NN classifier and a linear probe.

Input: features of a fit set and of query images, with class numbers. Output: ``ProbeAnswers``, for each query whether
it is right, so that means and intervals can be computed; of images with several classes the scores of all. Pure. Note:
ties, among neighbours or among classes, are broken at random as in ``metrics``, so that of collapsed features the
commonest class of the fit set is predicted. scikit-learn is imported only here.
"""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from clasp.evaluation.metrics import TIE_TOLERANCE
from clasp.evaluation.multilabel import average_precision

if TYPE_CHECKING:
    from sklearn.linear_model import LogisticRegression

_DEFAULT_NEIGHBOURS, _DEFAULT_TEMPERATURE = 20, 0.07
_C_GRID = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)  # values of C, the inverse of the penalty on standardised features
HELD_OUT_EVERY = 4  # one group in so many of each class chooses among them
_MAX_ITERATIONS = 500


class ProbeAnswers(NamedTuple):
    """For each query whether its class is predicted (0 or 1; a fraction where there is a tie), and the number of the
    predicted class, of tied ones the first."""

    right: Float[Tensor, " q"]
    predicted: Int[Tensor, " q"]


def knn_probe(
    fit: Float[Tensor, "n D"],
    fit_labels: Int[Tensor, " n"],
    queries: Float[Tensor, "q D"],
    query_labels: Int[Tensor, " q"],
    *,
    k: int = _DEFAULT_NEIGHBOURS,
    temperature: float = _DEFAULT_TEMPERATURE,
    scores_at_once: int = 1 << 22,
) -> ProbeAnswers:
    """Whether the ``k`` nearest of the fit set, by cosine, vote for the right class; each weighs exp(cosine / T).

    Wu et al., CVPR 2018, section 3.4; k = 20 and T = 0.07 as in DINO (Caron et al., ICCV 2021, section 4.1). Ours
    shares the last places among neighbours that are equally near, and a tied vote among its classes. Where there are
    fewer than ``k``, all vote. Memory: a few times ``scores_at_once`` numbers.
    """
    fit, queries = (F.normalize(features.float(), dim=1) for features in (fit, queries))
    k, classes = min(k, len(fit)), int(torch.cat([fit_labels, query_labels]).max()) + 1
    right, predicted = [], []
    for rows in torch.arange(len(queries)).split(max(1, scores_at_once // len(fit))):
        scores = queries[rows] @ fit.T
        last = scores.topk(k, dim=1).values[:, -1:]
        nearer, level = scores > last + TIE_TOLERANCE, (scores - last).abs() <= TIE_TOLERANCE
        places = (k - nearer.sum(dim=1, keepdim=True)).double() / level.sum(dim=1, keepdim=True)
        weights = (scores.double() / temperature).exp() * torch.where(level, places, nearer.double())
        votes = weights.new_zeros(len(rows), classes).index_add(1, fit_labels, weights)
        first = votes >= votes.amax(dim=1, keepdim=True) * (1 - TIE_TOLERANCE / temperature)
        of_right = first.gather(1, query_labels[rows][:, None])[:, 0]
        right.append(of_right.double() / first.sum(dim=1))
        predicted.append(first.int().argmax(dim=1))
    return ProbeAnswers(torch.cat(right), torch.cat(predicted))


def linear_probe(
    fit: Float[Tensor, "n D"],
    fit_labels: Int[Tensor, " n"],
    fit_groups: Int[Tensor, " n"],
    queries: Float[Tensor, "q D"],
    query_labels: Int[Tensor, " q"],
) -> ProbeAnswers:
    """Whether logistic regression on the fit set names the right class.

    L-BFGS on features standardised by the fit set, as linear probes of CLIP are (Radford et al., 2021, appendix A.3);
    theirs sweeps 96 strengths of the penalty on a validation set, ours the five of ``_C_GRID`` on every fourth group
    of each class of the fit set, and then fits to all of it. Without a class of four groups, C is the middle one.
    """
    fit, queries = _standardized(fit, queries)
    held_out = _held_out_mask(fit_labels, fit_groups)
    strength = _C_GRID[len(_C_GRID) // 2]
    if held_out.any():
        inside, outside = (fit[~held_out], fit_labels[~held_out]), (fit[held_out], fit_labels[held_out])
        strength = max(_C_GRID, key=lambda c: float(_logistic_regression_answers(*inside, *outside, c).right.mean()))
    return _logistic_regression_answers(fit, fit_labels, queries, query_labels, strength)


def multilabel_probe(
    fit: Float[Tensor, "n D"],
    fit_labels: Bool[Tensor, "n C"],
    fit_groups: Int[Tensor, " n"],
    queries: Float[Tensor, "q D"],
) -> Float[Tensor, "q C"]:
    """The scores of queries for classes of which an image may have several: a logistic regression of each class against
    all other images, as ``linear_probe``; one penalty for all classes, by mean average precision on every fourth group.

    Every class is that of some images of the fit set and not of others.
    """
    fit, queries = _standardized(fit, queries)
    places = fit_groups.unique(return_inverse=True)[1]
    held_out = places % HELD_OUT_EVERY == HELD_OUT_EVERY - 1
    strength = _C_GRID[len(_C_GRID) // 2]
    inside, outside = fit_labels[~held_out], fit_labels[held_out]
    chosen = inside.any(dim=0) & ~inside.all(dim=0) & outside.any(dim=0)
    if chosen.any():

        def precision(c: float) -> float:
            scores = _one_against_all(fit[~held_out], inside[:, chosen], fit[held_out], c)
            return float(average_precision(scores, outside[:, chosen]).mean())

        strength = max(_C_GRID, key=precision)
    return _one_against_all(fit, fit_labels, queries, strength)


def _standardized(fit: Tensor, queries: Tensor) -> tuple[Tensor, Tensor]:
    """Both by mean and deviation of the fit set; a constant feature, which is uninformative, becomes 0."""
    deviation, mean = torch.std_mean(fit.double(), dim=0, correction=0)
    scale = torch.where(deviation > 1e-6 * deviation.max(), 1 / deviation, 0.0)
    return (fit.double() - mean) * scale, (queries.double() - mean) * scale


def _one_against_all(fit: Tensor, labels: Bool[Tensor, "n C"], queries: Tensor, c: float) -> Float[Tensor, "q C"]:
    columns = [_logistic_regression(fit, of_class, c).decision_function(queries.numpy()) for of_class in labels.T]
    return torch.stack([torch.from_numpy(column) for column in columns], dim=1)


def _logistic_regression_answers(
    fit: Tensor, fit_labels: Tensor, queries: Tensor, query_labels: Tensor, c: float
) -> ProbeAnswers:
    predicted = torch.from_numpy(_logistic_regression(fit, fit_labels, c).predict(queries.numpy()))
    return ProbeAnswers((predicted == query_labels).double(), predicted)


def _logistic_regression(fit: Tensor, labels: Tensor, c: float) -> LogisticRegression:
    # inside: it takes a second to import, and most evaluations need none of it
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression

    with warnings.catch_warnings():
        # a weak penalty on separable classes converges slowly; the weights reached are evaluated like the others
        warnings.simplefilter("ignore", ConvergenceWarning)
        return LogisticRegression(C=c, max_iter=_MAX_ITERATIONS).fit(fit.numpy(), labels.numpy())


def _held_out_mask(labels: Int[Tensor, " n"], groups: Int[Tensor, " n"]) -> Tensor:
    """Every fourth group of each class, from the fourth on: no class loses all it has, no group is on both sides."""
    seen: dict[int, set[int]] = {}
    held: dict[int, bool] = {}
    for label, group in sorted(set(zip(labels.tolist(), groups.tolist(), strict=True))):
        before = seen.setdefault(label, set())
        held.setdefault(group, len(before) % HELD_OUT_EVERY == HELD_OUT_EVERY - 1)
        before.add(group)
    return torch.tensor([held[group] for group in groups.tolist()], dtype=torch.bool)


def commonest_class_share(query_labels: Int[Tensor, " q"]) -> float:
    """The chance level of both probes: the share of the commonest class among the queries, the most that one answer to
    all of them can reach; for balanced queries one over the number of their classes."""
    return int(torch.bincount(query_labels).max()) / len(query_labels)
