"""What a tower is built from: a pre-trained encoder (``Backbone``), and ``[image]`` and ``[text]`` of a recipe.

Data only. ``clasp.models.zoo.registry`` loads backbones, ``clasp.models.tower.Tower`` wraps one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from jaxtyping import Float
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn

from clasp.data.images import ImageTransform, ResizeMode
from clasp.data.tokenizer import CaptionCleaning, SpecialTokenTemplate, Tokenizer, Truncation
from clasp.models.classifier import Classifier
from clasp.models.transformer.encoders import ImageTransformerSettings, TextTransformerSettings

PoolingMode = Literal["cls", "mean", "last", "eos", "cls+mean", "mean+max", "attention", "pooler"]
_PixelMean = Annotated[float, Field(ge=0, le=1)]
_PixelStd = Annotated[float, Field(gt=0, le=1)]


class _TowerSettings(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    tower: str
    """Where the weights come from: a scheme of ``clasp.models.zoo.registry.TOWER_SOURCES`` and a name (hf: | clip: |
    open_clip: | timm: | pip: | file: | deit: | own:, native nets initialised from train.seed), or
    package.module:factory"""
    pool: PoolingMode | None = None
    """How hidden states are pooled to one vector; the choice of the tower's authors where left out. pooler: the
    pooling layers of the pre-trained net, such as SigLIP's attention head"""
    layer: int | None = None
    """Use the hidden states after this many blocks (negative: from the end); the blocks above are dropped"""
    extra_layers: list[int] | Literal["all"] = []
    """Also pool the hidden states after these blocks (counted as in ``layer``) and concatenate them to the last ones;
    "all": after every block. The recipe of a run has their numbers"""
    dropout: bool = False
    """Whether the tower's dropout is active in training; LilT has it active, also in frozen towers"""


class ImageTowerSettings(_TowerSettings):
    """``[image]`` of a recipe."""

    net: ImageTransformerSettings | None = None
    """Architecture of tower = "own:image\""""
    size: int | None = Field(default=None, ge=8, le=4096)
    """Side of the input image in pixels; the tower's default where left out"""
    resize: ResizeMode | None = None
    """How images that are not square become square"""
    patch_dropout: float = Field(default=0.0, ge=0, lt=1)
    """Fraction of the patch tokens of each image dropped in training, before the first block that trains (FLIP, Li et
    al., CVPR 2023); for ViTs with absolute positions. Evaluation reads all tokens"""
    background: tuple[int, int, int] = (255, 255, 255)
    """Colour under transparent pixels, 0-255"""
    mean: tuple[_PixelMean, _PixelMean, _PixelMean] | None = None
    """Per-channel mean of the normalisation, RGB in [0, 1]; the tower's default where left out"""
    std: tuple[_PixelStd, _PixelStd, _PixelStd] | None = None
    """Per-channel standard deviation of the normalisation; the tower's default where left out"""


class TextTowerSettings(_TowerSettings):
    """``[text]`` of a recipe."""

    net: TextTransformerSettings | None = None
    """Architecture of tower = "own:text\""""
    vocabulary: Literal["clip", "pairs"] | None = None
    """Vocabulary of tower = "own:text": CLIP's (the default), or learned from the training captions"""
    prefix: str | None = None
    """Text put before every caption; the tower's default where left out"""
    max_tokens: int | None = Field(default=None, ge=4, le=32768)
    """Captions are truncated to this many tokens; see ``truncation``"""
    truncation: Truncation = "keep_eos"
    """How longer captions are truncated. ``keep_eos``: the end token is retained. ``drop_eos``: only the
    start token is, since MS-CLIP's released code cuts the end token off and then pools the start token; all longer
    captions then have the same embedding. Only for checkpoints trained in this way"""
    clean: CaptionCleaning = "none"
    """Cleaning of captions; ``lilt``: as in the LilT paper"""
    template: SpecialTokenTemplate = "tower"
    """Special tokens; ``cls`` is LilT's class token without an end token"""
    token_types: bool = True
    """Whether BERT's token-type embedding is added; LilT leaves it out"""


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
