"""Imports a checkpoint of MS-CLIP (You et al., ECCV 2022) as a run, with the paper's recipe.

Input: the released state dict, of any sharing variant. Output: both encoders in one folder of the run, shared
parameters stored once, and a delta with the two heads and the logit scale. Note: the encoders are imported frozen, so
only the heads and the logit scale are trainable; overriding ``[tune]`` makes a new run that trains more.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor

from clasp.config.recipe import read_recipe
from clasp.convert.importers.msclip_checkpoint import MSCLIP_LATERAL_LAYERS, MSCLIPCheckpoint, parse_msclip_state_dict
from clasp.convert.importers.run_writer import ImportOptions, ImportReport, load_matching_tokenizer, write_run
from clasp.convert.importers.safe_pickle import safe_load_pickle
from clasp.data.bpe import CLIP_VOCAB_SIZE
from clasp.data.images import IMAGENET_MEAN, IMAGENET_STD, ImageTransform
from clasp.data.tokenizer import Tokenizer
from clasp.models.sharing.policy import SharingSettings
from clasp.models.zoo.folder import save_tied_encoders
from clasp.models.zoo.from_scratch import load_clip_tokenizer
from clasp.training.run_folder import RUN_PLACEHOLDER, RunFolder
from clasp.types import UserError

_RECIPE = "msclip/msclip-b32"
_DEFAULT_SIZE = 224


def import_msclip(checkpoint: Path, run: RunFolder, options: ImportOptions) -> ImportReport:
    """Write the run. Raises ``UserError`` for a file that is not an MS-CLIP state dict, or needs more options."""
    tensors = _state_dict(checkpoint)
    if options.text_heads not in (None, options.image_heads):
        raise UserError(f"text_heads={options.text_heads}: both nets of MS-CLIP have those of image_heads=")
    try:
        model = parse_msclip_state_dict(
            tensors,
            heads=options.image_heads,
            lateral_layers=options.lateral_layers or MSCLIP_LATERAL_LAYERS,
            size=options.size or _DEFAULT_SIZE,
        )
    except UserError as error:
        raise UserError(f"{checkpoint}: {error}") from None
    image, text = model.encoders.image.settings, model.encoders.text.settings
    if options.lateral_layers and image.branch is None:
        raise UserError(f"lateral={_listed(options.lateral_layers)}: {checkpoint} has no parallel branch")
    if options.size not in (None, image.size):
        raise UserError(f"size={options.size}: this model was trained on {image.size} px")
    tokenizer_name, tokenizer = _tokenizer(text.vocabulary, options.tokenizer)
    tokenizer = tokenizer.with_settings(max_tokens=text.context)
    transform = ImageTransform(image.size, IMAGENET_MEAN, IMAGENET_STD)
    ids = save_tied_encoders(model.encoders, transform, tokenizer, run.path / "towers")
    encoder, delta_bytes = write_run(run, _recipe(model, options), _tensors(model))
    branch = "" if image.branch is None else f", a parallel branch before layers {_listed(image.branch.before)}"
    lines = [
        f"{checkpoint.name}: MS-CLIP, {len(tensors)} names",
        f"image net: layers {image.layers}, width {image.width}, heads {image.heads}, {image.size} px in patches of "
        f"{image.patch}{', a stem in place of layer 0' if image.stem else ''}{branch}",
        f"text net: layers {text.layers}, width {text.width}, heads {text.heads}, {text.vocabulary:,} tokens, "
        f"{text.context} positions; tokenizer {tokenizer_name}",
        f"joint space: width {len(model.image_head)}",
        *_describe_sharing(model.encoders.policy),
        f"captions of more than {text.context} tokens "
        + (
            "keep their end token"
            if options.truncation == "keep_eos"
            else "have one embedding, as in the released code"
        ),
    ]
    if ids < text.vocabulary:
        lines.append(
            f"{tokenizer_name} has {ids:,} tokens, but the net {text.vocabulary:,}: is it the right tokenizer?"
        )
    return ImportReport(lines, {"log_scale": float(model.log_scale)}, encoder.parameter_counts(), delta_bytes)


def _state_dict(checkpoint: Path) -> dict[str, Tensor]:
    """The tensors in a file by name, without the ``module.`` prefix of DistributedDataParallel."""
    found = safe_load_pickle(checkpoint)
    if not isinstance(found, dict) or not all(isinstance(tensor, Tensor) for tensor in found.values()):
        contents = f"it has {', '.join(map(str, list(found)[:4]))}" if isinstance(found, dict) else "it has a list"
        hint = "; is it LilT's? then: clasp import lilt" if isinstance(found, dict) and "model" in found else ""
        raise UserError(f"{checkpoint} is not a bare state dict, as MS-CLIP's is released: {contents}{hint}")
    prefix = "module." if all(str(key).startswith("module.") for key in found) else ""
    return {str(key).removeprefix(prefix): tensor for key, tensor in found.items()}


def _tokenizer(vocabulary: int, wanted: str | None) -> tuple[str, Tokenizer]:
    if wanted is None and vocabulary == CLIP_VOCAB_SIZE:
        return "CLIP's", load_clip_tokenizer(CLIP_VOCAB_SIZE)  # max_tokens is set by the caller
    return load_matching_tokenizer(vocabulary, wanted)


def _recipe(model: MSCLIPCheckpoint, options: ImportOptions) -> dict[str, Any]:
    """The paper's recipe around the encoders of this file; the heads and the logit scale train."""
    recipe = read_recipe(_RECIPE).to_dict()
    pool = {"image": "cls", "text": "last"}
    recipe |= {side: {"tower": f"file:{RUN_PLACEHOLDER}/towers", "pool": pool[side]} for side in pool}
    recipe["text"]["truncation"] = options.truncation
    recipe["share"] = model.encoders.policy.model_dump(mode="json", exclude_none=True)
    recipe["tune"] = {"image": ["none"], "text": ["none"], "head": "full", "scale": "full"}
    recipe["head"]["width"] = len(model.image_head)
    return recipe


def _tensors(model: MSCLIPCheckpoint) -> dict[str, Tensor]:
    """Every parameter of the model, by its first name."""
    nets = {name.replace(".", ".net.", 1): p.detach() for name, p in model.encoders.named_parameters()}
    heads = {"image_head.map.weight": model.image_head, "text_head.map.weight": model.text_head}
    return {**nets, **heads, "log_scale": model.log_scale}


def _describe_sharing(policy: SharingSettings) -> list[str]:
    """The shared parts, one line for each range of layers."""
    lines = []
    for section in (policy, *policy.overrides):
        parts = [part for part, mode in section.part_modes().items() if mode == "shared"]
        if parts:
            lines.append(f"layers {section.layers} share {', '.join(parts)}")
    return lines or ["the two nets share nothing"]


def _listed(layers: tuple[int, ...]) -> str:
    return ", ".join(map(str, layers))
