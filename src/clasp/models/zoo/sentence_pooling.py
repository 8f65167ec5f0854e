"""The modules of a sentence-transformers folder around its net: pooling, layers on the pooled vector, default prompt.

Input: the files that ``modules.json`` lists. Output: a pooling, a ``Pooler`` whose module is added to the net, and
settings of the tokenizer. Note: a final ``Normalize`` is left out, since the dual encoder normalises its embeddings.
Unsupported modules are an error where ``text.pool`` is left out; where it is set, the layers on top are not loaded.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from clasp.models.backbone import Pooler
from clasp.models.tower_settings import TextTowerSettings
from clasp.types import UserError

_MODULE_NAME = "sentence_layers"
_PoolName = Literal["cls", "mean", "last", "cls+mean"]
_POOLS: dict[frozenset[str], _PoolName] = {
    frozenset({"cls"}): "cls",
    frozenset({"mean"}): "mean",
    frozenset({"lasttoken"}): "last",
    frozenset({"cls", "mean"}): "cls+mean",
}
_MODES = {  # pooling flags in older files, before they became the one field pooling_mode
    "pooling_mode_cls_token": "cls",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_lasttoken": "lasttoken",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len_tokens",
    "pooling_mode_weightedmean_tokens": "weightedmean",
}
_ACTIVATIONS: dict[str, type[nn.Module]] = {
    "Identity": nn.Identity,
    "Tanh": nn.Tanh,
    "ReLU": nn.ReLU,
    "GELU": nn.GELU,
    "Sigmoid": nn.Sigmoid,
    "SiLU": nn.SiLU,
}


@dataclass(frozen=True, slots=True)
class SentencePooling:
    """The pooling of the hidden states, and the changes to the tokenizer's settings."""

    pool: _PoolName
    pooler: Pooler | None
    tokenizer_changes: dict[str, Any]


def read_sentence_pooling(name: str, net: nn.Module, settings: TextTowerSettings) -> SentencePooling | None:
    """Read the pooling from the files of a folder or repository; layers on the pooled vector are added to ``net``.

    ``None`` where there are no such files. Raises ``UserError`` for unsupported poolings and layers.
    """
    listed = _read_list(name, "modules.json")
    kinds = [(str(module.get("type", "")).rpartition(".")[2], str(module.get("path", ""))) for module in listed]
    where = next((path for kind, path in kinds if kind == "Pooling"), "1_Pooling")
    pooling_config = read_json(name, f"{where}/config.json")
    if pooling_config is None:
        _refuse_layers(settings, kinds)
        return None
    changes = _tokenizer_changes(name, pooling_config, settings)
    if settings.pool not in (None, "pooler"):
        return SentencePooling("mean", None, changes)  # text.pool takes precedence
    pool = _pool_of(pooling_config, settings)
    after = kinds[[kind for kind, _ in kinds].index("Pooling") + 1 :] if kinds else []
    layers = [layer for kind, path in after if (layer := _layer(name, kind, path, net, settings)) is not None]
    if not layers:
        return SentencePooling(pool, None, changes)
    net.add_module(_MODULE_NAME, nn.Sequential(*layers).eval())
    return SentencePooling(pool, Pooler(pool, _MODULE_NAME), changes)


def read_json(name: str, file: str) -> dict[str, Any] | None:
    """A JSON file of the repository or folder; ``None`` where it does not exist."""
    found = _read(name, file)
    if found is not None and not isinstance(found, dict):
        raise UserError(f"{name}: {file} holds no settings")
    return found


# --- how -------------------------------------------------------------------------------------------------------------


def _read(name: str, file: str) -> Any:
    path = find_file(name, file)
    if path is None:
        return None
    with open(path, encoding="utf-8") as stream:
        return json.load(stream)


def find_file(name: str, file: str) -> str | None:
    """The path of a file of the repository or folder on this machine; ``None`` where it does not exist."""
    from transformers.utils.hub import cached_file

    return cached_file(name, file, _raise_exceptions_for_missing_entries=False)


def _read_list(name: str, file: str) -> list[dict[str, Any]]:
    found = _read(name, file)
    return [entry for entry in found if isinstance(entry, dict)] if isinstance(found, list) else []


def _refuse_layers(settings: TextTowerSettings, kinds: list[tuple[str, str]]) -> None:
    odd = [kind for kind, _ in kinds if kind not in ("Transformer", "Normalize")]
    if odd and settings.pool is None:
        raise UserError(
            f"tower = {settings.tower!r}: its modules.json has {odd[0]} and no Pooling; set text.pool to read it "
            "without"
        )


def _pool_of(pooling_config: dict[str, Any], settings: TextTowerSettings) -> _PoolName:
    newer = pooling_config.get("pooling_mode")
    if newer is not None:
        modes = frozenset([newer] if isinstance(newer, str) else newer)
    else:
        modes = frozenset(mode for key, mode in _MODES.items() if pooling_config.get(key))
    if modes not in _POOLS:
        raise UserError(
            f"tower = {settings.tower!r}: its authors pool by {' and '.join(sorted(modes)) or 'nothing known'}, and "
            "clasp by cls, mean, last or cls and mean; set text.pool to take another"
        )
    return _POOLS[modes]


def _tokenizer_changes(name: str, pooling_config: dict[str, Any], settings: TextTowerSettings) -> dict[str, Any]:
    """The default prompt as ``prefix``, and ``max_seq_length`` as ``max_tokens`` where it is below 64."""
    facts = read_json(name, "config_sentence_transformers.json") or {}
    prompt, changes = "", {}
    if (default := facts.get("default_prompt_name")) is not None:
        prompts = facts.get("prompts") or {}
        if default not in prompts:
            raise UserError(
                f"tower = {settings.tower!r}: its default prompt {default!r} is not one of {', '.join(prompts)}"
            )
        prompt = str(prompts[default])
    if prompt and settings.prefix is None:
        if pooling_config.get("include_prompt") is False:
            raise UserError(
                f"tower = {settings.tower!r}: its default prompt {prompt!r} is read but not pooled, which clasp does "
                "not do; set text.prefix, to '' for none"
            )
        changes["prefix"] = prompt
    longest = (read_json(name, "sentence_bert_config.json") or {}).get("max_seq_length")
    if isinstance(longest, int) and longest < 64:
        changes["max_tokens"] = longest
    return changes


def _layer(name: str, kind: str, path: str, net: nn.Module, settings: TextTowerSettings) -> nn.Module | None:
    """A module of ``modules.json`` after the pooling, with its weights; on the meta device where the net is."""
    if kind in ("Normalize", "Dropout"):
        return None
    facts = read_json(name, f"{path}/config.json") or {}
    meta = next(net.parameters()).is_meta
    with torch.device("meta" if meta else "cpu"):
        if kind == "Dense":
            activation = str(facts.get("activation_function", "Identity")).rpartition(".")[2]
            if activation not in _ACTIVATIONS:
                known = ", ".join(_ACTIVATIONS)
                raise UserError(f"tower = {settings.tower!r}: {path} has the activation {activation}, none of {known}")
            linear = nn.Linear(facts["in_features"], facts["out_features"], bias=facts.get("bias", True))
            layer, part = nn.Sequential(linear, _ACTIVATIONS[activation]()), linear
            prefix = "linear."
        elif kind == "LayerNorm":
            layer = part = nn.LayerNorm(facts["dimension"])
            prefix = "norm."
        else:
            raise UserError(
                f"tower = {settings.tower!r}: its authors put {kind or 'a module'} ({path}) behind the pooling, which "
                "clasp does not know; set text.pool to read it without"
            )
    if not meta:
        tensors = _weights(name, path, settings)
        part.load_state_dict({key.removeprefix(prefix): tensor.float() for key, tensor in tensors.items()})
    return layer


def _weights(name: str, path: str, settings: TextTowerSettings) -> dict[str, Tensor]:
    from safetensors.torch import load_file

    if (file := find_file(name, f"{path}/model.safetensors")) is not None:
        return load_file(file)
    if (file := find_file(name, f"{path}/pytorch_model.bin")) is not None:
        return torch.load(file, map_location="cpu", weights_only=True)
    raise UserError(f"tower = {settings.tower!r}: {path} has no weights (model.safetensors or pytorch_model.bin)")
