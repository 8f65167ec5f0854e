"""``clasp search`` as a command, and ``clasp serve`` over HTTP: start-up, memory, latency, and many clients at once.

By hand, and not a part of ``make bench``: ``python -m benchmarks.serving FOLDER --clients 64 --seconds 60``, where
FOLDER has an index (a run, or an ONNX export), and what follows ``--`` are further options of ``clasp serve``, such as
``-- --engine onnx-int8`` or ``-- --workers 2``. Printed as JSON. Start-up is from starting the process until ``/ready``
answers 200. ``search_command`` has the seconds of ``clasp search`` from starting the process to its end, cold (it loads
the model) and warm (the server of the folder answers), with an index of ``entries``; the first call of either may read
files from disk, and is apart. ``--clients 0`` leaves the many clients out. Memory is the resident set of the server and
the processes it started, after the requests, with its peak. No two queries are the same words, so that none is answered
from the memory of recent texts. The clients are threads of this process, which takes part of the same cores and imports
no torch. Of an export with int8 graphs, what these lose is measured first (``benchmarks.int8_graphs``).
"""

from __future__ import annotations

import argparse
import http.client
import json
import os
import platform
import random
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple
from urllib.parse import urlencode
from urllib.request import urlopen

import numpy as np

from benchmarks.int8_graphs import has_int8_graphs, measure_graphs

ADJECTIVES = "red old small wooden broken bright quiet foreign frozen empty striped round heavy golden wild".split()
NOUNS = "boat dog bridge market flower train child mountain window bicycle river bottle church horse lamp".split()
PLACES = "in the snow,at night,by the sea,on a table,in a forest,under a tree,in the city,before a storm".split(",")


class Reply(NamedTuple):
    """The status and the seconds of a request."""

    status: int
    seconds: float


class Server:
    """A server in a process of its own, on a free port."""

    def __init__(self, folder: Path, options: list[str]) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        began = time.perf_counter()
        command = [sys.executable, "-m", "clasp", "serve", str(folder), "--port", str(self.port), *options]
        self.process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
        while self.get("/ready").status != 200:
            if self.process.poll() is not None:
                raise SystemExit(f"the server ended with exit code {self.process.returncode}")
            time.sleep(0.02)
        self.startup = time.perf_counter() - began

    def get(self, path: str) -> Reply:
        """One request in a connection of its own; status 0 where it failed."""
        began = time.perf_counter()
        try:
            connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
            connection.request("GET", path)
            answer = connection.getresponse()
            answer.read()
            connection.close()
            return Reply(answer.status, time.perf_counter() - began)
        except (OSError, http.client.HTTPException):
            return Reply(0, time.perf_counter() - began)

    def entries(self) -> int:
        """Images in its index."""
        with urlopen(f"http://127.0.0.1:{self.port}/ready", timeout=60) as answer:
            return json.load(answer)["entries"]

    def memory(self) -> dict[str, float]:
        """Megabytes of the process and those it started, now and at most."""
        found = Counter[str]()
        for number in self._family(self.process.pid):
            for line in Path(f"/proc/{number}/status").read_text().splitlines():
                name, _, value = line.partition(":")
                if name in ("VmRSS", "VmHWM"):
                    found[name] += int(value.split()[0])
        return {"resident_mb": round(found["VmRSS"] / 1024), "peak_mb": round(found["VmHWM"] / 1024)}

    def _family(self, number: int) -> list[int]:
        children = Path(f"/proc/{number}/task/{number}/children").read_text().split()
        return [number, *(each for child in children for each in self._family(int(child)))]

    def stop(self) -> None:
        self.process.terminate()
        self.process.wait(30)


def query_words(chance: random.Random) -> str:
    """Words that nobody asked for before."""
    return f"{chance.choice(ADJECTIVES)} {chance.choice(NOUNS)} {chance.choice(PLACES)} {chance.randrange(10**6)}"


def query_path(chance: random.Random) -> str:
    """A search for such words."""
    return f"/api/search?{urlencode({'q': query_words(chance), 'k': 10})}"


def one_by_one(server: Server, count: int) -> dict[str, float]:
    """Latencies of requests that follow each other, after ten to warm up."""
    chance = random.Random(0)
    replies = [server.get(query_path(chance)) for _ in range(count + 10)][10:]
    assert all(reply.status == 200 for reply in replies), Counter(reply.status for reply in replies)
    return _milliseconds(replies)


def search_command(folder: Path, chance: random.Random, times: int) -> dict[str, Any]:
    """Seconds of ``clasp search``: of the first call, then the median and the slowest of ``times``."""
    seconds = []
    with tempfile.TemporaryDirectory() as made:
        for _ in range(times + 1):
            asked = [str(folder), query_words(chance), "--sheet", str(Path(made) / "hits.png"), "--json"]
            began = time.perf_counter()
            subprocess.run([sys.executable, "-m", "clasp", "search", *asked], stdout=subprocess.DEVNULL, check=True)
            seconds.append(time.perf_counter() - began)
    first, *others = seconds
    return {"first_s": round(first, 2), "median_s": round(median(others), 2), "slowest_s": round(max(others), 2)}


def many_clients(server: Server, clients: int, seconds: float) -> dict[str, Any]:
    """Each client asks again as soon as it is answered; after 429, a second later."""
    until = time.perf_counter() + seconds

    def client(number: int) -> list[Reply]:
        chance, replies = random.Random(1 + number), []
        while time.perf_counter() < until:
            replies.append(server.get(query_path(chance)))
            if replies[-1].status == 429:
                time.sleep(1)
        return replies

    with ThreadPoolExecutor(clients) as pool:
        replies = [reply for each in pool.map(client, range(clients)) for reply in each]
    answered = [reply for reply in replies if reply.status == 200]
    statuses = {str(status): count for status, count in sorted(Counter(reply.status for reply in replies).items())}
    rate = round(len(answered) / seconds, 1)
    return {"clients": clients, "statuses": statuses, "answered_per_s": rate, **_milliseconds(answered)}


def _milliseconds(replies: list[Reply]) -> dict[str, float]:
    if not replies:
        return {}
    p50, p99 = np.quantile([reply.seconds for reply in replies], (0.5, 0.99)) * 1e3
    return {"p50_ms": round(float(p50), 1), "p99_ms": round(float(p99), 1)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--requests", type=int, default=500)
    parser.add_argument("--commands", type=int, default=5, help="calls of clasp search, cold and warm each")
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=60.0)
    words, options = sys.argv[1:], list[str]()
    if "--" in words:  # options of clasp serve; argparse loses them behind its own
        words, options = words[: words.index("--")], words[words.index("--") + 1 :]
    given = parser.parse_args(words)
    facts: dict[str, Any] = {"graphs": measure_graphs(given.folder)} if has_int8_graphs(given.folder) else {}
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)  # where it is set, every start compiles all sources again
    chance = random.Random(-1)
    commands = {"cold": search_command(given.folder, chance, given.commands)} if given.commands else {}
    server = Server(given.folder, options)
    try:
        if given.commands:
            commands["warm"] = search_command(given.folder, chance, given.commands)
            facts["search_command"] = {"entries": server.entries(), **commands}
        alone = one_by_one(server, given.requests)
        facts |= {"startup_s": round(server.startup, 2), "one_by_one": alone, "memory": server.memory()}
        if given.clients:
            facts["together"] = many_clients(server, given.clients, given.seconds)
            facts["memory_after"] = server.memory()
    finally:
        server.stop()
    machine = f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}"
    print(json.dumps({"machine": machine, "options": options, **facts}, indent=1))


if __name__ == "__main__":
    main()
