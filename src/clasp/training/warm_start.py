"""Trainable parameters that start from those of another run: ``train.init_from``.

Input: a model with its selection, and its recipe as nested dictionaries. Output: none; parameters are copied in place,
by name. Parameters that the run did not train keep their own initialisation; a low-rank update is zero then, so that
the model starts exactly where the run ended. Note: the run's towers must have the same base weights and pooling, and
all that it trained must be trainable here, or a part of it would be lost when this run is saved. With
``train.init_parts = "towers"`` the heads are not copied, and the pooling may differ.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from clasp.models.dual_encoder import DualEncoder
from clasp.training.run_folder import RunFolder
from clasp.types import UserError

# settings that decide which tensors a delta has, and their shapes
_SETTINGS = (
    *(f"{side}.{key}" for side in ("image", "text") for key in ("tower", "pool", "layer", "extra_layers")),
    *(f"head.{key}" for key in ("kind", "width", "hidden", "bias", "standardize", "power", "class_probabilities")),
    *("loss.kind", "loss.scale"),
    *("tune.image", "tune.text", "tune.head", "tune.scale", "share"),
)

_TOWER_PREFIXES = ("image.", "text.")


def load_initial_weights(model: DualEncoder, recipe: Mapping[str, Any]) -> None:
    """Copy the delta of ``train.init_from``, or its tensors of the towers, into the trainable parameters of ``model``.

    ``model`` has ``recipe``. Raises ``UserError`` naming the settings that differ: where the base weights do (or, for
    ``train.init_parts = "all"``, the pooling), or where a tensor that is to be copied is not among the trainable
    parameters or has another shape.
    """
    run, towers_only = str(recipe["train"]["init_from"]), recipe["train"]["init_parts"] == "towers"
    folder = RunFolder(run)
    theirs, tensors = folder.recipe(), folder.read_delta()
    base = folder.base()
    for tower in (model.image, model.text):
        recorded, side = base[tower.modality], tower.modality
        if towers_only and recorded["tensors"] != tower.weight_hashes:
            raise _misfit(run, f"the base weights of its {side} tower", recipe, theirs)
        if not towers_only and recorded["fingerprint"] != tower.fingerprint:
            raise _misfit(run, f"the base weights or the pooling of its {side} tower", recipe, theirs)
    if towers_only:
        tensors = {name: tensor for name, tensor in tensors.items() if name.startswith(_TOWER_PREFIXES)}
    parameters = model.delta()
    for name, tensor in tensors.items():
        if name not in parameters:
            raise _misfit(run, f"{name}, which does not train here", recipe, theirs)
        if (shape := tuple(parameters[name].shape)) != tuple(tensor.shape):
            raise _misfit(run, f"{name} of shape {tuple(tensor.shape)}, here {shape}", recipe, theirs)
    with torch.no_grad():
        for name, tensor in tensors.items():
            parameters[name].copy_(tensor)


def _misfit(run: str, what: str, ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> UserError:
    differing = [
        f"{key} = {there!r} there, {here!r} here"
        for key in _SETTINGS
        if (there := _value(theirs, key)) != (here := _value(ours, key))
    ]
    return UserError(f"train.init_from = {run!r} does not fit: {what}; {'; '.join(differing) or 'the recipes agree'}")


def _value(recipe: Mapping[str, Any], key: str) -> Any:
    section, _, name = key.partition(".")
    found = recipe.get(section)
    return found.get(name) if name and isinstance(found, Mapping) else found
