"""Evaluations by name: a run, a task and a few options become rows of results.

In goes what was typed after ``clasp eval RUN TASK``; out come results, which are also kept in the run.
"""

from __future__ import annotations

import difflib
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from clasp.commands.train import inputs_of, open_as_trained
from clasp.config.build import Assembled, load
from clasp.config.recipe import Recipe, from_dict
from clasp.data.pairs import Columns, Pairs
from clasp.evaluation.from_pairs import languages_of, multilingual, retrieval, zeroshot
from clasp.evaluation.queries import class_list
from clasp.evaluation.retention.run import OPTIONS as KEPT_OPTIONS
from clasp.evaluation.retention.run import kept
from clasp.evaluation.tasks import Result
from clasp.models.dual_encoder import DualEncoder
from clasp.models.features import Bar, Inputs, Say, no_bar
from clasp.training.run_folder import Run
from clasp.types import UserError

Options = Mapping[str, str]


@dataclass(frozen=True, kw_only=True)
class Asked:
    """A run, the pairs it is asked about, and how it was asked: what any task may need."""

    run: Path
    recipe: Recipe
    model: DualEncoder
    pairs: Pairs
    inputs: Inputs
    options: Options
    say: Say
    bar: Bar


def examine(
    run: str | Path,
    task: str,
    options: Sequence[str] = (),
    *,
    say: Say = lambda line: None,
    bar: Bar = no_bar,
) -> list[Result]:
    """Ask ``task`` of a run. Options are ``key=value``; see each function below. Raises ``UserError``.

    ``say`` hears what a person should know beside the results.
    """
    if task not in TASKS:
        near = difflib.get_close_matches(task, TASKS, n=1)
        raise UserError(
            f"unknown task {task!r}; {f'did you mean {near[0]}? ' if near else ''}tasks: {', '.join(TASKS)}"
        )
    ask, known = TASKS[task]
    given = _options(task, options, known)
    if "data" not in given:
        raise UserError(f"{task} needs data=FOLDER or data=PAIRS; options: {', '.join(known)}")
    recipe = from_dict(Run(run).recipe(), str(run))
    columns = Columns(image=given.get("image", ""), caption=given.get("caption", ""))
    pairs = open_as_trained(given["data"], recipe, columns=columns, image_root=given.get("image_root"))
    model = load(run)
    assert isinstance(model.encoder, DualEncoder)
    inputs = inputs_of(Assembled(model.encoder, model.transform, model.tokenizer), recipe, bar=bar)
    results = ask(
        Asked(
            run=Path(run),
            recipe=recipe,
            model=model.encoder,
            pairs=pairs,
            inputs=inputs,
            options=given,
            say=say,
            bar=bar,
        )
    )
    Run(run).append("results.jsonl", [asdict(result) for result in results])
    return results


def ask_zeroshot(asked: Asked) -> list[Result]:
    """``data``: class folders, or pairs with their class in ``class`` or another column (``label=``); ``classes``: a
    file with one class a line; ``templates``: a file with one a line, or one template with ``{}``."""
    pairs, options = asked.pairs, asked.options
    label = options.get("label", "class")
    for pair in pairs:
        if label not in pair.meta:
            has = ", ".join(map(str, pair.meta)) or "none"
            raise UserError(
                f"{pair.id} of {options['data']} has no column {label!r} with its class; label= one of: {has}"
            )
    classes = (
        class_list(Path(options["classes"])) if "classes" in options else sorted({str(p.meta[label]) for p in pairs})
    )
    templates = _templates(options.get("templates", "a photo of a {}."))
    task = zeroshot(pairs, asked.inputs, classes=classes, templates=templates, data=options["data"], label=label)
    return task.results(asked.model)


def ask_retrieval(asked: Asked) -> list[Result]:
    """``data``: pairs; all their captions are asked, in both directions."""
    return retrieval(asked.pairs, asked.inputs, data=asked.options["data"]).results(asked.model)


def ask_multilingual(asked: Asked) -> list[Result]:
    """``data``: pairs whose captions name their language; ``languages``: some of them, separated by commas."""
    pairs, options = asked.pairs, asked.options
    spoken = languages_of(pairs)
    wanted = options["languages"].split(",") if "languages" in options else spoken
    odd = [language for language in wanted if language not in spoken]
    if odd or not spoken:
        lacking = ", ".join(odd) or "a language it names"
        raise UserError(f"no caption of {options['data']} is in {lacking}; it has {', '.join(spoken) or 'none'}")
    return multilingual(pairs, asked.inputs, languages=wanted, data=options["data"]).results(asked.model)


def ask_kept(asked: Asked) -> list[Result]:
    """``data``: pairs with a class, or with captions in several languages, or with several captions; see ``kept``."""
    return kept(
        asked.run,
        asked.recipe,
        asked.model,
        asked.pairs,
        asked.inputs,
        asked.options,
        say=asked.say,
        bar=asked.bar,
    )


TASKS: dict[str, tuple[Callable[[Asked], list[Result]], tuple[str, ...]]] = {
    "zeroshot": (ask_zeroshot, ("data", "classes", "templates", "label", "image", "caption", "image_root")),
    "retrieval": (ask_retrieval, ("data", "image", "caption", "image_root")),
    "multilingual": (ask_multilingual, ("data", "languages", "image", "caption", "image_root")),
    "kept": (ask_kept, KEPT_OPTIONS),
}


def _options(task: str, options: Sequence[str], known: Sequence[str]) -> dict[str, str]:
    given = {}
    for option in options:
        key, equals, value = option.partition("=")
        if not equals or key not in known:
            near = difflib.get_close_matches(key, known, n=1)
            raise UserError(
                f"{task}: {option!r} is not an option; {f'did you mean {near[0]}=…? ' if near else ''}"
                f"it takes {', '.join(known)}"
            )
        given[key] = value
    return given


def _templates(given: str) -> list[str]:
    if os.path.isfile(given):
        return [line for line in Path(given).read_text(encoding="utf-8").splitlines() if line.strip()]
    return [given]
