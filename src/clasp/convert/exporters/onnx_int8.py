"""int8 weights for exported graphs, and what they cost.

Input: float32 graphs. Output: graphs whose linear layers (MatMul) and token embeddings have int8 weights; and
``Int8Loss``: cosines with float32, and agreement of retrieval. Note: 32 consecutive inputs of an output share a scale,
and so do the activations they are multiplied with, which onnxruntime rounds as it computes (``MatMulNBits``): an
embedding does not depend on what else is in its batch. One scale per output and one for all activations
(``quantize_dynamic``) has a cosine of 0.988 where this has 0.9995, and is faster, 2.5 times so in large batches. A row
of an embedding table has one scale. Large tensors are in a file of their own, which onnxruntime maps, not copies.
Convolutions, heads and small tables stay in float32: an EfficientNet with dynamic int8 convolutions is useless (0.44).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, Int8

from clasp.convert.exporters.job import ExportJob
from clasp.convert.onnx_model import OnnxModel
from clasp.errors import counted

_MEASURED = 200  # pairs
_BLOCK = 32  # inputs of a linear layer that share a scale
INT8_SCHEME = f"blocks{_BLOCK}"
"""The rounding of these graphs, which ends their fingerprint: embeddings of another are another model's."""
_LARGE_TABLE = 1 << 20  # numbers in an embedding table from which it is stored in int8
_LARGE_TENSOR = 1 << 20  # bytes of a tensor from which it is stored beside the graph


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
    """Of each tower's graph with its large tensors: float32, int8"""

    def facts(self) -> dict[str, Any]:
        """The numbers by name."""
        return asdict(self)

    def lines(self) -> list[str]:
        """The numbers to print."""
        sizes = ", ".join(f"{side} {a / 1e6:.1f} to {b / 1e6:.1f} MB" for side, (a, b) in self.graph_bytes.items())
        return [
            f"int8: cosine with float32 {self.image_cosine:.4f} (image), {self.text_cosine:.4f} (text); {sizes}",
            f"int8: text-to-image retrieval agrees with float32 in {100 * self.top1:.1f} % of first hits and "
            f"{100 * self.top10:.1f} % of the first ten ({counted(self.pairs, 'pair')}, {self.checked_on})",
        ]


def quantize_graph(source: Path, target: Path) -> None:
    """Write the graph ``source`` with int8 linear layers and token embeddings; large tensors go to ``NAME.data`` beside
    it."""
    import onnx

    model = onnx.load(source)
    graph = model.graph
    weights = {each.name: onnx.numpy_helper.to_array(each) for each in graph.initializer}
    matrices = {name: weight for name, weight in weights.items() if weight.ndim == 2 and weight.dtype == np.float32}
    rounded: dict[str, np.ndarray] = {}
    nodes = []
    for node in graph.node:
        if node.op_type == "MatMul" and node.input[1] in matrices:
            nodes.append(_int8_product(node, matrices[node.input[1]], rounded))
        elif _looks_up_rows(node) and node.input[0] in matrices and matrices[node.input[0]].size >= _LARGE_TABLE:
            nodes += _int8_lookup(node, matrices[node.input[0]], rounded)
        else:
            nodes.append(node)
    used = _names_read(nodes) | {output.name for output in graph.output}
    kept = [each for each in graph.initializer if each.name in used or each.name not in matrices]
    made = [onnx.numpy_helper.from_array(values, name) for name, values in rounded.items()]
    new = onnx.helper.make_graph(nodes, graph.name, graph.input, graph.output, [*kept, *made])
    opsets = [*model.opset_import, onnx.helper.make_opsetid("com.microsoft", 1)]
    onnx.save(
        onnx.helper.make_model(new, opset_imports=opsets, ir_version=model.ir_version),
        target,
        save_as_external_data=True,
        location=_data_of(target).name,
        size_threshold=_LARGE_TENSOR,
    )


def _data_of(graph: Path) -> Path:
    """The file of its large tensors, if it has any."""
    return graph.with_suffix(".data")


def _names_read(nodes: Iterable[Any]) -> set[str]:
    """The names that nodes read, in their subgraphs, too."""
    names: set[str] = set()
    for node in nodes:
        names.update(node.input)
        for attribute in node.attribute:
            for body in (attribute.g, *attribute.graphs):
                names |= _names_read(body.node) | {output.name for output in body.output}
    return names


def _looks_up_rows(node: Any) -> bool:
    return node.op_type == "Gather" and all(each.i == 0 for each in node.attribute if each.name == "axis")


def _int8_product(node: Any, weight: Float[np.ndarray, "inputs outputs"], rounded: dict[str, np.ndarray]) -> Any:
    """The product with a constant matrix, whose rounded values and scales are added to ``rounded``."""
    from onnx import helper

    inputs, outputs = weight.shape
    blocks = -(-inputs // _BLOCK)
    padded = np.zeros((outputs, blocks * _BLOCK), np.float32)
    padded[:, :inputs] = weight.T
    values, scales = _round(padded.reshape(outputs, blocks, _BLOCK))
    names = [f"{node.input[1]}.blocks", f"{node.input[1]}.blocks.scales"]
    rounded[names[0]] = (values.astype(np.int16) + 128).astype(np.uint8)
    rounded[names[1]] = scales
    return helper.make_node(
        "MatMulNBits",
        [node.input[0], *names],
        node.output,
        node.name,
        domain="com.microsoft",
        K=inputs,
        N=outputs,
        bits=8,
        block_size=_BLOCK,
        accuracy_level=4,  # activations are rounded, too
    )


def _int8_lookup(node: Any, table: Float[np.ndarray, "rows D"], rounded: dict[str, np.ndarray]) -> list[Any]:
    """Rows of an embedding table: looked up as int8, with the scale of each, and multiplied."""
    from onnx import TensorProto, helper

    values, scales = _round(table)
    (name, ids), (out,) = node.input, node.output
    rounded[f"{name}.rows"], rounded[f"{name}.rows.scales"] = values, scales[:, None]
    return [
        helper.make_node("Gather", [f"{name}.rows", ids], [f"{out}.int8"], axis=0),
        helper.make_node("Gather", [f"{name}.rows.scales", ids], [f"{out}.scales"], axis=0),
        helper.make_node("Cast", [f"{out}.int8"], [f"{out}.cast"], to=TensorProto.FLOAT),
        helper.make_node("Mul", [f"{out}.cast", f"{out}.scales"], [out]),
    ]


def _round(values: Float[np.ndarray, "*rows D"]) -> tuple[Int8[np.ndarray, "*rows D"], Float[np.ndarray, "*rows"]]:
    """Whole numbers from -127 to 127 and the scale of each last axis, whose product is near ``values``."""
    scales = np.maximum(np.abs(values).max(-1), np.finfo(np.float32).tiny) / 127
    return np.rint(values / scales[..., None]).astype(np.int8), scales.astype(np.float32)


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
        {side: [_bytes(folder / name) for name in (f"{side}.onnx", f"{side}.int8.onnx")] for side in ("image", "text")},
    )


def _bytes(graph: Path) -> int:
    return sum(path.stat().st_size for path in (graph, _data_of(graph)) if path.exists())


def _first_hits(texts: Float[np.ndarray, "n E"], images: Float[np.ndarray, "m E"]) -> np.ndarray:
    return np.argsort(-(texts @ images.T), axis=1, kind="stable")[:, :10]
