"""``[image]`` and ``[text]`` of a recipe: which tower, and how it is read and pooled.

Data only. Note: nothing here imports torch, so that a recipe is checked at once.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from clasp.data.caption_ids import CaptionCleaning, SpecialTokenTemplate, Truncation
from clasp.data.decoding import ResizeMode
from clasp.models.transformer.settings import ImageTransformerSettings, TextTransformerSettings

PoolingMode = Literal["cls", "mean", "last", "eos", "cls+mean", "mean+max", "attention", "pooler"]
_Layer = Annotated[int, Field(ge=-1024, le=1024)]
_Level = Annotated[int, Field(ge=0, le=255)]
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
    layer: _Layer | None = None
    """Use the hidden states after this many blocks (negative: from the end); the blocks above are dropped"""
    extra_layers: list[_Layer] | Literal["all"] = []
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
    background: tuple[_Level, _Level, _Level] = (255, 255, 255)
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
