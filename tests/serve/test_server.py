"""The process of the server: what it refuses to bind, how a command finds it, and how it stops."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from clasp.commands.serve import require_serve_extra
from clasp.commands.warm_search import search_warm_server
from clasp.serve.server import bind_address
from clasp.serve.warm_server import (
    ServerRecord,
    WarmAnswer,
    ask_warm_server,
    read_record,
    remove_record,
    write_record,
)
from clasp.types import UserError
from toydata import COLOURS
from toysearch import png
from toyserver import KEY, serving, toy_app, toy_service, wait_until_it_answers


def test_addresses():
    with pytest.raises(UserError, match=r"0\.0\.0\.0 can be reached .* --token"):
        bind_address("0.0.0.0", 0, "")
    with pytest.raises(UserError, match="--port 70000"):
        bind_address("127.0.0.1", 70000, "")
    with pytest.raises(UserError, match="cannot listen at"):
        bind_address("192.0.2.1", 0, "token")  # an address that no machine has
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(UserError, match=r"in use; --port 0"):
            bind_address("127.0.0.1", taken.getsockname()[1], "")
    bound = bind_address("127.0.0.1", 0, "")
    assert bound.url == f"http://127.0.0.1:{bound.socket.getsockname()[1]}"
    bound.socket.close()


def test_without_the_extra_there_is_one_line(monkeypatch: pytest.MonkeyPatch):
    require_serve_extra()
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr("clasp.commands.serve.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install 'clasp-vl\[serve\]'"):
        require_serve_extra()


def test_a_command_asks_the_server_of_its_run(tmp_path: Path):
    run = tmp_path / "run"
    run.mkdir()
    service = toy_service(tmp_path / "x")
    with serving(toy_app(service)) as address:
        assert ask_warm_server(run, "red", [], 3, []) is None, "no server is recorded"
        record = ServerRecord(address, os.getpid(), KEY)
        write_record(run, record)
        assert (run / "server.json").stat().st_mode & 0o777 == 0o600
        found = search_warm_server(run, "red -green", [], 3, ["folder=ring"])
        assert found is not None and found.query == "red -green"
        assert all(hit["id"].startswith("ring/") for hit in found.answer["hits"])
        assert (run / "search.png").read_bytes() == b"red -green", "the server's drawing"
        assert {"id", "score", "meta", "z", "close", "duplicates"} == set(found.answer["hits"][0])
        (tmp_path / "q.png").write_bytes(png(COLOURS["green"]))
        blue = tmp_path / "blue.png"
        blue.write_bytes(png(COLOURS["blue"]))
        by_image = search_warm_server(run, None, [(tmp_path / "q.png", 1.0)], 1, sheet=tmp_path / "new" / "sheet.png")
        assert by_image is not None and "green" in by_image.answer["hits"][0]["id"]
        assert by_image.sheet.exists()
        away = search_warm_server(run, "yellow", [(tmp_path / "q.png", -0.5)], 10)
        assert away is not None and away.query.endswith("q.png with weight -0.5")
        assert "green" not in str([hit["id"] for hit in away.answer["hits"]])
        several = search_warm_server(run, None, [(tmp_path / "q.png", 2.0), (blue, 1.0), (blue, -0.5)], 10)
        assert several is not None and several.query.endswith(f"+ picture {blue} + picture {blue} with weight -0.5")
        assert "green" in several.answer["hits"][0]["id"]
        close = search_warm_server(run, "purple", [], 5, only_close=True)
        assert close is not None and close.answer["hits"] == [] and close.answer["note"].startswith("nothing is close")
        with pytest.raises(UserError, match="words alone tell which hits are close"):
            search_warm_server(run, None, [(blue, 1.0)], 5, only_close=True)
        with pytest.raises(UserError, match="cancels itself out"):
            search_warm_server(run, "red -red", [], 3)
        assert search_warm_server(run, "red", [], 10_000) is None, "above the server's limit"
        assert search_warm_server(run, None, [], 3) is None
        assert search_warm_server(run, None, [(tmp_path / "none.png", 1.0)], 3) is None
        write_record(run, ServerRecord(address, os.getpid(), "another key"))
        assert ask_warm_server(run, "red", [], 3, []) is None
        remove_record(run, record)
        assert (run / "server.json").exists(), "it is another server's by now"
    write_record(run, record)
    assert ask_warm_server(run, "red", [], 3, []) is None, "nothing listens there any more"
    service.close()


class _Listener(BaseHTTPRequestHandler):
    """Counts what reaches it."""

    asked = 0

    def do_POST(self) -> None:
        _Listener.asked += 1
        self.send_error(400)


def test_stale_and_damaged_records_are_ignored(tmp_path: Path):
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    write_record(tmp_path, ServerRecord("http://127.0.0.1:1", ended.pid, "k"))
    assert read_record(tmp_path) is None
    numbered = {"address": "http://127.0.0.1:1", "pid": os.getpid(), "key": 5}
    strange = ({"address": 1}, {"address": "x", "pid": "y", "key": "z"}, numbered)
    for text in ("", "[]", "{}", *map(json.dumps, strange)):
        (tmp_path / "server.json").write_text(text)
        assert read_record(tmp_path) is None and ask_warm_server(tmp_path, "x", [], 1, []) is None
    (tmp_path / "server.json").write_text(json.dumps({"address": "file:///etc", "pid": os.getpid(), "key": "z"}))
    assert ask_warm_server(tmp_path, "x", [], 1, []) is None
    with ThreadingHTTPServer(("0.0.0.0", 0), _Listener) as elsewhere:
        _Listener.asked = 0
        threading.Thread(target=elsewhere.serve_forever, daemon=True).start()
        for host in ("0.0.0.0", socket.gethostname()):
            write_record(tmp_path, ServerRecord(f"http://{host}:{elsewhere.server_port}", os.getpid(), "k"))
            assert ask_warm_server(tmp_path, "x", [], 1, []) is None
        elsewhere.shutdown()
    assert not _Listener.asked, "a run folder sends no search to another machine"
    assert not isinstance(ask_warm_server(tmp_path / "none", "x", [], 1, []), WarmAnswer)


SERVER = """
import sys, time
from pathlib import Path
sys.path[:0] = {path!r}
from clasp.serve.server import bind_address, recorded_server, run_server
from toyserver import KEY, toy_app, toy_service
service = toy_service(Path({folder!r}) / "x")
queue, encode = service._queue, service._queue._model.encode_text
def slow(*given, **options):
    time.sleep(0.7)
    return encode(*given, **options)
service._queue._model.encode_text = slow
address = bind_address("127.0.0.1", 0, "")
with recorded_server(Path({folder!r}), address, KEY, print):
    run_server(toy_app(service), address.socket)
service.close()
print("closed")
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=["SIGTERM", "SIGINT"])
def test_a_signal_lets_running_requests_end(tmp_path: Path, number: signal.Signals):
    tests = Path(__file__).parents[1]
    script = SERVER.format(path=[str(tests)], folder=str(tmp_path))
    process = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 60
    while (record := read_record(tmp_path)) is None:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    replies = []

    def ask() -> None:
        with urllib.request.urlopen(f"{record.address}/api/search?q=red", timeout=30) as reply:
            replies.append(json.loads(reply.read())["query"])

    wait_until_it_answers(record.address)
    thread = threading.Thread(target=ask)
    thread.start()
    time.sleep(0.35)
    process.send_signal(number)
    thread.join()
    out, _ = process.communicate(timeout=30)
    assert replies == ["red"] and process.returncode == 0 and out.endswith("closed\n")
    assert not (tmp_path / "server.json").exists()
