"""A CLIP of open_clip as both towers: ``open_clip:NAME/TAG``, ``open_clip:NAME@FILE`` or ``open_clip:FOLDER``.

Input: a model name with a tag of its hub weights or a local file, or a folder with ``open_clip_config.json``. Output:
the half of one modality as a ``Backbone``, as ``clip:`` returns it. Note: open_clip is not imported, since its import
needs torchvision; architectures and tags are read from the files of its pip package, and its weights become those of a
``transformers.CLIPModel`` with the same output. Transformers of both modalities as in CLIP are converted; an option of
the configuration that these do not have is an error, never ignored.
"""

from __future__ import annotations

import ast
import difflib
import importlib.metadata
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from clasp.data.images import ImageTransform
from clasp.data.plugins import valid_names
from clasp.models.backbone import Backbone
from clasp.models.tower_settings import ImageTowerSettings, TextTowerSettings
from clasp.models.zoo.dual_encoders import as_half, build_dual_encoder
from clasp.models.zoo.from_scratch import load_clip_tokenizer
from clasp.models.zoo.huggingface import translate_hub_errors
from clasp.models.zoo.sentence_pooling import find_file, read_json
from clasp.types import UserError

_PACKAGE, _CONFIG_FILE = "open_clip_torch", "open_clip_config.json"
_WEIGHT_FILES = ("open_clip_model.safetensors", "open_clip_pytorch_model.bin")
# of preprocess_cfg where a configuration has none: those of OpenAI's CLIP
_MEAN, _STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
_RESIZES = {"shortest": "crop", "squash": "squash"}
_READ = {  # options of a configuration that are converted; patch_dropout drops patches in training only
    "": {"embed_dim", "vision_cfg", "text_cfg", "quick_gelu", "custom_text"},
    "vision_cfg": {"image_size", "layers", "width", "patch_size", "head_width", "mlp_ratio", "patch_dropout"},
    "text_cfg": {"context_length", "vocab_size", "width", "heads", "layers", "mlp_ratio"},
}


class _Place(NamedTuple):
    """Where a dual encoder is: its architecture and preprocessing, and its weights (``None``: in no file here)."""

    model: Mapping[str, Any]
    preprocessing: Mapping[str, Any]
    weights: Path | None


def load_open_clip_half(name: str, settings: ImageTowerSettings | TextTowerSettings, meta: bool) -> Backbone:
    """The half of the dual encoder ``name``; see ``clasp.models.zoo.registry.load_backbone``."""
    with translate_hub_errors(settings.tower):
        place = _find(name, settings.tower, meta)
        config = _transformers_config(place.model, settings.tower)
        tensors = None if meta or place.weights is None else _convert(_read_weights(place.weights), settings.tower)
        whole = build_dual_encoder(config, tensors, settings)
    context = config.text_config.max_position_embeddings
    if isinstance(settings, TextTowerSettings):
        base = Backbone(settings.tower, "text", whole.text_model.eval(), "open_clip checkpoint", "eos")
        return as_half(base, whole, lambda: load_clip_tokenizer(context))
    transform = _transform(place, settings)
    base = Backbone(settings.tower, "image", whole.vision_model.eval(), "open_clip checkpoint", "cls", transform)
    return as_half(base, whole, None)


def _transform(place: _Place, settings: ImageTowerSettings) -> ImageTransform:
    facts = place.preprocessing
    resize = facts.get("resize_mode", "shortest")
    if resize not in _RESIZES:
        raise UserError(f"tower = {settings.tower!r}: resize_mode = {resize!r} is not one of {', '.join(_RESIZES)}")
    size = settings.size or place.model["vision_cfg"].get("image_size", 224)
    interpolation = facts.get("interpolation", "bicubic")
    mean, std = tuple(facts.get("mean", _MEAN)), tuple(facts.get("std", _STD))
    return ImageTransform(size, mean, std, _RESIZES[resize], interpolation)  # type: ignore[arg-type]


# --- where it is -----------------------------------------------------------------------------------------------------


def _find(name: str, tower: str, meta: bool) -> _Place:
    if (folder := Path(os.path.expanduser(name))).is_dir():
        return _find_in_repository(str(folder), tower, meta)
    if name.startswith("hf-hub:"):  # as open_clip spells a repository
        return _find_in_repository(name.removeprefix("hf-hub:"), tower, meta)
    separator = "@" if "@" in name else "/"
    model, found, rest = name.partition(separator)
    config = _packaged_config(model, tower)
    if separator == "@":
        if not (file := Path(os.path.expanduser(rest))).is_file():
            raise UserError(f"tower = {tower!r}: there is no file {rest}")
        return _Place(config, {}, file)
    tags = _read_tags().get(model, {})
    if not found or rest not in tags:
        shown = valid_names(rest, list(tags)) if tags else "there is none"
        raise UserError(
            f"tower = {tower!r}: open_clip:{model}/TAG takes a tag of its weights on the hub ({shown}), and "
            f"open_clip:{model}@FILE a file"
        )
    return _Place(config, {}, None) if meta else _find_in_repository(tags[rest], tower, meta)


def _find_in_repository(place: str, tower: str, meta: bool) -> _Place:
    """A folder or a hub repository as open_clip's ``push_to_hf_hub`` writes it."""
    if not Path(place).is_dir():
        from huggingface_hub import hf_hub_download

        hf_hub_download(place, _CONFIG_FILE)  # raises where there is no hub, no repository or no such file
    config = read_json(place, _CONFIG_FILE)
    if config is None or "model_cfg" not in config:
        raise UserError(f"tower = {tower!r}: {place} has no {_CONFIG_FILE} with model_cfg, as open_clip writes it")
    weights = None if meta else next((found for file in _WEIGHT_FILES if (found := find_file(place, file))), None)
    if weights is None and not meta:
        raise UserError(f"tower = {tower!r}: {place} has neither {' nor '.join(_WEIGHT_FILES)}")
    return _Place(config["model_cfg"], config.get("preprocess_cfg", {}), None if weights is None else Path(weights))


def _package_file(path: str) -> Path:
    try:
        return Path(str(importlib.metadata.distribution(_PACKAGE).locate_file(f"open_clip/{path}")))
    except importlib.metadata.PackageNotFoundError:
        raise UserError(
            f"open_clip: needs the package {_PACKAGE}, which is not installed: pip install --no-deps {_PACKAGE}"
        ) from None


def _packaged_config(name: str, tower: str) -> dict[str, Any]:
    folder = _package_file("model_configs")
    known = sorted(path.stem for path in folder.glob("*.json"))
    if name not in known:
        near = difflib.get_close_matches(name, known, n=3, cutoff=0.4)
        raise UserError(f"tower = {tower!r}: open_clip has no model {name!r}; nearest: {', '.join(near) or 'none'}")
    return json.loads((folder / f"{name}.json").read_text(encoding="utf-8"))


def _read_tags() -> dict[str, dict[str, str]]:
    """Hub repositories by model name and tag, read from open_clip's ``pretrained.py`` without running it."""
    source = ast.parse(_package_file("pretrained.py").read_text(encoding="utf-8"))
    assigned = {
        node.targets[0].id: node.value
        for node in source.body
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name)
    }
    models = assigned["_PRETRAINED"]
    assert isinstance(models, ast.Dict), "this release of open_clip has another table of weights"
    found: dict[str, dict[str, str]] = {}
    for key, value in zip(models.keys, models.values, strict=True):
        table = assigned[value.id] if isinstance(value, ast.Name) else value
        assert isinstance(key, ast.Constant)
        found[str(key.value)] = dict(_hub_repositories(table)) if isinstance(table, ast.Call) else {}
    return found


def _hub_repositories(table: ast.Call) -> Iterator[tuple[str, str]]:
    for tag in table.keywords:
        options = tag.value.keywords if isinstance(tag.value, ast.Call) else []
        for option in options:
            if option.arg == "hf_hub" and isinstance(option.value, ast.Constant) and tag.arg:
                yield tag.arg, str(option.value.value).rstrip("/")


# --- what it is ------------------------------------------------------------------------------------------------------


def _transformers_config(model: Mapping[str, Any], tower: str) -> Any:
    """The configuration of the ``CLIPModel`` with the same output. Raises ``UserError`` naming an option it lacks."""
    from transformers import CLIPConfig

    image, text = model["vision_cfg"], model["text_cfg"]
    for section, facts in (("vision_cfg", image), ("text_cfg", text), ("", model)):
        odd = next((key for key, value in facts.items() if value and key not in _READ[section]), None)
        if odd is not None:
            raise UserError(
                f"tower = {tower!r}: its configuration has {section}{'.' if section else ''}{odd} = "
                f"{str(facts[odd])[:40]}, which CLIP's transformers do not have; clip:NAME opens the checkpoints that "
                "transformers has too, such as SigLIP's"
            )
    if not isinstance(image["layers"], int):
        raise UserError(f"tower = {tower!r} has a ResNet for images; open_clip: opens transformers")
    activation = "quick_gelu" if model.get("quick_gelu") else "gelu"
    return CLIPConfig(
        projection_dim=model["embed_dim"],
        vision_config={
            **_sizes(image, image["width"] // image.get("head_width", 64), activation),
            "image_size": image.get("image_size", 224),
            "patch_size": image["patch_size"],
        },
        text_config={
            **_sizes(text, text.get("heads", 8), activation),
            "vocab_size": text.get("vocab_size", 49_408),
            "max_position_embeddings": text.get("context_length", 77),
            "pad_token_id": 0,
            "bos_token_id": text.get("vocab_size", 49_408) - 2,
            "eos_token_id": text.get("vocab_size", 49_408) - 1,
        },
    )


def _sizes(facts: Mapping[str, Any], heads: int, activation: str) -> dict[str, Any]:
    return {
        "hidden_size": facts["width"],
        "num_hidden_layers": facts["layers"],
        "num_attention_heads": heads,
        "intermediate_size": int(facts["width"] * facts.get("mlp_ratio", 4.0)),
        "hidden_act": activation,
    }


# --- weights ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Rename:
    """A prefix of names in open_clip and in ``CLIPModel``."""

    theirs: str
    ours: str


_IGNORED = ("attn_mask", "input_resolution", "context_length", "vocab_size")  # buffers of older checkpoints
_WHOLE_NAMES = {
    "visual.class_embedding": "vision_model.embeddings.class_embedding",
    "visual.positional_embedding": "vision_model.embeddings.position_embedding.weight",
    "visual.conv1.weight": "vision_model.embeddings.patch_embedding.weight",
    "visual.proj": "visual_projection.weight",
    "token_embedding.weight": "text_model.embeddings.token_embedding.weight",
    "positional_embedding": "text_model.embeddings.position_embedding.weight",
    "text_projection": "text_projection.weight",
    "logit_scale": "logit_scale",
}
_PREFIXES = (
    _Rename("visual.ln_pre.", "vision_model.pre_layrnorm."),
    _Rename("visual.ln_post.", "vision_model.post_layernorm."),
    _Rename("visual.transformer.resblocks.", "vision_model.encoder.layers."),
    _Rename("transformer.resblocks.", "text_model.encoder.layers."),
    _Rename("ln_final.", "text_model.final_layer_norm."),
)
_IN_BLOCKS = {"ln_1": "layer_norm1", "ln_2": "layer_norm2", "mlp.c_fc": "mlp.fc1", "mlp.c_proj": "mlp.fc2"}
_IN_BLOCKS |= {"attn.out_proj": "self_attn.out_proj"}
_TRANSPOSED = ("visual.proj", "text_projection")


def _read_weights(path: Path) -> dict[str, Tensor]:
    """The state dict of a checkpoint of weights or of a training run, without the prefixes of DDP and ``compile``."""
    if path.suffix == ".safetensors":
        from safetensors.torch import load_file

        found: Any = load_file(path)
    else:
        found = torch.load(path, map_location="cpu", weights_only=True)
    found = found.get("state_dict", found)
    return {name.removeprefix("module.").removeprefix("_orig_mod."): tensor for name, tensor in found.items()}


def _convert(tensors: Mapping[str, Tensor], tower: str) -> dict[str, Tensor]:
    """Tensors under the names of ``CLIPModel``, in float32. Raises ``UserError`` for a name without one there."""
    found: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        plain = name.removeprefix("text.")  # of custom_text
        if plain in _IGNORED:
            continue
        parts = _rename(plain, tensor)
        if not parts:
            raise UserError(f"tower = {tower!r}: its weights have {name}, which CLIP's transformers do not have")
        found.update({part: value.float().contiguous() for part, value in parts.items()})
    return found


def _rename(name: str, tensor: Tensor) -> dict[str, Tensor]:
    """One tensor under its name in ``CLIPModel``, or the three that a packed projection holds; empty where unknown."""
    if name in _WHOLE_NAMES:
        return {_WHOLE_NAMES[name]: tensor.T if name in _TRANSPOSED else tensor}
    prefix = next((prefix for prefix in _PREFIXES if name.startswith(prefix.theirs)), None)
    if prefix is None:
        return {}
    rest = name.removeprefix(prefix.theirs)
    if ".resblocks." not in f".{prefix.theirs}":
        return {f"{prefix.ours}{rest}": tensor}
    number, _, part = rest.partition(".")
    if part.startswith("attn.in_proj_"):
        leaf = part.removeprefix("attn.in_proj_")
        paths = (f"{prefix.ours}{number}.self_attn.{each}_proj.{leaf}" for each in "qkv")
        return dict(zip(paths, tensor.chunk(3), strict=True))
    module, _, leaf = part.rpartition(".")
    return {f"{prefix.ours}{number}.{_IN_BLOCKS[module]}.{leaf}": tensor} if module in _IN_BLOCKS else {}
