"""Towers as folders, so that the weights in a paper's file can stand behind ``file:FOLDER`` like any others.

In go settings and tensors, out comes a folder: a BERT as ``transformers`` reads it, or an image net of ``nn.nets`` or a
pair of nets, which has a ``config.json`` of ours (``model_type`` is a key of ``NATIVE_LOADERS``; settings, transform)
and is opened here, as a ``Backbone``. Unusual: a folder keeps the position table it was given; a tower asked for at
another image size gets it resized. Of a pair, what both nets hold is written once, and either net can be opened without
the other.
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
from clasp.models.backbone import Backbone, ImageTowerSettings, TextTowerSettings
from clasp.models.sharing.tie import TiedEncoders, parameter_aliases
from clasp.models.transformer.deit import resize_pos_embed
from clasp.models.transformer.encoders import (
    ImageTransformer,
    ImageTransformerSettings,
    TextTransformer,
    TextTransformerSettings,
)
from clasp.types import UserError

_IMAGE_MODEL_TYPE, _TIED_MODEL_TYPE = "clasp_image", "clasp_pair"
_TOKEN_TYPES_KEY = "embeddings.token_type_embeddings.weight"


class BertSettings(BaseModel):
    """A BERT without token types and pooler: absolute positions, exact GELU, norms with 1e-12."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    width: PositiveInt
    layers: PositiveInt
    heads: PositiveInt
    hidden: PositiveInt
    vocabulary: PositiveInt
    positions: PositiveInt

    def config(self, pad_id: int = 0) -> Any:
        """As ``transformers`` has it."""
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
    """The net of these settings, on the meta device; a BERT without token types."""
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
    """Write an ``ImageTransformer`` of these tensors, which are all that it has, under its names."""
    _save_tensors(settings, tensors, folder)
    config = {
        "model_type": _IMAGE_MODEL_TYPE,
        "net": settings.model_dump(mode="json"),
        "transform": transform.to_dict(),
    }
    (folder / "config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")


def save_tied_encoders(encoders: TiedEncoders, transform: ImageTransform, tokenizer: Tokenizer, folder: Path) -> int:
    """Write both nets of a pair, the transform and the tokenizer; returns how many ids that has.

    What both nets hold is written once. Only whole parts may be shared: nothing else has the names of a plain net.
    Raises ``UserError`` for a tokenizer with an id beyond the table.
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
    """Write a BERT of these tensors as ``transformers`` reads it; returns how many ids its tokenizer has.

    Its token types are zeros, which add nothing. Raises ``UserError`` for a tokenizer with an id beyond the table.
    """
    backend, ids = _save_tokenizer(tokenizer, settings.vocabulary, folder)
    _save_tensors(settings, tensors, folder, {_TOKEN_TYPES_KEY: torch.zeros(2, settings.width)})
    said = {"tokenizer_class": "PreTrainedTokenizerFast", "pad_token": backend.id_to_token(tokenizer.pad_id)}
    (folder / "tokenizer_config.json").write_text(json.dumps(said, indent=2), encoding="utf-8")
    settings.config(tokenizer.pad_id).save_pretrained(folder)
    return ids


def _save_tokenizer(tokenizer: Tokenizer, rows: int, folder: Path) -> tuple[tokenizers.Tokenizer, int]:
    """Writes a tokenizer; its backend, and how many ids it has. Raises ``UserError`` for one beyond the rows."""
    tokenizer.save(folder)
    backend = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    ids = set(backend.get_vocab(with_added_tokens=True).values())
    if max(ids) >= rows:
        raise UserError(
            f"the tokenizer has ids up to {max(ids):,}, and the word embedding has {rows:,} rows: it is another tower's"
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
    """The ``model_type`` that a folder's ``config.json`` names; empty where it names none."""
    try:
        return str(_read_config(folder).get("model_type", ""))
    except UserError:
        return ""  # whoever opens the folder says what is wrong with it


def load_native_backbone(folder: Path, settings: ImageTowerSettings | TextTowerSettings, meta: bool) -> Backbone:
    """The tower in a folder whose ``read_model_type`` is a key of ``NATIVE_LOADERS``. Raises ``UserError`` for what
    does not fit."""
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
    words = _read_settings(TextTransformerSettings, config, "text", folder, settings.tower)
    net = build_on_meta(words)
    if not meta:
        tensors = _read_tensors(
            folder, words, settings.tower, lambda tensors: _tensors_of_encoder("text", tensors, config)
        )
        net.load_state_dict(tensors, assign=True)
    pool = "last" if words.attention == "causal" else "mean"
    tokenizer = partial(Tokenizer.from_folder, folder)
    return Backbone(settings.tower, "text", net, f"a {_TIED_MODEL_TYPE} folder", pool, tokenizer=tokenizer)


def _tensors_of_encoder(side: str, tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> dict[str, Tensor]:
    """What belongs to one net of a pair, under the names that it has there."""
    same = {name: tensors[first] for name, first in dict(config.get("same", {})).items() if first in tensors}
    start = f"{side}."
    every = {**tensors, **same}
    return {name.removeprefix(start): tensor for name, tensor in every.items() if name.startswith(start)}


def _image_backbone(
    folder: Path,
    settings: ImageTowerSettings,
    saved: ImageTransformerSettings,
    config: Mapping[str, Any],
    meta: bool,
    select: Callable[[dict[str, Tensor]], dict[str, Tensor]],
) -> Backbone:
    """``select`` picks the net's tensors out of the file's."""
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
    """The folder's weights, each with the name and shape that the settings give it."""
    path = folder / "model.safetensors"
    try:
        tensors = select(load_file(path))
    except (OSError, safetensors.SafetensorError) as error:
        raise UserError(f"tower = {tower!r}: {path} cannot be read: {error}") from None
    wanted, found = _shapes(settings), {name: tensor.shape for name, tensor in tensors.items()}
    odd = sorted(name for name in wanted | found if wanted.get(name) != found.get(name))
    if odd:
        said = " and ".join(
            f"{'absent' if shape is None else tuple(shape)} in {where}"
            for shape, where in ((found.get(odd[0]), path.name), (wanted.get(odd[0]), "the net of config.json"))
        )
        raise UserError(f"tower = {tower!r}: {folder} is damaged: {len(odd)} tensors differ; {odd[0]} is {said}")
    return {name: tensor.float() if tensor.is_floating_point() else tensor for name, tensor in tensors.items()}


def _read_config(folder: Path) -> dict[str, Any]:
    path = folder / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path} is not JSON: {error}") from None
    return config if isinstance(config, dict) else {}
