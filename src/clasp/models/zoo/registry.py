"""Towers from a package, a model hub, a folder, timm or a factory of the user's; those of the LilT paper; our own nets.

In goes what a recipe says of a tower, out comes a ``Base``. With ``meta=True`` nothing is downloaded or read but a
configuration, and the shapes of the paper's towers are known here, so that parameters can be counted anywhere.
Unusual: a weight that the checkpoint lacks is an error, never a silent random tensor.
"""

from __future__ import annotations

import copy
import difflib
import importlib
import importlib.util
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

from clasp.data.images import ImageTransform
from clasp.models.backbone import Base, ImageSettings, TextSettings
from clasp.models.pooling import VisionTransformer, resize_positions
from clasp.models.zoo.folder import OWN, kind_of, open_own
from clasp.models.zoo.from_scratch import refuse_without_net, seeded_base
from clasp.models.zoo.huggingface import said_plainly, transformers_base
from clasp.models.zoo.pip_packages import PACKAGED, packaged
from clasp.types import UserError

Settings = ImageSettings | TextSettings

# image towers of the LilT paper: width, blocks, heads, start of the layer scale, and where timm keeps the weights
DEIT: dict[str, tuple[int, int, int, float | None, str]] = {
    "tiny": (192, 12, 3, None, "timm/deit_tiny_patch16_224.fb_in1k"),
    "small": (384, 12, 6, None, "timm/deit_small_patch16_224.fb_in1k"),
    "base": (768, 12, 12, None, "timm/deit_base_patch16_224.fb_in1k"),
    "large": (1024, 24, 16, 1e-4, "timm/deit3_large_patch16_224.fb_in1k"),
}
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def open_base(settings: Settings, *, meta: bool = False, seed: int = 0) -> Base:
    """The base that a recipe's ``[image]`` or ``[text]`` names; ``seed`` is what a net starts from that nobody trained.

    Raises ``UserError`` for an unknown scheme or tower, for one that cannot be reached, and for missing weights.
    """
    scheme, colon, rest = settings.tower.partition(":")
    if not colon or not scheme or not rest:
        raise UserError(f"tower = {settings.tower!r} has no scheme; write one of {', '.join(_EXAMPLES)}")
    if scheme == OWN_SCHEME:
        return seeded_base(settings, seed=seed, meta=meta)
    refuse_without_net(settings)
    if scheme in SCHEMES:
        return SCHEMES[scheme](rest, settings, meta)
    if "." in scheme or importlib.util.find_spec(scheme) is not None:
        return _factory(settings, scheme, rest, meta)
    near = difflib.get_close_matches(scheme, [*SCHEMES, OWN_SCHEME], n=1)
    hint = f"did you mean {near[0]}:{rest}? " if near else ""
    raise UserError(
        f"tower = {settings.tower!r}: {scheme!r} is neither a scheme nor a module that Python finds; {hint}"
        f"write one of {', '.join(_EXAMPLES)}"
    )


# --- the schemes -----------------------------------------------------------------------------------------------------


def _pip(name: str, settings: Settings, meta: bool) -> Base:
    size = settings.size if isinstance(settings, ImageSettings) else None
    return _checked(packaged(name, size=size, meta=meta), settings)


def _hf(name: str, settings: Settings, meta: bool) -> Base:
    return transformers_base(name, settings, meta)


def _file(path: str, settings: Settings, meta: bool) -> Base:
    folder = Path(path).expanduser()
    if not folder.is_dir():
        hint = "; {run} is the run's own folder, in the recipe.toml of a run" if "{run}" in path else ""
        raise UserError(f"tower = {settings.tower!r}: there is no folder {folder}{hint}")
    if not (folder / "config.json").is_file():
        raise UserError(
            f"tower = {settings.tower!r}: {folder} has no config.json, as transformers' save_pretrained writes it"
        )
    if kind_of(folder) in OWN:
        return open_own(folder, settings, meta)
    return transformers_base(str(folder), settings, meta)


def _deit(name: str, settings: Settings, meta: bool) -> Base:
    if name not in DEIT:
        raise UserError(f"tower = {settings.tower!r}: deit is one of {', '.join(DEIT)}")
    if not isinstance(settings, ImageSettings):
        raise UserError(f"[text] tower = {settings.tower!r} is a tower for images")
    width, blocks, heads, layer_scale, repository = DEIT[name]
    size = settings.size or 224
    if size % 16:
        raise UserError(
            f"size = {size}: {settings.tower} cuts images into 16 px patches; take {max(16, round(size / 16) * 16)}"
        )
    with torch.device("meta" if meta else "cpu"):
        net = VisionTransformer(size=size, patch=16, width=width, blocks=blocks, heads=heads, layer_scale=layer_scale)
    if not meta:
        with said_plainly(settings.tower):
            _load_deit(net, repository)
    transform = ImageTransform(size, IMAGENET_MEAN, IMAGENET_STD, crop_fraction=0.9)
    return Base(settings.tower, "image", net.eval(), repository, "cls", transform)


def _timm(name: str, settings: Settings, meta: bool) -> Base:
    """``timm:NAME`` with its hub weights, or ``timm:NAME@FILE`` with weights from a file of one's own."""
    try:
        from clasp.models.zoo.timm_models import timm_base
    except ImportError:
        raise UserError(f"tower = {settings.tower!r} needs timm; type: pip install 'clasp-vl[timm]'") from None
    except RuntimeError as error:  # torchvision, when it was built for another torch
        raise UserError(f"tower = {settings.tower!r}: timm cannot be imported ({error})") from None
    if not isinstance(settings, ImageSettings):
        raise UserError(f"[text] tower = {settings.tower!r} is a tower for images; timm has no other")
    return timm_base(name, settings, meta)


SCHEMES: dict[str, Callable[[str, Settings, bool], Base]] = {
    "hf": _hf,
    "timm": _timm,
    "pip": _pip,
    "file": _file,
    "deit": _deit,
}
OWN_SCHEME = "own"  # the one that needs a seed
_EXAMPLES = (
    "hf:facebook/dinov2-small",
    "timm:NAME",
    f"pip:{next(iter(PACKAGED))}",
    "file:FOLDER",
    "own:image",
    "package.module:factory",
)


def _load_deit(net: VisionTransformer, repository: str) -> None:
    """timm's file of DeiT and DeiT-III weights, its classifier left out and its positions resized to ours."""
    from huggingface_hub import hf_hub_download
    from safetensors.torch import load_file

    tensors = load_file(hf_hub_download(repository, "model.safetensors"))
    tensors = {name: t for name, t in tensors.items() if not name.startswith("head.")}
    tensors = {name.replace("ls1.gamma", "gamma_1").replace("ls2.gamma", "gamma_2"): t for name, t in tensors.items()}
    extra = net.pos_embed.shape[1] - (net.size // 16) ** 2
    tensors["pos_embed"] = resize_positions(tensors["pos_embed"], net.size // 16, extra)
    net.load_state_dict(tensors)


def _factory(settings: Settings, module: str, name: str, meta: bool) -> Base:
    """What ``name()`` in ``module`` gives; errors inside the user's own code stay as they are."""
    try:
        names = vars(importlib.import_module(module))
    except ModuleNotFoundError as error:
        raise UserError(f"tower = {settings.tower!r}: {error}; is its folder on PYTHONPATH?") from None
    factory = names.get(name)
    if not callable(factory):
        near = difflib.get_close_matches(name, (key for key, value in names.items() if callable(value)), n=3)
        hint = f"; nearest: {', '.join(near)}" if near else ""
        raise UserError(f"tower = {settings.tower!r}: {module} has no function {name!r}{hint}")
    base = factory()
    if not isinstance(base, Base):
        raise UserError(f"tower = {settings.tower!r}: {name}() gave a {type(base).__name__}; it must give a clasp.Base")
    _checked(base, settings)
    lacking = "transform" if isinstance(settings, ImageSettings) else "tokenizer"
    if (base.transform if isinstance(settings, ImageSettings) else base.tokenizer) is None:
        raise UserError(f"tower = {settings.tower!r}: the clasp.Base that {name}() gave has no {lacking}")
    return replace(base, net=_shapes_of(base.net)) if meta else base


def _shapes_of(net: nn.Module) -> nn.Module:
    """The net on the meta device. ``net.to("meta")`` would untie tied weights, which would then be counted twice."""
    shapes = {id(p): nn.Parameter(p.detach().to("meta"), p.requires_grad) for p in net.parameters()}
    return copy.deepcopy(net, {**shapes, **{id(b): b.to("meta") for b in net.buffers()}})


def _checked(base: Base, settings: Settings) -> Base:
    wanted = "image" if isinstance(settings, ImageSettings) else "text"
    if base.modality != wanted:
        raise UserError(f"[{wanted}] tower = {settings.tower!r} is a tower for {base.modality}s")
    return base
