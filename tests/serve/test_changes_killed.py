"""A server that is killed while it adds and deletes: nothing acknowledged is lost, nothing is stored twice."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import httpx
import pytest

from clasp.search.flat_store import FlatStore
from toysearch import png

ROUNDS = int(os.environ.get("CLASP_KILL_ROUNDS", "2"))
"""20 take about a minute"""
SERVER = """
import sys
from pathlib import Path
from clasp.serve.editor import IndexEditor
from clasp.serve.upload_folder import UploadFolder
from toyserver import serving, toy_app, toy_service
folder = Path(sys.argv[1])
service = toy_service(folder)
with serving(toy_app(service, editor=IndexEditor(service, UploadFolder(folder / "uploads")))) as address:
    print(address, flush=True)
    sys.stdin.read()
"""


class Client:
    """Adds images and deletes some of them until the server is gone; remembers what was asked for and what answered."""

    def __init__(self, address: str) -> None:
        self.added: set[str] = set()
        self.asked_to_delete: set[str] = set()
        self.deleted: set[str] = set()
        self._address = address

    def change(self, number: int) -> None:
        chance = random.Random(number)
        with httpx.Client(base_url=self._address, timeout=30, trust_env=False) as api:
            for step in range(10_000):
                try:
                    self._step(api, f"{number}-{step}", chance)
                except httpx.HTTPError:
                    return

    def _step(self, api: httpx.Client, name: str, chance: random.Random) -> None:
        data = png((chance.randrange(256), chance.randrange(256), chance.randrange(256)))
        reply = api.post("/api/images", files={"images": (f"{name}.png", data)})
        assert reply.status_code == 201, reply.text
        (entry,) = reply.json()["entries"]
        self.added.add(entry["id"])
        if chance.random() < 0.5:
            self.asked_to_delete.add(entry["id"])
            assert api.delete("/api/image", params={"id": entry["id"]}).json()["file_deleted"]
            self.deleted.add(entry["id"])


@pytest.mark.parametrize("number", range(ROUNDS))
def test_a_kill_loses_nothing_acknowledged(tmp_path: Path, number: int):
    folder = tmp_path / "server"
    tests = str(Path(__file__).parent.parent)
    paths = os.pathsep.join([tests, *filter(None, [os.environ.get("PYTHONPATH")])])
    server = subprocess.Popen(
        [sys.executable, "-c", SERVER, str(folder)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": paths},
    )
    assert server.stdin is not None and server.stdout is not None
    try:
        client = Client(server.stdout.readline().decode().strip())
        threads = [threading.Thread(target=client.change, args=(each,)) for each in range(3)]
        for thread in threads:
            thread.start()
        deadline = time.monotonic() + 30
        while not (client.added and client.deleted) and time.monotonic() < deadline:
            time.sleep(0.01)
        time.sleep(random.Random(number).uniform(0, 0.5))
    finally:
        server.send_signal(signal.SIGKILL)
        server.wait()
        server.stdin.close()
        server.stdout.close()
    for thread in threads:
        thread.join()
    entries = list(FlatStore(folder / "index").scan())
    stored = {name for name, _ in entries}
    assert client.added and client.deleted, "it was killed before it did anything"
    assert len(entries) == len(stored)
    assert client.added - client.asked_to_delete <= stored and not client.deleted & stored
    assert all(Path(meta["name"]).is_file() for _, meta in entries), "an entry has its file"
