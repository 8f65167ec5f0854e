"""What is recorded of an evaluation: one change of an option, of a file or of a pair is another evaluation."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from clasp.data.pairs import Pairs
from clasp.evaluation.embedding_folder import EmbeddingFolder, StoredEncoder
from clasp.evaluation.identity import identify, is_own_validation, validation_identity
from clasp.evaluation.registry import EVALUATION_TASKS, changed_options, parse_task_options
from clasp.evaluation.results import EvaluationResult
from clasp.evaluation.task_context import LoadedModel, TaskContext
from clasp.types import Caption, no_progress_bar
from toyembeddings import pair

PAIRS = Pairs("zoo", [[pair("a", "a cat", **{"class": "cat"}), pair("b", "a dog", **{"class": "dog"})]])
OTHERS = Pairs("other", [[pair("c", "a cow", **{"class": "cow"})]])


MODEL: list[EmbeddingFolder] = []


@pytest.fixture(scope="module", autouse=True)
def model(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Embeddings that nothing here reads."""
    folder = tmp_path_factory.mktemp("embeddings")
    for name in ("image", "text"):
        np.save(folder / f"{name}.npy", np.ones((1, 2), "float32"))
        (folder / f"{name}.json").write_text('["a"]')
    MODEL.append(EmbeddingFolder(folder))
    yield
    MODEL.clear()


def context(task: str, options: list[str], pairs: Pairs = PAIRS, fit: Pairs = OTHERS) -> TaskContext:
    given = parse_task_options(task, EVALUATION_TASKS[task], ["data=zoo", *options])
    return TaskContext(
        name="stored",
        load=lambda: LoadedModel(StoredEncoder(MODEL[0], "stored"), MODEL[0]),
        pairs=pairs,
        open_pairs=lambda name: fit,
        options=given,
        run=None,
        say=lambda line: None,
        bar=no_progress_bar,
    )


def id_of(task: str, *options: str, pairs: Pairs = PAIRS, fit: Pairs = OTHERS) -> str:
    return identify(task, EVALUATION_TASKS[task], context(task, list(options), pairs, fit)).id


def every_option() -> Iterator[Any]:
    for task, entry in EVALUATION_TASKS.items():
        for option in entry.all_options:
            if option.name != "data" and option.names != "reading":
                yield pytest.param(task, option.name, option.names, id=f"{task}-{option.name}")


def test_the_evaluation_of_a_run_itself_is_told_from_one_of_a_folder_of_that_name():
    row = EvaluationResult("retrieval", "validation", "", {}, {}, 2, {}, 0.0)
    (own,) = validation_identity("retrieval", OTHERS, PAIRS).recorded_in([row])
    (asked,) = identify("retrieval", EVALUATION_TASKS["retrieval"], context("retrieval", [])).recorded_in([row])
    assert [is_own_validation(each) for each in (own, asked, row)] == [True, False, True]


@pytest.mark.parametrize(("task", "name", "names"), list(every_option()))
def test_every_option_of_every_task_is_part_of_it(task: str, name: str, names: str, tmp_path: Path):
    required = [
        f"{option.name}=x" for option in EVALUATION_TASKS[task].options if option.required and option.name != name
    ]
    if names == "file":
        file = tmp_path / "names.txt"
        file.write_text("a")
        before = id_of(task, *required, f"{name}={file}")
        (tmp_path / "copy.txt").write_text("a")
        assert id_of(task, *required, f"{name}={tmp_path / 'copy.txt'}") == before, "by content, not by path"
        file.write_text("b")
        assert id_of(task, *required, f"{name}={file}") != before
    elif names == "pairs":
        before = id_of(task, *required, f"{name}=one")
        assert id_of(task, *required, f"{name}=two") == before, "by content, not by path"
        assert id_of(task, *required, f"{name}=one", fit=PAIRS) != before
    else:
        assert id_of(task, *required, f"{name}=1") != id_of(task, *required, f"{name}=2")


@pytest.mark.parametrize(
    "change",
    [
        {"id": "z"},
        {"captions": (Caption("another"),)},
        {"captions": (Caption("a cat", "en"),)},
        {"meta": {"class": "lion"}},
        {"group": "b"},
    ],
    ids=["id", "caption", "language", "class", "group"],
)
def test_so_is_every_part_of_a_pair(change: dict[str, Any]):
    changed = Pairs("zoo", [[replace(PAIRS[0], **change), PAIRS[1]]])
    assert id_of("retrieval", pairs=changed) != id_of("retrieval")
    assert validation_identity("retrieval", OTHERS, changed).id != validation_identity("retrieval", OTHERS, PAIRS).id


def test_names_of_pairs_and_of_groups_are_not():
    renamed = Pairs("elsewhere", [[replace(each, group=f"/mnt/{each.group}") for each in PAIRS]])
    assert id_of("retrieval", pairs=renamed) == id_of("retrieval")


def test_options_are_recorded_as_they_are_used():
    about = identify("zeroshot", EVALUATION_TASKS["zeroshot"], context("zeroshot", ["descriptions=d.json"]))
    assert about.options == {"descriptions": "d.json", "label": "class"}, "without data, and the templates not used"
    assert changed_options("zeroshot", about.options) == ["descriptions=d.json"]
    assert changed_options("package.module:Own", {"k": "3"}) == ["k=3"]
