"""An existing dual encoder as both towers: its own embeddings before training, tuned, saved and reloaded bitwise."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable
from pathlib import Path

import huggingface_hub.constants
import pytest
import torch
import transformers as hf
from safetensors.torch import load_file, save_file
from torch import Tensor

from clasp.config.build import build_model, build_model_and_preprocessing, load
from clasp.config.recipe import Recipe, recipe_from_dict
from clasp.models.tower_settings import ImageTowerSettings, TextTowerSettings
from clasp.models.zoo.dual_encoders import DUAL_ENCODER_FAMILIES
from clasp.models.zoo.registry import load_backbone
from clasp.types import Pixels, UserError
from selection_checks import CAPTIONS, train_save_load
from toysavedtowers import net, save

WIDTHS = {"clip": 512, "chinese_clip": 16, "metaclip_2": 16, "siglip": 32}


def write(name: str, folder: Path) -> Path:
    """A random dual encoder whose norms, biases and logit scale are not those of a new one."""
    save(name, folder)
    whole, generator = net(name), torch.Generator().manual_seed(2)
    with torch.no_grad():
        for p in whole.parameters():
            p += 0.05 * torch.randn(p.shape, generator=generator)
        whole.get_parameter("logit_scale").fill_(3.0)
    whole.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder of a family, written when first asked for."""
    place = tmp_path_factory.mktemp("clip")
    return lambda name: place / name if (place / name).exists() else write(name, place / name)


def made(tower: Path | str, width: int, *tuned: str, text: str | None = None, **changes) -> Recipe:
    given = {
        "image": {"tower": f"clip:{tower}"},
        "text": {"tower": text or f"clip:{tower}"},
        "tune": {"image": list(tuned or ["none"]), "text": list(tuned or ["none"])},
        "head": {"init": "pretrained", "width": width},
    }
    return recipe_from_dict({**given, **changes}, "a test")


def original(folder: Path, name: str, pixels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Embeddings of images and of ``CAPTIONS``, and the logit scale, by ``transformers``."""
    whole = getattr(hf, DUAL_ENCODER_FAMILIES[name].class_name).from_pretrained(folder).eval()
    tokenizer = hf.AutoTokenizer.from_pretrained(folder)
    padded = {"padding": "max_length", "max_length": 64} if name == "siglip" else {"padding": True}
    tokens = tokenizer(CAPTIONS, return_tensors="pt", **padded)
    tokens.pop("token_type_ids", None)
    mask = {} if name == "siglip" else {"attention_mask": tokens["attention_mask"]}
    with torch.no_grad():
        images = whole.get_image_features(pixel_values=pixels).pooler_output
        texts = whole.get_text_features(input_ids=tokens["input_ids"], **mask).pooler_output
    return images, texts, whole.logit_scale.detach().exp()


@pytest.mark.parametrize("name", DUAL_ENCODER_FAMILIES)
def test_embeddings_before_training_are_the_originals(folders: Callable[[str], Path], name: str):
    folder, pixels = folders(name), torch.randn(3, 3, 32, 32)
    parts = build_model_and_preprocessing(made(folder, WIDTHS[name], "lora(rank=2)"))
    images, texts, scale = original(folder, name, pixels)
    with torch.no_grad():
        ours = parts.model.embed_image(Pixels(pixels)), parts.model.embed_text(parts.tokenizer(CAPTIONS))
    for found, expected in zip(ours, (images, texts), strict=True):
        cosines = torch.cosine_similarity(found, expected)
        torch.testing.assert_close(cosines, torch.ones_like(cosines), rtol=0, atol=1e-5)
    torch.testing.assert_close(parts.model.scale_and_bias()[0], scale.reshape(()))


@pytest.mark.parametrize("name", DUAL_ENCODER_FAMILIES)
@pytest.mark.parametrize("tuned", ["lora(rank=2)", "norms", "adapters(reduction=4)"])
def test_one_selection_four_uses(folders: Callable[[str], Path], tmp_path: Path, name: str, tuned: str):
    given = made(folders(name), WIDTHS[name], tuned)
    parts = train_save_load(given, tmp_path / "run", CAPTIONS)
    assert any(part.startswith("text.net.") for part in parts.model.selection)


@pytest.mark.parametrize("name", ["clip", "siglip"])
def test_frozen_heads_are_base_weights(folders: Callable[[str], Path], tmp_path: Path, name: str):
    """They are in no delta; other projections under a run are refused as other towers are."""
    folder = write(name, tmp_path / "clip")
    kind = "none" if name == "siglip" else "linear"
    tune = {"image": ["lora(rank=2)"], "text": ["none"], "head": "none", "scale": "none"}
    given = made(folder, WIDTHS[name], tune=tune, head={"init": "pretrained", "width": WIDTHS[name], "kind": kind})
    parts = train_save_load(given, tmp_path / "run", CAPTIONS)
    assert all(part.startswith("image.net.") for part in parts.model.selection)
    whole = getattr(hf, DUAL_ENCODER_FAMILIES[name].class_name).from_pretrained(folder)
    whole.logit_scale.data += 0.1
    whole.save_pretrained(folder)
    says("pretrained_head:log_scale", lambda: load(tmp_path / "run"))


def test_a_sigmoid_loss_starts_at_the_checkpoints_bias(folders: Callable[[str], Path]):
    folder = folders("siglip")
    model = build_model(made(folder, 32, loss={"kind": "sigmoid"}))
    whole = hf.SiglipModel.from_pretrained(folder)
    assert model.bias is not None and model.bias.item() == whole.logit_bias.item()
    temperature = build_model(made(folder, 32, loss={"scale": "temperature"})).temperature
    assert temperature is not None and temperature.item() == pytest.approx(1 / whole.logit_scale.exp().item())


def test_counted_on_shapes_alone(folders: Callable[[str], Path]):
    given = made(folders("clip"), 512, "lora(rank=2)")
    real, meta = build_model(given).parameter_counts(), build_model(given, meta=True).parameter_counts()
    assert real == meta
    known = build_model(made("openai/clip-vit-base-patch32", 512, "lora(rank=8)"), meta=True).parameter_counts()
    assert known["model"].total - known["image"].trained - known["text"].trained == 151_277_313 + 2 * 512, (
        "OpenAI's count, and a bias for each of our heads"
    )


def test_longer_captions_than_other_towers_have(folders: Callable[[str], Path]):
    """CLIP's own context; 64 tokens is the default of the others."""
    for name, longest in (("clip", 77), ("chinese_clip", 77), ("siglip", 64)):
        tokenizer = load_backbone(TextTowerSettings(tower=f"clip:{folders(name)}")).tokenizer
        assert tokenizer is not None and tokenizer().max_tokens == longest


def test_a_tower_of_another_kind_has_a_random_head(
    folders: Callable[[str], Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    text = f"file:{save('bert', tmp_path / 'bert')}"
    with caplog.at_level(logging.WARNING):
        given = made(folders("clip"), 512, text=text)
        model = build_model(given)
    assert f"{text} comes without a projection: its head is initialised at random" in caplog.text
    weight = hf.CLIPModel.from_pretrained(folders("clip")).visual_projection.weight
    assert torch.equal(model.image_head.get_parameter("map.weight"), weight)
    assert model.log_scale is not None and model.log_scale.item() == pytest.approx(3.0)
    again = build_model(given)
    assert torch.equal(model.text_head.get_parameter("map.weight"), again.text_head.get_parameter("map.weight"))


def test_unused_projections_are_reported(folders: Callable[[str], Path], caplog: pytest.LogCaptureFixture):
    with caplog.at_level(logging.WARNING):
        build_model(made(folders("clip"), 64, head={"width": 64}))
    assert caplog.text.count("its projection is not used") == 2


# --- wrong inputs ----------------------------------------------------------------------------------------------------


def says(what: str, call: Callable[[], object]) -> None:
    """One line, with ``what`` in it."""
    with pytest.raises(UserError, match=re.escape(what)) as caught:
        call()
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 500


def test_not_a_dual_encoder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    save("vit", tmp_path / "vit")
    (tmp_path / "empty").mkdir()
    image = lambda name: load_backbone(ImageTowerSettings(tower=f"clip:{name}"))  # noqa: E731
    says("is vit, and clip: opens dual encoders of the families clip, ", lambda: image(tmp_path / "vit"))
    says("has no config.json, so it is not a saved CLIP", lambda: image(tmp_path / "empty"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    says("without a hub use pip:", lambda: image("openai/clip-vit-base-patch32"))
    says("did you mean clip:", lambda: load_backbone(ImageTowerSettings(tower="clp:x")))


def test_missing_projection(folders: Callable[[str], Path], tmp_path: Path):
    folder = write("clip", tmp_path / "clip")
    tensors = load_file(folder / "model.safetensors")
    del tensors["text_projection.weight"]
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    says("its weights lack text_projection.weight", lambda: build_model(made(folder, 512)))


def test_heads_that_do_not_fit(folders: Callable[[str], Path], tmp_path: Path):
    clip, siglip = folders("clip"), folders("siglip")
    head = {"init": "pretrained", "width": 512}
    says("head.width = 256: the embeddings of clip:", lambda: build_model(made(clip, 256)))
    says("set head.width = 512", lambda: build_model(made(clip, 256), meta=True))
    other = write("siglip", tmp_path / "other")
    says("are halves of two dual encoders", lambda: build_model(made(siglip, 32, text=f"clip:{other}")))
    says("their width 32 is not head.width = 512", lambda: build_model(made(clip, 512, head={**head, "kind": "none"})))
    equal = net("clip").config
    equal.projection_dim = 32
    hf.CLIPModel(equal).save_pretrained(save("clip", tmp_path / "equal"))
    none = {"init": "pretrained", "width": 32, "kind": "none"}
    says("has a projection from 32 to 32", lambda: build_model(made(tmp_path / "equal", 32, head=none)))
    pooled = {"tower": f"clip:{clip}", "pool": "mean"}
    says("is of image.pool = 'cls' of the last states", lambda: build_model(made(clip, 512, image=pooled)))
    bert = f"file:{save('bert', tmp_path / 'bert')}"
    plain = {"tower": f"file:{clip}"}
    says("comes with a projection; write clip:", lambda: build_model(made(clip, 512, image=plain, text=bert)))
    says("needs kind = 'linear' or 'none'", lambda: made(clip, 512, head={**head, "kind": "mlp"}))
    says("here standardize = true", lambda: made(clip, 512, head={**head, "standardize": True}))
    narrow = {"scale_range": [0, 20], "init_logit_scale": 10}
    says("the logit scale of the checkpoint is 20.09", lambda: build_model(made(clip, 512, loss=narrow)))
