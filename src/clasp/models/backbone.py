"""What a tower is made from: an encoder as it came (``Backbone``), and the settings of a recipe that shape it.

Data only. ``nn.foreign`` makes bases, ``nn.towers`` makes a tower of one.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn

from clasp.data.images import ImageTransform, ResizeMode
from clasp.data.tokenizer import CaptionCleaning, SpecialTokenTemplate, Tokenizer, Truncation
from clasp.models.transformer.encoders import ImageTransformerSettings, TextTransformerSettings

PoolingMode = Literal["cls", "mean", "last", "eos", "cls+mean", "mean+max", "attention", "pooler"]
_PixelMean = Annotated[float, Field(ge=0, le=1)]
_PixelStd = Annotated[float, Field(gt=0, le=1)]


class _TowerSettings(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    tower: str
    """Where the weights come from: a scheme of ``clasp.models.zoo.registry.TOWER_SOURCES`` and a name (hf: | timm: |
    pip: | file: | deit: | own:, nets of ours that start from train.seed), or package.module:factory"""
    pool: PoolingMode | None = None
    """States to one vector; the tower's own authors' choice where left out. pooler: the layers that its authors pool
    with, such as SigLIP's attention head"""
    layer: int | None = None
    """Read the states after this many blocks (negative from the end); the blocks above are dropped"""
    extra_layers: list[int] = []
    """Pool the states after these blocks as well (counted as in ``layer``), side by side with the last ones"""
    dropout: bool = False
    """Dropout inside the tower while training; LilT has it on, also in frozen towers"""


class ImageTowerSettings(_TowerSettings):
    """``[image]`` of a recipe."""

    net: ImageTransformerSettings | None = None
    """What the net of tower = "own:image" is like"""
    size: int | None = Field(default=None, ge=8, le=4096)
    """Pixels a side that the tower sees; its own where left out"""
    resize: ResizeMode | None = None
    """What happens to pictures that are not square"""
    background: tuple[int, int, int] = (255, 255, 255)
    """Colour under transparent pixels, 0-255"""
    mean: tuple[_PixelMean, _PixelMean, _PixelMean] | None = None
    """Subtracted from the pixels, RGB in [0, 1]; the tower's own where left out"""
    std: tuple[_PixelStd, _PixelStd, _PixelStd] | None = None
    """What the pixels are then divided by; the tower's own where left out"""


class TextTowerSettings(_TowerSettings):
    """``[text]`` of a recipe."""

    net: TextTransformerSettings | None = None
    """What the net of tower = "own:text" is like"""
    vocabulary: Literal["clip", "pairs"] | None = None
    """Word pieces of tower = "own:text": CLIP's (its own where left out), or learned from the captions to train on"""
    prefix: str | None = None
    """Put before every caption; the tower's own where left out"""
    max_tokens: int | None = Field(default=None, ge=4, le=32768)
    """Longer captions are cut, keeping their end token"""
    truncation: Truncation = "keep_eos"
    """What is left of a longer caption. ``lost``: its start token, as in MS-CLIP's released code, to which all of them
    are the same caption; only for what was trained so"""
    clean: CaptionCleaning = "none"
    """Cleaning of captions; ``lilt`` is the paper's"""
    template: SpecialTokenTemplate = "tower"
    """Special tokens; ``cls`` is LilT's class token without an end token"""
    token_types: bool = True
    """LilT leaves BERT's token-type embedding out"""


@dataclass(frozen=True, slots=True)
class Pooler:
    """The pooling of a tower's authors, where layers of the net are part of it: ``pool = "pooler"``."""

    reads: Literal["states", "prefix", "cls", "mean", "last", "cls+mean"]
    """what the module reads: all states, or these pooled without weights; ``prefix``: the mean of the class tokens"""
    module: str | None
    """path of the module in the net, ``[B N D]`` or ``[B D]`` to ``[B Dp]``; none where there is nothing more"""


@dataclass(frozen=True, slots=True)
class Backbone:
    """An encoder as it came, before anything of ours: the weights a delta stands on."""

    name: str
    """the spec as the user wrote it, e.g. ``pip:efficientnet-lite0``"""
    modality: Literal["image", "text"]
    net: nn.Module
    """the foreign module itself, in evaluation mode, weights loaded or on the meta device"""
    version: str
    """package and version, or hub revision"""
    pool: str
    """the pooling its authors use"""
    transform: ImageTransform | None = None
    """image towers: size, mean and std as the weights were trained"""
    tokenizer: Callable[[], Tokenizer] | None = None
    """text towers; a callable, since counting parameters needs none"""
    forward_features: Callable[[nn.Module, Any], Tensor] | None = None
    """inputs to states, where calling the net does not give them: ``(net, pixels)`` to ``[B N D]`` or ``[B D h w]``,
    ``(net, Tokens)`` to ``[B N D]``"""
    from_seed: bool = False
    """whether its weights were drawn and never trained; statistics of BatchNorm are then worth nothing yet"""
    new_parameters: frozenset[str] = frozenset()
    """parameters of a pre-trained net that nobody has trained, such as embeddings of another modality"""
    pooler: Pooler | None = None
    """what ``pool = "pooler"`` is; its module is dropped where another pooling is chosen"""
