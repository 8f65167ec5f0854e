"""Where ``pool`` is left out, a tower pools as its authors do: compared with what their own classes return."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
import torch.nn.functional as F
import transformers as hf

from clasp.config.build import build_model_and_preprocessing
from clasp.models.tower import Tower
from clasp.models.tower_settings import ImageTowerSettings, TextTowerSettings
from clasp.models.zoo.registry import load_backbone
from clasp.types import Pixels, Tokens, UserError
from selection_checks import CAPTIONS, recipe, train_save_load
from toyfamilies import save_family
from toysavedtowers import END, save, save_tokenizer

POOLER_OUTPUT = (
    "aimv2_vision_model", "bit", "convnextv2", "dinov2_with_registers", "dinov3_convnext", "focalnet", "hiera",
    "mlcd_vision_model", "mobilenet_v1", "mobilevit", "pixio", "regnet", "resnet", "siglip_vision_model", "swin",
)  # fmt: skip


@pytest.mark.parametrize("name", POOLER_OUTPUT)
def test_images_are_pooled_as_by_their_authors(tmp_path: Path, name: str):
    size = 64 if name == "mobilevit" else 32
    save_family(name, tmp_path, size={"height": size, "width": size})
    settings = ImageTowerSettings(tower=f"file:{tmp_path}")
    tower, theirs = Tower(load_backbone(settings)), hf.AutoModel.from_pretrained(tmp_path).eval()
    pixels = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = theirs(pixel_values=pixels).pooler_output.flatten(1)
        torch.testing.assert_close(tower.pooled(Pixels(pixels)), expected, rtol=1e-4, atol=1e-5)
    meta = Tower(load_backbone(settings, meta=True))
    assert meta.width == tower.width == expected.shape[1]
    assert {n: p.shape for n, p in meta.named_parameters()} == {n: p.shape for n, p in tower.named_parameters()}


def whole(family: str, folder: Path) -> Path:
    """A checkpoint of both halves, with a text projection of another width."""
    config, model = {
        "siglip": (hf.SiglipConfig, hf.SiglipModel), "siglip2": (hf.Siglip2Config, hf.Siglip2Model)
    }[family]  # fmt: skip
    sizes = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64)
    text = dict(
        **sizes, vocab_size=64, max_position_embeddings=16, pad_token_id=0, eos_token_id=END, projection_size=24
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = model(config(text_config=text, vision_config=dict(**sizes, image_size=32, patch_size=8)))
        for p in net.parameters():
            p.data += 0.05 * torch.randn_like(p)
    net.save_pretrained(folder)
    save_tokenizer(folder, template="$A </s>")
    return folder


@pytest.mark.parametrize(("family", "theirs"), [("siglip", hf.SiglipTextModel), ("siglip2", hf.Siglip2TextModel)])
def test_siglip_reads_texts_padded_to_its_positions(tmp_path: Path, family: str, theirs: Any):
    whole(family, tmp_path)
    settings = TextTowerSettings(tower=f"file:{tmp_path}")
    base = load_backbone(settings)
    assert base.tokenizer is not None and base.pool == "pooler"
    tower, tokens = Tower(base), base.tokenizer()(CAPTIONS)
    whole_length = dict(padding="max_length", max_length=16, padding_side="right", return_tensors="pt")
    padded = hf.AutoTokenizer.from_pretrained(tmp_path)(CAPTIONS, **whole_length)
    assert torch.equal(tokens.ids, padded["input_ids"]) and tokens.mask.all()
    with torch.no_grad():
        expected = theirs.from_pretrained(tmp_path).eval()(input_ids=padded["input_ids"]).pooler_output
        torch.testing.assert_close(tower.pooled(tokens), expected, rtol=1e-4, atol=1e-5)
    assert Tower(load_backbone(settings, meta=True)).width == tower.width == 24
    chosen = load_backbone(TextTowerSettings(tower=f"file:{tmp_path}", pool="mean"))
    assert chosen.tokenizer is not None and chosen.tokenizer().settings.padding == "longest"
    assert not any("head" in name for name, _ in Tower(chosen, pool="mean").named_parameters())
    with pytest.raises(UserError, match=r"max_tokens = 8: .* padded to 16 tokens"):
        load_backbone(TextTowerSettings(tower=f"file:{tmp_path}", max_tokens=8))


def test_a_siglip_pair_trains_and_comes_back(tmp_path: Path):
    save("siglip", tmp_path / "siglip")
    tower = f"file:{tmp_path / 'siglip'}"
    parts = train_save_load(recipe(tower, tower, ["full"]), tmp_path / "run", CAPTIONS)
    assert {"image.net.head.probe", "text.net.head.weight"} <= parts.model.selection
    assert parts.tokenizer.settings.padding == "max_tokens"


# --- sentence-transformers -------------------------------------------------------------------------------------------


def sentence_folder(folder: Path, mode: dict[str, Any], *kinds: str, prompts: dict[str, Any] | None = None) -> Path:
    """A BERT as sentence-transformers saves one: ``modules.json``, a folder for each module, prompts."""
    save("bert", folder)
    listed = [
        ("Transformer", ""),
        ("Pooling", "1_Pooling"),
        *((kind, f"{n}_{kind}") for n, kind in enumerate(kinds, 2)),
    ]
    modules = [{"idx": n, "type": f"sentence_transformers.models.{k}", "path": p} for n, (k, p) in enumerate(listed)]
    (folder / "modules.json").write_text(json.dumps(modules))
    for kind, path in listed[1:]:
        (folder / path).mkdir()
        facts = mode if kind == "Pooling" else {}
        if kind == "Dense":
            facts = {"in_features": 32, "out_features": 8, "bias": True, "activation_function": "torch.nn.Tanh"}
            generator = torch.Generator().manual_seed(2)
            weights = {"weight": torch.randn(8, 32, generator=generator), "bias": torch.randn(8, generator=generator)}
            safetensors.torch.save_file(
                {f"linear.{k}": v for k, v in weights.items()}, folder / path / "model.safetensors"
            )
        (folder / path / "config.json").write_text(json.dumps(facts))
    if prompts is not None:
        (folder / "config_sentence_transformers.json").write_text(json.dumps(prompts))
    return folder


MODES = [
    ({"pooling_mode_cls_token": True}, lambda states, mask: states[:, 0]),
    ({"pooling_mode": "mean"}, lambda states, mask: (states * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)),
    (
        {"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": True},
        lambda states, mask: torch.cat(
            (states[:, 0], (states * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)), 1
        ),
    ),
]


@pytest.mark.parametrize(("mode", "pooled"), MODES, ids=["cls", "mean", "cls and mean"])
@pytest.mark.parametrize("dense", [True, False])
def test_sentence_transformers_pool_project_and_prompt(tmp_path: Path, mode: dict, pooled: Any, dense: bool):
    if dense and len(mode) == 2:
        pytest.skip("a dense layer of 32")
    prompts = {"prompts": {"query": "w7 "}, "default_prompt_name": "query"}
    sentence_folder(tmp_path, mode, *(["Dense"] if dense else []), "Normalize", prompts=prompts)
    settings = TextTowerSettings(tower=f"file:{tmp_path}")
    base = load_backbone(settings)
    assert base.tokenizer is not None
    tower, tokens = Tower(base), base.tokenizer()(CAPTIONS)
    theirs = hf.AutoTokenizer.from_pretrained(tmp_path)(
        [f"w7 {text}" for text in CAPTIONS], padding=True, return_tensors="pt"
    )
    with torch.no_grad():
        states = hf.AutoModel.from_pretrained(tmp_path).eval()(**theirs).last_hidden_state
        expected = pooled(states, theirs["attention_mask"])
        if dense:
            weights = safetensors.torch.load_file(tmp_path / "2_Dense" / "model.safetensors")
            expected = F.linear(expected, weights["linear.weight"], weights["linear.bias"]).tanh()
        torch.testing.assert_close(tower.pooled(tokens), expected, rtol=1e-4, atol=1e-5)
    meta = Tower(load_backbone(settings, meta=True))
    assert {n: p.shape for n, p in meta.named_parameters()} == {n: p.shape for n, p in tower.named_parameters()}
    assert meta.width == tower.width
    without = Tower(load_backbone(TextTowerSettings(tower=f"file:{tmp_path}", pool="mean")), pool="mean")
    assert without.width == 32 and not any("sentence" in name for name, _ in without.named_parameters())


def test_a_prefix_of_ones_own_comes_before_the_default_prompt(tmp_path: Path):
    prompts = {"prompts": {"query": "w7 "}, "default_prompt_name": "query"}
    sentence_folder(tmp_path / "text", {"pooling_mode": "mean", "include_prompt": False}, prompts=prompts)
    save("vit", tmp_path / "vit")
    given = recipe(f"file:{tmp_path / 'vit'}", f"file:{tmp_path / 'text'}", ["norms"])
    with pytest.raises(UserError, match="its default prompt 'w7 ' is read but not pooled"):
        build_model_and_preprocessing(given)
    parts = build_model_and_preprocessing(given.with_overrides(["text.prefix=''"]))
    assert parts.tokenizer.settings.prefix == ""


@pytest.mark.parametrize(
    ("mode", "kinds", "reason"),
    [
        ({"pooling_mode_max_tokens": True}, (), "its authors pool by max"),
        ({"pooling_mode": "weightedmean"}, (), "its authors pool by weightedmean"),
        ({"pooling_mode": "mean"}, ("LSTM",), "its authors put LSTM"),
    ],
)
def test_what_cannot_be_done_is_refused_unless_pool_is_set(tmp_path: Path, mode: dict, kinds: tuple, reason: str):
    sentence_folder(tmp_path, mode, *kinds)
    with pytest.raises(UserError, match=reason) as caught:
        load_backbone(TextTowerSettings(tower=f"file:{tmp_path}"))
    assert "\n" not in str(caught.value)
    tower = Tower(load_backbone(TextTowerSettings(tower=f"file:{tmp_path}", pool="mean")), pool="mean")
    assert tower.pooled(Tokens(torch.tensor([[1, 5]]), torch.ones(1, 2, dtype=torch.bool))).shape == (1, 32)


def test_no_pooler_no_pooling_by_it(tmp_path: Path):
    save("vit", tmp_path)
    with pytest.raises(UserError, match="brings no layers to pool with"):
        Tower(load_backbone(ImageTowerSettings(tower=f"file:{tmp_path}")), pool="pooler")
