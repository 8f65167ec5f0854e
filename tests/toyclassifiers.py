"""Tiny random image classifiers as folders on disk: an encoder, its last linear layer, and the labels in its config.

Goes in: a family and labels. Comes out: a folder for ``file:FOLDER``. Unusual: ``save_colour_classifier`` fits the last
layer to the toy world, so that the class pairs of a random tower mean something.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers as hf

from clasp.data.images import ImageTransform
from toydata import COLOURS, Toy
from toysavedtowers import save_preprocessor

TRANSFORM = ImageTransform(32, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))

_SIZES = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64)
_IMAGE = dict(image_size=32, patch_size=8)
_STAGES = dict(hidden_sizes=[8, 12, 16, 24], depths=[1, 1, 1, 1])
_SWIN = dict(image_size=32, patch_size=4, embed_dim=8, depths=[1, 1], num_heads=[1, 2], window_size=4)

CLASSIFIERS = {  # name of a family -> class, configuration, the pooling that it reads
    "vit": (hf.ViTForImageClassification, hf.ViTConfig(**_SIZES, **_IMAGE), "cls"),
    "deit": (hf.DeiTForImageClassification, hf.DeiTConfig(**_SIZES, **_IMAGE), "cls"),
    "beit": (hf.BeitForImageClassification, hf.BeitConfig(**_SIZES, **_IMAGE), "mean"),
    "beit-cls": (hf.BeitForImageClassification, hf.BeitConfig(**_SIZES, **_IMAGE, use_mean_pooling=False), "cls"),
    "convnext": (hf.ConvNextForImageClassification, hf.ConvNextConfig(**_STAGES, image_size=32), "mean"),
    "resnet": (
        hf.ResNetForImageClassification,
        hf.ResNetConfig(embedding_size=8, **_STAGES, layer_type="basic"),
        "mean",
    ),
    "swin": (hf.SwinForImageClassification, hf.SwinConfig(**_SWIN), "mean"),
    "dinov2": (
        hf.Dinov2ForImageClassification,
        hf.Dinov2Config(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, mlp_ratio=2, **_IMAGE),
        "cls+mean",
    ),
    "mobilenet": (
        hf.MobileNetV2ForImageClassification,
        hf.MobileNetV2Config(depth_multiplier=0.25, image_size=32),
        "mean",
    ),
}


def classifier_net(family: str, labels: Sequence[str]) -> Any:
    """A random classifier whose norms and biases are no identities."""
    kind, config, _ = CLASSIFIERS[family]
    config = type(config).from_dict({**config.to_dict(), "id2label": dict(enumerate(labels))})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = kind(config).eval()
        for p in net.parameters():
            p.data += 0.05 * torch.randn_like(p)
    return net


def save_classifier(family: str, labels: Sequence[str], folder: Path) -> Path:
    """Write a random classifier as the hub would have it."""
    classifier_net(family, labels).save_pretrained(folder)
    save_preprocessor(folder)
    return folder


def save_colour_classifier(folder: Path, toys: Sequence[Toy], labels: Sequence[str]) -> Path:
    """A random DeiT whose last layer tells the colours of ``toys`` apart; ``labels`` name ``COLOURS`` in their order.

    Its weights are the class means of the pooled features over their variance: a linear discriminant with a diagonal
    covariance. With labels in another order, the same classifier has wrong names.
    """
    net = classifier_net("deit", labels)
    for p in net.base_model.parameters():
        p.data *= 2 if p.ndim > 1 else 1  # at the usual start, little of the picture reaches the class token
    pixels = torch.stack([TRANSFORM(toy.png) for toy in toys])
    with torch.no_grad():
        features = net.base_model(pixels).last_hidden_state[:, 0]
        colours = [list(COLOURS).index(toy.colour) for toy in toys]
        means = torch.stack([features[torch.tensor(colours) == each].mean(0) for each in range(len(COLOURS))])
        net.classifier.weight.copy_((means - means.mean(0)) / features.var(0).clamp(min=1e-6))
    net.save_pretrained(folder)
    save_preprocessor(folder, image_mean=list(TRANSFORM.mean), image_std=list(TRANSFORM.std))
    return folder
