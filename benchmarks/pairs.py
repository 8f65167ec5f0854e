"""Start and memory of large tables of pairs: ``python -m benchmarks.pairs --rows 10000000``.

For each format a table is written, opened once (cold: every row is read and indexed), and then by a new process (warm):
opened, split, indexed and hashed, up to the order of the first epoch. Printed: seconds, and the process's own memory
(anonymous pages, sampled) in bytes a row: what remains, and the peak. Images are not read, and do not exist. Note: what
is mapped from the cache folder can be dropped by the system at any time, and is not counted. About
19 MB do not grow with the rows; below a few million rows they are most of the bytes a row.
"""

from __future__ import annotations

import argparse
import io
import json
import subprocess
import sys
import tarfile
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

_WANTED_BYTES, _WANTED_SECONDS = 64, 20  # a row, and in all, of a warm start
_ROWS_OF_SHARD, _ROWS_OF_GROUP = 100_000, 65_536


def caption(row: int) -> str:
    """A caption of about 60 characters; one in ten is that of another row."""
    return f"photograph {row - row % 10 if row % 10 == 1 else row} of a street in the rain, seen from a window"


def write_csv(folder: Path, rows: int) -> str:
    """Columns filepath, title."""
    file = folder / "pairs.csv"
    with file.open("w") as out:
        out.write("filepath,title\n")
        out.writelines(f'images/{row:09}.jpg,"{caption(row)}"\n' for row in range(rows))
    return str(file)


def write_jsonl(folder: Path, rows: int) -> str:
    """Keys image, caption."""
    file = folder / "pairs.jsonl"
    with file.open("w") as out:
        out.writelines(f'{{"image": "images/{row:09}.jpg", "caption": "{caption(row)}"}}\n' for row in range(rows))
    return str(file)


def write_parquet(folder: Path, rows: int) -> str:
    """Columns image (a path), caption."""
    file = folder / "pairs.parquet"
    with pq.ParquetWriter(file, pa.schema([("image", pa.string()), ("caption", pa.string())])) as writer:
        for start in range(0, rows, _ROWS_OF_GROUP):
            some = range(start, min(rows, start + _ROWS_OF_GROUP))
            columns = {"image": [f"images/{row:09}.jpg" for row in some], "caption": [caption(row) for row in some]}
            writer.write_table(pa.table(columns), row_group_size=_ROWS_OF_GROUP)
    return str(file)


def write_tar(folder: Path, rows: int) -> str:
    """Shards of key.jpg (of one byte), key.txt."""
    shards = -(-rows // _ROWS_OF_SHARD)
    for shard in range(shards):
        with tarfile.open(folder / f"{shard:04}.tar", "w", format=tarfile.USTAR_FORMAT) as tar:
            for row in range(shard * _ROWS_OF_SHARD, min(rows, (shard + 1) * _ROWS_OF_SHARD)):
                for suffix, data in (("jpg", b"."), ("txt", caption(row).encode())):
                    member = tarfile.TarInfo(f"{row:09}.{suffix}")
                    member.size = len(data)
                    tar.addfile(member, io.BytesIO(data))
    return f"{folder}/{{0000..{shards - 1:04}}}.tar"


WRITERS: dict[str, Callable[[Path, int], str]] = {
    "csv": write_csv,
    "jsonl": write_jsonl,
    "parquet": write_parquet,
    "tar": write_tar,
}


class OwnMemory:
    """The anonymous memory of this process in bytes, beyond that at the start: now, and the peak."""

    def __init__(self) -> None:
        self._start = self._peak = self._read()
        threading.Thread(target=self._sample, daemon=True).start()

    @property
    def now(self) -> int:
        return self._read() - self._start

    @property
    def peak(self) -> int:
        return max(self._peak, self._read()) - self._start

    def _sample(self) -> None:
        while True:
            self._peak = max(self._peak, self._read())
            time.sleep(0.005)

    def _read(self) -> int:
        status = Path("/proc/self/status").read_text()
        return 1024 * int(status.partition("RssAnon:")[2].split()[0])


def start(source: str, cache: Path) -> dict[str, float]:
    """Seconds and bytes of what ``clasp train`` does with pairs before the first step, but for features."""
    from clasp.config.run_plan import hash_pairs
    from clasp.data.loader import BatchReader, PairLoader
    from clasp.data.pairs import open_pairs, split_by_group
    from clasp.data.readers import LiveImageReader, LiveTextReader, PairIndex

    memory, began, seconds = OwnMemory(), time.perf_counter(), {}

    def lap(name: str) -> None:
        seconds[name] = round(time.perf_counter() - began - sum(seconds.values()), 2)

    pairs = open_pairs(source, cache=cache)
    lap("open")
    train, val = split_by_group(pairs, 0.01)
    lap("split")
    index = PairIndex(train)
    lap("index")
    hash_pairs(index, val)
    lap("hash")
    never: tuple[LiveImageReader, LiveTextReader] = (None, None)  # pyright: ignore[reportAssignmentType]
    loader = PairLoader(BatchReader(index, *never), batch_size=1024, seed=0)
    held = loader._sample_indices(0, 0)  # holds the order of the epoch
    next(held)
    lap("order")
    total = time.perf_counter() - began
    return {"seconds": total, "bytes": memory.now, "peak_bytes": memory.peak, "rows": len(pairs), **seconds}


def measure(source: str, cache: Path) -> dict[str, float]:
    """``start`` in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.pairs", "--start", source, "--cache", str(cache)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    words = argparse.ArgumentParser(prog="python -m benchmarks.pairs", description=__doc__)
    words.add_argument("--rows", type=int, default=1_000_000)
    words.add_argument("--formats", nargs="+", default=list(WRITERS), choices=list(WRITERS))
    words.add_argument("--folder", type=Path, help="where the tables are written; by default a temporary folder")
    words.add_argument("--start", help=argparse.SUPPRESS)
    words.add_argument("--cache", type=Path, help=argparse.SUPPRESS)
    given = words.parse_args()
    if given.start:
        print(json.dumps(start(given.start, given.cache)))
        return
    print("| format | rows | start | seconds | of these open, split, index, hash, order | bytes a row | at the peak |")
    print("|---|---|---|---|---|---|---|")
    for name in given.formats:
        with tempfile.TemporaryDirectory(dir=given.folder) as folder:
            source = WRITERS[name](Path(folder), given.rows)
            for kind in ("cold", "warm"):
                row = measure(source, Path(folder) / "cache")
                laps = " ".join(f"{row[lap]:.1f}" for lap in ("open", "split", "index", "hash", "order"))
                held, peak = (row[key] / row["rows"] for key in ("bytes", "peak_bytes"))
                reached = row["seconds"] <= _WANTED_SECONDS and peak <= _WANTED_BYTES
                verdict = f"{'reached' if reached else '**missed**'}" if kind == "warm" else ""
                print(
                    f"| {name} | {row['rows']:,} | {kind} | {row['seconds']:.1f} | {laps} | {held:.0f} | {peak:.0f} "
                    f"{verdict} |",
                    flush=True,
                )


if __name__ == "__main__":
    main()
