"""Pairs made into evaluation tasks: which captions are the queries, in which language, of which class.

Input: pairs and the ``EvaluationInputs`` of a model. Output: tasks, for validation during training and ``clasp eval``.
Note: the validation task depends on the pairs. Where every caption is a class name, retrieval would be among many equal
captions, so zero-shot classification is used; where captions are in several languages, each language has separate
queries, so that captions of an image in one language are not competitors of those in another.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence

from clasp.data.pairs import Pairs, caption_languages
from clasp.evaluation.class_labels import column_choices
from clasp.evaluation.compositional import HardNegativeQueries, WinogroundQueries
from clasp.evaluation.embedding_table import EvaluationInputs, TextBatches
from clasp.evaluation.language_sets import ALL_LANGUAGES, macro_language
from clasp.evaluation.retrieval import RetrievalDirection, RetrievalQueries
from clasp.evaluation.tasks import MultilingualTask, RetrievalTask, SingleTask, ZeroShotTask
from clasp.evaluation.zeroshot import ACCURACIES, TWO_CLASS_METRICS, ZeroShotQueries
from clasp.types import Pair, UserError

VALIDATION = "validation"
"""The data of the evaluation that a run makes of itself"""
_BOTH_DIRECTIONS: tuple[RetrievalDirection, ...] = ("image_to_text", "text_to_image")


def validation_task(
    train: Pairs, val: Pairs, inputs: EvaluationInputs
) -> RetrievalTask | MultilingualTask | ZeroShotTask:
    """The task whose primary metric selects the weights of a run.

    Retrieval; its mean over the languages, where there are several; zero-shot classification where captions are
    class names.
    """
    if not all(_only_class(pair) for pair in val):
        languages = caption_languages(val)
        if len(languages) > 1:
            return multilingual_task(val, inputs, languages=languages, data=VALIDATION)
        return retrieval_task(val, inputs, data=VALIDATION)
    return zeroshot_task(val, inputs, classes=_class_names(train, val), templates=["{}"], data=VALIDATION)


def require_validation(train: Pairs, val: Pairs) -> None:
    """Raises ``UserError`` where ``validation_task`` would: for images of one class. Reads no image, and of pairs with
    captions few."""
    if all(_only_class(pair) for pair in val) and len(names := _class_names(train, val)) < 2:
        raise UserError(f"zero-shot validation needs at least two classes; there is only {', '.join(names)}")


def validation_texts(train: Pairs, val: Pairs) -> list[list[str]]:
    """The texts that ``validation_task`` reads, one list for each read."""
    if all(_only_class(pair) for pair in val):
        return [_class_names(train, val)]
    captions, languages = [caption for pair in val for caption in pair.captions], caption_languages(val)
    if len(languages) < 2:
        return [[text for text, _ in captions]]
    each = [[text for text, language in captions if language == one] for one in languages]
    return [[text for text, language in captions if language in languages], *each]


def _class_names(train: Pairs, val: Pairs) -> list[str]:
    """The classes of ``val``, and of ``train`` where its captions are class names, too."""
    named = [val, train] if all(_only_class(pair) for pair in train) else [val]
    return sorted({caption.text for pairs in named for pair in pairs for caption in pair.captions})


def _only_class(pair: Pair) -> bool:
    return [caption.text for caption in pair.captions] == [pair.meta.get("class")]


def zeroshot_task(
    pairs: Pairs,
    inputs: EvaluationInputs,
    *,
    classes: Sequence[str],
    templates: Sequence[str],
    data: str,
    label: str = "class",
    descriptions: Mapping[str, Sequence[str]] | None = None,
) -> ZeroShotTask:
    """Zero-shot classification; the class of an image is that in ``label`` of its pair's meta."""
    labels = {pair.id: str(pair.meta[label]) for pair in pairs}
    queries = ZeroShotQueries(
        labels=labels,
        classes=classes,
        templates=templates,
        descriptions=descriptions,
        read=inputs.read,
        metric_names=TWO_CLASS_METRICS if len(classes) == 2 else ACCURACIES,
    )
    return ZeroShotTask(data=data, images=inputs.images(pairs), queries=queries)


def retrieval_task(pairs: Pairs, inputs: EvaluationInputs, *, data: str) -> RetrievalTask:
    """Image-to-text and text-to-image retrieval over all captions of ``pairs``."""
    queries = retrieval_queries(list(pairs), inputs)
    return RetrievalTask(data=data, images=inputs.images(pairs_of(queries.image_groups, pairs)), queries=queries)


def image_groups(pairs: Sequence[Pair]) -> dict[str, str]:
    """Id to group of the first pair of each image of a group: in a table with a row for each caption, an image is one
    candidate. An image is one by name and version; images that are stored in cells of a table are never one."""
    rows = Counter((pair.group, pair.image.name) for pair in pairs)
    first: dict[tuple[str, str, str], Pair] = {}
    for pair in pairs:
        name = pair.group, pair.image.name
        first.setdefault((*name, pair.image.version if rows[name] > 1 else ""), pair)
    return {pair.id: pair.group for pair in first.values()}


def pairs_of(ids: Collection[str], pairs: Pairs) -> Pairs:
    """The pairs of these ids, some of those of ``pairs``, in the order of ``pairs``."""
    if len(ids) == len(pairs):
        return pairs
    return pairs.subset(number for number, id in enumerate(pairs.ids) if id in ids)


def retrieval_queries(pairs: Sequence[Pair], inputs: EvaluationInputs) -> RetrievalQueries:
    """Retrieval among all captions of ``pairs``."""
    captions = {f"{pair.id}#{n}": (text, pair.group) for pair in pairs for n, (text, _) in enumerate(pair.captions)}
    return RetrievalQueries(
        image_groups=image_groups(pairs),
        text_groups={key: group for key, (_, group) in captions.items()},
        texts=inputs.texts({key: text for key, (text, _) in captions.items()}),
    )


def hard_negative_task(
    pairs: Pairs, inputs: EvaluationInputs, *, negative: str, data: str
) -> SingleTask[HardNegativeQueries]:
    """The first caption of each image against those in its column ``negative``, a text or a list of texts.

    Raises ``UserError`` for a pair without.
    """
    candidates: dict[str, tuple[str, ...]] = {}
    for pair in pairs:
        given = pair.meta.get(negative)
        texts = [given] if isinstance(given, str) else given
        if not isinstance(texts, list) or not texts or not all(isinstance(text, str) and text for text in texts):
            raise UserError(
                f"{pair.id} of {data} has no text or list of texts in {negative!r}; {column_choices('negative', pair)}"
            )
        candidates[pair.id] = (pair.captions[0].text, *texts)
    groups = {pair.id: pair.group for pair in pairs}
    queries = HardNegativeQueries(candidates=candidates, groups=groups, read=inputs.read)
    return SingleTask(data=data, images=inputs.images(pairs), queries=queries, name="sugarcrepe", primary="accuracy")


def winoground_task(pairs: Pairs, inputs: EvaluationInputs, *, data: str) -> SingleTask[WinogroundQueries]:
    """Groups of two pairs, each with its first caption. Raises ``UserError`` for a group of another size."""
    members: dict[str, list[tuple[str, str]]] = {}
    for pair in pairs:
        members.setdefault(pair.group, []).append((pair.id, pair.captions[0].text))
    examples: dict[str, tuple[tuple[str, str], tuple[str, str]]] = {}
    for group, found in members.items():
        if len(found) != 2:
            raise UserError(f"{data}: winoground needs two pairs in each group, and {group!r} has {len(found)}")
        examples[group] = (found[0], found[1])
    queries = WinogroundQueries(examples=examples, read=inputs.read)
    return SingleTask(data=data, images=inputs.images(pairs), queries=queries, name="winoground", primary="group_score")


def multilingual_task(
    pairs: Pairs, inputs: EvaluationInputs, *, languages: Sequence[str], data: str
) -> MultilingualTask:
    """Retrieval in each language, and the mean over them."""
    inputs.precompute_texts(
        caption.text for pair in pairs for caption in pair.captions if caption.language in languages
    )
    in_memory = list(pairs)
    return MultilingualTask(
        data=data,
        images=inputs.images(pairs_of(image_groups(in_memory), pairs)),
        queries=language_queries(in_memory, languages, inputs.texts),
        primary=f"{macro_language(ALL_LANGUAGES)}/{RetrievalTask.primary}",
        sets={ALL_LANGUAGES: languages},
    )


def language_queries(
    pairs: Sequence[Pair],
    languages: Iterable[str],
    stream: Callable[[Mapping[str, str]], TextBatches],
    directions: Sequence[RetrievalDirection] = _BOTH_DIRECTIONS,
) -> dict[str, RetrievalQueries]:
    """Retrieval among the captions of ``pairs`` in each language, each distinct caption of a group once.

    ``stream`` returns text-tower inputs of captions by id: ``FeatureSource.texts``, or precomputed features.
    """
    texts: dict[str, dict[str, tuple[str, str]]] = {language: {} for language in languages}
    for pair in pairs:
        for caption in pair.captions:
            if caption.language in texts:
                key = f"{pair.group}|{caption.text}"
                texts[caption.language].setdefault(key, (caption.text, pair.group))
    candidates = image_groups(pairs)
    return {
        language: RetrievalQueries(
            image_groups=candidates,
            text_groups={key: group for key, (_, group) in found.items()},
            texts=stream({key: text for key, (text, _) in found.items()}),
            directions=tuple(directions),
        )
        for language, found in texts.items()
    }
