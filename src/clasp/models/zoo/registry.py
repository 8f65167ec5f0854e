"""Tower sources: the Hugging Face hub, open_clip, pip packages, folders, timm, factories, LilT's towers, native nets.

Input: ``[image]`` or ``[text]`` of a recipe. Output: a ``Backbone``. With ``meta=True`` nothing but a configuration is
downloaded or read, and the shapes of LilT's towers are built in, so that parameters can be counted offline.
``TOWER_SOURCES`` has a row for each scheme. Note: a weight missing from the checkpoint is an error, never silently
initialised at random.
"""

from __future__ import annotations

import copy
import difflib
import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import nn

from clasp.data.images import IMAGENET_MEAN, IMAGENET_STD, ImageTransform
from clasp.data.plugins import import_named, is_module
from clasp.models.backbone import Backbone
from clasp.models.tower_settings import ImageTowerSettings, TextTowerSettings
from clasp.models.transformer.deit import VisionTransformer, resize_pos_embed
from clasp.models.zoo.dual_encoders import load_dual_encoder_half
from clasp.models.zoo.folder import NATIVE_LOADERS, load_native_backbone, read_model_type
from clasp.models.zoo.from_scratch import create_backbone_from_scratch, refuse_net_settings
from clasp.models.zoo.huggingface import load_transformers_backbone, translate_hub_errors
from clasp.models.zoo.open_clip_checkpoints import load_open_clip_half
from clasp.models.zoo.pip_packages import PIP_TOWERS, load_pip_backbone
from clasp.types import UserError

_TowerSettings = ImageTowerSettings | TextTowerSettings

# image towers of the LilT paper: width, blocks, heads, initial layer scale, and the hub repository of timm's weights
DEIT_VARIANTS: dict[str, tuple[int, int, int, float | None, str]] = {
    "tiny": (192, 12, 3, None, "timm/deit_tiny_patch16_224.fb_in1k"),
    "small": (384, 12, 6, None, "timm/deit_small_patch16_224.fb_in1k"),
    "base": (768, 12, 12, None, "timm/deit_base_patch16_224.fb_in1k"),
    "large": (1024, 24, 16, 1e-4, "timm/deit3_large_patch16_224.fb_in1k"),
}


@dataclass(frozen=True, slots=True)
class LoadOptions:
    """How to load: shapes only (``meta``), and the ``seed`` of a randomly initialised net."""

    meta: bool
    seed: int


@dataclass(frozen=True, slots=True)
class TowerSource:
    """A row of ``TOWER_SOURCES``: the loader of ``SCHEME:REST``, called with ``REST``, and an example for errors.

    ``reads_net_settings``: whether ``[image.net]`` and ``[text.net]`` apply; elsewhere they are an error.
    """

    load: Callable[[str, _TowerSettings, LoadOptions], Backbone]
    example: str
    reads_net_settings: bool = False


def load_backbone(settings: _TowerSettings, *, meta: bool = False, seed: int = 0) -> Backbone:
    """Load the backbone of ``[image]`` or ``[text]``; ``seed`` initialises a net without pre-trained weights.

    Raises ``UserError`` for an unknown scheme or tower, for one that cannot be loaded, and for missing weights.
    """
    scheme, colon, rest = settings.tower.partition(":")
    if not colon or not scheme or not rest:
        raise UserError(f"tower = {settings.tower!r} has no scheme; write one of {_examples()}")
    source = TOWER_SOURCES.get(scheme)
    if source is None or not source.reads_net_settings:
        refuse_net_settings(settings)
    if source is not None:
        return source.load(rest, settings, LoadOptions(meta, seed))
    if "." in scheme or is_module(scheme):
        return _load_from_factory(settings, meta)
    near = difflib.get_close_matches(scheme, TOWER_SOURCES, n=1)
    hint = f"did you mean {near[0]}:{rest}? " if near else ""
    raise UserError(
        f"tower = {settings.tower!r}: {scheme!r} is neither a scheme nor a module that Python finds; {hint}"
        f"write one of {_examples()}"
    )


def _examples() -> str:
    return ", ".join((*(f"{scheme}:{row.example}" for scheme, row in TOWER_SOURCES.items()), "package.module:factory"))


# --- the schemes -----------------------------------------------------------------------------------------------------


def _load_pip(name: str, settings: _TowerSettings, options: LoadOptions) -> Backbone:
    size = settings.size if isinstance(settings, ImageTowerSettings) else None
    return _check_modality(load_pip_backbone(name, size=size, meta=options.meta), settings)


def _load_huggingface(name: str, settings: _TowerSettings, options: LoadOptions) -> Backbone:
    return load_transformers_backbone(name, settings, options.meta)


def _load_dual_encoder(name: str, settings: _TowerSettings, options: LoadOptions) -> Backbone:
    return load_dual_encoder_half(name, settings, options.meta)


def _load_open_clip(name: str, settings: _TowerSettings, options: LoadOptions) -> Backbone:
    return load_open_clip_half(name, settings, options.meta)


def _create_from_scratch(name: str, settings: _TowerSettings, options: LoadOptions) -> Backbone:
    return create_backbone_from_scratch(settings, seed=options.seed, meta=options.meta)


def _load_folder(path: str, settings: _TowerSettings, options: LoadOptions) -> Backbone:
    folder = Path(os.path.expanduser(path))
    if not folder.is_dir():
        hint = "; {run} is the run's own folder, in the recipe.toml of a run" if "{run}" in path else ""
        raise UserError(f"tower = {settings.tower!r}: there is no folder {folder}{hint}")
    if not (folder / "config.json").is_file():
        raise UserError(
            f"tower = {settings.tower!r}: {folder} has no config.json, as transformers' save_pretrained writes it"
        )
    if read_model_type(folder) in NATIVE_LOADERS:
        return load_native_backbone(folder, settings, options.meta)
    return load_transformers_backbone(str(folder), settings, options.meta)


def _load_deit_backbone(name: str, settings: _TowerSettings, options: LoadOptions) -> Backbone:
    if name not in DEIT_VARIANTS:
        raise UserError(f"tower = {settings.tower!r}: deit is one of {', '.join(DEIT_VARIANTS)}")
    if not isinstance(settings, ImageTowerSettings):
        raise UserError(f"[text] tower = {settings.tower!r} is a tower for images")
    width, blocks, heads, layer_scale, repository = DEIT_VARIANTS[name]
    size = settings.size or 224
    if size % 16:
        raise UserError(
            f"size = {size}: {settings.tower} cuts images into 16 px patches; take {max(16, round(size / 16) * 16)}"
        )
    with torch.device("meta" if options.meta else "cpu"):
        net = VisionTransformer(size=size, patch=16, width=width, blocks=blocks, heads=heads, layer_scale=layer_scale)
    if not options.meta:
        with translate_hub_errors(settings.tower):
            _load_deit_weights(net, repository)
    transform = ImageTransform(size, IMAGENET_MEAN, IMAGENET_STD, crop_fraction=0.9)
    return Backbone(settings.tower, "image", net.eval(), repository, "cls", transform)


def _load_timm(name: str, settings: _TowerSettings, options: LoadOptions) -> Backbone:
    """``timm:NAME`` with its hub weights, or ``timm:NAME@FILE`` with weights from a local file."""
    try:
        from clasp.models.zoo.timm_models import load_timm_backbone
    except ImportError:
        raise UserError(f"tower = {settings.tower!r} needs timm; type: pip install 'clasp-vl[timm]'") from None
    except RuntimeError as error:  # torchvision, when it was built for another torch
        raise UserError(f"tower = {settings.tower!r}: timm cannot be imported ({error})") from None
    if not isinstance(settings, ImageTowerSettings):
        raise UserError(f"[text] tower = {settings.tower!r} is a tower for images; timm has no other")
    return load_timm_backbone(name, settings, options.meta)


TOWER_SOURCES: dict[str, TowerSource] = {
    "hf": TowerSource(_load_huggingface, "facebook/dinov2-small"),
    "clip": TowerSource(_load_dual_encoder, "openai/clip-vit-base-patch32"),
    "open_clip": TowerSource(_load_open_clip, "ViT-B-32/laion2b_s34b_b79k"),
    "timm": TowerSource(_load_timm, "NAME"),
    "pip": TowerSource(_load_pip, next(iter(PIP_TOWERS))),
    "file": TowerSource(_load_folder, "FOLDER"),
    "deit": TowerSource(_load_deit_backbone, next(iter(DEIT_VARIANTS))),
    "own": TowerSource(_create_from_scratch, "image", reads_net_settings=True),
}


def _load_deit_weights(net: VisionTransformer, repository: str) -> None:
    """Load timm's DeiT or DeiT-III weights without the classifier; position embeddings are resized to the net's."""
    from huggingface_hub import hf_hub_download
    from safetensors.torch import load_file

    tensors = load_file(hf_hub_download(repository, "model.safetensors"))
    tensors = {name: t for name, t in tensors.items() if not name.startswith("head.")}
    tensors = {name.replace("ls1.gamma", "gamma_1").replace("ls2.gamma", "gamma_2"): t for name, t in tensors.items()}
    extra = net.pos_embed.shape[1] - (net.size // 16) ** 2
    tensors["pos_embed"] = resize_pos_embed(tensors["pos_embed"], net.size // 16, extra)
    net.load_state_dict(tensors)


def _load_from_factory(settings: _TowerSettings, meta: bool) -> Backbone:
    """The backbone that ``package.module:factory`` returns; errors inside the user's code are not translated."""
    factory, name = import_named(settings.tower, "tower"), settings.tower.partition(":")[2]
    backbone = factory()
    if not isinstance(backbone, Backbone):
        raise UserError(
            f"tower = {settings.tower!r}: {name}() gave a {type(backbone).__name__}; it must give a clasp.Backbone"
        )
    _check_modality(backbone, settings)
    lacking = "transform" if isinstance(settings, ImageTowerSettings) else "tokenizer"
    if (backbone.transform if isinstance(settings, ImageTowerSettings) else backbone.tokenizer) is None:
        raise UserError(f"tower = {settings.tower!r}: the clasp.Backbone that {name}() gave has no {lacking}")
    return replace(backbone, net=_to_meta(backbone.net)) if meta else backbone


def _to_meta(net: nn.Module) -> nn.Module:
    """The net on the meta device. ``net.to("meta")`` would untie tied weights, which would then be counted twice."""
    shapes = {id(p): nn.Parameter(p.detach().to("meta"), p.requires_grad) for p in net.parameters()}
    return copy.deepcopy(net, {**shapes, **{id(b): b.to("meta") for b in net.buffers()}})


def _check_modality(backbone: Backbone, settings: _TowerSettings) -> Backbone:
    wanted = "image" if isinstance(settings, ImageTowerSettings) else "text"
    if backbone.modality != wanted:
        raise UserError(f"[{wanted}] tower = {settings.tower!r} is a tower for {backbone.modality}s")
    return backbone
