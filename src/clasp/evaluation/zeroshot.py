"""Zero-shot classification: the class whose prompts are nearest to an image.

Input: an encoder, embedded images, class names with prompt templates. Output: one ``QueryScores`` with a value for
every image. Note: the class of an image is looked up by the image's id; what can be checked without reading a stream is
checked when the queries are made. The one file read here is a class list.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from pathlib import Path

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from clasp.data.formats.rows import is_blank
from clasp.data.plugins import valid_names
from clasp.evaluation import metrics
from clasp.evaluation.embedding_table import EmbeddingTable, TextBatcher, embed_batches
from clasp.evaluation.multilabel import two_class_influence
from clasp.evaluation.name_checks import quote_first, refuse_repeats, require_known
from clasp.evaluation.prompt_templates import TEMPLATE_SETS
from clasp.evaluation.query_scores import MeanMetric, QueryScores
from clasp.types import Encoder, UserError

ACCURACIES = ("top1", "top5", "mean_per_class")
TWO_CLASS_METRICS = (*ACCURACIES, "roc_auc")
_PLACEHOLDER = re.compile(r"\{c?\}")  # {} as in CLIP's templates, {c} as in CLIP_benchmark's


@dataclass(frozen=True, kw_only=True)
class ZeroShotQueries:
    """Zero-shot classification (CLIP, section 3.1): the class whose text is nearest to the image.

    A class's vector is the mean of the unit vectors of its prompts, made unit length again (prompt ensembling).

    Attributes:
        labels: image id to class name; None for an image that is no query (its class has no name here).
        classes: the class names, as they are put into the prompts.
        templates: texts with the placeholder ``{}`` or ``{c}``.
        descriptions: class name to prompts of its own, in place of the templates (Pratt et al., ICCV 2023, CuPL).
        read: makes text-tower inputs of prompts.
        groups: image id to cluster, for intervals; without it every image is its own.
        metric_names: ``ACCURACIES``, or with two classes also ``TWO_CLASS_METRICS``.

    Raises:
        UserError: a class named twice, an empty name, fewer than two classes, no template, one twice or without
            placeholder, a class without description, a label that is not a class. When scored: an image without label.
    """

    labels: Mapping[str, str | None]
    classes: Sequence[str]
    templates: Sequence[str]
    read: TextBatcher
    descriptions: Mapping[str, Sequence[str]] | None = None
    groups: Mapping[str, str] | None = None
    directions: tuple[str, ...] = field(default=("",), init=False)
    metric_names: tuple[str, ...] = ACCURACIES

    def __post_init__(self) -> None:
        _check_class_names(self.classes, "the classes")
        if len(self.classes) < 2:
            raise UserError(f"classification needs at least two classes; there is only {', '.join(self.classes)}")
        assert self.metric_names == ACCURACIES or (self.metric_names == TWO_CLASS_METRICS and len(self.classes) == 2)
        if not self.templates:
            raise UserError("classification needs at least one prompt template, such as 'a photo of a {}.'")
        refuse_repeats([template.strip() for template in self.templates], "the templates")
        for template in self.templates:
            if not _PLACEHOLDER.search(template):
                raise UserError(f"the template {template!r} has no place for the class name: write {{}} or {{c}} there")
        described = self.descriptions
        if described is not None and (bare := [name for name in self.classes if not described.get(name)]):
            raise UserError(f"{len(bare)} of {len(self.classes)} classes have no description: {quote_first(bare)}")
        if described is not None and (empty := [name for name in self.classes if any(map(is_blank, described[name]))]):
            raise UserError(f"an empty text is among the descriptions of {quote_first(empty)}")
        known = set(self.classes)
        for image, label in self.labels.items():
            if label is not None and label not in known:
                raise UserError(
                    f"image {image!r} is labelled {label!r}, which is not one of the {len(known)} classes; "
                    f"{valid_names(label, self.classes)}"
                )

    def score(self, encoder: Encoder, images: EmbeddingTable) -> list[QueryScores]:
        """Top-1 and top-5 accuracy over images, and the mean over classes of top-1 accuracy."""
        require_known(images.ids, self.labels, "image", "label")
        number = {name: index for index, name in enumerate(self.classes)}
        labelled = [(row, id, label) for row, id in enumerate(images.ids) if (label := self.labels[id]) is not None]
        if not labelled:
            raise UserError("no image is labelled with one of the classes")
        rows, ids, labels = zip(*labelled, strict=True)
        if self.groups is not None:
            require_known(ids, self.groups, "image", "group")
        numbers = torch.tensor([number[label] for label in labels])
        candidates = torch.arange(len(self.classes))

        def measure(counts: metrics.RankCounts) -> dict[str, MeanMetric]:
            first = metrics.hit_at_k(counts, 1)
            found = MeanMetric(first), MeanMetric(metrics.hit_at_k(counts, 5)), MeanMetric(first, cells=numbers)
            return dict(zip(ACCURACIES, found, strict=True))

        vectors = self.class_embeddings(encoder)
        counts = metrics.rank_counts(images.vectors[list(rows)], vectors, numbers, candidates)
        means = measure(counts)
        if "roc_auc" in self.metric_names:
            margin = images.vectors[list(rows)] @ (vectors[1] - vectors[0])
            means["roc_auc"] = MeanMetric(two_class_influence(margin, numbers == 1), cells=numbers)
        chance = measure(metrics.chance_rank_counts(numbers, candidates))
        groups = ids if self.groups is None else tuple(self.groups[id] for id in ids)
        seen, names = images.vectors[list(rows)], self.classes
        scores = QueryScores(
            direction="",
            ids=tuple(ids),
            groups=tuple(groups),
            means=means,
            medians={},
            chance=dict.fromkeys(self.metric_names, 0.5) | {name: mean.value() for name, mean in chance.items()},
            expected=tuple(labels),
            ranks=metrics.expected_ranks(counts),
            predict=lambda: [names[row] for row in metrics.first_ranked(seen, vectors)],
        )
        return [scores]

    def class_embeddings(self, encoder: Encoder) -> Float[Tensor, "C E"]:
        """The ensembled unit vector of every class, in the order of ``classes``."""
        prompts = [self._prompts(name) for name in self.classes]
        distinct = list(dict.fromkeys(prompt for of_class in prompts for prompt in of_class))
        texts = embed_batches(self.read(distinct), encoder.embed_text, "prompt")
        row = {text: index for index, text in enumerate(texts.ids)}
        rows = torch.tensor([row[prompt] for of_class in prompts for prompt in of_class])
        starts = torch.tensor([0, *accumulate(map(len, prompts))][:-1])
        return F.normalize(F.embedding_bag(rows, texts.vectors, starts, mode="mean"), dim=1)

    @property
    def comparable_prompts(self) -> list[str]:
        """Prompts of all classes that differ in the class alone: of the first template, or all descriptions."""
        most = 1 if self.descriptions is None else None
        return [prompt for name in self.classes for prompt in self._prompts(name)[:most]]

    def _prompts(self, name: str) -> list[str]:
        if self.descriptions is not None:
            return list(self.descriptions[name])
        return [_fill_template(template, name) for template in self.templates]


def _fill_template(template: str, name: str) -> str:
    return _PLACEHOLDER.sub(lambda _: name, template)  # a function, since a name may hold a backslash


def read_templates(given: str) -> list[str]:
    """A named set (``clip-80``, ``clip-7``), a JSON list of templates, those of a file in UTF-8 (one a line, or a JSON
    list), or the one template itself."""
    text = given.strip()
    if text in TEMPLATE_SETS:
        return list(TEMPLATE_SETS[text])
    if _is_list(text):
        return _template_list(text, given)
    if os.path.isfile(given):
        try:
            content = Path(given).read_text(encoding="utf-8-sig")
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"templates={given} cannot be read as UTF-8 text: {error}") from None
        if _is_list(content.strip()):
            return _template_list(content, given)
        return [line for line in content.splitlines() if line.strip()]
    if not _PLACEHOLDER.search(given):
        raise UserError(
            f"templates={given!r} is neither a file nor a template: there is no such file, and a template has {{}} "
            f"where the class name goes; named sets: {', '.join(TEMPLATE_SETS)}"
        )
    return [given]


def _is_list(text: str) -> bool:
    return text.startswith(('["', "['")) or (text.startswith("[") and text.endswith("]"))


def _template_list(text: str, given: str) -> list[str]:
    """The templates of a JSON list; ``given`` is what the option was set to."""
    try:
        templates = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"templates={given} is not a JSON list: {error}") from None
    if not templates or not all(isinstance(template, str) and not is_blank(template) for template in templates):
        raise UserError(f'templates={given} must be a list of texts such as ["a photo of a {{}}.", "a {{}}."]')
    return templates


def read_descriptions(path: str | Path) -> dict[str, list[str]]:
    """The descriptions of classes in a JSON file, ``{class: [texts]}``, as CuPL's. Raises ``UserError``."""
    try:
        found = json.loads(Path(path).read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise UserError(f"cannot read descriptions={path}: {error.strerror}; it names a JSON file") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"descriptions={path} is not JSON: {error}") from None
    if not isinstance(found, dict) or not found:
        raise UserError(f"descriptions={path} must be an object that is not empty: {{class: [texts]}}")
    for name, texts in found.items():
        if not isinstance(texts, list) or not all(isinstance(text, str) and not is_blank(text) for text in texts):
            raise UserError(f"descriptions={path}: {name!r} must have a list of texts")
    return found


def read_class_names(path: str | Path) -> list[str]:
    """The class names of a UTF-8 text file, one a line; empty lines are ignored.

    Raises:
        UserError: no such file, not text, no names in it, or a name twice.
    """
    try:
        lines = Path(path).read_text(encoding="utf-8-sig").splitlines()
    except OSError as error:
        raise UserError(
            f"cannot read the class list {str(path)!r}: {error.strerror}; classes= names a file, one class name a line"
        ) from None
    except UnicodeDecodeError as error:
        raise UserError(f"cannot read the class list {str(path)!r} as UTF-8 text: {error}") from None
    names = [line.strip() for line in lines if line.strip()]
    if not names:
        raise UserError(f"the class list {str(path)!r} is empty: it must hold one class name a line")
    _check_class_names(names, f"the class list {str(path)!r}")
    return names


def _check_class_names(names: Sequence[str], where: str) -> None:
    stripped, empty = [name.strip() for name in names], [place for place, name in enumerate(names) if is_blank(name)]
    if empty:
        raise UserError(f"{where} hold an empty name, at position {empty[0]} of {len(names)}, counted from 0")
    refuse_repeats(stripped, where)
