"""Any image or text encoder that ``transformers`` can load, from the hub or a folder; also decoder language models.

In: a repository or a folder. Out: a ``Backbone`` in float32, whose every parameter came from the checkpoint. Unusual:
``transformers`` never touches pixels: size, mean and deviation are read from the model's ``preprocessor_config.json``,
and pictures go through ``clasp.data.images`` as for every other tower. Modality and shapes are checked on meta tensors
before any weight is read, and whether a text tower reads from left to right is tried out, not looked up.
"""

from __future__ import annotations

import json
import logging as levels
import math
import pickle
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from clasp.data.images import ImageTransform, Interpolation
from clasp.data.tokenizer import Tokenizer
from clasp.models.backbone import Backbone, ImageTowerSettings, TextTowerSettings
from clasp.models.structure import find_structure, find_unused_modules
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


class _SubEncoder(NamedTuple):
    """The class of the encoder inside a larger model, and where that model's configuration keeps its part."""

    class_name: str
    config_key: str | None = None


# families whose AutoModel would be the whole of a dual encoder, or an encoder with a decoder
_SUB_ENCODERS: dict[tuple[str, str], _SubEncoder] = {
    ("clip", "image"): _SubEncoder("CLIPVisionModel", "vision_config"),
    ("clip", "text"): _SubEncoder("CLIPTextModel", "text_config"),
    ("siglip", "image"): _SubEncoder("SiglipVisionModel", "vision_config"),
    ("siglip", "text"): _SubEncoder("SiglipTextModel", "text_config"),
    ("t5", "text"): _SubEncoder("T5EncoderModel"),
    ("mt5", "text"): _SubEncoder("MT5EncoderModel"),
    ("umt5", "text"): _SubEncoder("UMT5EncoderModel"),
}
_MODALITIES = {"pixel_values": "image", "input_ids": "text"}
# sentence-transformers' names of what it does to the states
_SENTENCE_TRANSFORMERS_POOLS = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_lasttoken": "last",
}
# Pillow's numbers; nearest, box and hamming have no place beside antialiasing, and bilinear is their neighbour
_INTERPOLATIONS: dict[int, Interpolation] = {
    0: "bilinear",
    1: "lanczos",
    2: "bilinear",
    3: "bicubic",
    4: "bilinear",
    5: "bilinear",
}


def load_transformers_backbone(name: str, settings: ImageTowerSettings | TextTowerSettings, meta: bool) -> Backbone:
    """The encoder at ``name`` (a hub repository or a folder); see ``open_base``."""
    with translate_hub_errors(settings.tower):
        config = _load_config(name, meta)
        net = _load_net(name, config, settings, meta)
        version = vars(config).get("_commit_hash") or f"transformers {config.transformers_version}"
        if isinstance(settings, ImageTowerSettings):
            # BEiT has a class token that its authors do not pool
            pool = "cls" if find_structure(net).prefix_tokens and config.model_type != "beit" else "mean"
            transform = None if meta else _read_transform(name, settings)
            return Backbone(settings.tower, "image", net, version, pool, transform)
        longest = _max_positions(net, settings)
        if not settings.token_types:
            _drop_token_types(net, settings)
        pool = "mean" if meta else _text_pool(name, config.model_type, net)
    return Backbone(
        settings.tower, "text", net, version, pool, tokenizer=lambda: _load_tokenizer(name, settings.tower, longest)
    )


@contextmanager
def translate_hub_errors(tower: str) -> Iterator[None]:
    """Turn what the hub and its libraries raise into one line, and keep their chatter away."""
    from huggingface_hub.utils import logging as hub_logging
    from safetensors import SafetensorError
    from transformers.utils import logging

    level, hub_level, bars = logging.get_verbosity(), hub_logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity(levels.CRITICAL)
    hub_logging.set_verbosity(levels.CRITICAL)
    logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except UserError:
        raise
    except (OSError, ValueError, RuntimeError, ImportError, EOFError, pickle.UnpicklingError, SafetensorError) as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        reason = " ".join(lines[: 2 if lines[0].endswith(":") else 1])[:200] if lines else type(error).__name__
        raise UserError(
            f"tower = {tower!r} cannot be loaded ({reason}); without a hub use pip:… or file:FOLDER"
        ) from None
    finally:
        logging.set_verbosity(level)
        hub_logging.set_verbosity(hub_level)
        if bars:
            logging.enable_progress_bar()


# --- the net -------------------------------------------------------------------------------------------------------


def _load_config(name: str, meta: bool) -> Any:
    from transformers import AutoConfig

    if meta and name in KNOWN_CONFIGS:
        facts = dict(KNOWN_CONFIGS[name])
        return AutoConfig.for_model(facts.pop("model_type"), **facts)
    return AutoConfig.from_pretrained(name)


def _load_net(name: str, config: Any, settings: ImageTowerSettings | TextTowerSettings, meta: bool) -> nn.Module:
    """The encoder with its weights, or on the meta device; no parameter that takes part is left to chance."""
    shapes = _build_on_meta(config, settings)
    if meta:
        return shapes
    net, facts = type(shapes).from_pretrained(name, dtype=torch.float32, output_loading_info=True)
    spare = tuple(f"{path}." for path in find_unused_modules(net))
    lacking = sorted(key for key in facts["missing_keys"] if not f"{key}.".startswith(spare))
    if lacking:
        more = f" and {len(lacking) - 3} more" if len(lacking) > 3 else ""
        raise UserError(f"tower = {settings.tower!r}: its weights lack {', '.join(lacking[:3])}{more}")
    return net.eval()


def _build_on_meta(config: Any, settings: ImageTowerSettings | TextTowerSettings) -> Any:
    """The encoder on the meta device. Raises ``UserError`` when it is of the other modality, or not one encoder."""
    import transformers

    wanted = "image" if isinstance(settings, ImageTowerSettings) else "text"
    half, facts = _SUB_ENCODERS.get((config.model_type, wanted)), config.to_dict()
    with torch.device("meta"):
        if half is not None:
            own = config if half.config_key is None else vars(config)[half.config_key]
            return getattr(transformers, half.class_name)(own).eval()
        several = {"vision_config", "text_config", "audio_config"} & facts.keys()
        if several or facts.get("is_encoder_decoder"):
            holds = "several encoders" if several else "an encoder with a decoder"
            known = ", ".join(family for family, modality in _SUB_ENCODERS if modality == wanted)
            raise UserError(
                f"[{wanted}] tower = {settings.tower!r} is {config.model_type}, {holds}; clasp takes the {wanted} half "
                f"of {known}; for any other write a factory that gives a clasp.Backbone"
            )
        net = transformers.AutoModel.from_config(config)
    reads = _MODALITIES.get(net.main_input_name)
    if reads != wanted:
        what = f"a tower for {reads}s" if reads else f"a model of {net.main_input_name}"
        raise UserError(f"[{wanted}] tower = {settings.tower!r} is {what} ({config.model_type})")
    return net.eval()


def _text_pool(name: str, family: str, net: nn.Module) -> str:
    """What its authors say (sentence-transformers' file); else the mean, or the last token where only that saw all."""
    said = _read_json(name, "1_Pooling/config.json") or {}
    pools = [pool for key, pool in _SENTENCE_TRANSFORMERS_POOLS.items() if said.get(key)]
    if len(pools) == 1:
        return pools[0]
    if family in ("clip", "clip_text_model"):
        return "eos"
    return "last" if _is_causal(net) else "mean"


def _is_causal(net: nn.Module) -> bool:
    """Whether the first token's state is blind to the second token: two runs over two tokens."""
    with torch.no_grad():
        first, other = (net(input_ids=torch.tensor([[0, second]])).last_hidden_state[0, 0] for second in (1, 2))
    return torch.equal(first, other)


class _NoTokenTypes(nn.Module):
    """Stands where BERT adds its token-type embedding, and adds nothing."""

    def forward(self, token_types: Tensor) -> Tensor:
        return torch.zeros((*token_types.shape, 1), device=token_types.device)


def _drop_token_types(net: nn.Module, settings: TextTowerSettings) -> None:
    if "embeddings.token_type_embeddings" not in dict(net.named_modules()):
        raise UserError(f"token_types = false: {settings.tower} has no token-type embedding to leave out")
    net.get_submodule("embeddings").token_type_embeddings = _NoTokenTypes()


# --- pixels and tokens ---------------------------------------------------------------------------------------------


def _read_transform(name: str, settings: ImageTowerSettings) -> ImageTransform:
    newer = _read_json(name, "processor_config.json") or {}
    facts = newer.get("image_processor") or _read_json(name, "preprocessor_config.json")
    if facts is None or not {"image_mean", "image_std", "size"} <= facts.keys():
        raise UserError(
            f"tower = {settings.tower!r} has no preprocessor_config.json with image_mean, image_std and size, so its "
            "pixels cannot be prepared; write a factory that gives a clasp.Backbone with a transform"
        )
    if abs(facts.get("rescale_factor", 1 / 255) * 255 - 1) > 1e-3 or facts.get("rescale_offset"):
        by = f"{facts.get('rescale_factor', 1 / 255):.4g}{', less one' if facts.get('rescale_offset') else ''}"
        raise UserError(f"tower = {settings.tower!r} scales pixels by {by}; clasp knows 1/255 only")
    mean, std = tuple(facts["image_mean"]), tuple(facts["image_std"])
    if not facts.get("do_normalize", True):
        mean, std = (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)
    elif facts.get("include_top"):
        std = tuple(s * s for s in std)  # EfficientNet's processor divides by the deviation twice
    size, crop = facts["size"], facts.get("crop_size")
    side, fraction = _square_size(size, settings), 1.0
    if crop is not None and facts.get("do_center_crop", True):
        resize, side, fraction = (
            "crop",
            _square_size(crop, settings),
            _crop_fraction(_square_size(crop, settings), side),
        )
    elif "crop_pct" in facts:  # ConvNeXt: larger pictures are squashed
        resize, fraction = ("crop", facts["crop_pct"] or 224 / 256) if side < 384 else ("squash", 1.0)
    else:
        resize = "crop" if isinstance(size, dict) and "shortest_edge" in size else "squash"
    interpolation = _INTERPOLATIONS[facts.get("resample", 3)]
    return ImageTransform(settings.size or side, mean, std, resize, interpolation, crop_fraction=fraction)


def _crop_fraction(side: int, shorter: int) -> float:
    """A fraction from which the transform gets ``shorter`` back, by ``floor(side / fraction)``."""
    fraction = min(1.0, side / shorter)
    return fraction if math.floor(side / fraction) == max(side, shorter) else math.nextafter(fraction, 0)


def _square_size(size: int | list[int] | Mapping[str, int], settings: ImageTowerSettings) -> int:
    """A square's side out of the four ways in which ``preprocessor_config.json`` may have it."""
    match size:
        case int():
            return size
        case {"shortest_edge": side}:
            return side
        case {"height": side, "width": wide} | [side, wide] if side == wide:
            return side
    if settings.size is not None:
        return settings.size
    raise UserError(f"tower = {settings.tower!r} wants pictures of size {size}; clasp shows squares, so set image.size")


def _max_positions(net: nn.Module, settings: TextTowerSettings) -> int | None:
    """The longest text, in tokens, that a learned position table has rows for; none where positions are computed."""
    rows = [
        # RoBERTa and its kin count positions from the padding id on
        table.num_embeddings - (0 if table.padding_idx is None else table.padding_idx + 1)
        for name, table in net.named_modules()
        if isinstance(table, nn.Embedding) and ("position" in name.rpartition(".")[2] or name == "wpe")
    ]
    longest = min(rows, default=None)
    if longest is not None and settings.max_tokens is not None and settings.max_tokens > longest:
        raise UserError(f"max_tokens = {settings.max_tokens}: {settings.tower} has positions for {longest} tokens")
    return longest


def _load_tokenizer(name: str, tower: str, longest: int | None) -> Tokenizer:
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    with translate_hub_errors(tower):
        try:
            theirs = AutoTokenizer.from_pretrained(name)
        except Exception as error:  # converters fail with whatever they meet, and tokenizers with bare Exception
            raise ValueError(f"its tokenizer: {error}") from error
    if not isinstance(theirs, PreTrainedTokenizerFast):
        raise UserError(
            f"tower = {tower!r} has a {type(theirs).__name__}, which has no fast form (tokenizer.json); "
            "write a factory that gives a clasp.Backbone with a tokenizer"
        )
    if len(theirs) <= len(theirs.all_special_tokens):  # transformers makes an empty one where it finds no file
        raise UserError(f"tower = {tower!r} has no words in its tokenizer: is tokenizer.json missing?")
    pads = [number for number in (theirs.pad_token_id, theirs.eos_token_id, 0) if isinstance(number, int)]
    return Tokenizer(theirs.backend_tokenizer, pad_id=pads[0], max_tokens=min(64, longest or 64))


def _read_json(name: str, file: str) -> dict[str, Any] | None:
    """A file of the repository or the folder; none where it has no such file."""
    from transformers.utils.hub import cached_file

    path = cached_file(name, file, _raise_exceptions_for_missing_entries=False)
    if path is None:
        return None
    with open(path, encoding="utf-8") as stream:
        return json.load(stream)
