"""The quality cost of a higher frozen boundary (tuning all blocks, the top 4, the top 2), and of half precision.

Input: none (the sample inside the package). Output: a table, printed and written to ``frozen_boundary.md``. The text
tower is multilingual-e5-small; the image tower is EfficientNet-Lite0, frozen, its features cached. Heads start from
closed-form CCA, so every row shows what tuning inside the text tower adds to it. Training data is one drawing style
with names in four languages as captions; evaluation is on the validation concepts in the same languages (image to text,
R@5, macro over them).

    python studies/frozen_boundary.py [--seeds 2]
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import tempfile
import time
from pathlib import Path

import torch

from clasp.commands.train import train_recipe
from clasp.config.datasets import cache_folder
from clasp.config.recipe import read_recipe
from clasp.data.samples.emoji import unpack_emoji_sample

IN_WORDS = "In words:"  # the hand-written interpretation below the table is preserved
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
    "lora r=8, top 2, kept in float32": ["tune.text=[\"lora(rank=8, blocks='-2:')\"]", "data.feature_cache=float32"],
    "lora r=8, top 2, kept in int8": ["tune.text=[\"lora(rank=8, blocks='-2:')\"]", "data.feature_cache=int8"],
}


def main() -> None:
    """Run every row with every seed and print the table."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--seeds", type=int, default=2)
    seeds = range(parser.parse_args().seeds)
    with tempfile.TemporaryDirectory() as folder:
        train, val = _pairs(Path(folder))
        rows = {name: [_cell(name, seed, train, val, Path(folder)) for seed in seeds] for name in ROWS}
    text = _table(rows)
    page = Path(__file__).with_suffix(".md")
    words = page.read_text(encoding="utf-8").partition(IN_WORDS)[2] if page.exists() else "\n"
    page.write_text(text + "\n" + IN_WORDS + words, encoding="utf-8")
    print(text)


def _pairs(folder: Path) -> tuple[Path, Path]:
    """Training pairs of one style; validation pairs of every style, with names only."""
    sample = unpack_emoji_sample(cache_folder(), quick=False)
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


def _cell(name: str, seed: int, train: Path, val: Path, folder: Path) -> float:
    """R@5, per cent, of one row with one seed."""
    settings = [f"data.train={train}", f"data.val={val}", f"data.image_root={train.parent}", "image.size=128"]
    settings += ["head.standardize=true", "head.power=[1.0, 1.0]", "head.class_probabilities=false"]
    settings += ["train.batch_size=128", "train.epochs=4", "train.lr=3e-4", f"train.seed={seed}", "train.select=last"]
    done = train_recipe(read_recipe("demo", [*settings, *ROWS[name]]), folder / f"{name}-{seed}", say=lambda line: None)
    macro = next(r for r in done.results if r.language == "macro:all" and r.task.endswith("image_to_text"))
    print(f"{name}, seed {seed}: R@5 {100 * macro.metrics['recall@5']:.1f}", flush=True)
    return 100 * macro.metrics["recall@5"]


def _table(rows: dict[str, list[float]]) -> str:
    seeds = len(next(iter(rows.values())))
    lines = [
        f"# The frozen boundary: the quality it keeps\n\n`python studies/frozen_boundary.py --seeds {seeds}`, "
        f"{time.strftime('%Y-%m-%d')}, {platform.machine()}, torch {torch.__version__}, float32. "
        "R@5 in per cent; see the script for what is trained and asked.\n",
        f"| trained in the text tower | mean | {' | '.join(f'seed {seed}' for seed in range(seeds))} |",
        f"|---|---|{'---|' * seeds}",
    ]
    for name, values in rows.items():
        lines.append(f"| {name} | {statistics.mean(values):.1f} | {' | '.join(f'{value:.1f}' for value in values)} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
