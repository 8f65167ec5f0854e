"""The table of tasks: options, defaults and help come from it, and a task may come from outside."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from clasp.evaluation.options import ANALYZE_OPTIONS, MAP_OPTIONS, TaskOption, parse_options
from clasp.evaluation.registry import EVALUATION_TASKS, TaskEntry, describe_tasks, find_task, parse_task_options
from clasp.types import UserError
from toytasks import POSITIVE


def refused(name: str, *typed: str) -> str:
    with pytest.raises(UserError) as error:
        parse_task_options(name, find_task(name), typed)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize("name", EVALUATION_TASKS)
def test_every_task_has_help_and_options_of_its_own_names(name: str):
    entry = EVALUATION_TASKS[name]
    names = [option.name for option in entry.all_options]
    assert names[0] == "data" and len(set(names)) == len(names)
    assert entry.help and all(option.help for option in entry.all_options)
    described = "\n".join(describe_tasks())
    assert f"{name}: {entry.help}" in described and all(f"{option}=" in described for option in names)


@pytest.mark.parametrize(
    "options", [*(entry.all_options for entry in EVALUATION_TASKS.values()), ANALYZE_OPTIONS, MAP_OPTIONS]
)
def test_an_option_without_a_value_is_an_error_and_no_default(options: tuple[TaskOption, ...]):
    for option in options:
        typed = [f"{each.name}=x" for each in options if each.required and each != option]
        for empty in ("", " "):
            with pytest.raises(UserError, match=f"^t: {option.name}= is empty; (it is required|leave it out for the)"):
                parse_options("t", options, [*typed, f"{option.name}={empty}"])


@pytest.mark.parametrize("name", EVALUATION_TASKS)
def test_every_task_and_its_options_are_in_the_documentation(name: str):
    page = (Path(__file__).parents[2] / "docs" / "evaluation.md").read_text(encoding="utf-8")
    rows = [line for line in page.splitlines() if line.startswith("|")]
    assert any(row.startswith(f"| `{name}` |") for row in rows)
    for option in EVALUATION_TASKS[name].all_options:
        told = [row for row in rows if f"`{option.name}=`" in row.split("|")[1]]
        assert any(f"`{name}`" in row or "| all |" in row for row in told), option.name
        assert option.default is None or any(f"{option.default}" in row for row in told), option.name


def test_defaults_fill_what_is_left_out():
    entry = EVALUATION_TASKS["zeroshot"]
    parsed = parse_task_options("zeroshot", entry, ["data=a=b.csv", "label=kind"])
    assert parsed == {"data": "a=b.csv", "label": "kind", "templates": "a photo of a {}."}
    assert parse_task_options("retention", EVALUATION_TASKS["retention"], ["data=x"]) == {"data": "x"}


def test_mistakes_are_told_from_the_table():
    assert "did you mean retrieval? tasks: zeroshot, retrieval" in refused("retreival")
    assert "'templats=x' is not an option; did you mean templates=…? it takes data, classes" in refused(
        "zeroshot", "templats=x"
    )
    assert "'data' is not an option" in refused("zeroshot", "data")
    assert "data= is given twice, 'a' and 'b'" in refused("retrieval", "data=a", "data=b")
    both = refused("zeroshot", "data=a", "templates=clip-80", "descriptions=b.json")
    assert "descriptions= is in place of templates=; give one of the two" in both
    assert "retrieval needs data=" in refused("retrieval", "image=x")
    needs = TaskEntry(POSITIVE.run, "toy", (TaskOption("axis", "which one", required=True),))
    with pytest.raises(UserError, match="toy needs axis=, which one"):
        parse_task_options("toy", needs, ["data=x"])


def test_a_task_from_outside_is_found_by_module_and_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    assert find_task("toytasks:POSITIVE") is POSITIVE
    (tmp_path / "lying_here.py").write_text(
        "from clasp.evaluation.registry import TaskEntry\nHERE = TaskEntry(lambda context: [], 'here')\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    assert find_task("lying_here:HERE").help == "here"


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("toytasks:NEGATIVE", "'NEGATIVE' is no such name in toytasks"),
        ("toytasks:NEGATIVE", "there: POSITIVE"),
        ("toytasks:share_of_positives", "is a function in toytasks; it must be a clasp.evaluation.registry.TaskEntry"),
        ("no_such_module:TASK", "No module named 'no_such_module'; it is looked for in the current folder"),
        (":TASK", "':TASK' is not package.module:Name"),
        (".relative:TASK", "'.relative:TASK' is not package.module:Name"),
    ],
)
def test_what_is_not_there_is_told_in_one_line(name: str, words: str):
    assert words in refused(name)


def test_errors_inside_somebody_elses_module_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "lacks_another.py").write_text("import not_installed_anywhere\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ModuleNotFoundError, match="not_installed_anywhere"):
        find_task("lacks_another:TASK")
