"""The two questions one can put to embedded images: which of these classes is it, and which caption goes with it.

In: an encoder, images already embedded, and texts as streams that can be read again (``TextBatches``: each call yields
chunks of ids and inputs, in any order). Out: an ``QueryScores`` per direction, with a value for every query, so that
means and intervals over any part of them can follow. Unusual: what belongs together is told by name (an image's class;
the group of an image and of a caption), never by position; and what can be checked without reading a stream is checked
when the question is made. Knows protocols only; the one file read here is a class list.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path
from typing import Literal, TypeVar

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from clasp.evaluation import metrics
from clasp.types import Encoder, ImageInput, TextInput, UserError

ImageBatches = Callable[[], Iterable[tuple[Sequence[str], ImageInput]]]
TextBatches = Callable[[], Iterable[tuple[Sequence[str], TextInput]]]
# From texts to chunks for the text tower. The ids of a chunk are its texts themselves, so any order will do.
TextBatcher = Callable[[Sequence[str]], Iterable[tuple[Sequence[str], TextInput]]]
RetrievalDirection = Literal["image_to_text", "text_to_image"]

_RECALL_KS = (1, 5, 10)
_PLACEHOLDER = re.compile(r"\{c?\}")  # {} as in CLIP's templates, {c} as in CLIP_benchmark's

_InputT = TypeVar("_InputT")


@dataclass(frozen=True, slots=True)
class EmbeddingTable:
    """Unit vectors and whose they are; float32, on the CPU."""

    ids: tuple[str, ...]
    vectors: Float[Tensor, "n E"]


def embed_batches(
    chunks: Iterable[tuple[Sequence[str], _InputT]], encode: Callable[[_InputT], Float[Tensor, "B E"]], item_name: str
) -> EmbeddingTable:
    """Run a stream through one side of an encoder, without gradients. ``item_name`` names the items in errors.

    Raises:
        UserError: nothing in the stream, or one id twice.
    """
    ids: list[str] = []
    vectors: list[Tensor] = []
    with torch.inference_mode():
        for names, inputs in chunks:
            ids.extend(names)
            vectors.append(encode(inputs).float().cpu())
            assert len(vectors[-1]) == len(names), f"{len(names)} ids for {len(vectors[-1])} embeddings"
    if not ids:
        raise UserError(f"there are no {item_name}s to evaluate on")
    _refuse_repeats(ids, f"{item_name} ids")
    return EmbeddingTable(tuple(ids), torch.cat(vectors))


# --- answers -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class MeanMetric:
    """A metric that is a mean: over queries or, where ``cells`` are given, over the means of the cells."""

    values: Float[Tensor, " q"]
    cells: Int[Tensor, " q"] | None = None

    def value(self) -> float:
        """The metric: a fraction between 0 and 1."""
        if self.cells is None:
            return self.values.mean().item()
        return metrics.mean_per_class(self.values, self.cells)


@dataclass(frozen=True, slots=True)
class QueryScores:
    """What a question found out, in one direction (``direction``; empty where there is only one).

    ``groups`` holds the cluster of each query: the unit that is resampled for intervals. ``chance`` is what guessing
    would score on each metric.
    """

    direction: str
    groups: tuple[str, ...]
    means: Mapping[str, MeanMetric]
    medians: Mapping[str, float]
    chance: Mapping[str, float]

    def metrics(self) -> dict[str, float]:
        """Every metric by name."""
        return {name: mean.value() for name, mean in self.means.items()} | dict(self.medians)


# --- which class is it? --------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class ZeroShotQueries:
    """Zero-shot classification (CLIP, section 3.1): the class whose text is nearest to the image.

    A class's vector is the mean of the unit vectors of its prompts, made unit length again (prompt ensembling).

    Attributes:
        labels: image id to class name; None for an image that is not asked about (its class has no name here).
        classes: the class names, as they are put into the prompts.
        templates: texts with the placeholder ``{}`` or ``{c}``.
        read: makes text-tower inputs of prompts.
        groups: image id to cluster, for intervals; without it every image is its own.

    Raises:
        UserError: a class named twice, an empty name, fewer than two classes, no template, a template without
            placeholder, a label that is not a class. When asked: an image without label.
    """

    labels: Mapping[str, str | None]
    classes: Sequence[str]
    templates: Sequence[str]
    read: TextBatcher
    groups: Mapping[str, str] | None = None
    directions: tuple[str, ...] = field(default=("",), init=False)
    metric_names: tuple[str, ...] = field(default=("top1", "top5", "mean_per_class"), init=False)

    def __post_init__(self) -> None:
        _check_classes(self.classes, "the classes")
        if len(self.classes) < 2:
            raise UserError(f"classification needs at least two classes; there is only {list(self.classes)}")
        if not self.templates:
            raise UserError("classification needs at least one prompt template, such as 'a photo of a {}.'")
        for template in self.templates:
            if not _PLACEHOLDER.search(template):
                raise UserError(f"the template {template!r} has no place for the class name: write {{}} or {{c}} there")
        known = set(self.classes)
        for image, label in self.labels.items():
            if label is not None and label not in known:
                nearest = get_close_matches(label, self.classes, n=3, cutoff=0.0)
                raise UserError(
                    f"image {image!r} is labelled {label!r}, which is none of the {len(known)} classes; "
                    f"nearest: {', '.join(map(repr, nearest))}"
                )

    def score(self, encoder: Encoder, images: EmbeddingTable) -> list[QueryScores]:
        """Top-1 and top-5 accuracy over images, and the mean over classes of top-1 accuracy."""
        _require_known(images.ids, self.labels, "image", "label")
        number = {name: index for index, name in enumerate(self.classes)}
        asked = [(row, id, label) for row, id in enumerate(images.ids) if (label := self.labels[id]) is not None]
        if not asked:
            raise UserError("no image is labelled with one of the classes")
        rows, ids, labels = zip(*asked, strict=True)
        if self.groups is not None:
            _require_known(ids, self.groups, "image", "group")
        numbers = torch.tensor([number[label] for label in labels])
        candidates = torch.arange(len(self.classes))

        def measure(standings: metrics.RankCounts) -> dict[str, MeanMetric]:
            first = metrics.hit_at_k(standings, 1)
            found = MeanMetric(first), MeanMetric(metrics.hit_at_k(standings, 5)), MeanMetric(first, cells=numbers)
            return dict(zip(self.metric_names, found, strict=True))

        vectors = self.class_embeddings(encoder)
        means = measure(metrics.rank_counts(images.vectors[list(rows)], vectors, numbers, candidates))
        chance = measure(metrics.chance_rank_counts(numbers, candidates))
        groups = ids if self.groups is None else tuple(self.groups[id] for id in ids)
        return [QueryScores("", groups, means, {}, {name: mean.value() for name, mean in chance.items()})]

    def class_embeddings(self, encoder: Encoder) -> Float[Tensor, "C E"]:
        """The ensembled unit vector of every class, in the order of ``classes``."""
        prompts = [[_fill_template(template, name) for template in self.templates] for name in self.classes]
        distinct = list(dict.fromkeys(prompt for of_class in prompts for prompt in of_class))
        texts = embed_batches(self.read(distinct), encoder.embed_text, "prompt")
        row = {text: index for index, text in enumerate(texts.ids)}
        rows = torch.tensor([[row[prompt] for prompt in of_class] for of_class in prompts])
        return F.normalize(F.embedding_bag(rows, texts.vectors, mode="mean"), dim=1)


def _fill_template(template: str, name: str) -> str:
    return _PLACEHOLDER.sub(lambda _: name, template)  # a function, since a name may hold a backslash


def read_class_names(path: Path) -> list[str]:
    """The class names of a UTF-8 text file, one a line; empty lines are passed over.

    Raises:
        UserError: no such file, not text, no names in it, or a name twice.
    """
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read the class list {str(path)!r}: {error}") from None
    names = [line.strip() for line in lines if line.strip()]
    if not names:
        raise UserError(f"the class list {str(path)!r} is empty: it must hold one class name a line")
    _check_classes(names, f"the class list {str(path)!r}")
    return names


# --- which caption, which image? -----------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class RetrievalQueries:
    """Retrieval: an image and a caption belong together when their groups are equal.

    Recall@k asks for one of the right answers among the first k, as in CLIP papers (5 captions an image, either will
    do). An image whose group has no caption here (or the reverse) stays in the gallery but is not asked about.

    Attributes:
        image_groups: image id to group.
        text_groups: caption id to group.
        texts: the captions as inputs of the text tower, with their ids.
        parts: the directions to ask.

    Raises:
        UserError: no group has both an image and a caption; an unknown direction. When asked: an image or a caption
            without group.
    """

    image_groups: Mapping[str, str]
    text_groups: Mapping[str, str]
    texts: TextBatches
    directions: tuple[RetrievalDirection, ...] = ("image_to_text", "text_to_image")
    metric_names: tuple[str, ...] = field(
        default=(*(f"recall@{k}" for k in _RECALL_KS), "mean_recall", "median_rank"), init=False
    )

    def __post_init__(self) -> None:
        _check_directions(self.directions)
        _require_overlap(self.image_groups.values(), self.text_groups.values())

    def score(self, encoder: Encoder, images: EmbeddingTable) -> list[QueryScores]:
        """Recall at 1, 5 and 10, their mean, and the median rank of the first right answer; in each direction."""
        texts = embed_batches(self.texts(), encoder.embed_text, "caption")
        _require_known(images.ids, self.image_groups, "image", "group")
        _require_known(texts.ids, self.text_groups, "caption", "group")
        image_groups = [self.image_groups[id] for id in images.ids]
        text_groups = [self.text_groups[id] for id in texts.ids]
        _require_overlap(image_groups, text_groups)
        sides = {
            "image_to_text": (images.vectors, image_groups, texts.vectors, text_groups),
            "text_to_image": (texts.vectors, text_groups, images.vectors, image_groups),
        }
        return [self._score_direction(part, *sides[part]) for part in self.directions]

    def _score_direction(
        self,
        part: RetrievalDirection,
        queries: Float[Tensor, "q E"],
        query_groups: Sequence[str],
        gallery: Float[Tensor, "n E"],
        gallery_groups: Sequence[str],
    ) -> QueryScores:
        number = {group: index for index, group in enumerate(dict.fromkeys(gallery_groups))}
        asked = [row for row, group in enumerate(query_groups) if group in number]
        groups = tuple(query_groups[row] for row in asked)
        labels = torch.tensor([number[group] for group in groups])
        candidates = torch.tensor([number[group] for group in gallery_groups])
        standings = metrics.rank_counts(queries[asked], gallery, labels, candidates)
        guess = metrics.chance_rank_counts(labels, candidates)
        chance = {name: mean.value() for name, mean in _recall_metrics(guess).items()}
        return QueryScores(
            part,
            groups,
            _recall_metrics(standings),
            {"median_rank": metrics.median_rank(standings)},
            chance | {"median_rank": metrics.median_rank(guess)},
        )


def _recall_metrics(standings: metrics.RankCounts) -> dict[str, MeanMetric]:
    found = {f"recall@{k}": metrics.hit_at_k(standings, k) for k in _RECALL_KS}
    found["mean_recall"] = torch.stack(list(found.values())).mean(dim=0)
    return {name: MeanMetric(values) for name, values in found.items()}


EvaluationQueries = ZeroShotQueries | RetrievalQueries


# --- mistakes, each in one line ------------------------------------------------------------------------------------


def _refuse_repeats(names: Sequence[str], where: str) -> None:
    repeated = [name for name, count in Counter(names).items() if count > 1]
    if repeated:
        raise UserError(f"{where} hold these more than once: {_quote_first(repeated)}")


def _check_classes(names: Sequence[str], where: str) -> None:
    stripped = [name.strip() for name in names]
    if "" in stripped:
        raise UserError(f"{where} hold an empty name, at position {stripped.index('')} of {len(names)}, counted from 0")
    _refuse_repeats(stripped, where)


def _check_directions(parts: Sequence[str]) -> None:
    known = ("image_to_text", "text_to_image")
    if not parts or len(set(parts)) < len(parts) or not set(parts) <= set(known):
        raise UserError(f"retrieval directions {list(parts)}: give one or both of {', '.join(known)}")


def _require_known(ids: Sequence[str], known: Mapping[str, object], what: str, lacking: str) -> None:
    missing = [id for id in ids if id not in known]
    if missing:
        raise UserError(f"{len(missing)} of {len(ids)} {what}s have no {lacking}: {_quote_first(missing)}")


def _require_overlap(image_groups: Iterable[str], text_groups: Iterable[str]) -> None:
    images, texts = set(image_groups), set(text_groups)
    if not images & texts:
        raise UserError(
            f"no image has a caption: no group is common to images ({_quote_first(sorted(images)) or 'none'}) "
            f"and captions ({_quote_first(sorted(texts)) or 'none'})"
        )


def _quote_first(names: Sequence[str], most: int = 5) -> str:
    listed = ", ".join(map(repr, names[:most]))
    return listed if len(names) <= most else f"{listed} and {len(names) - most} more"
