"""ONNX exports of toy runs: equal to torch, without torch, in int8, and what is refused."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch

import clasp
from clasp.commands import export
from clasp.commands.export import export_run
from clasp.commands.run_store import open_run_store
from clasp.commands.search import index_images
from clasp.commands.search_model import find_search_model
from clasp.commands.serve import ServeSettings, serve_run
from clasp.convert.exporters import onnx_graphs, onnx_int8
from clasp.convert.exporters.job import ExportOptions, ExportReport
from clasp.convert.exporters.onnx_int8 import quantize_graph
from clasp.convert.onnx_model import OnnxModel
from clasp.types import SearchModel, UserError, no_progress_bar
from toydata import toys, write_folder
from toyruns import recipe, run, save_image_tower, save_text_tower

TUNED = ['tune.image=["lora(rank=2)", "norms"]', 'tune.text=["adapters(reduction=4)", "biases"]', "train.epochs=1"]
CAPTIONS = ["a red circle", "circle", "a photo of the blue ring . a photo of the blue ring"]


def make_run(folder: Path, *overrides: str, family: str = "vit") -> Path:
    save_image_tower(folder / "image", family)
    save_text_tower(folder / "text")
    run(recipe(folder, write_folder(toys(40), folder / "pairs"), *overrides), folder / "run")
    return folder / "run"


@pytest.fixture(scope="module")
def tuned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with low-rank updates in the image tower and adapters in the text tower."""
    return make_run(tmp_path_factory.mktemp("tuned"), *TUNED)


@pytest.fixture(scope="module")
def exported(tuned: Path) -> tuple[Path, ExportReport]:
    out = tuned.parent / "onnx"
    return out, export_run(tuned, "onnx", out, ExportOptions(quantize="int8"))


def images(tuned: Path) -> list[Path]:
    return sorted((tuned.parent / "pairs").glob("*.png"))[:9]


def test_embeddings_are_those_of_torch(tuned: Path, exported: tuple[Path, ExportReport]):
    model, onnx = clasp.load(tuned, precision="float32"), OnnxModel(exported[0])
    files = images(tuned)
    assert files
    np.testing.assert_allclose(onnx.encode_image(files), model.encode_image(files), atol=1e-5)
    np.testing.assert_allclose(onnx.encode_text(CAPTIONS), model.encode_text(CAPTIONS), atol=1e-5)
    assert onnx.encode_text([]).shape == (0, 16) == onnx.encode_image([]).shape
    assert onnx.fingerprint == model.fingerprint
    assert onnx.logit_scale == pytest.approx(model.encoder.scale_and_bias()[0].item())


def test_pixels_and_ids_are_bitwise_those_of_training(tuned: Path, exported: tuple[Path, ExportReport]):
    model, onnx = clasp.load(tuned), OnnxModel(exported[0])
    for file in images(tuned):
        assert np.array_equal(onnx.transform(file), model.transform(file).numpy())
    tokens = model.tokenizer(CAPTIONS)
    ids, mask = onnx._caption_ids.pad(onnx._caption_ids(CAPTIONS))
    assert np.array_equal(ids, tokens.ids) and np.array_equal(mask, tokens.mask)


def test_parity_is_measured_at_other_batches_lengths_and_sizes(exported: tuple[Path, ExportReport]):
    out, report = exported
    parity = json.loads((out / "clasp_onnx.json").read_text())["parity"]
    assert parity["checked_on"] == "validation pairs of the run"
    shapes = {side: [row["shape"] for row in parity[side]] for side in ("image", "text")}
    assert [3, 3, 32, 32] in shapes["image"] and [1, 3, 64, 64] in shapes["image"]
    assert len({tuple(shape) for shape in shapes["text"]}) >= 3
    assert all(row["difference"] <= 1e-5 for side in ("image", "text") for row in parity[side])
    assert report.facts["folded_layers"] > 0 and report.facts["image"]["sizes"] == "any"


def test_int8_loss_is_reported(tuned: Path, exported: tuple[Path, ExportReport]):
    loss = exported[1].facts["int8"]
    assert 0.9 < loss["image_cosine"] < 1 and 0.9 < loss["text_cosine"] < 1
    assert 0 <= loss["top1"] <= 1 and 0.5 <= loss["top10"] <= 1 and loss["pairs"] > 5
    assert any("int8: cosine with float32" in line for line in exported[1].lines)
    small, full = OnnxModel(exported[0], weights="int8"), OnnxModel(exported[0])
    cosine = (small.encode_text(CAPTIONS) * full.encode_text(CAPTIONS)).sum(1)
    assert (0.9 < cosine).all() and not np.array_equal(small.encode_text(CAPTIONS), full.encode_text(CAPTIONS))
    assert small.fingerprint != full.fingerprint


def test_int8_embeddings_do_not_depend_on_their_batch(exported: tuple[Path, ExportReport]):
    small = OnnxModel(exported[0], weights="int8")
    alone = np.concatenate([small.encode_text([caption]) for caption in CAPTIONS])
    np.testing.assert_allclose(alone, small.encode_text(CAPTIONS), atol=1e-6)


def test_int8_embeddings_of_another_rounding_are_of_another_model(
    tuned: Path, exported: tuple[Path, ExportReport], tmp_path: Path
):
    earlier, now = tmp_path / "earlier", OnnxModel(exported[0], weights="int8")
    shutil.copytree(exported[0], earlier)
    manifest = json.loads((earlier / "clasp_onnx.json").read_text())
    assert manifest["int8"].pop("scheme") == "blocks32"
    (earlier / "clasp_onnx.json").write_text(json.dumps(manifest))
    before = OnnxModel(earlier, weights="int8")
    assert before.fingerprint == f"{OnnxModel(earlier).fingerprint}:int8" != now.fingerprint
    index = index_images(tmp_path, str(tuned.parent / "pairs"), model=before)
    assert OnnxModel(earlier).in_precision_of(before.fingerprint).weights == "int8"
    anew = index_images(tmp_path, str(tuned.parent / "pairs"), model=now)
    assert anew.unchanged == 0 and anew.encoded == index.encoded > 0, "embeddings of both are never in one index"
    assert open_run_store(tmp_path).model == now.fingerprint


def test_large_embedding_tables_become_int8(
    exported: tuple[Path, ExportReport], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(onnx_int8, "_LARGE_TABLE", 500)
    monkeypatch.setattr(onnx_int8, "_LARGE_TENSOR", 500)
    source, target = exported[0] / "text.onnx", tmp_path / "text.onnx"
    quantize_graph(source, target)
    assert target.with_suffix(".data").stat().st_size > 500
    tables = {"float32": large_tables(source), "int8": large_tables(target)}
    assert len(tables["float32"]) == len(tables["int8"]) > 0
    assert set(tables["float32"]) == {np.dtype(np.float32)} and set(tables["int8"]) == {np.dtype(np.int8)}
    full = OnnxModel(exported[0])
    feed = dict(zip(("ids", "mask"), full._caption_ids.pad(full._caption_ids(CAPTIONS)), strict=True))
    found = onnxruntime.InferenceSession(str(target), providers=["CPUExecutionProvider"]).run(["embedding"], feed)[0]
    cosine = (found * full.encode_text(CAPTIONS)).sum(1)
    assert (cosine > 0.98).all() and (cosine < 1).any()


def large_tables(path: Path) -> list[np.dtype]:
    """The types of the matrices with 500 numbers or more that rows of several numbers are looked up in."""
    graph = onnx.load(path).graph
    looked_up = {node.input[0] for node in graph.node if node.op_type == "Gather"}
    tables = [onnx.numpy_helper.to_array(each) for each in graph.initializer if each.name in looked_up]
    return [table.dtype for table in tables if table.ndim == 2 and table.shape[1] > 1 and table.size >= 500]


def test_it_runs_without_torch(tuned: Path, exported: tuple[Path, ExportReport]):
    script = f"""
import sys
for name in ("torch", "transformers", "safetensors", "pydantic", "scipy", "sklearn"):
    sys.modules[name] = None
from clasp import OnnxModel
import numpy as np
model = OnnxModel({str(exported[0])!r})
images, texts = model.encode_image([{str(images(tuned)[0])!r}]), model.encode_text({CAPTIONS!r})
np.save({str(exported[0].parent / "texts.npy")!r}, texts)
print(model.similarity(images, texts).shape)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "(1, 3)"
    texts = torch.from_numpy(np.load(exported[0].parent / "texts.npy"))
    assert torch.allclose(texts, clasp.load(tuned, precision="float32").encode_text(CAPTIONS), atol=1e-5)


def test_a_store_is_searched_in_the_weights_that_made_it(
    tuned: Path, exported: tuple[Path, ExportReport], tmp_path: Path
):
    small, full = find_search_model(exported[0], "onnx-int8")(), OnnxModel(exported[0])
    assert isinstance(small, OnnxModel) and isinstance(small, SearchModel)
    assert index_images(tmp_path, str(tuned.parent / "pairs"), model=small).added == 40
    stored = open_run_store(tmp_path).model
    assert stored == small.fingerprint != full.fingerprint
    assert full.in_precision_of(stored).weights == "int8" and full.in_precision_of("another") is full
    settings = ServeSettings(port=0, engine="onnx", model=exported[0])
    with pytest.raises(UserError, match=r"was made with .* in int8, and --engine onnx is another"):
        serve_run(tmp_path, None, settings, say=lambda line: None, bar=no_progress_bar)


def test_a_convolutional_tower_exports(tmp_path: Path):
    made = make_run(tmp_path, "image.pool=mean+max", "head.kind=glu", family="convnext")
    report = export_run(made, "onnx", tmp_path / "out")
    assert "int8" not in report.facts
    files = sorted((tmp_path / "pairs").glob("*.png"))[:3]
    wanted = clasp.load(made, precision="float32").encode_image(files)
    np.testing.assert_allclose(OnnxModel(tmp_path / "out").encode_image(files), wanted, atol=1e-5)


def test_pairs_that_are_gone_are_replaced_by_the_sample(tmp_path: Path):
    made = make_run(tmp_path)
    (tmp_path / "pairs").rename(tmp_path / "moved")
    said: list[str] = []
    report = export_run(made, "onnx", tmp_path / "out", say=said.append)
    assert report.facts["parity"]["checked_on"].startswith("sample:emoji")
    assert "cannot be read here" in said[0]


def test_a_graph_that_differs_is_refused(tuned: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(onnx_graphs, "PARITY_LIMIT", 0.0)
    with pytest.raises(UserError, match=r"differs from torch by \d\.\de-0\d at shape") as error:
        export_run(tuned, "onnx", tmp_path / "out")
    assert "\n" not in str(error.value)
    assert not list(tmp_path.iterdir())


def test_what_is_refused_before_the_model_is_loaded(tuned: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(export, "open_job", lambda *given: pytest.fail("the model is loaded"))
    with pytest.raises(UserError, match=r"--to = 'onnix' should be .*'onnx'"):
        export_run(tuned, "onnix", tmp_path / "out")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    with pytest.raises(UserError, match="full is there already"):
        export_run(tuned, "onnx", tmp_path / "full")
    with pytest.raises(UserError, match="--push is for"):
        export_run(tuned, "onnx", tmp_path / "out", ExportOptions(push="me/mine"))
    with pytest.raises(UserError, match="no such folder"):
        export_run(tmp_path / "none", "onnx", tmp_path / "out")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install 'clasp-vl\[onnx\]'"):
        export_run(tuned, "onnx", tmp_path / "out")


def test_errors_of_the_runner_are_one_line(exported: tuple[Path, ExportReport], tmp_path: Path):
    with pytest.raises(UserError, match="not an output of clasp export"):
        OnnxModel(tmp_path)
    model = OnnxModel(exported[0])
    with pytest.raises(UserError, match="text 1 is a int"):
        model.encode_text(["a", 3])
    with pytest.raises(UserError, match=r"text 0: the text .* is not valid Unicode"):
        model.encode_text(["\ud800"])
    with pytest.raises(UserError, match=r"none\.png: no such file"):
        model.encode_image([tmp_path / "none.png"])
    with pytest.raises(UserError, match="takes a list of strings"):
        model.encode_text("a")
    with pytest.raises(UserError, match="image 0 is a float"):
        model.encode_image([1.5])
