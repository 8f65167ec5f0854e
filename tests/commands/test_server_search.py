"""A plain ``clasp search``, which a running server answers before the verbs are imported."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import typer

from clasp.cli.server_search import parse_plain_search
from clasp.cli.verbs import root_command
from clasp.serve.warm_server import NONCE_FIELD, PROOF_FIELD, ServerRecord, answer_proof, write_record

PLAIN = (
    "RUN dog",
    "RUN dog -k 3",
    "--json RUN dog -k 03",
    "RUN --where folder=a dog --where date>=2020 --only-close",
    "--sheet out/a.png RUN dog --json --only-close",
    "RUN dog -k 3 -k 4 --sheet a --sheet b",
    "RUN dog^-1",
)
OTHER = (
    "",
    "RUN",
    "RUN red dog",
    "RUN dog -k",
    "RUN dog -k 0",
    "RUN dog -k -1",
    "RUN dog -k ²",
    "RUN dog -k3",
    "RUN dog --where=folder=a",
    "RUN dog --where -x",
    "RUN dog --image a.png",
    "RUN dog --help",
    "RUN dog --foo",
    "RUN -- dog",
    "RUN -dog",
)


def parsed_by_the_verb(words: list[str]) -> dict[str, Any]:
    group: Any = typer.main.get_command(root_command("search"))
    context = group.make_context("clasp", [], resilient_parsing=True)
    return group.get_command(context, "search").make_context("search", words).params


@pytest.mark.parametrize("typed", PLAIN)
def test_a_plain_search_is_read_as_the_verb_reads_it(typed: str) -> None:
    ours, theirs = parse_plain_search(["search", *typed.split()]), parsed_by_the_verb(typed.split())
    assert ours is not None
    named = {**ours._asdict(), "where": list(ours.where)}
    assert named == {name: theirs[name] or [] if name == "where" else theirs[name] for name in named}
    assert not any(theirs[name] for name in theirs.keys() - named.keys()), "all others at their defaults"


@pytest.mark.parametrize("typed", OTHER)
def test_all_else_is_left_to_the_verb(typed: str) -> None:
    assert parse_plain_search(["search", *typed.split()]) is None
    assert parse_plain_search(["index", *typed.split()]) is None


class _Server(BaseHTTPRequestHandler):
    """Answers each search alike, or with an error."""

    def do_POST(self) -> None:
        wrong = "q=wrong" in self.path
        head = json.dumps({"hits": [], "note": "nothing is close", "p_value": 0.5}).encode()
        body = b'{"error": "the query cancels itself out"}' if wrong else len(head).to_bytes(8) + head + b"a picture"
        self.send_response(400 if wrong else 200)
        self.send_header("Content-Length", str(len(body) + (7 if "q=cut" in self.path else 0)))
        key = "another key" if "q=stranger" in self.path else "key"
        self.send_header(PROOF_FIELD, answer_proof(key, self.headers[NONCE_FIELD], body))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *given: object) -> None:
        pass


def test_a_server_answers_before_anything_is_imported(tmp_path: Path) -> None:
    code = """
import sys
from clasp.__main__ import start_command
sys.argv = ["clasp", "search", sys.argv[1], sys.argv[2], "--json"]
try:
    start_command()
finally:
    print(*sorted({"typer", "rich", "pydantic", "numpy", "torch", "ssl", "email"} & set(sys.modules)), file=sys.stderr)
"""

    def search(words: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-c", code, str(tmp_path), words], capture_output=True, text=True, timeout=60
        )

    with ThreadingHTTPServer(("127.0.0.1", 0), _Server) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        write_record(tmp_path, ServerRecord(f"http://127.0.0.1:{server.server_port}", os.getpid(), "key"))
        found, wrong, cut, stranger = search("dog"), search("wrong"), search("cut"), search("stranger")
        server.shutdown()
    assert json.loads(found.stdout)["query"] == "dog" and found.stderr == "\n" and found.returncode == 0
    assert (tmp_path / "search.png").read_bytes() == b"a picture"
    assert wrong.returncode == 2 and wrong.stderr.startswith("clasp: the query cancels itself out\n")
    assert cut.returncode == 2 and "is not a run folder" in cut.stderr, "an answer that is cut is none"
    assert stranger.returncode == 2 and "is not a run folder" in stranger.stderr, "nor is one without the key"
