"""Imports a checkpoint of LilT (Khan & Fu, ICLR 2023) as a run, with the paper's recipe.

Input: the ``.pth`` that the authors' code saves, or its state dict alone. Output: two base towers in the run, the delta
on top of them, and the recipe, as far as the file determines it; what had to be assumed is reported.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from clasp.config.recipe import read_recipe
from clasp.config.recipe_files import builtin_recipes
from clasp.convert.importers.lilt_checkpoint import (
    MAX_TEMPERATURE,
    MIN_TEMPERATURE,
    LiltCheckpoint,
    Modality,
    read_lilt_checkpoint,
)
from clasp.convert.importers.lilt_flags import LiltTuning, explain_lilt_tuning, infer_lilt_tuning, lilt_flags
from clasp.convert.importers.run_writer import ImportOptions, ImportReport, load_matching_tokenizer, write_run
from clasp.data.images import ImageTransform
from clasp.models.transformer.deit import resize_pos_embed
from clasp.models.transformer.settings import ImageTransformerSettings
from clasp.models.zoo.folder import BertSettings, save_bert, save_image_encoder
from clasp.training.run_folder import RUN_PLACEHOLDER, RunFolder
from clasp.types import UserError

_RECIPE = "lilt/base"
_Tunings = Mapping[Modality, LiltTuning]


def import_lilt(checkpoint: Path, run: RunFolder, options: ImportOptions) -> ImportReport:
    """Write the run. Raises ``UserError`` for a file that is not a LilT checkpoint, or needs more options."""
    if options.lateral_layers:
        raise UserError("lateral= is for MS-CLIP's parallel branch; LilT's towers have none")
    lilt = read_lilt_checkpoint(checkpoint, {"image": options.image_heads, "text": options.text_heads})
    image, text = lilt.towers["image"].settings, lilt.towers["text"].settings
    assert isinstance(image, ImageTransformerSettings) and isinstance(text, BertSettings)
    size = _size(image, options.size)
    tunings: _Tunings = {modality: infer_lilt_tuning(lilt, modality) for modality in lilt.towers}
    recipe = _recipe(lilt, tunings, size, text.positions)
    tokenizer_name, tokenizer = load_matching_tokenizer(text.vocabulary, options.tokenizer)
    bases = {modality: side.base_tower(tunings[modality].appended_blocks) for modality, side in lilt.towers.items()}
    ids = save_bert(*bases["text"], tokenizer, run.path / "towers" / "text")
    transform = ImageTransform(image.size, tuple(recipe["image"]["mean"]), tuple(recipe["image"]["std"]), "squash")
    save_image_encoder(*bases["image"], transform, run.path / "towers" / "image")
    model, delta_bytes = write_run(run, recipe, _tensors(lilt, size))
    lines = [
        f"{checkpoint.name}: LilT{'' if lilt.epoch is None else f', epoch {lilt.epoch}'}",
        f"image tower: layers {image.layers}, width {image.width}, heads {image.heads}, {size} px in patches of "
        f"{image.patch}{', layer scale' if image.layer_scale else ''}",
        f"text tower: layers {text.layers}, width {text.width}, heads {text.heads}, {text.vocabulary:,} tokens, "
        f"{text.positions} positions; tokenizer {tokenizer_name}",
        f"joint space: width {recipe['head']['width']}",
        *_describe_tuning(lilt, tunings),
    ]
    if ids < text.vocabulary:
        lines.append(
            f"{tokenizer_name} has {ids:,} tokens, but the tower {text.vocabulary:,}: is it the right tokenizer?"
        )
    if not MIN_TEMPERATURE <= (temperature := float(lilt.temperature)) <= MAX_TEMPERATURE:
        lines.append(
            f"the temperature {temperature:.4g} is clamped to [{MIN_TEMPERATURE}, {MAX_TEMPERATURE}], "
            "as before each of its uses"
        )
    facts = {"epoch": lilt.epoch, "temperature": temperature, "config": lilt.config}
    return ImportReport(lines, facts, model.parameter_counts(), delta_bytes)


def _size(image: ImageTransformerSettings, wanted: int | None) -> int:
    size = image.size if wanted is None else wanted
    if size < image.patch or size % image.patch:
        near = max(image.patch, round(size / image.patch) * image.patch)
        raise UserError(f"size={size}: the tower cuts images into patches of {image.patch} px; take {near}")
    return size


def _recipe(lilt: LiltCheckpoint, tunings: _Tunings, size: int, positions: int) -> dict[str, Any]:
    """The paper's recipe on the towers of this file, with the inferred tuning."""
    recipe = read_recipe(_RECIPE).to_dict()
    recipe["image"] |= {"tower": f"file:{RUN_PLACEHOLDER}/towers/image", "size": size}
    recipe["text"] |= {"tower": f"file:{RUN_PLACEHOLDER}/towers/text"}
    recipe["text"]["max_tokens"] = min(recipe["text"]["max_tokens"], positions)
    recipe["tune"] |= {modality: each.methods for modality, each in tunings.items()}
    recipe["head"]["width"] = len(lilt.heads["image"]["bias"])
    return recipe


def _tensors(lilt: LiltCheckpoint, size: int) -> dict[str, Tensor]:
    """Every parameter of the model by name; positions interpolated (bicubic) to images of ``size`` pixels."""
    tensors = {"temperature": lilt.temperature.clamp(MIN_TEMPERATURE, MAX_TEMPERATURE)}
    for modality, side in lilt.towers.items():
        tensors |= {f"{modality}.net.{name}": tensor for name, tensor in side.tensors.items()}
        tensors |= {f"{modality}_head.map.{name}": tensor for name, tensor in lilt.heads[modality].items()}
    image = lilt.towers["image"].settings
    assert isinstance(image, ImageTransformerSettings)
    table = tensors["image.net.pos_embed"]
    tensors["image.net.pos_embed"] = resize_pos_embed(table, size // image.patch, int(image.class_position))
    return tensors


def _describe_tuning(lilt: LiltCheckpoint, tunings: _Tunings) -> list[str]:
    """The matching built-in recipe, the tuning of each tower, and notes on how they were inferred."""
    methods = {modality: set(each.methods) for modality, each in tunings.items()}
    names = sorted((name for name in builtin_recipes() if name.startswith("lilt/")), key=len)
    tunes = {name: read_recipe(name).tune for name in names}
    match = next((n for n in names if {"image": set(tunes[n].image), "text": set(tunes[n].text)} == methods), None)
    source = "keys" if lilt_flags(lilt) is None else "config"
    return [
        f"recipe, by its {source}: {match or 'none of the built-in ones'}",
        *(f"trains in the {modality} tower: {', '.join(each.methods)}" for modality, each in tunings.items()),
        *(note for each in tunings.values() for note in each.notes),
        *explain_lilt_tuning(lilt, sum(len(each.trained) for each in tunings.values())),
    ]
