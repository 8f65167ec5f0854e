"""Parser of a LilT checkpoint as saved by the authors' code: sizes from shapes, every key mapped to our name.

Input: a ``.pth`` (the released dictionary, or a bare state dict). Output: a ``LiltCheckpoint``: two towers, two heads,
the temperature, and the rest of the file's contents. Which parameters were trained is inferred in ``lilt_flags``. Note:
the expected names are derived from our encoders, so every key is mapped or the file is refused.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from clasp.convert.importers.safe_pickle import safe_load_pickle
from clasp.models.transformer.settings import ImageTransformerSettings
from clasp.models.tuning.spec import apply_tuning
from clasp.models.zoo.folder import BertSettings, EncoderSettings, build_on_meta
from clasp.types import Modality, UserError

LILT_TOWER_PREFIXES: dict[Modality, str] = {"image": "visual_encoder.", "text": "text_encoder."}
LILT_HEAD_PREFIXES: dict[Modality, str] = {"image": "vision_proj.", "text": "text_proj."}
LILT_BLOCK_PREFIXES: dict[Modality, str] = {"image": "blocks.", "text": "encoder.layer."}
_ADAPTER_NAMES: dict[Modality, tuple[str, str]] = {  # inside a block, in the order of our adapter1 and adapter2
    "image": ("adapter1", "adapter2"),
    "text": ("attention.output.adapter", "output.adapter"),
}
_ADAPTER_PLACES: dict[Modality, str] = {"image": "input", "text": "output"}  # of a residual branch
_POSITION_IDS = "text_encoder.embeddings.position_ids"  # 0, 1, 2, …: a buffer that current versions do not save
MIN_TEMPERATURE, MAX_TEMPERATURE = 0.001, 0.5  # the temperature is clamped to this range before each use
_ATTENTION_HEAD_WIDTH = 64  # in every tower of the paper


@dataclass(frozen=True, slots=True)
class LiltTower:
    """One tower of the file."""

    modality: Modality
    settings: EncoderSettings
    """of its encoder, appended blocks included"""
    reduction: int | None
    """reduction factor of its adapters; ``None`` without adapters"""
    tensors: Mapping[str, Tensor]
    """by our names, adapters and appended blocks included"""
    original_names: Mapping[str, str]
    """our names to the authors', without the tower's prefix"""

    def base_tower(self, appended_blocks: int) -> tuple[Any, dict[str, Tensor]]:
        """Settings and tensors of the tower without its adapters and without its last ``appended_blocks`` blocks."""
        settings = self.settings.model_copy(update={"layers": self.settings.layers - appended_blocks})
        return settings, {name: self.tensors[name] for name, _ in build_on_meta(settings).named_parameters()}


@dataclass(frozen=True, slots=True)
class LiltCheckpoint:
    """The contents of a checkpoint."""

    path: Path
    towers: Mapping[Modality, LiltTower]
    heads: Mapping[Modality, Mapping[str, Tensor]]
    """``weight [E D]`` and ``bias [E]``"""
    temperature: Tensor
    """the divisor of the cosine similarities, not clamped"""
    config: Mapping[str, Any] | None
    epoch: int | None
    optimizer_tensors: int | None
    """number of tensors in the optimizer; ``None`` without one"""


def read_lilt_checkpoint(path: Path, heads: Mapping[Modality, int | None]) -> LiltCheckpoint:
    """Load a checkpoint. ``heads``, the attention heads, is needed where a tower's width is not a multiple of 64.

    Raises ``UserError`` for a file that is not a checkpoint, that ``parse_lilt_checkpoint`` refuses, or that contains
    non-finite numbers.
    """
    found = safe_load_pickle(path)
    lilt = parse_lilt_checkpoint(path, found, heads)
    if odd := [
        key
        for key, tensor in _state_dict(path, _as_released_format(path, found)).items()
        if not tensor.isfinite().all()
    ]:
        raise UserError(f"{path} is damaged: {_listed(odd)} has numbers that are not finite")
    return lilt


def parse_lilt_checkpoint(path: Path, found: Any, heads: Mapping[Modality, int | None]) -> LiltCheckpoint:
    """Parse ``found``, the contents of the file ``path``.

    Raises ``UserError`` where it is not a checkpoint and, in one line, for all unexpected or missing keys and for
    shapes that do not match the rest of the file.
    """
    found = _as_released_format(path, found)
    model = _state_dict(path, found)
    sizes: dict[Modality, EncoderSettings] = {
        "image": _image_sizes(path, model, heads["image"]),
        "text": _text_sizes(path, model, heads["text"]),
    }
    reductions = {
        modality: _reduction(path, model, modality, sizes[modality].width) for modality in LILT_TOWER_PREFIXES
    }
    names = {modality: _name_map(modality, sizes[modality], reductions[modality]) for modality in LILT_TOWER_PREFIXES}
    joint = _shape(path, model, f"{LILT_HEAD_PREFIXES['image']}weight", 2)[0]
    wanted: dict[str, tuple[int, ...]] = {"temp": ()}
    for modality, head in LILT_HEAD_PREFIXES.items():
        wanted |= {f"{head}weight": (joint, sizes[modality].width), f"{head}bias": (joint,)}
        wanted |= {f"{LILT_TOWER_PREFIXES[modality]}{theirs}": shape for theirs, shape in names[modality].values()}
    _check_keys_and_shapes(path, model, wanted)

    def side(modality: Modality) -> LiltTower:
        theirs = {ours: key for ours, (key, _) in names[modality].items()}
        tensors = {ours: model[f"{LILT_TOWER_PREFIXES[modality]}{key}"].float() for ours, key in theirs.items()}
        return LiltTower(modality, sizes[modality], reductions[modality], tensors, theirs)

    config, epoch, optimizer = (found.get(name) for name in ("config", "epoch", "optimizer"))
    groups = optimizer.get("param_groups") if isinstance(optimizer, dict) else None
    trained = [group.get("params") for group in groups if isinstance(group, dict)] if isinstance(groups, list) else []
    return LiltCheckpoint(
        path,
        {modality: side(modality) for modality in LILT_TOWER_PREFIXES},
        {
            m: {name: model[f"{head}{name}"].float() for name in ("weight", "bias")}
            for m, head in LILT_HEAD_PREFIXES.items()
        },
        model["temp"].float(),
        config if isinstance(config, dict) else None,
        epoch if isinstance(epoch, int) else None,
        sum(len(names) for names in trained if isinstance(names, list)) or None,
    )


def lilt_adapter_method(modality: Modality, reduction: int) -> str:
    """LilT's adapters as a method of a tuning spec."""
    return f"adapters(reduction={reduction}, place='{_ADAPTER_PLACES[modality]}', init='random')"


# --- the file --------------------------------------------------------------------------------------------------------


def _as_released_format(path: Path, found: Any) -> dict[str, Any]:
    """The dictionary in the file; a bare state dict is put under ``model``, as in the released format."""
    if not isinstance(found, dict):
        raise UserError(f"{path} is not a checkpoint: it holds a {type(found).__name__}, not a dictionary")
    if found and all(isinstance(value, Tensor) for value in found.values()):
        return {"model": found}
    if not found:
        raise UserError(f"{path} is not a LilT checkpoint: it is an empty dictionary")
    if "model" in found and not isinstance(found["model"], dict):
        raise UserError(f"{path} is not a LilT checkpoint: its model is a {type(found['model']).__name__}")
    if "model" not in found:
        raise UserError(f"{path} is not a LilT checkpoint: it has no model, but {_listed(map(str, found))}")
    return found


def _state_dict(path: Path, found: Mapping[str, Any]) -> dict[str, Tensor]:
    """The tensors by name, without the ``module.`` prefix of DistributedDataParallel."""
    model = {str(key): value for key, value in found["model"].items()}
    if all(key.startswith("module.") for key in model):
        model = {key.removeprefix("module."): value for key, value in model.items()}
    model.pop(_POSITION_IDS, None)
    odd = [key for key, value in model.items() if not isinstance(value, Tensor) or not value.is_floating_point()]
    if odd:
        raise UserError(f"{path} is not a LilT checkpoint: {_listed(odd)} of its model is not a tensor of real numbers")
    if not any(key.startswith(tuple(LILT_TOWER_PREFIXES.values())) for key in model):
        towers = " or ".join(LILT_TOWER_PREFIXES.values())
        raise UserError(
            f"{path} is not a LilT checkpoint: no key begins with {towers}; it has {_listed(model) or 'none'}"
        )
    return model


def _check_keys_and_shapes(path: Path, model: Mapping[str, Tensor], wanted: Mapping[str, tuple[int, ...]]) -> None:
    """Raises ``UserError`` unless the file has exactly these names and shapes."""
    unexpected = [key for key in model if key not in wanted]
    missing = [key for key in wanted if key not in model]
    shapes = {key: tuple(tensor.shape) for key, tensor in model.items() if key in wanted}
    misshapen = [f"{key} is {shape} and not {wanted[key]}" for key, shape in shapes.items() if shape != wanted[key]]
    problems = [f"unexpected keys {_listed(unexpected)}"] if unexpected else []
    problems += [f"missing keys {_listed(missing)}"] if missing else []
    problems += misshapen and [_listed(misshapen)]
    if problems:
        raise UserError(f"{path} is not a LilT checkpoint that clasp can read: {'; '.join(problems)}")


def _listed(items: Iterable[str], most: int = 6) -> str:
    items = list(items)
    more = f" and {len(items) - most} more" if len(items) > most else ""
    return ", ".join(items[:most]) + more


# --- sizes from shapes -----------------------------------------------------------------------------------------------


def _image_sizes(path: Path, model: Mapping[str, Tensor], heads: int | None) -> ImageTransformerSettings:
    tower = LILT_TOWER_PREFIXES["image"]
    width, _, patch, _ = _shape(path, model, f"{tower}patch_embed.proj.weight", 4)
    rows = _shape(path, model, f"{tower}pos_embed", 3)[1]
    grid = math.isqrt(rows)
    class_position = grid * grid != rows  # DeiT-III has none: it adds its positions before the class token
    if class_position and (not grid or grid * grid + 1 != rows):
        raise UserError(
            f"{path}: {tower}pos_embed has {rows} rows; a square of patches has {grid * grid}, or one more with the "
            "class token's"
        )
    return ImageTransformerSettings(
        size=grid * patch,
        patch=patch,
        width=width,
        layers=_layers(path, model, "image"),
        heads=_heads(path, "image", width, heads),
        hidden=_shape(path, model, f"{tower}blocks.0.mlp.fc1.weight", 2)[0],
        layer_scale=1e-4 if any(key.endswith(".gamma_1") for key in model) else None,
        class_position=class_position,
    )


def _text_sizes(path: Path, model: Mapping[str, Tensor], heads: int | None) -> BertSettings:
    tower = LILT_TOWER_PREFIXES["text"]
    vocabulary, width = _shape(path, model, f"{tower}embeddings.word_embeddings.weight", 2)
    return BertSettings(
        width=width,
        layers=_layers(path, model, "text"),
        heads=_heads(path, "text", width, heads),
        hidden=_shape(path, model, f"{tower}encoder.layer.0.intermediate.dense.weight", 2)[0],
        vocabulary=vocabulary,
        positions=_shape(path, model, f"{tower}embeddings.position_embeddings.weight", 2)[0],
    )


def _shape(path: Path, model: Mapping[str, Tensor], key: str, axes: int) -> tuple[int, ...]:
    shape = tuple(model[key].shape) if key in model else ()
    if len(shape) != axes or 0 in shape:
        problem = f"has shape {shape}" if key in model else "is missing"
        raise UserError(f"{path} is not a LilT checkpoint: sizes are read from {key}, which {problem}")
    return shape


def _layers(path: Path, model: Mapping[str, Tensor], modality: Modality) -> int:
    start = f"{LILT_TOWER_PREFIXES[modality]}{LILT_BLOCK_PREFIXES[modality]}"
    count = len({match[0] for key in model if (match := re.match(rf"{re.escape(start)}\d+\.", key))})
    if not count:
        raise UserError(f"{path} is not a LilT checkpoint: {start}0 is missing")
    return count


def _heads(path: Path, modality: Modality, width: int, given: int | None) -> int:
    if given is None and width % _ATTENTION_HEAD_WIDTH:
        raise UserError(
            f"{path}: its {modality} tower is {width} wide, and the number of attention heads does not follow from its "
            f"shapes; set {modality}_heads=N"
        )
    heads = width // _ATTENTION_HEAD_WIDTH if given is None else given
    if heads < 1 or width % heads:
        raise UserError(f"{modality}_heads={heads}: does not divide {width}, the width of the {modality} tower")
    return heads


def _reduction(path: Path, model: Mapping[str, Tensor], modality: Modality, width: int) -> int | None:
    """The reduction factor of the adapters; ``None`` where the tower has none."""
    start = LILT_TOWER_PREFIXES[modality]
    key = next((key for key in model if key.startswith(start) and key.endswith(".down_sampler.weight")), None)
    if key is None:
        return None
    hidden = _shape(path, model, key, 2)[0]
    reduction = next((number for number in range(1, width + 1) if width // number == hidden), None)
    if reduction is None:
        raise UserError(f"{path}: {key} has {hidden} rows, which does not divide the tower's width, {width}")
    return reduction


# --- names -----------------------------------------------------------------------------------------------------------


def _name_map(
    modality: Modality, sizes: EncoderSettings, reduction: int | None
) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Expected parameters of such a tower: our names to the authors' names and the shapes."""
    net = build_on_meta(sizes)
    if reduction:
        apply_tuning(net, [lilt_adapter_method(modality, reduction)], seed=0)
    return {name: (_original_name(modality, name), tuple(p.shape)) for name, p in net.named_parameters()}


def _original_name(modality: Modality, name: str) -> str:
    for number, adapter in enumerate(_ADAPTER_NAMES[modality], 1):
        name = name.replace(f".adapter{number}.down.", f".{adapter}.down_sampler.")
        name = name.replace(f".adapter{number}.up.", f".{adapter}.up_sampler.")
    return name
