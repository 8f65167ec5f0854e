"""int8 weights for exported graphs, and what they cost.

Input: float32 graphs. Output: graphs whose linear layers (MatMul and Gemm) have int8 weights, one scale per output
channel, with activations quantised at run time; and ``Int8Loss``: cosines with float32, and agreement of retrieval.
Note: convolutions and embedding tables stay in float32. Dynamic int8 of convolutions makes an EfficientNet useless
(cosine 0.44 with float32).
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

from clasp.convert.exporters.job import ExportJob
from clasp.convert.onnx_model import OnnxModel

_MEASURED = 200  # pairs


@dataclass(frozen=True, slots=True)
class Int8Loss:
    """Agreement of int8 with float32 on real pairs. Fractions in 0 to 1."""

    checked_on: str
    pairs: int
    image_cosine: float
    """Mean cosine of an image's embedding with that in float32"""
    text_cosine: float
    top1: float
    """Fraction of captions whose first image is that of float32"""
    top10: float
    """Mean fraction of the first ten images (or of all, where there are fewer) that float32 has, too"""
    graph_bytes: dict[str, list[int]]
    """Of each tower's graph: float32, int8"""

    def facts(self) -> dict[str, Any]:
        """The numbers by name."""
        return asdict(self)

    def lines(self) -> list[str]:
        """The numbers to print."""
        sizes = ", ".join(f"{side} {a / 1e6:.1f} to {b / 1e6:.1f} MB" for side, (a, b) in self.graph_bytes.items())
        return [
            f"int8: cosine with float32 {self.image_cosine:.4f} (image), {self.text_cosine:.4f} (text); {sizes}",
            f"int8: text-to-image retrieval agrees with float32 in {100 * self.top1:.1f} % of first hits and "
            f"{100 * self.top10:.1f} % of the first ten ({self.pairs} pairs, {self.checked_on})",
        ]


def quantize_graph(source: Path, target: Path) -> None:
    """Write the graph ``source`` with int8 linear layers."""
    from onnxruntime.quantization import QuantType, quantize_dynamic

    with _without_root_log():
        quantize_dynamic(
            source,
            target,
            op_types_to_quantize=["MatMul", "Gemm"],
            per_channel=True,
            weight_type=QuantType.QInt8,
        )


def measure_int8_loss(job: ExportJob, folder: Path) -> Int8Loss:
    """Embeds real pairs with both sets of graphs in ``folder``."""
    checked = job.check_inputs(_MEASURED)
    image, text = [], []
    for weights in ("float32", "int8"):
        model = OnnxModel(folder, weights=weights)
        image.append(model.encode_image(checked.images))
        text.append(model.encode_text(checked.captions))
    ranks = [_first_hits(texts, images) for texts, images in zip(text, image, strict=True)]
    kept = [len(set(a) & set(b)) / len(a) for a, b in zip(*ranks, strict=True)]
    return Int8Loss(
        checked.name,
        len(checked.images),
        float((image[0] * image[1]).sum(1).mean()),
        float((text[0] * text[1]).sum(1).mean()),
        float((ranks[0][:, 0] == ranks[1][:, 0]).mean()),
        float(np.mean(kept)),
        {
            side: [(folder / name).stat().st_size for name in (f"{side}.onnx", f"{side}.int8.onnx")]
            for side in ("image", "text")
        },
    )


def _first_hits(texts: Float[np.ndarray, "n E"], images: Float[np.ndarray, "m E"]) -> np.ndarray:
    return np.argsort(-(texts @ images.T), axis=1, kind="stable")[:, :10]


@contextmanager
def _without_root_log() -> Iterator[None]:
    """onnxruntime logs advice on the root logger that is for activations quantised beforehand."""
    root = logging.getLogger()
    level = root.level
    root.setLevel(logging.ERROR)
    try:
        yield
    finally:
        root.setLevel(level)
