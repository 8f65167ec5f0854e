"""``clasp serve`` over a run: indexed first, searched by HTTP and by ``clasp search``, stopped by a signal."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
import urllib.parse
import urllib.request
from pathlib import Path
from typing import Any

from clasp.commands.run_store import open_run_store
from clasp.commands.search import search_images
from clasp.commands.serve import ServeSettings, serve_run
from clasp.commands.warm_search import FoundHits, search_warm_server
from clasp.search.background import BACKGROUND_FILE
from clasp.serve.warm_server import read_record
from clasp.types import no_progress_bar
from toydata import toys, write_folder, write_images
from toyruns import recipe, run, save_towers
from toysearch import png
from toyserver import wait_until_it_answers


def ask_and_stop(folder: Path, found: dict[str, Any]) -> None:
    """Search as a browser and as a command, then send SIGTERM to this process, where the server runs."""
    deadline = time.monotonic() + 120
    while (record := read_record(folder)) is None and time.monotonic() < deadline:
        time.sleep(0.05)
    assert record is not None
    try:
        wait_until_it_answers(record.address)
        asked = urllib.parse.urlencode({"q": "a red ring", "k": 5})
        with urllib.request.urlopen(f"{record.address}/api/search?{asked}", timeout=60) as reply:
            found["http"] = [hit["id"] for hit in json.loads(reply.read())["hits"]]
        found["warm"] = search_warm_server(folder, "a red ring", [], 5)
        data = b'--x\r\nContent-Disposition: form-data; name="images"; filename="new.png"\r\n\r\n%b\r\n--x--\r\n'
        head = {"Content-Type": "multipart/form-data; boundary=x"}
        added = urllib.request.Request(f"{record.address}/api/images", data % png((9, 9, 9)), head, method="POST")
        with urllib.request.urlopen(added, timeout=60) as reply:
            (entry,) = json.loads(reply.read())["entries"]
        found["added"] = dict(open_run_store(folder).scan())[entry["id"]]["name"], Path(entry["name"]).is_file()
        asked = urllib.parse.urlencode({"id": entry["id"]})
        deleted = urllib.request.Request(f"{record.address}/api/image?{asked}", method="DELETE")
        with urllib.request.urlopen(deleted, timeout=60) as reply:
            found["deleted"] = json.loads(reply.read())["file_deleted"]
    finally:
        os.kill(os.getpid(), signal.SIGTERM)


def test_from_pictures_to_hits_and_changes(tmp_path: Path):
    pairs, folder = write_folder(toys(24), tmp_path / "pairs"), tmp_path / "run"
    run(recipe(save_towers(tmp_path), pairs, "train.epochs=1"), folder)
    write_images(toys(20), tmp_path / "pictures")
    said: list[str] = []
    found: dict[str, Any] = {}
    asking = threading.Thread(target=ask_and_stop, args=(folder, found))
    asking.start()
    serve_run(
        folder,
        str(tmp_path / "pictures"),
        ServeSettings(port=0, uploads=tmp_path / "uploads"),
        say=said.append,
        bar=no_progress_bar,
    )
    asking.join()
    assert "20 images added" in said[0] and "20 images; open http://127.0.0.1:" in said[1]
    warm = found["warm"]
    assert isinstance(warm, FoundHits) and warm.sheet.read_bytes().startswith(b"\x89PNG")
    cold = search_images(folder, "a red ring", [], 5)
    assert found["http"] == [hit["id"] for hit in warm.answer["hits"]] == [hit.id for hit in cold.hits]
    assert [hit["z"] for hit in warm.answer["hits"]] == [ranked.z for ranked in cold.answer.hits]
    name, there = found["added"]
    assert Path(name).parent == tmp_path / "uploads" and there and found["deleted"] and not Path(name).exists()
    assert (folder / BACKGROUND_FILE).exists() and not (folder / "server.json").exists()
