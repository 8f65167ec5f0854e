"""Rounding ONNX graphs: weights that are used in several ways, and those that are left alone."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

from clasp.convert.exporters import onnx_int8
from clasp.convert.exporters.onnx_int8 import quantize_graph

WEIGHTS = {
    name: np.random.default_rng(number).normal(size=(64, 64)).astype(np.float32)
    for number, name in enumerate(("product", "tied", "columns", "branch", "constant"))
}


def write_graph(path: Path) -> None:
    """``product`` and ``tied`` are multiplied; rows of ``tied`` and columns of ``columns`` are looked up; ``branch`` is
    read in a branch of an ``If`` only; ``constant`` is an output."""
    unchanged = helper.make_graph(
        [helper.make_node("Identity", ["tied_product"], ["kept"])],
        "unchanged",
        [],
        [helper.make_tensor_value_info("kept", TensorProto.FLOAT, None)],
    )
    added = helper.make_graph(
        [helper.make_node("MatMul", ["tied_product", "branch"], ["sum"])],
        "added",
        [],
        [helper.make_tensor_value_info("sum", TensorProto.FLOAT, None)],
    )
    nodes = [
        helper.make_node("Gather", ["tied", "ids"], ["rows"]),
        helper.make_node("MatMul", ["rows", "product"], ["x"]),
        helper.make_node("MatMul", ["x", "tied"], ["tied_product"]),
        helper.make_node("Gather", ["columns", "ids"], ["picked"], axis=1),
        helper.make_node("If", ["flag"], ["branched"], then_branch=added, else_branch=unchanged),
    ]
    inputs = [
        helper.make_tensor_value_info("ids", TensorProto.INT64, ["n"]),
        helper.make_tensor_value_info("flag", TensorProto.BOOL, []),
    ]
    outputs = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, None)
        for name in ("tied_product", "picked", "branched", "constant")
    ]
    made = [numpy_helper.from_array(values, name) for name, values in WEIGHTS.items()]
    graph = helper.make_graph(nodes, "toy", inputs, outputs, made)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path)


def run(path: Path) -> dict[str, np.ndarray]:
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    names = [each.name for each in session.get_outputs()]
    feed = {"ids": np.array([3, 0, 63, 3]), "flag": np.array(True)}
    return dict(zip(names, session.run(names, feed), strict=True))


def test_weights_that_are_used_in_several_ways(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onnx_int8, "_LARGE_TABLE", 1000)
    write_graph(tmp_path / "whole.onnx")
    quantize_graph(tmp_path / "whole.onnx", tmp_path / "int8.onnx")
    whole, rounded = run(tmp_path / "whole.onnx"), run(tmp_path / "int8.onnx")
    for name, exact in whole.items():
        assert np.linalg.norm(rounded[name] - exact) <= 0.02 * np.linalg.norm(exact), name
    for name in ("picked", "constant"):
        assert np.array_equal(rounded[name], whole[name]), "not rounded"
    assert not np.array_equal(rounded["tied_product"], whole["tied_product"])
    kept = {each.name: each.data_type for each in onnx.load(tmp_path / "int8.onnx").graph.initializer}
    floats = {name for name in kept if name in WEIGHTS}
    assert floats == {"columns", "branch", "constant"}, "what is rounded is not stored twice"
    assert (kept["tied.rows"], kept["tied.blocks"]) == (TensorProto.INT8, TensorProto.UINT8)
