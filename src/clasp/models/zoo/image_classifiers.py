"""The classifier of an image classification checkpoint of ``transformers``: weights, class names and pooling.

Input: a checkpoint whose configuration names a ``...ForImageClassification`` and its labels. Output: a ``Classifier``,
or ``None`` where its last layer reads anything but pooled last hidden states. Note: the whole net is loaded once more,
from the same local files, and dropped again.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from clasp.models.classifier import Classifier
from clasp.models.classifier_pooling import find_classifier_pooling
from clasp.models.foreign_forward import foreign_states, native_image_size
from clasp.models.partial_forward import as_tokens
from clasp.models.probe import image_probe
from clasp.models.zoo.imagenet import are_names, concepts_of_labels
from clasp.types import Pixels


def find_labels(config: Any) -> tuple[str | None, tuple[str, ...]]:
    """The class of an image classifier that a configuration declares, and its labels; ``None`` where it declares none,
    or its labels are numbers (``LABEL_0``)."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES as KINDS

    known = KINDS.get(config.model_type, ())
    declared = {*(config.architectures or ())} & ({known} if isinstance(known, str) else {*known})
    id2label = config.id2label or {}  # PVT's configuration is saved without
    labels = tuple(id2label[number] for number in sorted(id2label))
    if not declared or len(labels) < 2 or not are_names(labels):
        return None, ()
    return declared.pop(), labels


def read_image_classifier(name: str, kind: str, labels: tuple[str, ...]) -> Classifier | None:
    """The classifier at ``name`` (a hub repository or a folder), a net of the class ``kind`` of ``transformers``."""
    import transformers

    whole, facts = getattr(transformers, kind).from_pretrained(name, dtype=torch.float32, output_loading_info=True)
    whole.eval()
    encoder = whole.base_model
    own = {id(module) for module in encoder.modules()}
    layers = {
        path: module
        for path, module in whole.named_modules()
        if isinstance(module, nn.Linear) and module.out_features == len(labels) and id(module) not in own
    }
    if len(layers) != 1 or any(key.startswith((*layers,)) for key in facts["missing_keys"]):
        return None
    (layer,) = layers.values()
    pixels = image_probe(native_image_size(encoder, None), torch.device("cpu")).beside
    assert isinstance(pixels, Pixels)
    with torch.no_grad():
        logits = whole(pixel_values=pixels.values).logits
        states = as_tokens(foreign_states(name, encoder, pixels, None))
    weight = layer.weight.detach().clone()
    bias = weight.new_zeros(len(weight)) if layer.bias is None else layer.bias.detach().clone()
    pool = find_classifier_pooling(encoder, states, (weight, bias), logits)
    if pool is None:
        return None
    concepts, source = concepts_of_labels(labels)
    return Classifier(weight, bias, concepts, pool, source)
