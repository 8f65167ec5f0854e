"""Tiny random towers of every family clasp knows, built from configurations: no file, no hub, few parameters."""

from __future__ import annotations

import copy
import io
import pickle
from functools import cache

import torch
import transformers as hf
from torch import nn

from clasp.models.backbone import Backbone
from clasp.models.transformer.deit import VisionTransformer
from clasp.models.transformer.encoders import ImageTransformer, TextTransformer, init_weights
from clasp.models.transformer.settings import ImageTransformerSettings, TextTransformerSettings
from clasp.types import Pixels, Tokens

_SIZES = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64)
_IMAGE = dict(image_size=32, patch_size=8)
_TEXT = dict(vocab_size=64, pad_token_id=0, bos_token_id=1, eos_token_id=2)
_CNN = dict(  # three blocks; at the usual start, nothing of the picture would reach their end
    in_channels=[32, 16, 24], out_channels=[16, 24, 40], kernel_sizes=[3, 3, 5], strides=[1, 2, 2],
    num_block_repeats=[1, 1, 1], expand_ratios=[1, 6, 6], initializer_range=0.5,
)  # fmt: skip
_SPECIAL = dict(cls_token_id=1, sep_token_id=2)
_OWN = dict(width=32, heads=2, hidden=64)
_OWN_TEXT = dict(**_OWN, layers=2, vocabulary=64, context=16)


def _own(net: nn.Module) -> nn.Module:
    init_weights(net, seed=0)
    return net


IMAGE_NETS = {
    "vit": lambda: hf.ViTModel(hf.ViTConfig(**_SIZES, **_IMAGE)),
    "deit": lambda: hf.DeiTModel(hf.DeiTConfig(**_SIZES, **_IMAGE)),
    "dinov2": lambda: hf.Dinov2Model(
        hf.Dinov2Config(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, mlp_ratio=2, **_IMAGE)
    ),
    "dinov3": lambda: hf.DINOv3ViTModel(hf.DINOv3ViTConfig(**_SIZES, **_IMAGE, num_register_tokens=2)),
    "clip-image": lambda: hf.CLIPVisionModel(hf.CLIPVisionConfig(**_SIZES, **_IMAGE)),
    "siglip-image": lambda: hf.SiglipVisionModel(hf.SiglipVisionConfig(**_SIZES, **_IMAGE)),
    "beit": lambda: hf.BeitModel(hf.BeitConfig(**_SIZES, **_IMAGE)),
    "convnext": lambda: hf.ConvNextModel(
        hf.ConvNextConfig(hidden_sizes=[8, 12, 16, 24], depths=[1, 1, 2, 1], image_size=32)
    ),
    "efficientnet": lambda: hf.EfficientNetModel(
        hf.EfficientNetConfig(**_CNN, width_coefficient=0.25, depth_coefficient=1.0, hidden_dim=320, image_size=32)
    ),
    "deit3": lambda: VisionTransformer(size=32, patch=8, width=32, blocks=2, heads=2, layer_scale=0.1),
    "own-image": lambda: _own(
        ImageTransformer(
            ImageTransformerSettings(**_OWN, layers=2, size=32, patch=8, norm="rms", qk_norm=True, entry_norm=True)
        )
    ),
    "own-stem": lambda: _own(  # two blocks above it
        ImageTransformer(ImageTransformerSettings(**_OWN, layers=3, size=32, patch=8, stem="batch"))
    ),
}
TEXT_NETS = {
    "bert": lambda: hf.BertModel(hf.BertConfig(**_SIZES, **_TEXT)),
    "xlm-roberta": lambda: hf.XLMRobertaModel(hf.XLMRobertaConfig(**_SIZES, **_TEXT)),
    "distilbert": lambda: hf.DistilBertModel(
        hf.DistilBertConfig(dim=32, n_layers=2, n_heads=2, hidden_dim=64, vocab_size=64, pad_token_id=0)
    ),
    "mpnet": lambda: hf.MPNetModel(hf.MPNetConfig(**_SIZES, **_TEXT)),
    "modernbert": lambda: hf.ModernBertModel(hf.ModernBertConfig(**_SIZES, **_TEXT, **_SPECIAL)),
    "llama": lambda: hf.LlamaModel(hf.LlamaConfig(**_SIZES, **_TEXT, num_key_value_heads=1)),
    "qwen3": lambda: hf.Qwen3Model(hf.Qwen3Config(**_SIZES, **_TEXT, num_key_value_heads=1, head_dim=16)),
    "clip-text": lambda: hf.CLIPTextModel(hf.CLIPTextConfig(**_SIZES, **_TEXT)),
    "t5": lambda: hf.T5EncoderModel(
        hf.T5Config(d_model=32, d_kv=16, d_ff=64, num_layers=2, num_heads=2, vocab_size=64, pad_token_id=0)
    ),
    "own-text": lambda: _own(TextTransformer(TextTransformerSettings(**_OWN_TEXT, activation="quick-gelu"))),
    "own-bert": lambda: _own(
        TextTransformer(
            TextTransformerSettings(
                **_OWN_TEXT, norm_position="post", entry_norm=True, attention="bidirectional", token_width=16
            )
        )
    ),
}
NETS = {**IMAGE_NETS, **TEXT_NETS}
OURS = ("deit3", "own-image", "own-stem", "own-text", "own-bert")  # transformers neither knows nor saves them


@cache
def _net(name: str) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = NETS[name]().eval()
        for p in net.parameters():  # no norm, bias or scale is an identity
            p.data += 0.05 * torch.randn_like(p)
    return net


class _WithoutTensors(pickle.Pickler):
    """Pickles a net, but for its tensors, which it numbers."""

    def __init__(self, file: io.BytesIO) -> None:
        super().__init__(file)
        self.tensors: dict[int, tuple[int, torch.Tensor]] = {}

    def persistent_id(self, obj: object) -> int | None:
        if not isinstance(obj, torch.Tensor):
            return None
        return self.tensors.setdefault(id(obj), (len(self.tensors), obj))[0]


class _WithCopies(pickle.Unpickler):
    """Reads a net back, with a copy of each of its tensors."""

    def __init__(self, file: io.BytesIO, tensors: list[torch.Tensor]) -> None:
        super().__init__(file)
        self.copies = [copy.deepcopy(tensor) for tensor in tensors]

    def persistent_load(self, pid: int) -> torch.Tensor:
        return self.copies[pid]


@cache
def _pickled(name: str) -> tuple[bytes, list[torch.Tensor]]:
    file = io.BytesIO()
    pickler = _WithoutTensors(file)
    pickler.dump(_net(name))
    return file.getvalue(), [tensor for _, tensor in pickler.tensors.values()]


def base(name: str, pool: str = "mean") -> Backbone:
    """A fresh copy of a tiny tower: what ``copy.deepcopy`` gives, in a part of the time."""
    pickled, tensors = _pickled(name)
    net = _WithCopies(io.BytesIO(pickled), tensors).load()
    return Backbone(name, "image" if name in IMAGE_NETS else "text", net, "toy", pool)


def inputs(name: str, rows: int = 2) -> Pixels | Tokens:
    """Something for the tower to read; the second text is shorter than the first."""
    generator = torch.Generator().manual_seed(1)
    if name in IMAGE_NETS:
        return Pixels(torch.randn(rows, 3, 32, 32, generator=generator))
    ids = torch.randint(3, 60, (rows, 7), generator=generator)
    lengths = torch.tensor([7, 4] * (rows // 2) + [7] * (rows % 2))
    return Tokens(ids, torch.arange(7) < lengths[:, None])
