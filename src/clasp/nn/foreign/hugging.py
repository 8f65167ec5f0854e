"""Any image or text encoder that ``transformers`` can load, from the hub or from a folder; also decoder language models.

Unusual: ``transformers`` never decides about pixels here. Size, mean and deviation are read from the model's
``preprocessor_config.json``, and pictures go through ``clasp.data.images`` as for every other tower.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from clasp.data.images import ImageTransform
from clasp.data.text import Tokenizer
from clasp.nn.anatomy import unused
from clasp.nn.towers import Base, ImageSettings, TextSettings
from clasp.types import UserError

_BERT = {"model_type": "bert", "max_position_embeddings": 512, "type_vocab_size": 2}
# text towers of the LilT paper, as their published config.json has them: counting needs no hub
KNOWN_CONFIGS: dict[str, dict[str, Any]] = {
    name: {
        **_BERT,
        "hidden_size": width,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "intermediate_size": 4 * width,
        "vocab_size": vocabulary,
    }
    for name, width, layers, heads, vocabulary in (
        ("prajjwal1/bert-tiny", 128, 2, 2, 30522),
        ("prajjwal1/bert-small", 512, 4, 8, 30522),
        ("princeton-nlp/unsup-simcse-bert-base-uncased", 768, 12, 12, 30522),
        ("princeton-nlp/unsup-simcse-bert-large-uncased", 1024, 24, 16, 30522),
        ("google-bert/bert-base-multilingual-cased", 768, 12, 12, 119547),
    )
}
# families whose AutoModel would be the whole of a dual encoder, or an encoder with a decoder
_IMAGE_HALF = {"clip": "CLIPVisionModel", "siglip": "SiglipVisionModel"}
_TEXT_HALF = {"clip": "CLIPTextModel", "siglip": "SiglipTextModel", "t5": "T5EncoderModel", "mt5": "MT5EncoderModel"}
# decoders read from left to right, so only their last token has seen the whole text
_DECODERS = (
    "llama",
    "mistral",
    "qwen2",
    "qwen3",
    "gemma",
    "gemma2",
    "gemma3_text",
    "phi3",
    "gpt2",
    "gpt_neox",
    "smollm3",
)
_POOLS = {
    "convnext": "mean",
    "convnextv2": "mean",
    "efficientnet": "mean",
    "beit": "mean",
    "siglip": "mean",
    "resnet": "mean",
}
_INTERPOLATIONS = {1: "lanczos", 2: "bilinear", 3: "bicubic"}


def transformers_base(name: str, settings: ImageSettings | TextSettings, meta: bool) -> Base:
    """The encoder at ``name`` (a hub repository or a folder); see ``open_base``."""
    with said_plainly(settings.tower):
        config = _config(name, meta)
        net = _net(name, config, settings, meta)
    version = str(config.to_dict().get("_commit_hash") or config.to_dict().get("transformers_version") or "")
    if isinstance(settings, TextSettings):
        if not settings.token_types:
            _drop_token_types(net, settings)
        pool = "last" if config.model_type in _DECODERS else "eos" if config.model_type == "clip" else "mean"
        return Base(settings.tower, "text", net, version, pool, tokenizer=lambda: _tokenizer(name, settings))
    transform = None if meta else _transform(name, settings)
    return Base(settings.tower, "image", net, version, _POOLS.get(config.model_type, "cls"), transform)


@contextmanager
def said_plainly(tower: str) -> Iterator[None]:
    """Turn what the hub and its libraries raise into one line, and keep their chatter away."""
    from transformers.utils import logging

    level = logging.get_verbosity()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except (OSError, ValueError, RuntimeError) as error:
        if isinstance(error, UserError):
            raise
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(
            f"tower = {tower!r} cannot be loaded ({first[:200]}); without a hub use pip:… or file:FOLDER"
        ) from None
    finally:
        logging.set_verbosity(level)
        logging.enable_progress_bar()


def _config(name: str, meta: bool) -> Any:
    from transformers import AutoConfig

    if meta and name in KNOWN_CONFIGS:
        facts = dict(KNOWN_CONFIGS[name])
        return AutoConfig.for_model(facts.pop("model_type"), **facts)
    return AutoConfig.from_pretrained(name)


def _net(name: str, config: Any, settings: ImageSettings | TextSettings, meta: bool) -> nn.Module:
    import transformers

    halves = _IMAGE_HALF if isinstance(settings, ImageSettings) else _TEXT_HALF
    family = getattr(transformers, halves[config.model_type]) if config.model_type in halves else transformers.AutoModel
    if meta:
        half = {"CLIPVisionModel": "vision_config", "SiglipVisionModel": "vision_config"}.get(
            family.__name__, "text_config"
        )
        own = getattr(config, half) if config.model_type in ("clip", "siglip") else config
        with torch.device("meta"):
            net = (family.from_config if family is transformers.AutoModel else family)(own)
        return net.eval()
    net, facts = family.from_pretrained(name, dtype=torch.float32, output_loading_info=True)
    lacking = [key for key in facts["missing_keys"] if not key.startswith(unused(net) or ("\0",))]
    if lacking:
        raise UserError(f"tower = {settings.tower!r}: its weights lack {', '.join(sorted(lacking)[:3])}")
    return net.eval()


def _transform(name: str, settings: ImageSettings) -> ImageTransform:
    facts = _file(name, "preprocessor_config.json")
    if facts is None or "image_mean" not in facts:
        raise UserError(
            f"tower = {settings.tower!r} has no preprocessor_config.json with image_mean and image_std, so its pixels cannot "
            "be prepared; write a factory that gives a clasp.Base with a transform"
        )
    size, crop = facts.get("size", 224), facts.get("crop_size")
    shorter, side = _side(size), _side(crop) if crop and facts.get("do_center_crop") else _side(size)
    return ImageTransform(
        settings.size or side,
        tuple(facts["image_mean"]),
        tuple(facts["image_std"]),
        resize="crop" if crop or (isinstance(size, dict) and "shortest_edge" in size) else "squash",
        interpolation=_INTERPOLATIONS.get(facts.get("resample", 3), "bicubic"),
        crop_fraction=min(1.0, side / shorter),
    )


def _side(size: Any) -> int:
    return size if isinstance(size, int) else size.get("shortest_edge") or size["height"]


def _tokenizer(name: str, settings: TextSettings) -> Tokenizer:
    from transformers import AutoTokenizer

    with said_plainly(settings.tower):
        theirs = AutoTokenizer.from_pretrained(name)
    pad = theirs.pad_token_id if theirs.pad_token_id is not None else theirs.eos_token_id
    return Tokenizer(theirs.backend_tokenizer, pad_id=pad or 0)


def _file(name: str, file: str) -> dict[str, Any] | None:
    from transformers.utils import cached_file

    path = cached_file(name, file, _raise_exceptions_for_missing_entries=False)
    if path is None:
        return None
    with open(path, encoding="utf-8") as stream:
        return json.load(stream)


class _NoTokenTypes(nn.Module):
    """Stands where BERT adds its token-type embedding, and adds nothing."""

    def forward(self, token_types: Tensor) -> Tensor:
        return torch.zeros((*token_types.shape, 1), device=token_types.device)


def _drop_token_types(net: nn.Module, settings: TextSettings) -> None:
    if "embeddings.token_type_embeddings" not in dict(net.named_modules()):
        raise UserError(f"token_types = false: {settings.tower} has no token-type embedding to leave out")
    net.get_submodule("embeddings").token_type_embeddings = _NoTokenTypes()
