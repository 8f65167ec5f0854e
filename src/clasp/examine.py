"""Evaluations by name: a run, a task and a few options become rows of results.

In goes what was typed after ``clasp eval RUN TASK``; out come results, which are also kept in the run.
"""

from __future__ import annotations

import difflib
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

from clasp.align import cache_folder, inputs_of, retrieval
from clasp.assemble import Assembled, load
from clasp.data.pairs import Columns, Pairs, open_pairs
from clasp.evaluate.questions import Captions, Classes, class_list
from clasp.evaluate.tasks import Multilingual, Result, ZeroShot
from clasp.inputs import Bar, Inputs, no_bar
from clasp.model import DualEncoder
from clasp.recipe import from_dict
from clasp.train.checkpoint import Run
from clasp.types import UserError

Options = Mapping[str, str]


def examine(run: str | Path, task: str, options: Sequence[str] = (), *, bar: Bar = no_bar) -> list[Result]:
    """Ask ``task`` of a run. Options are ``key=value``; see each function below. Raises ``UserError``."""
    if task not in TASKS:
        near = difflib.get_close_matches(task, TASKS, n=1)
        raise UserError(f"unknown task {task!r}; {f'did you mean {near[0]}? ' if near else ''}tasks: {', '.join(TASKS)}")
    ask, known = TASKS[task]
    given = _options(task, options, known)
    if "data" not in given:
        raise UserError(f"{task} needs data=FOLDER or data=PAIRS; options: {', '.join(known)}")
    columns = Columns(image=given.get("image", ""), caption=given.get("caption", ""))
    pairs = open_pairs(given["data"], columns=columns, image_root=given.get("image_root"), cache=cache_folder() / "pairs")
    model = load(run)
    assert isinstance(model.encoder, DualEncoder)
    recipe = from_dict(Run(run).read().recipe, str(run))
    inputs = inputs_of(Assembled(model.encoder, model.transform, model.tokenizer), recipe, bar=bar)
    results = ask(model.encoder, pairs, inputs, given)
    Run(run).append("results.jsonl", [asdict(result) for result in results])
    return results


def ask_zeroshot(model: DualEncoder, pairs: Pairs, inputs: Inputs, options: Options) -> list[Result]:
    """``data``: class subfolders, or pairs whose group (or ``label=`` column) is the class; ``classes``: a file with one
    class a line; ``templates``: a file with one a line, or one template with ``{}``."""
    labels = {pair.id: _label(pair.group, pair.meta, options.get("label")) for pair in pairs}
    classes = class_list(Path(options["classes"])) if "classes" in options else sorted(set(labels.values()))
    templates = _templates(options.get("templates", "a photo of a {}."))
    question = Classes(labels=labels, classes=classes, templates=templates, read=inputs.read)
    return ZeroShot(data=options["data"], images=inputs.images(pairs), question=question).results(model)


def ask_retrieval(model: DualEncoder, pairs: Pairs, inputs: Inputs, options: Options) -> list[Result]:
    """``data``: pairs; all their captions are asked, in both directions."""
    return retrieval(pairs, inputs, data=options["data"]).results(model)


def ask_multilingual(model: DualEncoder, pairs: Pairs, inputs: Inputs, options: Options) -> list[Result]:
    """``data``: pairs whose captions name their language; ``languages``: some of them, separated by commas."""
    spoken = sorted({caption.language for pair in pairs for caption in pair.captions} - {""})
    wanted = options["languages"].split(",") if "languages" in options else spoken
    odd = [language for language in wanted if language not in spoken]
    if odd or not spoken:
        raise UserError(f"no caption of {options['data']} is in {odd or 'a language it names'}; it has {', '.join(spoken) or 'none'}")
    questions = {language: by_language(pairs, language, inputs) for language in wanted}
    task = Multilingual(
        data=options["data"],
        images=inputs.images(pairs),
        questions=questions,
        primary="macro:all/mean_recall",
        sets={"all": wanted},
    )
    return task.results(model)


def by_language(
    pairs: Sequence, language: str, inputs: Inputs, parts: Sequence[str] = ("image_to_text", "text_to_image")
) -> Captions:
    """The captions of ``pairs`` in one language, each distinct caption of a group once."""
    texts: dict[str, tuple[str, str]] = {}
    for pair in pairs:
        for caption in pair.captions:
            if caption.language == language:
                texts.setdefault(f"{pair.group}|{caption.text}", (caption.text, pair.group))
    return Captions(
        image_groups={pair.id: pair.group for pair in pairs},
        text_groups={key: group for key, (_, group) in texts.items()},
        texts=inputs.texts({key: text for key, (text, _) in texts.items()}),
        parts=tuple(parts),  # type: ignore[arg-type]
    )


TASKS: dict[str, tuple[Callable[[DualEncoder, Pairs, Inputs, Options], list[Result]], tuple[str, ...]]] = {
    "zeroshot": (ask_zeroshot, ("data", "classes", "templates", "label", "image", "caption", "image_root")),
    "retrieval": (ask_retrieval, ("data", "image", "caption", "image_root")),
    "multilingual": (ask_multilingual, ("data", "languages", "image", "caption", "image_root")),
}


def _options(task: str, options: Sequence[str], known: Sequence[str]) -> dict[str, str]:
    given = {}
    for option in options:
        key, equals, value = option.partition("=")
        if not equals or key not in known:
            near = difflib.get_close_matches(key, known, n=1)
            raise UserError(f"{task}: {option!r} is not an option; {f'did you mean {near[0]}=…? ' if near else ''}it takes {', '.join(known)}")
        given[key] = value
    return given


def _label(group: str, meta: Mapping, column: str | None) -> str:
    if column is None:
        return group
    if column not in meta:
        raise UserError(f"label = {column!r}: a pair has no such column; it has {', '.join(map(str, meta)) or 'none'}")
    return str(meta[column])


def _templates(given: str) -> list[str]:
    if os.path.isfile(given):
        return [line for line in Path(given).read_text(encoding="utf-8").splitlines() if line.strip()]
    return [given]
