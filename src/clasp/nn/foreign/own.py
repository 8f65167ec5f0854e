"""Towers as folders, so that the weights in a paper's file can stand behind ``file:FOLDER`` like any others.

In go settings and tensors, out comes a folder: a BERT as ``transformers`` reads it, or a net of ``nn.nets``, which has
a ``config.json`` of ours (``model_type`` is a key of ``OWN``; settings, transform) and is opened here, as a ``Base``.
Unusual: a folder keeps the position table it was given; a tower asked for at another image size gets it resized.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import safetensors
import tokenizers
import torch
from pydantic import BaseModel, ConfigDict, PositiveInt
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from clasp.data.images import ImageTransform
from clasp.data.text import Tokenizer
from clasp.nn.base import Base, ImageSettings, TextSettings
from clasp.nn.layers import resize_positions
from clasp.nn.nets import ImageTransformer, ImageTransformerSettings
from clasp.types import UserError

IMAGE_NET = "clasp_image"
TOKEN_TYPES = "embeddings.token_type_embeddings.weight"


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


Settings = ImageTransformerSettings | BertSettings


def shapes_of(settings: Settings) -> nn.Module:
    """The net of these settings, on the meta device; a BERT without token types."""
    with torch.device("meta"):
        if isinstance(settings, ImageTransformerSettings):
            return ImageTransformer(settings).eval()
        from transformers import BertModel

        net = BertModel(settings.config(), add_pooling_layer=False).eval()
    net.get_submodule("embeddings").register_module("token_type_embeddings", None)
    return net


def save_image_net(
    settings: ImageTransformerSettings, tensors: Mapping[str, Tensor], transform: ImageTransform, folder: Path
) -> None:
    """Write an ``ImageTransformer`` of these tensors, which are all that it has, under its names."""
    _save_tensors(settings, tensors, folder)
    config = {"model_type": IMAGE_NET, "net": settings.model_dump(mode="json"), "transform": transform.to_dict()}
    (folder / "config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")


def save_bert(settings: BertSettings, tensors: Mapping[str, Tensor], tokenizer: Tokenizer, folder: Path) -> int:
    """Write a BERT of these tensors as ``transformers`` reads it; returns how many ids its tokenizer has.

    Its token types are zeros, which add nothing. Raises ``UserError`` for a tokenizer with an id beyond the table.
    """
    tokenizer.save(folder)
    backend = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    ids = set(backend.get_vocab(with_added_tokens=True).values())
    if max(ids) >= settings.vocabulary:
        raise UserError(
            f"the tokenizer has ids up to {max(ids):,}, and the word embedding has {settings.vocabulary:,} rows: it is "
            "another tower's"
        )
    _save_tensors(settings, tensors, folder, {TOKEN_TYPES: torch.zeros(2, settings.width)})
    said = {"tokenizer_class": "PreTrainedTokenizerFast", "pad_token": backend.id_to_token(tokenizer.pad_id)}
    (folder / "tokenizer_config.json").write_text(json.dumps(said, indent=2), encoding="utf-8")
    settings.config(tokenizer.pad_id).save_pretrained(folder)
    return len(ids)


def _save_tensors(
    settings: Settings, tensors: Mapping[str, Tensor], folder: Path, more: Mapping[str, Tensor] = {}
) -> None:
    assert {name: t.shape for name, t in tensors.items()} == _shapes(settings)
    folder.mkdir(parents=True, exist_ok=True)
    written = {name: tensor.contiguous() for name, tensor in {**tensors, **more}.items()}
    save_file(written, folder / "model.safetensors", {"format": "pt"})


def _shapes(settings: Settings) -> dict[str, torch.Size]:
    return {name: parameter.shape for name, parameter in shapes_of(settings).named_parameters()}


def kind_of(folder: Path) -> str:
    """The ``model_type`` that a folder's ``config.json`` names; empty where it names none."""
    try:
        return str(_config(folder).get("model_type", ""))
    except UserError:
        return ""  # whoever opens the folder says what is wrong with it


def open_own(folder: Path, settings: ImageSettings | TextSettings, meta: bool) -> Base:
    """The tower in a folder whose ``kind_of`` is a key of ``OWN``. Raises ``UserError`` for what does not fit."""
    return OWN[kind_of(folder)](folder, settings, meta)


def _open_image_net(folder: Path, settings: ImageSettings | TextSettings, meta: bool) -> Base:
    if not isinstance(settings, ImageSettings):
        raise UserError(f"[text] tower = {settings.tower!r} is a tower for images")
    config = _config(folder)
    try:
        transform = ImageTransform.from_dict(config["transform"])
        saved = ImageTransformerSettings.model_validate(config["net"])
    except (KeyError, AttributeError, TypeError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"tower = {settings.tower!r}: {folder / 'config.json'} is damaged: {reason}") from None
    size, patch = settings.size or saved.size, saved.patch
    if size % patch:
        near = max(patch, round(size / patch) * patch)
        raise UserError(f"size = {size}: {settings.tower} cuts images into {patch} px patches; take {near}")
    net = shapes_of(saved.model_copy(update={"size": size}))
    if not meta:
        tensors = _tensors(folder, saved, settings.tower)
        tensors["pos_embed"] = resize_positions(tensors["pos_embed"], size // patch, int(saved.class_position))
        net.load_state_dict(tensors, assign=True)
    return Base(settings.tower, "image", net, f"a {IMAGE_NET} folder", "cls", replace(transform, size=size))


OWN: dict[str, Callable[[Path, ImageSettings | TextSettings, bool], Base]] = {IMAGE_NET: _open_image_net}


def _tensors(folder: Path, settings: Settings, tower: str) -> dict[str, Tensor]:
    """The folder's weights, each with the name and shape that the settings give it."""
    path = folder / "model.safetensors"
    try:
        tensors = load_file(path)
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
    return {name: tensor.float() for name, tensor in tensors.items()}


def _config(folder: Path) -> dict[str, Any]:
    path = folder / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path} is not JSON: {error}") from None
    return config if isinstance(config, dict) else {}
