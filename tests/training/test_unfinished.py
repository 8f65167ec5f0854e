"""A run that is not trained to its end is said to be so, by its files alone."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from clasp.data.folder_lock import lock_folder
from clasp.training.unfinished import unfinished_lines

_START = {"event": "start", "step": 0, "steps": 1400}
_STOP = {"event": "stop", "step": 1200, "interrupted": True, "held_step": 1200}
_RESUMED = {"event": "start", "step": 1200, "steps": 1400}
_ENDED = {"event": "stop", "step": 1400, "interrupted": False, "held_step": 900}
_AT_STEP, _BEFORE_END = "was stopped at step 1,200 of 1,400", "was stopped before its end"
_STATE, _PREVIOUS = "state/state.safetensors", "state/previous.safetensors"


def _log(*events: Mapping[str, Any]) -> str:
    return "".join(json.dumps(event) + "\n" for event in events)


STOPPED = {
    "by Ctrl-C": ({_STATE: "", "log.jsonl": _log(_START, _STOP)}, _AT_STEP),
    "killed once it went on": ({_STATE: "", "log.jsonl": _log(_START, _STOP, _RESUMED)}, _AT_STEP),
    "killed, its last line torn": ({_STATE: "", "log.jsonl": _log(_START, _STOP) + '{"event": "st'}, _AT_STEP),
    "killed before any stop": ({_STATE: "", "log.jsonl": _log(_START)}, _BEFORE_END),
    "killed while it saved": ({_PREVIOUS: "", "log.jsonl": _log(_START)}, _BEFORE_END),
    "killed while it ended": ({_STATE: "", "log.jsonl": _log(_START, _ENDED)}, _BEFORE_END),
    "without a log": ({_STATE: ""}, _BEFORE_END),
    "a damaged log": ({_STATE: "", "log.jsonl": "?\n?\n"}, _BEFORE_END),
    "a climb": ({"plan.json": '{"finished": false}'}, _BEFORE_END),
    "finished": ({"log.jsonl": _log(_START, _ENDED), "state/results.json": "[]"}, None),
    "a finished climb": ({"plan.json": '{"finished": true}'}, None),
    "a damaged plan": ({"plan.json": "{"}, None),
    "imported": ({}, None),
}


@pytest.mark.parametrize("case", STOPPED)
def test_where_a_run_was_stopped(case: str, tmp_path: Path):
    files, place = STOPPED[case]
    run = tmp_path / "my run"
    for name, text in files.items():
        (run / name).parent.mkdir(parents=True, exist_ok=True)
        (run / name).write_text(text)
    said = [] if place is None else [f"{run} {place}; go on with: clasp resume '{run}'"]
    assert unfinished_lines(run) == said
    run.mkdir(exist_ok=True)
    with lock_folder(run):  # it goes on
        stop = (place or "").removeprefix("was stopped ")
        assert unfinished_lines(run) == ([f"{run} is being trained; these are its weights {stop}"] if stop else [])
    assert unfinished_lines(run) == said


def test_a_model_that_is_no_run_is_not_unfinished():
    assert unfinished_lines(None) == []
