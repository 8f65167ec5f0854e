"""Any image or text encoder that ``transformers`` can load, from the hub or a folder; also decoder language models.

Input: a repository or a folder. Output: a ``Backbone`` in float32, all of whose parameters are in the checkpoint. Note:
images are not preprocessed by ``transformers``: size, mean and deviation are read from ``preprocessor_config.json``,
and images are transformed by ``clasp.data.images``, as for every other tower. Modality and shapes are checked on the
meta device before any weight is read. Whether a text tower has causal attention is probed, not looked up.
"""

from __future__ import annotations

import logging as levels
import pickle
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from clasp.data.tokenizer import Tokenizer
from clasp.models.backbone import Backbone, Pooler
from clasp.models.classifier import Classifier
from clasp.models.structure import find_structure, find_unused_modules, learned_positions
from clasp.models.tower_settings import ImageTowerSettings, TextTowerSettings
from clasp.models.zoo.image_classifiers import find_labels, read_image_classifier
from clasp.models.zoo.known_configs import KNOWN_CONFIGS
from clasp.models.zoo.preprocessing import Preprocessing, read_preprocessing
from clasp.models.zoo.sentence_pooling import read_json, read_sentence_pooling
from clasp.types import UserError


class _SubEncoder(NamedTuple):
    """The class of an encoder inside a larger model, and the key of its configuration in that model's."""

    class_name: str
    config_key: str | None = None


# families whose AutoModel is a whole dual encoder, or an encoder with a decoder
_SUB_ENCODERS: dict[tuple[str, str], _SubEncoder] = {
    ("clip", "image"): _SubEncoder("CLIPVisionModel", "vision_config"),
    ("clip", "text"): _SubEncoder("CLIPTextModel", "text_config"),
    ("metaclip_2", "image"): _SubEncoder("MetaClip2VisionModel", "vision_config"),
    ("metaclip_2", "text"): _SubEncoder("MetaClip2TextModel", "text_config"),
    ("siglip", "image"): _SubEncoder("SiglipVisionModel", "vision_config"),
    ("siglip", "text"): _SubEncoder("SiglipTextModel", "text_config"),
    ("siglip2", "text"): _SubEncoder("Siglip2TextModel", "text_config"),
    ("t5", "text"): _SubEncoder("T5EncoderModel"),
    ("mt5", "text"): _SubEncoder("MT5EncoderModel"),
    ("umt5", "text"): _SubEncoder("UMT5EncoderModel"),
}
_MODALITIES = {"pixel_values": "image", "input_ids": "text"}
# families that pool with layers of the net
_POOLERS = {
    "SiglipVisionModel": Pooler("states", "head"),
    "SiglipTextModel": Pooler("last", "head"),
    "Siglip2TextModel": Pooler("last", "head"),
    "Aimv2VisionModel": Pooler("states", "head"),
    "PixioModel": Pooler("prefix", None),
}
_TEXT_POOLS = {  # by model_type, where attention does not tell
    **dict.fromkeys(("clip", "clip_text_model", "metaclip_2", "metaclip_2_text_model"), "eos"),
    **dict.fromkeys(("chinese_clip", "chinese_clip_text_model"), "cls"),
}
_POOLS_PATCHES = ("beit", "data2vec-vision")  # though they have a class token
_PADS_TO_ITS_POSITIONS = ("SiglipTextModel", "Siglip2TextModel")  # and attends to the padding


def load_transformers_backbone(name: str, settings: ImageTowerSettings | TextTowerSettings, meta: bool) -> Backbone:
    """The encoder at ``name`` (a hub repository or a folder); see ``clasp.models.zoo.registry.load_backbone``."""
    with translate_hub_errors(settings.tower):
        config = load_config(name, meta)
        return read_encoder(name, config, _load_net(name, config, settings, meta), settings, meta)


def read_encoder(
    name: str, config: Any, net: nn.Module, settings: ImageTowerSettings | TextTowerSettings, meta: bool
) -> Backbone:
    """An encoder with its pooling, and its transform or tokenizer as read from the files at ``name``."""
    version = vars(config).get("_commit_hash") or f"transformers {config.transformers_version}"
    if isinstance(settings, ImageTowerSettings):
        return _image_backbone(name, config, net, version, settings, meta)
    return _text_backbone(name, config, net, version, settings, meta)


def _image_backbone(
    name: str, config: Any, net: nn.Module, version: str, settings: ImageTowerSettings, meta: bool
) -> Backbone:
    if config.to_dict().get("num_channels") not in (None, 3):
        raise UserError(f"tower = {settings.tower!r} reads {config.num_channels} channels, and pictures are RGB here")
    pooler = _own_pooler(net)
    pool = "cls" if find_structure(net).prefix_tokens and config.model_type not in _POOLS_PATCHES else "mean"
    prepared = None if meta else _read_preprocessing(name, settings)
    return Backbone(
        settings.tower,
        "image",
        net,
        version,
        pool if pooler is None else "pooler",
        None if prepared is None else prepared.transform,
        forward_features=_forward_bgr if prepared is not None and prepared.bgr else None,
        pooler=pooler,
        classifier=None if meta else _labelled_classifier(name, config, settings.tower),
    )


def _labelled_classifier(name: str, config: Any, tower: str) -> Callable[[], Classifier | None] | None:
    """Reads the classifier of the checkpoint, where its configuration declares one whose classes have names."""
    kind, labels = find_labels(config)
    if kind is None:
        return None

    def read() -> Classifier | None:
        with translate_hub_errors(tower):
            return read_image_classifier(name, kind, labels)

    return read


def _text_backbone(
    name: str, config: Any, net: nn.Module, version: str, settings: TextTowerSettings, meta: bool
) -> Backbone:
    longest = _max_positions(net, settings)
    if not settings.token_types:
        _drop_token_types(net, settings)
    authors = None if meta and name in KNOWN_CONFIGS else read_sentence_pooling(name, net, settings)
    pooler = authors.pooler if authors is not None else _own_pooler(net)
    if pooler is not None:
        pool = "pooler"
    elif authors is not None:
        pool = authors.pool
    else:
        pool = _TEXT_POOLS.get(config.model_type) or _pool_by_direction(net, meta)
    changes: dict[str, Any] = {} if authors is None else authors.tokenizer_changes
    if type(net).__name__ in _PADS_TO_ITS_POSITIONS and (settings.pool or pool) == "pooler":
        if settings.max_tokens not in (None, longest):
            raise UserError(
                f"max_tokens = {settings.max_tokens}: {settings.tower} reads every text padded to {longest} tokens and "
                "pools the last of them; leave max_tokens out, or set text.pool = 'mean'"
            )
        changes |= {"max_tokens": longest, "padding": "max_tokens"}
    return Backbone(
        settings.tower,
        "text",
        net,
        version,
        pool,
        tokenizer=lambda: _load_tokenizer(name, settings.tower, longest, changes),
        pooler=pooler,
    )


def _own_pooler(net: nn.Module) -> Pooler | None:
    """The pooling layers of the family, where this checkpoint has them."""
    pooler = _POOLERS.get(type(net).__name__)
    return pooler if pooler is None or pooler.module in (None, *dict(net.named_children())) else None


def _forward_bgr(net: Any, pixels: Tensor) -> Tensor:
    return net(pixel_values=pixels.flip(1)).last_hidden_state


@contextmanager
def translate_hub_errors(tower: str) -> Iterator[None]:
    """Translate errors of the hub and its libraries to one-line ``UserError``, and silence their logs and warnings."""
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


def load_config(name: str, meta: bool) -> Any:
    """The configuration at ``name``; on the meta device that of ``KNOWN_CONFIGS`` where it is one."""
    from transformers import AutoConfig

    if meta and name in KNOWN_CONFIGS:
        facts = dict(KNOWN_CONFIGS[name])
        return AutoConfig.for_model(facts.pop("model_type"), **facts)
    return AutoConfig.from_pretrained(name, trust_remote_code=False)


def _load_net(name: str, config: Any, settings: ImageTowerSettings | TextTowerSettings, meta: bool) -> nn.Module:
    """The encoder with its weights, or on the meta device. Raises ``UserError`` for weights that are missing."""
    shapes = _build_on_meta(config, settings)
    if meta:
        return shapes
    net, facts = type(shapes).from_pretrained(name, dtype=torch.float32, output_loading_info=True)
    pooler = _own_pooler(net) if settings.pool in (None, "pooler") else None
    used = {pooler.module} if pooler is not None else set()
    unused = tuple(f"{path}." for path in find_unused_modules(net) if path not in used)
    require_weights((key for key in facts["missing_keys"] if not f"{key}.".startswith(unused)), settings)
    return net.eval()


def require_weights(missing: Iterable[str], settings: ImageTowerSettings | TextTowerSettings) -> None:
    """Raise ``UserError`` where names of weights are missing from a checkpoint."""
    names = sorted(missing)
    if names:
        more = f" and {len(names) - 3} more" if len(names) > 3 else ""
        raise UserError(f"tower = {settings.tower!r}: its weights lack {', '.join(names[:3])}{more}")


def _build_on_meta(config: Any, settings: ImageTowerSettings | TextTowerSettings) -> Any:
    """The encoder on the meta device. Raises ``UserError`` when it is of the other modality, or not one encoder."""
    import transformers

    wanted = "image" if isinstance(settings, ImageTowerSettings) else "text"
    sub_encoder, facts = _SUB_ENCODERS.get((config.model_type, wanted)), config.to_dict()
    with torch.device("meta"):
        if sub_encoder is not None:
            sub_config = config if sub_encoder.config_key is None else vars(config)[sub_encoder.config_key]
            return _all_on_meta(getattr(transformers, sub_encoder.class_name)(sub_config))
        several = {"vision_config", "text_config", "audio_config"} & facts.keys()
        if several or facts.get("is_encoder_decoder"):
            holds = "several encoders" if several else "an encoder with a decoder"
            known = ", ".join(family for family, modality in _SUB_ENCODERS if modality == wanted)
            raise UserError(
                f"[{wanted}] tower = {settings.tower!r} is {config.model_type}, {holds}; clasp takes the {wanted} half "
                f"of {known}, and clip: opens more; for any other write a factory that gives a clasp.Backbone"
            )
        net = transformers.AutoModel.from_config(config, trust_remote_code=False)
    reads = _MODALITIES.get(net.main_input_name)
    if reads != wanted:
        what = f"a tower for {reads}s" if reads else f"a model of {net.main_input_name}"
        raise UserError(f"[{wanted}] tower = {settings.tower!r} is {what} ({config.model_type})")
    return _all_on_meta(net)


def _all_on_meta(net: Any) -> Any:
    """The net in evaluation mode; parameters that XLNet creates on the CPU (by the legacy constructor) are moved."""
    for module in net.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            if not parameter.is_meta:
                setattr(module, name, nn.Parameter(parameter.to("meta")))
    return net.eval()


def _pool_by_direction(net: nn.Module, meta: bool) -> str:
    """``last`` for causal attention, else ``mean``; on the meta device ``mean``, since nothing can be probed there."""
    return "last" if not meta and _is_causal(net) else "mean"


def _is_causal(net: nn.Module) -> bool:
    """Whether attention is causal: the first token's hidden state is independent of the second token."""
    with torch.no_grad():
        first, other = (net(input_ids=torch.tensor([[0, second]])).last_hidden_state[0, 0] for second in (1, 2))
    return torch.equal(first, other)


class _NoTokenTypes(nn.Module):
    """Replaces BERT's token-type embedding by zeros."""

    def forward(self, token_types: Tensor) -> Tensor:
        return torch.zeros((*token_types.shape, 1), device=token_types.device)


def _drop_token_types(net: nn.Module, settings: TextTowerSettings) -> None:
    if "embeddings.token_type_embeddings" not in dict(net.named_modules()):
        raise UserError(f"token_types = false: {settings.tower} has no token-type embedding to leave out")
    net.get_submodule("embeddings").token_type_embeddings = _NoTokenTypes()


# --- pixels and tokens ---------------------------------------------------------------------------------------------


def _read_preprocessing(name: str, settings: ImageTowerSettings) -> Preprocessing:
    newer = read_json(name, "processor_config.json") or {}
    return read_preprocessing(newer.get("image_processor") or read_json(name, "preprocessor_config.json"), settings)


def _max_positions(net: nn.Module, settings: TextTowerSettings) -> int | None:
    """``learned_positions``. Raises ``UserError`` where ``max_tokens`` is more."""
    longest = learned_positions(net)
    if longest is not None and settings.max_tokens is not None and settings.max_tokens > longest:
        raise UserError(f"max_tokens = {settings.max_tokens}: {settings.tower} has positions for {longest} tokens")
    return longest


def _load_tokenizer(name: str, tower: str, longest: int | None, changes: Mapping[str, Any]) -> Tokenizer:
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    with translate_hub_errors(tower):
        try:
            tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
        except Exception as error:  # converters raise arbitrary errors, and tokenizers bare Exception
            raise ValueError(f"its tokenizer: {error}") from error
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise UserError(
            f"tower = {tower!r} has a {type(tokenizer).__name__}, which has no fast form (tokenizer.json); "
            "write a factory that gives a clasp.Backbone with a tokenizer"
        )
    if len(tokenizer) <= len(tokenizer.all_special_tokens):  # empty where the file is missing
        raise UserError(f"tower = {tower!r} has no words in its tokenizer: is tokenizer.json missing?")
    pads = [number for number in (tokenizer.pad_token_id, tokenizer.eos_token_id, 0) if isinstance(number, int)]
    given = {"pad_id": pads[0], "max_tokens": min(64, longest or 64), **changes}
    return Tokenizer(tokenizer.backend_tokenizer, **given)
