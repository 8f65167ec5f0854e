"""Plain folders of transformers and of sentence-transformers: equal to the run, and what does not fold."""

from __future__ import annotations

import importlib.util
import json
import warnings
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoModel, AutoTokenizer

import clasp
from clasp.commands.export import export_run
from clasp.types import UserError
from toydata import toys, write_folder
from toyruns import recipe, run, save_towers

FOLDING = ['tune.image=["lora(rank=2)", "norms"]', 'tune.text=["dora(rank=2)", "biases"]', "train.epochs=1"]
TEXTS = ["a red circle", "ring", "a photo of the blue cross . a photo"]


def make_run(folder: Path, *overrides: str) -> Path:
    run(recipe(save_towers(folder), write_folder(toys(40), folder / "pairs"), *overrides), folder / "run")
    return folder / "run"


needs_sentence_transformers = pytest.mark.skipif(
    importlib.util.find_spec("sentence_transformers") is None,
    reason="sentence-transformers is not installed, and not among the dev packages",
)


@pytest.fixture(scope="module")
def folding(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run(tmp_path_factory.mktemp("folding"), *FOLDING, "text.prefix=a photo of", "text.max_tokens=8")


@pytest.fixture(scope="module")
def merged(folding: Path) -> Path:
    report = export_run(folding, "merged", folding.parent / "merged")
    assert max(report.facts.values()) <= 1e-5
    return folding.parent / "merged"


def test_the_towers_load_without_clasp_and_are_the_runs(folding: Path, merged: Path):
    ours = clasp.load(folding, precision="float32")
    net, tokenizer = AutoModel.from_pretrained(merged / "text"), AutoTokenizer.from_pretrained(merged / "text")
    tokens = tokenizer(TEXTS, padding=True, truncation=True, return_tensors="pt")
    expected = ours.tokenizer(TEXTS)
    assert torch.equal(tokens["input_ids"], expected.ids)
    heads, settings = load_file(merged / "heads.safetensors"), json.loads((merged / "clasp_merged.json").read_text())
    assert settings["pool"] == {"image": "cls", "text": "mean"}
    with torch.no_grad():
        states, weight = net(**tokens).last_hidden_state, tokens["attention_mask"][..., None]
        pooled = (states * weight).sum(1) / weight.sum(1)
        pooled = pooled * heads["text.standardize.scale"] + heads["text.standardize.shift"]
        embedded = F.normalize(F.linear(pooled, heads["text.map.weight"], heads["text.map.bias"]), dim=-1)
    assert torch.allclose(embedded, ours.encode_text(TEXTS), atol=1e-5)
    assert not [name for name in load_file(merged / "image" / "model.safetensors") if "lora" in name]


def test_what_does_not_fold_is_named(tmp_path: Path):
    made = make_run(tmp_path, 'tune.text=["adapters(reduction=4)"]', "train.epochs=1")
    with pytest.raises(UserError, match="tuned with adapters, which does not fold into weights") as error:
        export_run(made, "merged", tmp_path / "out")
    assert "\n" not in str(error.value) and not (tmp_path / "out").exists()


def test_the_layout_for_sentence_transformers(folding: Path):
    """Without that package: every module that the folder names is there, in the places where it is read."""
    out = folding.parent / "layout"
    report = export_run(folding, "sentence-transformers", out)
    assert report.facts["text_difference"] <= 1e-5 and report.facts["image_difference"] <= 1e-5
    assert report.facts["file_cosine"] > 0.99
    router = json.loads((out / "router_config.json").read_text())
    assert router["structure"] == {
        side: [f"{side}_0_Transformer", f"{side}_1_Pooling", f"{side}_2_Dense"] for side in ("image", "text")
    }
    assert router["parameters"]["route_mappings"] == {"(None, 'image')": "image", "(None, 'text')": "text"}
    assert set(router["types"]) == {name for names in router["structure"].values() for name in names}
    assert [each["path"] for each in json.loads((out / "modules.json").read_text())] == ["", "1_Normalize"]
    dense, tensors = out / "text_2_Dense", load_file(out / "text_2_Dense" / "model.safetensors")
    assert (
        tensors["linear.weight"].shape
        == (16, 32)
        == tuple(json.loads((dense / "config.json").read_text())[name] for name in ("out_features", "in_features"))
    )


@needs_sentence_transformers
def test_sentence_transformers_loads_it_with_the_embeddings_of_the_run(folding: Path):
    out = folding.parent / "st"
    export_run(folding, "sentence-transformers", out)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from sentence_transformers import SentenceTransformer

        model = SentenceTransformer(str(out), device="cpu")
        texts = model.encode(TEXTS, convert_to_tensor=True)
        files = sorted((folding.parent / "pairs").glob("*.png"))[:3]
        images = model.encode([Image.open(file) for file in files], convert_to_tensor=True)
    ours = clasp.load(folding, precision="float32")
    assert torch.allclose(texts.clone(), ours.encode_text(TEXTS), atol=1e-5)
    assert torch.allclose(images.clone(), ours.encode_image(files), atol=1e-5)  # 32 pixels: nothing is resized


@needs_sentence_transformers
@pytest.mark.parametrize(
    ("overrides", "reason"),
    [
        (['tune.text=["adapters(reduction=4)"]'], "tuned with adapters, which does not fold"),
        (["head.kind=glu"], "linear heads only; here head.kind = 'glu'"),
        (["image.pool=cls+mean", "image.extra_layers=[1]"], "image.pool = 'cls+mean' and extra_layers = [1]"),
    ],
    ids=["adapters", "gated head", "layers"],
)
def test_other_runs_are_a_module_of_clasp(tmp_path: Path, overrides: list[str], reason: str):
    made = make_run(tmp_path, *overrides, "train.epochs=1")
    report = export_run(made, "sentence-transformers", tmp_path / "out")
    assert reason in report.facts["reason"] and "trust_remote_code=True" in report.lines[-1]
    files, ours = sorted((tmp_path / "pairs").glob("*.png"))[:3], clasp.load(made, precision="float32")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from sentence_transformers import SentenceTransformer

        model = SentenceTransformer(str(tmp_path / "out"), device="cpu", trust_remote_code=True)
        texts = model.encode(TEXTS, convert_to_tensor=True)
        images = model.encode([Image.open(file) for file in files], convert_to_tensor=True)
        assert model.get_embedding_dimension() == 16
    assert torch.allclose(texts.clone(), ours.encode_text(TEXTS), atol=1e-6)
    assert torch.allclose(images.clone(), ours.encode_image(files), atol=1e-6)


def test_the_layout_of_a_module_of_clasp(tmp_path: Path):
    made = make_run(tmp_path, "head.kind=glu", "train.epochs=1")
    export_run(made, "sentence-transformers", tmp_path / "out")
    [module] = json.loads((tmp_path / "out" / "modules.json").read_text())
    assert module["path"] == "" and module["type"] == "clasp.convert.sentence_transformers_module.RunEncoder"
    wanted = clasp.load(made).encode_text(TEXTS)
    assert torch.equal(clasp.load(tmp_path / "out").encode_text(TEXTS), wanted)
    export_run(made, "merged", tmp_path / "merged")
