"""An ONNX export in float32 and in int8: what rounding loses, milliseconds, and memory; no torch here.

``python -m benchmarks.int8_graphs FOLDER``, where FOLDER is written by ``clasp export --to onnx --int8``; also the
first part of ``python -m benchmarks.serving FOLDER``. Printed as JSON. Inputs are of the packaged sample: 250 names of
emoji, in its languages in turn, and 250 drawings. Embeddings are compared row by row (cosine), and as collections: of
the eleven nearest rows to each, itself included, the fraction that float32 has too (``kept``), and the same for the ten
nearest images to each name (``hits_kept``); both sides of a comparison are of one format, as in an index. Each format
is loaded and timed in a process of its own: ``one_ms`` is the median of single inputs, ``batch_ms`` that of 64, in
batches as served; ``loaded_mb`` is the resident memory once both graphs have answered, ``peak_mb`` the most until then.
The clock includes the tokenizer, not the decoding of images, which is the same in both.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any, get_args

import numpy as np

from clasp.convert.onnx_model import MANIFEST_FILE, OnnxModel, WeightFormat
from clasp.data.samples.emoji import concept_names, unpack_emoji_sample

INPUTS, BATCH, TIMED, BATCHES, NEIGHBOURS, HITS = 250, 64, 100, 5, 11, 10
SIDES = ("image", "text")


def has_int8_graphs(folder: Path) -> bool:
    """Whether a folder is an ONNX export with graphs of both formats."""
    manifest = folder / MANIFEST_FILE
    return manifest.is_file() and "int8" in json.loads(manifest.read_text())["image"]["graphs"]


def sample_inputs(folder: Path) -> tuple[list[str], list[bytes]]:
    """Names and drawings of the packaged sample, which is unpacked into ``folder``."""
    names = list(concept_names().values())[:: max(1, len(concept_names()) // INPUTS)][:INPUTS]
    texts = [list(spoken.values())[place % len(spoken)] for place, spoken in enumerate(names)]
    drawings = sorted(unpack_emoji_sample(folder, quick=True).folder.rglob("*.webp"))
    return texts, [path.read_bytes() for path in drawings[:: max(1, len(drawings) // INPUTS)][:INPUTS]]


def measure_format(folder: Path, weights: WeightFormat, sample: Path) -> dict[str, Any]:
    """Times and memory of one format; its embeddings are saved in ``sample`` as ``image-WEIGHTS.npy``, ``text-…``."""
    texts, images = sample_inputs(sample)
    model = OnnxModel(folder, weights=weights)
    pixels = np.stack([model.transform(image) for image in images])
    model.encode_text(texts[:1])
    model.encode_pixels(pixels[:1])
    facts: dict[str, Any] = {"loaded_mb": _resident("VmRSS"), "peak_mb": _resident("VmHWM")}
    embedders: dict[str, tuple[Any, Callable[[Any], np.ndarray]]] = {
        "image": (pixels, model.encode_pixels),
        "text": (texts, model.encode_text),
    }
    for side, (rows, embed) in embedders.items():
        np.save(sample / f"{side}-{weights}.npy", embed(rows))
        ones = [_seconds(embed, rows[place : place + 1]) for place in range(TIMED)]
        many = [_seconds(embed, rows[:BATCH]) for _ in range(BATCHES)]
        facts[side] = {"one_ms": round(1e3 * median(ones), 2), "batch_ms": round(1e3 * median(many), 1)}
    return facts


def measure_graphs(folder: Path) -> dict[str, Any]:
    """Both formats, each in a process of its own, and the agreement of their embeddings."""
    facts: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as made:
        sample = Path(made)
        for weights in get_args(WeightFormat):
            command = [sys.executable, "-m", "benchmarks.int8_graphs", str(folder), "--measure", weights, made]
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
            facts[weights] = json.loads(done.stdout.splitlines()[-1])
        rows = {
            side: [np.load(sample / f"{side}-{weights}.npy") for weights in get_args(WeightFormat)] for side in SIDES
        }
    for side, (exact, rounded) in rows.items():
        cosines = (exact * rounded).sum(1)
        facts[f"{side}_cosine"] = {"mean": round(float(cosines.mean()), 5), "least": round(float(cosines.min()), 5)}
        facts[f"{side}_kept"] = _kept(exact @ exact.T, rounded @ rounded.T, NEIGHBOURS)
    (images, rounded_images), (texts, rounded_texts) = rows["image"], rows["text"]
    facts["hits_kept"] = _kept(texts @ images.T, rounded_texts @ rounded_images.T, HITS)
    return facts


def _kept(exact: np.ndarray, rounded: np.ndarray, count: int) -> float:
    """The mean fraction of the ``count`` largest of a row that both matrices of scores ``[n m]`` have in common."""
    first, second = (np.argsort(-scores, axis=1, kind="stable")[:, :count].tolist() for scores in (exact, rounded))
    return round(float(np.mean([len({*a} & {*b}) / count for a, b in zip(first, second, strict=True)])), 4)


def _seconds(embed: Callable[[Any], np.ndarray], rows: Any) -> float:
    began = time.perf_counter()
    embed(rows)
    return time.perf_counter() - began


def _resident(name: str) -> int:
    """Megabytes of this process by a name of ``/proc/self/status``."""
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return round(int(status[name].split()[0]) / 1024)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--measure", nargs=2, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.measure:
        weights, sample = given.measure
        return print(json.dumps(measure_format(given.folder, weights, Path(sample))))
    if not has_int8_graphs(given.folder):
        raise SystemExit(f"{given.folder} has no int8 graphs; clasp export RUN --to onnx --int8 writes them")
    print(json.dumps(measure_graphs(given.folder), indent=1))


if __name__ == "__main__":
    main()
