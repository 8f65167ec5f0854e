"""What people and files name is shown as it was typed, wherever it is printed: one text through every outlet."""

from __future__ import annotations

import io
import json
import logging
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from clasp.cli.program import _PrintableFormatter
from clasp.data.checks import Finding
from clasp.report.console import (
    print_error,
    print_json,
    print_lines,
    print_status,
    print_table,
    printable,
    progress_bar,
    relative_path,
)
from clasp.report.contact_sheet import SheetRow, Thumbnail, contact_sheet
from clasp.report.terminal import print_results, terminal_reporter
from toyresults import result

TYPED = "[/b] [red]x :cat: \x1b[31m\n\t\u202e\ud83d.png"
SHOWN = r"[/b] [red]x :cat: \x1b[31m\n\t\u202e\ud83d.png"


def _log() -> None:
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_PrintableFormatter("%(message)s"))
    handler.handle(logging.makeLogRecord({"msg": "skipped %s", "args": (TYPED,)}))


def _progress() -> None:
    with progress_bar(f"images of {TYPED}") as progress:
        progress(3, 3)


def _training() -> None:
    reporter = terminal_reporter()
    reporter.start(3)
    reporter.note(f"skipped {TYPED}: truncated")
    reporter.stop()


OUTLETS: dict[str, Callable[[], None]] = {
    "remark: index, train, search, import": lambda: print_status(f"the run is in {TYPED}"),
    "error of every verb": lambda: print_error(f"{TYPED} does not exist"),
    "doctor: findings": lambda: print_lines([Finding("look", "pairs", TYPED)]),
    "search: title": lambda: print_table(TYPED, ("id",), [["a"]]),
    "search: hits": lambda: print_table("words", ("id", "cosine"), [[TYPED, "0.1"]]),
    "params, sweep: titles of columns": lambda: print_table("runs", (TYPED,), [["a"]]),
    "sweep: notes": lambda: print_table("runs", ("set",), [["a"]], [f"{TYPED} failed"]),
    "eval, train: title": lambda: print_results(TYPED, [result("zeroshot", metrics=["top1"])], "here"),
    "eval, train: data": lambda: print_results("run", [result("zeroshot", metrics=["top1"], data=TYPED)], "here"),
    "eval, train: language": lambda: print_results("run", [result("multilingual", TYPED, metrics=["top1"])], "here"),
    "progress": _progress,
    "train: notes": _training,
    "warnings": _log,
}


@pytest.mark.parametrize("name", OUTLETS)
def test_every_outlet_shows_text_as_typed(name: str, capsys: pytest.CaptureFixture[str]):
    OUTLETS[name]()
    captured = capsys.readouterr()
    assert SHOWN in captured.out + captured.err
    assert not set("\x1b\t\u202e") & set(captured.out + captured.err)


class _Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize("name", OUTLETS)
def test_so_does_a_terminal(name: str, monkeypatch: pytest.MonkeyPatch):
    """Where rich draws colours and bars of its own."""
    screen = _Terminal()
    for variable, value in (("TERM", "xterm-256color"), ("COLUMNS", "100")):
        monkeypatch.setenv(variable, value)
    monkeypatch.setattr(sys, "stdout", screen)
    monkeypatch.setattr(sys, "stderr", screen)
    OUTLETS[name]()
    assert SHOWN in screen.getvalue()
    assert "\x1b[31m" not in screen.getvalue() and "\u202e" not in screen.getvalue()


def test_json_is_what_was_typed_again(capsys: pytest.CaptureFixture[str]):
    print_json({"query": TYPED, "path": Path("a"), "ring": "指輪\x9b"})
    out = capsys.readouterr().out
    assert out.count("\n") == 1 and "指輪" in out and out[:-1].isprintable()
    assert json.loads(out) == {"query": TYPED, "path": "a", "ring": "指輪\x9b"}


def test_letters_of_all_scripts_stay_as_they_are():
    for text in ("指輪 กบ नमस्ते", "👩‍🚀 e\u0301", "می‌خواهم", r"C:\new\table", ""):
        assert printable(text) == text
    assert printable("a\r\nb\x07\x7f\x85\u2028") == r"a\r\nb\x07\x7f\x85\u2028"


def test_a_contact_sheet_escapes_as_well(tmp_path: Path):
    def drawn(text: str, name: str) -> bytes:
        return contact_sheet([SheetRow(text, [Thumbnail(None, text)], text)], tmp_path / name).path.read_bytes()

    assert drawn("a [/b]\n\x1b[31m", "one.png") == drawn(r"a [/b]\n\x1b[31m", "two.png")


def test_paths_are_seen_from_the_current_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    assert relative_path(tmp_path / "here" / "runs" / "x") == "runs/x" and relative_path("runs/x") == "runs/x"
    assert relative_path(tmp_path / "there") == str(tmp_path / "there")
