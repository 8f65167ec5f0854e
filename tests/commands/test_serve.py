"""``clasp serve`` over a run: indexed first, searched by HTTP and by ``clasp search``, stopped by a signal."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import urllib.parse
import urllib.request
from pathlib import Path

from clasp import cli
from clasp.commands.search import search_images
from clasp.commands.warm_search import search_warm_server
from clasp.search.background import BACKGROUND_FILE
from clasp.serve.warm_server import read_record
from toydata import toys, write_folder, write_images
from toyruns import recipe, run, save_towers


def test_from_pictures_to_hits(tmp_path: Path):
    pairs = write_folder(toys(48), tmp_path / "pairs")
    run(recipe(save_towers(tmp_path), pairs), tmp_path / "run")
    pictures = tmp_path / "pictures"
    write_images(toys(20), pictures)
    script = "import sys; from clasp.cli import main; sys.argv[0] = 'clasp'; main()"
    words = ["serve", str(tmp_path / "run"), "--pictures", str(pictures), "--port", "0"]
    process = subprocess.Popen(
        [sys.executable, "-c", script, *words],
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(Path(cli.__file__).parents[1])},
    )
    try:
        deadline = time.monotonic() + 120
        while (record := read_record(tmp_path / "run")) is None:
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.1)
        for _ in range(100):
            try:
                urllib.request.urlopen(f"{record.address}/ready", timeout=5).close()
                break
            except OSError:
                time.sleep(0.05)
        asked = urllib.parse.urlencode({"q": "a red ring", "k": 5})
        with urllib.request.urlopen(f"{record.address}/api/search?{asked}", timeout=60) as reply:
            by_http = [hit["id"] for hit in json.loads(reply.read())["hits"]]
        warm = search_warm_server(tmp_path / "run", "a red ring", None, 5)
        assert warm is not None and warm.sheet.read_bytes().startswith(b"\x89PNG")
    finally:
        process.send_signal(signal.SIGTERM)
        _, said = process.communicate(timeout=60)
    assert process.returncode == 0 and "20 images added" in said and record.address in said
    cold = search_images(tmp_path / "run", "a red ring", None, 5)
    assert by_http == [hit["id"] for hit in warm.answer["hits"]] == [hit.id for hit in cold.hits]
    assert {hit["z"] for hit in warm.answer["hits"]} == {ranked.z for ranked in cold.answer.hits}
    assert (tmp_path / "run" / BACKGROUND_FILE).exists() and not (tmp_path / "run" / "server.json").exists()
