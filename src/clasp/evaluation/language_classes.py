"""Zero-shot classification in many languages, of the classes that have a name in each: the layout of Babel-ImageNet.

Input: a ``TaskContext`` whose pairs have a class number, and a JSON file ``{language: [[numbers], [names]]}``. Output:
the task. Note: of an image whose class has no name in a language nothing is asked there; classes of one name in a
language are one class. Source: Geigle et al., ACL 2024; its numbers are those of ImageNet-1k, the sorted folders.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from clasp.evaluation.class_labels import label_choices
from clasp.evaluation.language_sets import ALL_LANGUAGES, macro_language, requested_languages
from clasp.evaluation.name_checks import quote_first
from clasp.evaluation.task_context import TaskContext
from clasp.evaluation.tasks import MultilingualTask, ZeroShotTask
from clasp.evaluation.zeroshot import ZeroShotQueries, read_templates
from clasp.types import Pair, UserError


def language_classes_task(context: TaskContext) -> MultilingualTask:
    """Raises ``UserError`` for files of another form, and for a pair without a class number."""
    options = context.options
    names = _read_names(options["classes"])
    languages = requested_languages(options.get("languages"), list(names), options["classes"])
    numbers = {pair.id: _class_number(pair, options["label"], context.data) for pair in context.pairs}
    templates = _read_language_templates(options["templates"], languages)
    queries = {}
    for language in languages:
        labels = {id: names[language].get(number) for id, number in numbers.items()}
        classes = list(dict.fromkeys(names[language].values()))
        if len(classes) > 1 and any(label is not None for label in labels.values()):
            queries[language] = ZeroShotQueries(
                labels=labels,
                classes=classes,
                templates=templates[language],
                read=context.inputs.read,
            )
    if unasked := [language for language in languages if language not in queries]:
        why = f"no image of {context.data} has a class with a name there, or there are fewer than two classes"
        context.say(f"left out: {', '.join(unasked)}: {why}")
    for each in queries.values():
        context.inputs.tell_apart(each.comparable_prompts)
    return MultilingualTask(
        data=context.data,
        images=context.inputs.images(context.pairs),
        queries=queries,
        primary=f"{macro_language(ALL_LANGUAGES)}/{ZeroShotTask.primary}",
        sets={ALL_LANGUAGES: list(queries)},
        name="multilingual_zeroshot",
    )


def _read_names(file: str) -> dict[str, dict[int, str]]:
    """Language to class number to name."""
    given = _read_json(file, "classes")
    try:
        return {
            str(language): {int(number): str(name) for number, name in zip(*classes, strict=True)}
            for language, classes in given.items()
        }
    except (ValueError, TypeError):
        raise UserError(f'classes={file} must be {{"en": [[class numbers], [names]], …}}, as many of both') from None


def _read_language_templates(given: str, languages: Sequence[str]) -> dict[str, list[str]]:
    """Those of a JSON file for each language, or the same templates for all."""
    if not given.endswith(".json"):
        return dict.fromkeys(languages, read_templates(given))
    found = _read_json(given, "templates")
    if lacking := [language for language in languages if not isinstance(found.get(language), list)]:
        raise UserError(f"templates={given} has no list of templates for {quote_first(lacking)}")
    return {language: [str(template) for template in found[language]] for language in languages}


def _read_json(file: str, option: str) -> Mapping[str, Any]:
    try:
        given = json.loads(Path(file).read_text(encoding="utf-8-sig"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{option}={file} cannot be read as JSON: {error}") from None
    if not isinstance(given, dict) or not given:
        raise UserError(f"{option}={file} must be a JSON object with languages as keys")
    return given


def _class_number(pair: Pair, label: str, data: str) -> int:
    number = pair.meta.get(label)
    if not isinstance(number, int):
        raise UserError(f"{pair.id} of {data} has no class number in {label!r}; {label_choices(pair)}")
    return number
