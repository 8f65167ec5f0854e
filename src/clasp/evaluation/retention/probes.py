"""Probes of a single tower: classification of images, and retrieval among captions, by its features.

Input: pairs and options. Output: an ``ImageProbe`` and ``TextProbe``s, which score ``TowerFeatures``. Errors in the
pairs are raised before anything is computed. Note: the text probes depend on the pairs. Where captions name languages,
those of each language retrieve the caption of the same group in the anchor language; where a group has several captions
in one language, each of them retrieves the others.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from clasp.analysis.tower_features import TowerFeatures
from clasp.data.pairs import Pairs, split_by_group
from clasp.errors import counted
from clasp.evaluation import metrics, probes
from clasp.evaluation.class_labels import has_labels
from clasp.evaluation.language_sets import TrainingStatus, training_status
from clasp.evaluation.name_checks import quote_first
from clasp.types import Pair, UserError

_FIT_FRACTION = 0.5  # of the groups, where the pairs to fit on are not given
TEXT_RECALL_KS = (1, 5)
IMAGE_PROBES = ("image_knn", "image_linear")

_GroupedCaption = tuple[str, str]  # a caption and its group


@dataclass(frozen=True, slots=True)
class ProbeScores:
    """The score of each query, between 0 and 1, its group, and the mean chance level."""

    values: Float[Tensor, " q"]
    groups: tuple[str, ...]
    chance: float


# --- images ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class ImageProbe:
    """Images with a class: the fit set and the queries.

    ``skipped``: number of queries left out since their class is not in the fit set.
    """

    fit: Sequence[Pair]
    queries: Sequence[Pair]
    label: str
    classes: tuple[str, ...]
    skipped: int

    def score(self, name: str, fit: TowerFeatures, queries: TowerFeatures) -> ProbeScores:
        """Score the queries with one of ``IMAGE_PROBES``, given the features of fit set and queries."""
        known, asked = _with_features(self.fit, fit), _with_features(self.queries, queries)
        features = fit.rows_of([pair.id for pair in known]), queries.rows_of([pair.id for pair in asked])
        labels = self._labels(known), self._labels(asked)
        if name == "image_knn":
            answers = probes.knn_probe(features[0], labels[0], features[1], labels[1])
        else:
            number = {group: place for place, group in enumerate(sorted({pair.group for pair in known}))}
            groups = torch.tensor([number[pair.group] for pair in known])
            answers = probes.linear_probe(features[0], labels[0], groups, features[1], labels[1])
        groups_asked = tuple(pair.group for pair in asked)
        return ProbeScores(answers.right, groups_asked, probes.commonest_class_share(labels[1]))

    def _labels(self, pairs: Iterable[Pair]) -> Int[Tensor, " n"]:
        number = {name: place for place, name in enumerate(self.classes)}
        return torch.tensor([number[str(pair.meta[self.label])] for pair in pairs])


def make_image_probe(pairs: Pairs, fit: Pairs | None, label: str, data: str, fit_name: str) -> ImageProbe:
    """Fit on ``fit`` or, where there is none, on the half of ``pairs`` that a hash of their group chooses.

    Raises ``UserError`` for fewer than two classes, for a fit set that lacks classes or shares images with ``pairs``.
    """
    classes = {str(pair.meta[label]) for pair in pairs}
    if len(classes) < 2:
        raise UserError(f"{data}: {label!r} is {next(iter(classes))!r} for every image; give two classes")
    if fit is None:
        return _split_in_half(pairs, label, data)
    if not has_labels(fit, label, fit_name):
        raise UserError(f"{fit_name} has no column {label!r}, in which {data} has its classes")
    known = {str(pair.meta[label]) for pair in fit}
    if lacking := sorted(classes - known):
        raise UserError(
            f"fit={fit_name} has no image of {len(lacking)} of the {len(classes)} classes: {quote_first(lacking)}"
        )
    require_disjoint(pairs, fit, data, fit_name)
    return ImageProbe(fit, pairs, label, tuple(sorted(known)), 0)


def require_disjoint(pairs: Pairs, fit: Pairs, data: str, fit_name: str) -> None:
    """Raises ``UserError`` for images that are in both."""
    seen = {(pair.image.name, pair.image.version) for pair in fit}
    if twice := [pair.id for pair in pairs if (pair.image.name, pair.image.version) in seen]:
        raise UserError(
            f"{len(twice)} of {counted(len(pairs), 'image')} of {data} are in fit={fit_name} too: {quote_first(twice)}"
        )


def _split_in_half(pairs: Pairs, label: str, data: str) -> ImageProbe:
    if len({pair.group for pair in pairs}) < 2:
        raise UserError(f"{data} is all one group, so none of it can be set aside to fit on; give fit=PAIRS")
    fit, asked = split_by_group(pairs, 1 - _FIT_FRACTION, salt="kept")
    known = {str(pair.meta[label]) for pair in fit}
    answerable = [pair for pair in asked if str(pair.meta[label]) in known]
    if len(known) < 2 or not answerable:
        raise UserError(f"{data} has too few images of each of its classes in {label!r} to fit on half; give fit=PAIRS")
    return ImageProbe(fit, answerable, label, tuple(sorted(known)), len(asked) - len(answerable))


# --- captions --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class CaptionSearch:
    """Query captions, and the gallery in which one of the same group is to be retrieved."""

    queries: tuple[_GroupedCaption, ...]
    gallery: tuple[_GroupedCaption, ...]


@dataclass(frozen=True, slots=True)
class TextProbe:
    """Retrieval of captions of the same group by captions in one language, in one or several searches.

    ``kind``: ``text`` for captions in the anchor language, ``captions`` for others in the same. ``language_set``: the
    set that ``language`` belongs to; empty where that is unknown.
    """

    kind: Literal["text", "captions"]
    language_set: TrainingStatus
    language: str
    searches: tuple[CaptionSearch, ...]

    def score(self, features: TowerFeatures, k: int) -> ProbeScores:
        """For each query, whether one of its group is among the first ``k`` by cosine."""
        row = {text: place for place, text in enumerate(features.ids)}
        unit = F.normalize(features.plain_pooled, dim=1)
        values, chance = [], []
        for turn in self.searches:
            queries, gallery = (unit[[row[text] for text, _ in side]] for side in (turn.queries, turn.gallery))
            values.append(metrics.hit_at_k(metrics.rank_counts(queries, gallery, *_group_labels(turn)), k))
            chance.append(metrics.hit_at_k(metrics.chance_rank_counts(*_group_labels(turn)), k))
        groups = tuple(group for turn in self.searches for _, group in turn.queries)
        return ProbeScores(torch.cat(values), groups, torch.cat(chance).mean().item())


def make_text_probes(
    pairs: Sequence[Pair], languages: Sequence[str], anchor: str, trained: AbstractSet[str] | None, data: str
) -> list[TextProbe]:
    """The text probes of captions in ``languages``, trained languages first.

    Captions without a language are probed where no language is named.

    Raises ``UserError`` where captions are in two languages and none is the anchor.
    """
    by_language = _captions_by_language(pairs)
    named = sorted(by_language.keys() - {""})
    if anchor not in named and len(named) > 1:
        raise UserError(
            f"no caption of {data} is in the anchor language {anchor!r}; anchor= one of: {', '.join(named)}"
        )
    others = [language for language in languages if language != anchor]
    probes = []
    for language in others if anchor in by_language else []:
        if turn := _cross_language_search(by_language[language], by_language[anchor]):
            probes.append(TextProbe("text", training_status(language, trained), language, (turn,)))
    for language in languages or [""]:
        if turns := _within_language_searches(by_language.get(language, {})):
            probes.append(TextProbe("captions", training_status(language, trained), language, turns))
    return sorted(probes, key=lambda probe: (probe.kind != "text", probe.language_set != "trained", probe.language))


def _captions_by_language(pairs: Iterable[Pair]) -> dict[str, dict[str, list[str]]]:
    """Language to group to its different captions, in the order of the pairs."""
    found: dict[str, dict[str, dict[str, None]]] = {}
    for pair in pairs:
        for caption in pair.captions:
            found.setdefault(caption.language, {}).setdefault(pair.group, {})[caption.text] = None
    return {language: {group: list(texts) for group, texts in of.items()} for language, of in found.items()}


def _cross_language_search(
    query_captions: Mapping[str, Sequence[str]], anchor: Mapping[str, Sequence[str]]
) -> CaptionSearch | None:
    queries = tuple((text, group) for group, texts in query_captions.items() if group in anchor for text in texts)
    gallery = tuple((text, group) for group, texts in anchor.items() for text in texts)
    return CaptionSearch(queries, gallery) if queries and len(anchor) > 1 else None


def _within_language_searches(captions: Mapping[str, Sequence[str]]) -> tuple[CaptionSearch, ...]:
    """For each n, the n-th captions of all groups are queries, the other captions the gallery.

    Groups with one caption are in the gallery but no queries.
    """
    several = [group for group, texts in captions.items() if len(texts) > 1]
    if len(several) < 2:
        return ()
    turns = []
    for n in range(max(len(captions[group]) for group in several)):
        queries = tuple((captions[group][n], group) for group in several if n < len(captions[group]))
        gallery = tuple(
            (text, group)
            for group, texts in captions.items()
            for place, text in enumerate(texts)
            if place != n or len(texts) == 1
        )
        turns.append(CaptionSearch(queries, gallery))
    return tuple(turns)


def _with_features(pairs: Sequence[Pair], features: TowerFeatures) -> list[Pair]:
    there = set(features.ids)
    return [pair for pair in pairs if pair.id in there]


def _group_labels(search: CaptionSearch) -> tuple[Int[Tensor, " q"], Int[Tensor, " n"]]:
    number = {group: place for place, group in enumerate(dict.fromkeys(group for _, group in search.gallery))}
    queries, gallery = ([number[group] for _, group in side] for side in (search.queries, search.gallery))
    return torch.tensor(queries), torch.tensor(gallery)
