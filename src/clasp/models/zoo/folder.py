"""Towers as folders, so that weights from a paper's checkpoint can be used as ``tower = "file:FOLDER"``.

Input: settings and tensors. Output: a folder: a BERT in ``transformers``' format, or a native image encoder or a tied
pair of encoders with a ``config.json`` of our format (``model_type`` is a key of ``NATIVE_LOADERS``; settings,
transform), which is also loaded here, as a ``Backbone``. Note: a folder stores the original position embedding; loading
at another image size interpolates it. Parameters shared by a pair are stored once, and either encoder can be loaded
alone.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import safetensors
import tokenizers
import torch
from pydantic import BaseModel, ConfigDict, PositiveInt
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from clasp.data.images import ImageTransform
from clasp.data.tokenizer import Tokenizer
from clasp.models.backbone import Backbone
from clasp.models.sharing.tie import TiedEncoders, parameter_aliases
from clasp.models.tower_settings import ImageTowerSettings, TextTowerSettings
from clasp.models.transformer.deit import resize_pos_embed
from clasp.models.transformer.encoders import ImageTransformer, TextTransformer
from clasp.models.transformer.settings import ImageTransformerSettings, TextTransformerSettings
from clasp.types import UserError

_IMAGE_MODEL_TYPE, _TIED_MODEL_TYPE = "clasp_image", "clasp_pair"
_TOKEN_TYPES_KEY = "embeddings.token_type_embeddings.weight"


class BertSettings(BaseModel):
    """A BERT without token types and pooler: absolute positions, exact GELU, norm epsilon 1e-12."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    width: PositiveInt
    layers: PositiveInt
    heads: PositiveInt
    hidden: PositiveInt
    vocabulary: PositiveInt
    positions: PositiveInt

    def config(self, pad_id: int = 0) -> Any:
        """The ``transformers`` configuration."""
        from transformers import BertConfig

        return BertConfig(
            architectures=["BertModel"],
            vocab_size=self.vocabulary,
            hidden_size=self.width,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            intermediate_size=self.hidden,
            max_position_embeddings=self.positions,
            pad_token_id=pad_id,
        )


EncoderSettings = ImageTransformerSettings | TextTransformerSettings | BertSettings


def build_on_meta(settings: EncoderSettings) -> nn.Module:
    """The encoder of these settings on the meta device; a BERT has no token type embedding."""
    with torch.device("meta"):
        if isinstance(settings, ImageTransformerSettings):
            return ImageTransformer(settings).eval()
        if isinstance(settings, TextTransformerSettings):
            return TextTransformer(settings).eval()
        from transformers import BertModel

        net = BertModel(settings.config(), add_pooling_layer=False).eval()
    net.get_submodule("embeddings").register_module("token_type_embeddings", None)
    return net


def save_image_encoder(
    settings: ImageTransformerSettings, tensors: Mapping[str, Tensor], transform: ImageTransform, folder: Path
) -> None:
    """Save an ``ImageTransformer``; ``tensors`` is its complete state dict."""
    _save_tensors(settings, tensors, folder)
    config = {
        "model_type": _IMAGE_MODEL_TYPE,
        "net": settings.model_dump(mode="json"),
        "transform": transform.to_dict(),
    }
    (folder / "config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")


def save_tied_encoders(encoders: TiedEncoders, transform: ImageTransform, tokenizer: Tokenizer, folder: Path) -> int:
    """Save a tied pair of encoders, the transform and the tokenizer; returns the tokenizer's vocabulary size.

    Shared parameters are stored once. Only whole parts may be shared, since low-rank sharing changes parameter names.
    Raises ``UserError`` for a tokenizer with an id beyond the token embedding.
    """
    nets = {"image": encoders.image, "text": encoders.text}
    settings = {side: net.settings for side, net in nets.items()}
    for side, net in nets.items():
        assert {name: tensor.shape for name, tensor in net.state_dict().items()} == _shapes(settings[side])
    _, ids = _save_tokenizer(tokenizer, encoders.text.settings.vocabulary, folder)
    tensors = {name: tensor.contiguous() for name, tensor in encoders.state_dict().items()}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    config = {
        "model_type": _TIED_MODEL_TYPE,
        "image": settings["image"].model_dump(mode="json"),
        "text": settings["text"].model_dump(mode="json"),
        "same": parameter_aliases(encoders),
        "transform": transform.to_dict(),
    }
    (folder / "config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")
    return ids


def save_bert(settings: BertSettings, tensors: Mapping[str, Tensor], tokenizer: Tokenizer, folder: Path) -> int:
    """Save a BERT in ``transformers``' format; returns the tokenizer's vocabulary size.

    Its token type embedding is zero. Raises ``UserError`` for a tokenizer with an id beyond the token embedding.
    """
    backend, ids = _save_tokenizer(tokenizer, settings.vocabulary, folder)
    _save_tensors(settings, tensors, folder, {_TOKEN_TYPES_KEY: torch.zeros(2, settings.width)})
    tokenizer_config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "pad_token": backend.id_to_token(tokenizer.pad_id),
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer_config, indent=2), encoding="utf-8")
    settings.config(tokenizer.pad_id).save_pretrained(folder)
    return ids


def _save_tokenizer(tokenizer: Tokenizer, rows: int, folder: Path) -> tuple[tokenizers.Tokenizer, int]:
    """Save a tokenizer; returns its backend and vocabulary size. Raises ``UserError`` for an id of ``rows`` or more."""
    tokenizer.save(folder)
    backend = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    ids = set(backend.get_vocab(with_added_tokens=True).values())
    if max(ids) >= rows:
        raise UserError(
            f"the tokenizer has ids up to {max(ids):,}, but the embedding has {rows:,} rows: it is another tower's"
        )
    return backend, len(ids)


def _save_tensors(
    settings: EncoderSettings, tensors: Mapping[str, Tensor], folder: Path, more: Mapping[str, Tensor] = {}
) -> None:
    assert {name: t.shape for name, t in tensors.items()} == _shapes(settings)
    folder.mkdir(parents=True, exist_ok=True)
    written = {name: tensor.contiguous() for name, tensor in {**tensors, **more}.items()}
    save_file(written, folder / "model.safetensors", {"format": "pt"})


def _shapes(settings: EncoderSettings) -> dict[str, torch.Size]:
    return {name: tensor.shape for name, tensor in build_on_meta(settings).state_dict().items()}


def read_model_type(folder: Path) -> str:
    """The ``model_type`` in a folder's ``config.json``; empty where there is none."""
    try:
        return str(_read_config(folder).get("model_type", ""))
    except UserError:
        return ""  # reported when the folder is loaded


def load_native_backbone(folder: Path, settings: ImageTowerSettings | TextTowerSettings, meta: bool) -> Backbone:
    """Load the tower of a folder whose ``read_model_type`` is a key of ``NATIVE_LOADERS``. Raises ``UserError`` for a
    damaged folder and for settings that do not fit."""
    return NATIVE_LOADERS[read_model_type(folder)](folder, settings, meta)


def _load_image_encoder(folder: Path, settings: ImageTowerSettings | TextTowerSettings, meta: bool) -> Backbone:
    if not isinstance(settings, ImageTowerSettings):
        raise UserError(f"[text] tower = {settings.tower!r} is a tower for images")
    config = _read_config(folder)
    saved = _read_settings(ImageTransformerSettings, config, "net", folder, settings.tower)
    return _image_backbone(folder, settings, saved, config, meta, lambda tensors: tensors)


def _load_tied_encoder(folder: Path, settings: ImageTowerSettings | TextTowerSettings, meta: bool) -> Backbone:
    config = _read_config(folder)
    if isinstance(settings, ImageTowerSettings):
        saved = _read_settings(ImageTransformerSettings, config, "image", folder, settings.tower)
        return _image_backbone(
            folder, settings, saved, config, meta, lambda tensors: _tensors_of_encoder("image", tensors, config)
        )
    saved = _read_settings(TextTransformerSettings, config, "text", folder, settings.tower)
    net = build_on_meta(saved)
    if not meta:
        tensors = _read_tensors(
            folder, saved, settings.tower, lambda tensors: _tensors_of_encoder("text", tensors, config)
        )
        net.load_state_dict(tensors, assign=True)
    pool = "last" if saved.attention == "causal" else "mean"
    tokenizer = partial(Tokenizer.from_folder, folder)
    return Backbone(settings.tower, "text", net, f"a {_TIED_MODEL_TYPE} folder", pool, tokenizer=tokenizer)


def _tensors_of_encoder(side: str, tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> dict[str, Tensor]:
    """The tensors of one encoder of a pair, aliases resolved, under its parameter names."""
    aliases = {name: tensors[first] for name, first in dict(config.get("same", {})).items() if first in tensors}
    prefix = f"{side}."
    named = {**tensors, **aliases}
    return {name.removeprefix(prefix): tensor for name, tensor in named.items() if name.startswith(prefix)}


def _image_backbone(
    folder: Path,
    settings: ImageTowerSettings,
    saved: ImageTransformerSettings,
    config: Mapping[str, Any],
    meta: bool,
    select: Callable[[dict[str, Tensor]], dict[str, Tensor]],
) -> Backbone:
    """``select`` returns the encoder's tensors from those of the file."""
    try:
        transform = ImageTransform.from_dict(config["transform"])
    except (KeyError, AttributeError, TypeError, ValueError) as error:
        raise _damaged(folder, settings.tower, error) from None
    size, patch = settings.size or saved.size, saved.patch
    if size % patch:
        near = max(patch, round(size / patch) * patch)
        raise UserError(f"size = {size}: {settings.tower} cuts images into {patch} px patches; take {near}")
    net = build_on_meta(saved.model_copy(update={"size": size}))
    if not meta:
        tensors = _read_tensors(folder, saved, settings.tower, select)
        tensors["pos_embed"] = resize_pos_embed(tensors["pos_embed"], size // patch, int(saved.class_position))
        net.load_state_dict(tensors, assign=True)
    return Backbone(
        settings.tower, "image", net, f"a {config['model_type']} folder", "cls", replace(transform, size=size)
    )


NATIVE_LOADERS: dict[str, Callable[[Path, ImageTowerSettings | TextTowerSettings, bool], Backbone]] = {
    _IMAGE_MODEL_TYPE: _load_image_encoder,
    _TIED_MODEL_TYPE: _load_tied_encoder,
}
_SettingsT = TypeVar("_SettingsT", ImageTransformerSettings, TextTransformerSettings)


def _read_settings(kind: type[_SettingsT], config: Mapping[str, Any], key: str, folder: Path, tower: str) -> _SettingsT:
    try:
        return kind.model_validate(config[key])
    except (KeyError, ValueError) as error:
        raise _damaged(folder, tower, error) from None


def _damaged(folder: Path, tower: str, error: Exception) -> UserError:
    reason = " ".join(str(error).split())[:200]
    return UserError(f"tower = {tower!r}: {folder / 'config.json'} is damaged: {reason}")


def _read_tensors(
    folder: Path, settings: EncoderSettings, tower: str, select: Callable[[dict[str, Tensor]], dict[str, Tensor]]
) -> dict[str, Tensor]:
    """The weights of a folder, in float32. Raises ``UserError`` unless names and shapes are those of ``settings``."""
    path = folder / "model.safetensors"
    try:
        tensors = select(load_file(path))
    except (OSError, safetensors.SafetensorError) as error:
        raise UserError(f"tower = {tower!r}: {path} cannot be read: {error}") from None
    expected, found = _shapes(settings), {name: tensor.shape for name, tensor in tensors.items()}
    odd = sorted(name for name in expected | found if expected.get(name) != found.get(name))
    if odd:
        difference = " and ".join(
            f"{'absent' if shape is None else tuple(shape)} in {where}"
            for shape, where in ((found.get(odd[0]), path.name), (expected.get(odd[0]), "the net of config.json"))
        )
        raise UserError(f"tower = {tower!r}: {folder} is damaged: {len(odd)} tensors differ; {odd[0]} is {difference}")
    return {name: tensor.float() if tensor.is_floating_point() else tensor for name, tensor in tensors.items()}


def _read_config(folder: Path) -> dict[str, Any]:
    path = folder / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path} is not JSON: {error}") from None
    return config if isinstance(config, dict) else {}
