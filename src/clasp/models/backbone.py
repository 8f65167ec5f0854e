"""What a tower is built from: a pre-trained encoder (``Backbone``).

Data only. ``clasp.models.zoo.registry`` loads backbones, ``clasp.models.tower.Tower`` wraps one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from jaxtyping import Float
from torch import Tensor, nn

from clasp.data.images import ImageTransform
from clasp.data.tokenizer import Tokenizer
from clasp.models.classifier import Classifier


@dataclass(frozen=True, slots=True)
class Pooler:
    """The pooling of a pre-trained net that has layers for it: ``pool = "pooler"``."""

    reads: Literal["states", "prefix", "cls", "mean", "last", "cls+mean"]
    """the input of the module: all hidden states, or a parameter-free pooling of them; ``prefix``: the mean of the
    class tokens"""
    module: str | None
    """path of the module in the net, ``[B N D]`` or ``[B D]`` to ``[B Dp]``; ``None``: no module follows"""


@dataclass(frozen=True, slots=True)
class PretrainedHead:
    """What follows the pooled vector in the dual encoder that a tower is one half of: ``head.init = "pretrained"``."""

    weight: Float[Tensor, "E D"] | None
    """the projection; ``None``: the pooled vector is the embedding, as in SigLIP"""
    log_scale: Float[Tensor, ""]
    """logarithm of the logit scale"""
    logit_bias: Float[Tensor, ""] | None = None
    """of a sigmoid loss"""

    def tensors(self) -> dict[str, Tensor]:
        """The tensors by name, those that are ``None`` left out."""
        named = {"weight": self.weight, "log_scale": self.log_scale, "logit_bias": self.logit_bias}
        return {name: tensor for name, tensor in named.items() if tensor is not None}


@dataclass(frozen=True, slots=True)
class Backbone:
    """An encoder as loaded, before pooling and tuning: the base weights that a delta refers to."""

    name: str
    """the spec as the user wrote it, e.g. ``pip:efficientnet-lite0``"""
    modality: Literal["image", "text"]
    net: nn.Module
    """the module, in evaluation mode, with its weights loaded or on the meta device"""
    version: str
    """package and version, or hub revision"""
    pool: str
    """the pooling that its authors use"""
    transform: ImageTransform | None = None
    """image towers: size, mean and std as the weights were trained"""
    tokenizer: Callable[[], Tokenizer] | None = None
    """text towers; a callable, so that counting parameters loads no tokenizer"""
    forward_features: Callable[[nn.Module, Any], Tensor] | None = None
    """computes hidden states where calling the net does not return them: ``(net, pixels)`` to ``[B N D]`` or
    ``[B D h w]``, ``(net, Tokens)`` to ``[B N D]``"""
    from_seed: bool = False
    """whether the weights are randomly initialised; the running statistics of BatchNorm are then untrained, too"""
    new_parameters: frozenset[str] = frozenset()
    """randomly initialised parameters of a pre-trained net, such as the embeddings of another modality"""
    pooler: Pooler | None = None
    """the pooling of ``pool = "pooler"``; its module is dropped where another pooling is chosen"""
    classifier: Callable[[], Classifier | None] | None = None
    """the classifier that an image tower was pre-trained with; a callable, so that it is read only where it is used;
    returns ``None`` where it reads other features than pooled last hidden states"""
    weight_hashes: Mapping[str, str] | None = None
    """``hash_tensors`` of the state of ``net``, where it is known; whoever writes to a weight drops it"""
    pretrained_head: PretrainedHead | None = None
    """halves of a dual encoder: its projection and logit scale"""
