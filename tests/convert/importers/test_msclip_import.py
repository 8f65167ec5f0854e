"""State dicts of MS-CLIP as runs: the recorded outputs through ``clasp.load``, from words and pictures' numbers on."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor

from clasp import cli
from clasp.commands.import_checkpoint import import_checkpoint
from clasp.config.build import load
from clasp.config.recipe import read_recipe
from clasp.convert.importers.run_writer import ImportOptions, parse_import_options
from clasp.types import UserError
from toydata import toys, write_csv
from toysavedtowers import WordToy

GOLDEN = Path(__file__).parents[2] / "golden"
NAMES = ("msclip_plain", "msclip_parallel_only", "msclip_share_last6", "msclip_s_b32")


def golden(name: str) -> dict[str, Any]:
    return torch.load(GOLDEN / f"{name}.golden.pt", weights_only=True)


def words(folder: Path, vocabulary: int) -> str:
    """One id a word, ``w5`` being 5; the start is the last but one, the end the last."""
    ids = {f"w{number}": number for number in range(vocabulary)}
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel(ids, "w0"))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    start, end = f"w{vocabulary - 2}", f"w{vocabulary - 1}"
    backend.post_processor = tokenizers.processors.TemplateProcessing(
        single=f"{start} $A {end}", special_tokens=[(start, vocabulary - 2), (end, vocabulary - 1)]
    )
    folder.mkdir()
    backend.save(str(folder / "tokenizer.json"))
    return f"file:{folder}"


def spelt(row: Tensor, vocabulary: int) -> str:
    """The text whose ids these are, without start, end and padding."""
    ids = row.tolist()
    last = ids.index(vocabulary - 1) if vocabulary - 1 in ids else len(ids)
    return " ".join(f"w{number}" for number in ids[1:last])


def imported(name: str, folder: Path, **wanted: Any) -> Path:
    config = golden(name)["config"]
    lateral = tuple(config["parallel_branch"].get("lateral_layers", ())) or None
    tokenizer = words(folder / "words", config["text"]["vocab_size"])
    heads = config["vision"]["heads"]
    said = ImportOptions(tokenizer=tokenizer, image_heads=heads, lateral_layers=lateral, **wanted)
    return import_checkpoint("msclip", GOLDEN / f"{name}.state_dict.pth", folder / "run", said).run


@pytest.mark.parametrize("name", NAMES)
def test_a_loaded_run_says_what_was_recorded(name: str, tmp_path: Path):
    recorded = golden(name)
    inputs, said, vocabulary = recorded["inputs"], recorded["outputs"], recorded["config"]["text"]["vocab_size"]
    model = load(imported(name, tmp_path, truncation="drop_eos"))
    texts = [spelt(row, vocabulary) for row in inputs["input_ids"]]
    for row, ids in zip(inputs["input_ids"], model.tokenizer.encode(texts), strict=True):
        assert row[: len(ids)].tolist() == ids
    # two texts of more words than there is room for, beginning as the recorded ones do
    endless = [f"{spelt(row, vocabulary)} w1 w2" for row in inputs["input_ids_without_eot"]]
    image, text = model.encode_pixels(inputs["pixel_values"]), model.encode_text(texts)
    scale, bias = (each if each is None else each.detach() for each in model.encoder.scale_and_bias())
    assert scale is not None
    ours = {
        "image_features": image,
        "text_features": text,
        "text_features_without_eot": model.encode_text(endless),
        "logit_scale_exp": scale,
        "logits_per_image": scale * image @ text.T,
        "loss": (
            F.cross_entropy(scale * image @ text.T, at := torch.arange(len(image)))
            + F.cross_entropy(scale * text @ image.T, at)
        )
        / 2,
    }
    assert bias is None
    for key, value in ours.items():
        torch.testing.assert_close(value, said[key], atol=1e-5, rtol=0, msg=lambda m, key=key: f"{key}: {m}")


def test_over_long_captions_keep_their_end_unless_told_otherwise(tmp_path: Path):
    model = load(imported("msclip_plain", tmp_path))
    one, other = (model.encode_text([" ".join([word] * 60)]) for word in ("w3", "w4"))
    assert not torch.allclose(one, other, atol=1e-3)
    assert model.tokenizer.encode(["w3 " * 60])[0][-1] == golden("msclip_plain")["config"]["text"]["eot_id"]


@pytest.mark.parametrize("name", NAMES)
def test_each_tensor_is_written_once(name: str, tmp_path: Path):
    run = imported(name, tmp_path)
    nets, delta, params = (
        load_file(run / "towers" / "model.safetensors"),
        load_file(run / "delta.safetensors"),
        golden(name)["params"],
    )
    assert len(nets) + len(delta) == params["distinct_tensors"]
    assert sum(t.numel() for t in (*nets.values(), *delta.values())) == params["trainable"] + params["buffers"]
    assert {key for key in delta} == {"image_head.map.weight", "text_head.map.weight", "log_scale"}
    counts = load(run).encoder.parameter_counts()
    assert counts["model"].total == params["trainable"] and counts["shared"].total == params["tied_elements"]


def test_the_verb_and_all_that_comes_after(tmp_path: Path, monkeypatch: Any, capfd: Any):
    monkeypatch.setenv("CLASP_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    file = GOLDEN / "msclip_s_b32.state_dict.pth"

    def typed(*given: Any) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["clasp", *map(str, given)])
        capfd.readouterr()
        code = 0
        try:
            cli.main()
        except SystemExit as stop:
            code = stop.code if isinstance(stop.code, int) else 0
        return code, *capfd.readouterr()

    tokenizer = words(tmp_path / "words", 512)
    code, out, err = typed("import", "msclip", file, "-o", "run", f"tokenizer={tokenizer}", "image_heads=3")
    assert code == 0, err
    assert "layers 1:12 share q, k, v, o, ffn" in err and "a stem in place of layer 0" in err
    assert "1,559,137" in out and "in both towers" in out
    os.rename("run", "moved")
    assert "own:" not in (tmp_path / "moved" / "recipe.toml").read_text()
    pairs = write_csv([WordToy(*toy) for toy in toys(12, size=64)], tmp_path / "pairs")
    code, out, err = typed("eval", "moved", "retrieval", f"data={pairs}", "--json")
    assert code == 0 and "recall@1" in out, err
    assert typed("index", "moved", pairs.parent)[0] == 0
    assert typed("search", "moved", "w5 w6", "-k", "3", "--json")[0] == 0
    # both nets as they were trained, and now the text net's norms train too
    recipe = (tmp_path / "moved" / "recipe.toml").read_text().replace("{run}", "moved")
    (tmp_path / "more.toml").write_text(recipe)
    changes = ("tune.text=['norms']", f"data.train={pairs}", "train.batch_size=4", "train.epochs=1")
    code, _, err = typed("train", "more.toml", *changes, "--name", "more")
    assert code == 0, err
    delta = load_file(tmp_path / "runs" / "more" / "delta.safetensors")
    assert "text.net.blocks.3.norm1.weight" in delta and not any(".attn." in name for name in delta)
    assert read_recipe("more.toml").share is not None


def refused(words: str, call: Callable[[], object]) -> None:
    with pytest.raises(UserError) as caught:
        call()
    assert words in str(caught.value) and "\n" not in str(caught.value), str(caught.value)


def test_what_does_not_fit_is_refused(tmp_path: Path):
    file, run = GOLDEN / "msclip_plain.state_dict.pth", tmp_path / "run"
    tokenizer = words(tmp_path / "few", 512)
    for said, wanted in (
        ("no default one has 512 tokens", ImportOptions()),
        ("text_heads=4: both nets", ImportOptions(image_heads=2, text_heads=4)),
        ("size=32: this model was trained on 64 px", ImportOptions(image_heads=2, size=32)),
        ("the embedding has 512 rows", ImportOptions(image_heads=2, tokenizer=words(tmp_path / "many", 600))),
    ):
        refused(said, lambda wanted=wanted: import_checkpoint("msclip", file, run, wanted))
        assert not run.exists()
    torch.save({"model": 3}, tmp_path / "other.pth")
    refused(
        "it has model; is it LilT's?", lambda: import_checkpoint("msclip", tmp_path / "other.pth", run, ImportOptions())
    )
    branch = ImportOptions(image_heads=2, lateral_layers=(1, 2))
    refused("lateral=1, 2: ", lambda: import_checkpoint("msclip", file, run, branch))
    refused("lateral=2;3: must be a list of layers", lambda: parse_import_options(["lateral=2;3"]))
    refused("must be one of keep_eos, drop_eos", lambda: parse_import_options(["truncation=kept"]))
    refused("did you mean size=", lambda: parse_import_options(["sise=3"]))
    refused("size=big: must be a whole number from 1", lambda: parse_import_options(["size=big"]))
    given = tmp_path / "prefixed.pth"
    torch.save({f"module.{key}": tensor for key, tensor in torch.load(file, weights_only=True).items()}, given)
    made = import_checkpoint("msclip", given, run, ImportOptions(image_heads=2, tokenizer=tokenizer)).run
    (made / "towers" / "config.json").write_text('{"model_type": "clasp_pair", "image": {}, "transform": {}}')
    refused("is damaged", lambda: load(made))
