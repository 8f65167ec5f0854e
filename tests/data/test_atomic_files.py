"""Files are the old or the new, never a part; a torn line is set aside; a folder has one writer."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from clasp.data import folder_lock
from clasp.data.atomic_files import (
    append_json_lines,
    read_json_lines,
    replace_file,
    translate_disk_errors,
    write_text_file,
)
from clasp.data.folder_lock import lock_folder
from clasp.data.regular_file import read_regular_file
from clasp.types import UserError


def test_a_file_is_replaced_or_left_and_nothing_else_stays(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    write_text_file(path, "old")
    with pytest.raises(ZeroDivisionError), replace_file(path) as part:
        part.write_text("half")
        raise ZeroDivisionError
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["a.txt"]
    with replace_file(path) as part:
        part.unlink()
        os.close(os.open(part, os.O_CREAT | os.O_WRONLY, 0o600))  # as a library that writes privately
    plain = tmp_path / "plain"
    plain.write_text("")
    assert path.stat().st_mode == plain.stat().st_mode


def test_a_torn_last_line_is_set_aside(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "results.jsonl"
    append_json_lines(path, [{"n": 1}, {"n": "\udce9"}])
    with path.open("a") as file:
        file.write('{"n": 3, "torn')
    assert read_json_lines(path) == [{"n": 1}, {"n": "\udce9"}] and "torn" in caplog.text
    append_json_lines(path, [{"n": 4}])
    assert [row["n"] for row in read_json_lines(path)] == [1, "\udce9", 4]
    assert (tmp_path / "results.jsonl.torn").read_text() == '{"n": 3, "torn\n'
    path.write_text('{"n": 1}\n{"n": \n{"n": 3}\n')
    with pytest.raises(UserError, match="damaged in line 2, which may be deleted"):
        read_json_lines(path)


@pytest.mark.parametrize(
    "text", ['{"n": 1}\r\n{"n": 2}\r\n', '\ufeff{"n": 1}\n{"n": 2}\n', '{"n": 1}\n{"n": 2}', '{"n": 1}\n{"n": 2}\r\n\n']
)
def test_lines_that_an_editor_saved_are_whole(text: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "results.jsonl"
    path.write_bytes(text.encode())
    assert read_json_lines(path) == [{"n": 1}, {"n": 2}]
    append_json_lines(path, [{"n": 3}])
    assert read_json_lines(path) == [{"n": 1}, {"n": 2}, {"n": 3}] and not caplog.text


OUT = Path("/proc/out")


@pytest.mark.parametrize("number", [errno.EROFS, errno.EACCES, errno.ENOSPC, errno.EDQUOT, errno.EISDIR])
def test_errors_of_the_disk_are_one_line(number: int, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"cannot be written|no space left"), translate_disk_errors(tmp_path):
        raise OSError(number, os.strerror(number))


def test_a_folder_that_its_file_system_does_not_make_is_one_line() -> None:
    with pytest.raises(UserError, match=r"^/proc/out cannot be written: "), translate_disk_errors(OUT):
        OUT.mkdir(parents=True)


# --- the lock --------------------------------------------------------------------------------------------------------

HOLD = "import sys, time\nfrom clasp.data.folder_lock import lock_folder\nfrom pathlib import Path\n"
HOLD += "with lock_folder(Path(sys.argv[1])):\n    print('held', flush=True)\n    time.sleep(60)\n"


def test_a_second_writer_is_told_who_the_first_is_and_a_dead_one_is_taken_over(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    with subprocess.Popen([sys.executable, "-c", HOLD, str(folder)], stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None and holder.stdout.readline() == "held\n"
        with pytest.raises(UserError, match=rf"run is being written to by process {holder.pid} \(-c") as told:
            with lock_folder(folder):
                pass
        assert "\n" not in str(told.value)
        holder.send_signal(signal.SIGKILL)
    assert (folder / "lock").exists()
    with lock_folder(folder):
        assert json.loads((folder / "lock").read_text())["process"] == os.getpid()
    assert os.listdir(folder) == []


def test_a_folder_that_was_moved_is_told_and_the_lock_of_another_stays(tmp_path: Path) -> None:
    with lock_folder(tmp_path / "run") as require_held:
        require_held()
        (tmp_path / "run").rename(tmp_path / "moved")
        with pytest.raises(UserError, match="run was moved, deleted or replaced"):
            require_held()
        with pytest.raises(UserError, match="run is gone"), translate_disk_errors(tmp_path / "run"):
            write_text_file(tmp_path / "run" / "recipe.toml", "")
        (tmp_path / "run").mkdir()
        (tmp_path / "run" / "lock").write_text("another's")
        with pytest.raises(UserError, match="run was moved, deleted or replaced"):
            require_held()
    assert (tmp_path / "run" / "lock").exists()


def test_a_deleted_lock_is_no_reason_to_end_and_a_file_in_place_of_the_folder_is(tmp_path: Path) -> None:
    with lock_folder(tmp_path / "run") as require_held:
        (tmp_path / "run" / "lock").unlink()
        require_held()
        (tmp_path / "run").rename(tmp_path / "moved")
        (tmp_path / "run").touch()
        with pytest.raises(UserError, match="run was moved, deleted or replaced"):
            require_held()
    assert (tmp_path / "run").is_file()
    (tmp_path / "run").unlink()
    with lock_folder(tmp_path / "run"):
        (tmp_path / "run").rename(tmp_path / "moved again")
        (tmp_path / "run").mkdir()
    assert (tmp_path / "run").is_dir(), "the folder of another stays"


def test_a_file_missing_elsewhere_is_no_folder_that_is_gone(tmp_path: Path) -> None:
    for name in ("elsewhere/weights", "run.json"):
        with pytest.raises(FileNotFoundError), translate_disk_errors(tmp_path / "run"):
            (tmp_path / name).read_bytes()
    for path in (tmp_path / "gone" / "file", tmp_path / "gone"):
        with pytest.raises(UserError, match="gone is gone: it was moved"), translate_disk_errors(path):
            (tmp_path / "gone" / "file").write_bytes(b"")


def test_a_folder_made_for_its_lock_goes_where_it_stayed_empty(tmp_path: Path) -> None:
    with lock_folder(tmp_path / "new"):
        pass
    assert not (tmp_path / "new").exists()
    with lock_folder(tmp_path / "new"):
        (tmp_path / "new" / "file").touch()
    assert os.listdir(tmp_path / "new") == ["file"]
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="file cannot be written"), lock_folder(tmp_path / "file"):
        pass


def test_without_flock_the_number_of_the_process_decides(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    import fcntl

    def refused(*args: object) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", refused)
    about = {"process": os.getppid(), "host": folder_lock.platform.node(), "command": "clasp train x"}
    (tmp_path / "lock").write_text(json.dumps(about))
    with pytest.raises(UserError, match=r"process \d+ \(clasp train x\).*if that process has ended, delete"):
        with lock_folder(tmp_path):
            pass
    assert "has no locks" in caplog.text
    (tmp_path / "lock").write_text(json.dumps({**about, "process": 2**22 + 1}))  # no such process
    with lock_folder(tmp_path):
        pass
    (tmp_path / "lock").write_text(json.dumps({**about, "host": "elsewhere"}))
    with pytest.raises(UserError, match="on elsewhere"), lock_folder(tmp_path):
        pass


# --- what is no regular file -----------------------------------------------------------------------------------------


def test_pipes_devices_folders_and_giants_are_refused_unread(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.jpg")
    (tmp_path / "link.jpg").symlink_to("/dev/zero")
    with (tmp_path / "giant.jpg").open("wb") as file:
        file.truncate(20 << 30)
    wrong = {"pipe.jpg": "is a pipe", "link.jpg": "is a device", "giant.jpg": "21,474,836,480 bytes"}
    done: list[str] = []

    def read_all() -> None:
        for name, words in wrong.items():
            with pytest.raises(UserError, match=words):
                read_regular_file(tmp_path / name)
            done.append(name)

    thread = threading.Thread(target=read_all, daemon=True)
    thread.start()
    thread.join(20)
    assert done == list(wrong)
