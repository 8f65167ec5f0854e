"""Pairs of towers ranked before training: the table of ``clasp pair``.

Input: a ``TowerPair`` for each combination, the best first. Output: the table, and the command that trains a pair.
Note: the metric is that of heads in closed form on frozen towers; similarities are at the blocks where they are
highest, which by selection alone are slightly above the baseline. Pairs of the same metric share their rank.
"""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import dataclass

from clasp.analysis.layer_similarity import LayerSimilarity
from clasp.data.sample_size import few_validation_pairs
from clasp.errors import counted
from clasp.report.tables import AnnotatedTable, format_interval, format_metric
from clasp.training.cost.ledger import format_si

_COLUMNS = ("rank", "image", "text", "metric", "95 %", "k-NN", "CKA", "trained", "s")


@dataclass(frozen=True, slots=True, kw_only=True)
class TowerPair:
    """An image tower and a text tower, and what was measured of them.

    ``primary``, ``metric``, ``interval``: the validation metric of the heads in closed form, a fraction, and its 95 %
    interval, on ``validated`` pairs. ``layers``: what the heads read, with ridge and width. ``trained``: parameters of
    the heads. ``nearest`` and ``most_aligned``: the blocks with the highest mutual k-NN above its baseline, and those
    with the highest CKA; ``None`` where too few captions differ. ``feature_seconds``: both towers over all pairs, or
    reading them from the feature cache; ``seconds``: all that is done for this combination alone.
    """

    image: str
    text: str
    primary: str
    metric: float
    interval: tuple[float, float]
    validated: int
    layers: str
    trained: int
    nearest: LayerSimilarity | None
    most_aligned: LayerSimilarity | None
    feature_seconds: float
    seconds: float
    overrides: tuple[str, ...]

    @property
    def command(self) -> str:
        """What trains this pair."""
        towers = (f"image.tower={self.image}", f"text.tower={self.text}")
        return shlex.join(("clasp", "train", "auto", *towers, *self.overrides))


def pair_ranks(pairs: Sequence[TowerPair]) -> list[str]:
    """The rank of each pair, from 1; pairs of the same metric have the rank of their first, marked ``=``."""
    values = [pair.metric for pair in pairs]
    return [f"{values.index(value) + 1}{'=' if values.count(value) > 1 else ''}" for value in values]


def pair_table(pairs: Sequence[TowerPair]) -> AnnotatedTable:
    """A row for each pair; below it what the ranking is worth, and the command for the first."""
    name = pairs[0].primary
    rows = [[rank, *_cells(pair, name)] for rank, pair in zip(pair_ranks(pairs), pairs, strict=True)]
    notes = few_validation_pairs(pairs[0].validated)
    notes.append(f"metric: {name} of heads in closed form on the validation pairs, both towers frozen")
    if near := sum(pair.metric >= pairs[0].interval[0] for pair in pairs[1:]):
        notes.append(f"{near} of {counted(len(pairs) - 1, 'other')} within the interval of the first: not told apart")
    if pairs[0].nearest is None:
        notes.append("no k-NN, no CKA: too few training pairs have a caption and a group of their own")
    else:
        notes.append("k-NN (mutual, 10 neighbours), CKA: above that of images and texts paired at random")
    notes += ["s: features of both towers + this pair", f"go on with: {pairs[0].command}"]
    return AnnotatedTable(_COLUMNS, rows, notes)


def pair_layer_table(pairs: Sequence[TowerPair]) -> AnnotatedTable:
    """For each pair the layers that the heads read, and the blocks that are most similar, image and text."""
    rows = [
        [pair.image, pair.text, pair.layers.partition(",")[0], _blocks(pair.nearest), _blocks(pair.most_aligned)]
        for pair in pairs
    ]
    return AnnotatedTable(("image", "text", "heads read layers", "k-NN at blocks", "CKA at blocks"), rows, [])


def _cells(pair: TowerPair, metric: str) -> list[str]:
    return [
        pair.image,
        pair.text,
        format_metric(metric, pair.metric),
        format_interval(metric, pair.interval),
        "" if pair.nearest is None else f"{neighbour_excess(pair.nearest):.3f}",
        "" if pair.most_aligned is None else f"{cka_excess(pair.most_aligned):.3f}",
        format_si(pair.trained, ""),
        f"{pair.feature_seconds:,.0f}+{pair.seconds:,.0f}",
    ]


def _blocks(row: LayerSimilarity | None) -> str:
    return "" if row is None else f"{row.image_block} and {row.text_block}"


def neighbour_excess(row: LayerSimilarity) -> float:
    """Mutual k-NN above its shuffled baseline."""
    return row.mutual_knn - row.mutual_knn_shuffled


def cka_excess(row: LayerSimilarity) -> float:
    """CKA above its shuffled baseline."""
    return row.cka - row.cka_shuffled
