"""A run is data: no name in it is imported unless the caller allows it."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from clasp.commands.run_store import open_run_store, writable_store
from clasp.commands.store_copy import copy_index
from clasp.training.run_code import all_code_names, allow_code, code_names, require_allowed
from clasp.types import UserError

NAMED = {
    "image.tower": {"image": {"tower": "payload:open"}},
    "text.tower": {"text": {"tower": "runs.x.payload:open"}},
    "tune.image[0]": {"tune": {"image": ["payload:method(a=1)"]}},
    "tune.text[1]": {"tune": {"text": ["norms", "payload:method"]}},
    "loss.kind": {"loss": {"kind": "payload:loss"}},
    "train.schedule": {"train": {"schedule": "payload:schedule"}},
    "train.decay_filter": {"train": {"decay_filter": "payload:filter"}},
    "data.format": {"data": {"format": "payload:open"}},
    "train.trackers[0]": {"train": {"trackers": ["tensorboard", "payload:Tracker"]}},
}
PLAIN = {
    "image": {"tower": "hf:facebook/dinov2-small"},
    "text": {"tower": "file:{run}/towers/text", "template": "a: {}"},
    "tune": {"image": ["adapters(blocks='6:')", "lora(rank=8)"], "text": ["none"]},
    "loss": {"kind": "infonce"},
    "data": {"train": "sample:emoji"},
}


@pytest.mark.parametrize("key", NAMED)
def test_code_in_any_place_is_found_and_refused(key: str) -> None:
    (found,) = all_code_names(NAMED[key]).items()
    assert found[0] == key
    with pytest.raises(UserError, match=rf"run names Python code, {re.escape(key)} = 'payload|'runs.x.payload"):
        require_allowed(dict([found]), Path("run"))
    with allow_code([found[1]]):
        require_allowed(dict([found]), Path("run"))
        with pytest.raises(UserError):
            require_allowed({"loss.kind": "another:name"}, Path("run"))
    with allow_code():
        require_allowed({"loss.kind": "another:name"}, Path("run"))
    with pytest.raises(UserError):
        require_allowed(dict([found]), Path("run"))


def test_plain_recipes_name_none() -> None:
    assert code_names(PLAIN) == {}


def test_every_key_that_imports_is_known() -> None:
    source = Path(__file__).parents[2] / "src" / "clasp"
    called = {
        key
        for file in source.rglob("*.py")
        for key in re.findall(r'(?:load|import)_named\([^()]*"([a-z.]+)"\)', file.read_text("utf-8"))
    }
    keys = {key.partition("[")[0] for key in NAMED} | {"tower", "store"}  # store.json: commands/run_store.py
    assert called and called <= keys, "a key that may name Python code is to be listed in training/run_code.py"


def test_a_recorded_store_is_imported_only_where_that_is_allowed(tmp_path: Path) -> None:
    (tmp_path / "store.json").write_text('{"store": "toystores:OutsideStore"}')
    for call in (
        lambda: open_run_store(tmp_path),
        lambda: copy_index(tmp_path, "flat"),
        lambda: writable_store(tmp_path, None, 3, print).__enter__(),
    ):
        with pytest.raises(
            UserError, match=r"store.json names Python code, store = 'toystores:OutsideStore', and a run"
        ):
            call()
    with allow_code():
        open_run_store(tmp_path).close()
    open_run_store(tmp_path).close()  # as a thread of the server that has opened it
