"""The weights of frozen layers in bfloat16, for training steps under autocast, which casts them anew at every use.

Input: a model. Output: a context in which its frozen linear layers hold their weights in bfloat16, cast once. Note:
results are bit by bit those of autocast, which computes with the same casts, but keeps them only for weights with a
gradient; where packaged towers or plain attention compute products together (``models.frozen_products``), to rounding.
The float32 weights stay as they are and are back after the context; a step must end its backward pass inside it. Those
that are mapped from a file are read from it again then (``models.mapped_pages``). Layers whose weights are not only
multiplied are left alone: those of DoRA, subclasses of ``nn.Linear``, and patch embeddings (DINOv3 computes its
positions in the dtype of theirs).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from clasp.models.mapped_pages import release_mapped_pages

# Of the process, as the weights that are replaced are: a backward pass may compute states again in another thread.
_contexts = 0


class FrozenCasts:
    """The frozen layers of a model with their weights in bfloat16, which are cast when the context is first entered.

    A parameter that is also outside of such layers (tied to an embedding, say) is left alone.
    """

    def __init__(self, model: nn.Module):
        self._parameters = _castable_parameters(model)
        self._casts: list[Tensor] = []

    @contextmanager
    def __call__(self) -> Iterator[None]:
        """Context in which the weights are in bfloat16."""
        if not self._casts:
            self._casts = [parameter.data.to(torch.bfloat16) for parameter in self._parameters]
            release_mapped_pages(parameter.data for parameter in self._parameters)
        exact = [parameter.data for parameter in self._parameters]
        _set_data(self._parameters, self._casts)
        _count_contexts(1)
        try:
            yield
        finally:
            _count_contexts(-1)
            _set_data(self._parameters, exact)


def within_frozen_casts() -> bool:
    """Whether a training step in bfloat16 is being computed: then states may be rounded where autocast would not."""
    return _contexts > 0


def _count_contexts(change: int) -> None:
    global _contexts
    _contexts += change


def is_plain_low_rank(wrapper: nn.Module) -> bool:
    """Whether a layer of peft adds a low-rank update to the output of its base layer, whose weight it does not read."""
    children = dict(wrapper.named_children())
    return "lora_A" in children and not any(children["lora_magnitude_vector"].children())


def _set_data(parameters: list[nn.Parameter], values: list[Tensor]) -> None:
    for parameter, value in zip(parameters, values, strict=True):
        parameter.data = value


def _castable_parameters(model: nn.Module) -> list[nn.Parameter]:
    layers = {
        id(layer): layer
        for path, layer in model.named_modules()
        if type(layer) is nn.Linear and _is_only_multiplied(model, path)
    }
    elsewhere = {
        id(parameter)
        for module in model.modules()
        if id(module) not in layers
        for parameter in module.parameters(recurse=False)
    }
    inside = {
        id(parameter): parameter
        for layer in layers.values()
        for parameter in layer.parameters(recurse=False)
        if not parameter.requires_grad and parameter.dtype == torch.float32
    }
    return [parameter for key, parameter in inside.items() if key not in elsewhere]


def _is_only_multiplied(model: nn.Module, path: str) -> bool:
    """Whether a layer's weight is used in its own product only: peft's other methods compute with the base weight."""
    owner, _, name = path.rpartition(".")
    return name != "base_layer" or is_plain_low_rank(model.get_submodule(owner))
