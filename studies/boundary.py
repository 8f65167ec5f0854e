"""What a higher frozen boundary costs in quality and gives in time: tunings over all blocks, the top 4, the top 2.

Goes in: nothing (the sample inside the package). Comes out: a table, printed and written to ``boundary.md``. The text
tower is multilingual-e5-small; the image tower is EfficientNet-Lite0, locked, its vectors kept. Heads start from the
closed form, so every row is what tuning inside the text tower adds to it. One drawing style trains, captions are names
in four languages; the validation concepts are asked for in the same languages (image to text, R@5, macro over them).

    python studies/boundary.py [--seeds 2]
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from clasp.align import align, cache_folder
from clasp.demo.sample import unpack
from clasp.recipe import read_recipe

LANGUAGES = ("en", "sw", "cy", "am")
ROWS: dict[str, list[str]] = {
    "heads": [],
    "norms": ['tune.text=["norms"]'],
    "norms, top 4": ["tune.text=[\"norms(blocks='-4:')\"]"],
    "norms, top 2": ["tune.text=[\"norms(blocks='-2:')\"]"],
    "lora r=8": ['tune.text=["lora(rank=8)"]'],
    "lora r=8, top 4": ["tune.text=[\"lora(rank=8, blocks='-4:')\"]"],
    "lora r=8, top 2": ["tune.text=[\"lora(rank=8, blocks='-2:')\"]"],
    "adapters + norms (LwA), top 2": ["tune.text=[\"adapters(blocks='-2:')\", \"norms(blocks='-2:')\"]"],
    "last block": ['tune.text=["last(1)"]'],
    "lora r=8, top 2, kept in float32": ["tune.text=[\"lora(rank=8, blocks='-2:')\"]", "data.features=float32"],
    "lora r=8, top 2, kept in int8": ["tune.text=[\"lora(rank=8, blocks='-2:')\"]", "data.features=int8"],
    "lora r=8, top 2, not kept": ["tune.text=[\"lora(rank=8, blocks='-2:')\"]", "data.features=off"],
}


def main() -> None:
    """Run every row with every seed and print the table."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--seeds", type=int, default=2)
    seeds = range(parser.parse_args().seeds)
    with tempfile.TemporaryDirectory() as folder:
        train, val = _pairs(Path(folder))
        rows = [_row(name, ROWS[name], seeds, train, val, Path(folder)) for name in ROWS]
    text = _table(rows, len(seeds))
    (Path(__file__).parent / "boundary.md").write_text(text, encoding="utf-8")
    print(text)


def _pairs(folder: Path) -> tuple[Path, Path]:
    """One style to train on; every style of the validation concepts, their names only."""
    sample = unpack(cache_folder(), quick=False)
    files = []
    for split in ("train", "val"):
        rows = [json.loads(line) for line in sample.pairs(split).read_text("utf-8").splitlines()]
        kept = [row for row in rows if split == "val" or "noto" in row["image"]]
        for row in kept:
            row["image"] = str(sample.folder / row["image"])
            row["caption"] = [caption for caption in row["caption"] if caption["language"] in LANGUAGES]
        files.append(folder / f"{split}.jsonl")
        files[-1].write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in kept), encoding="utf-8")
    return files[0], files[1]


def _row(name: str, overrides: list[str], seeds: range, train: Path, val: Path, folder: Path) -> dict[str, Any]:
    found = []
    for seed in seeds:
        run = folder / f"{name}-{seed}"
        settings = [f"data.train={train}", f"data.val={val}", "image.size=128", "image.more_layers=[]"]
        settings += ["train.batch=128", "train.epochs=4", "train.lr=3e-4", f"train.seed={seed}", "train.keep=last"]
        said: list[str] = []
        done = align(read_recipe("demo", [*settings, *overrides]), run, say=said.append)
        log = [json.loads(line) for line in (run / "log.jsonl").read_text("utf-8").splitlines()]
        asked = {(row.language, row.task): row for row in done.results}
        macro = asked["macro:all", "retrieval/image_to_text"]
        found.append((macro, _seconds_an_epoch(log), done.delta_bytes))
        print(f"{name}, seed {seed}: R@5 {100 * macro.metrics['recall@5']:.1f}", flush=True)
    values = [100 * macro.metrics["recall@5"] for macro, *_ in found]
    low, high = found[0][0].interval["recall@5"]
    return {
        "name": name,
        "r5": statistics.mean(values),
        "spread": max(values) - min(values),
        "interval": (100 * low, 100 * high),
        "epoch": statistics.median(seconds for _, seconds, *_ in found),
        "delta": found[0][2],
    }


def _seconds_an_epoch(log: list[dict[str, Any]]) -> float:
    """Of training alone, from the pairs a second that the log's steps say."""
    rates = [row["pairs_per_second"] for row in log if row["event"] == "step"]
    return 1114 / statistics.median(rates[1:] or rates)


def _table(rows: list[dict[str, Any]], seeds: int) -> str:
    lines = [
        f"# The frozen boundary: quality kept, time saved\n\n`python studies/boundary.py --seeds {seeds}`, "
        f"{time.strftime('%Y-%m-%d')}, {platform.machine()}, {torch.get_num_threads()} threads, torch "
        f"{torch.__version__}, float32. See the script for what is trained and asked.\n",
        "| trained in the text tower | R@5 | spread over seeds | 95 % interval | s an epoch | delta |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        low, high = row["interval"]
        lines.append(
            f"| {row['name']} | {row['r5']:.1f} | {row['spread']:.1f} | {low:.1f}–{high:.1f} | {row['epoch']:.2f} "
            f"| {row['delta'] / 1e6:.2f} MB |"
        )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
