"""Translates LilT's training flags into a tuning spec: which parameters were trainable when a checkpoint was made.

Input: a ``LiltCheckpoint``. Output: for each tower, a list of tuning methods that selects what the authors' code left
unfrozen, and notes on what was assumed. Note: that code unfreezes by substrings of its own parameter names, one flag
after the other; this is replayed on those names, and then the fewest of our methods with the same selection are
searched. What LilT adds to a tower (adapters, an appended layer) is always selected: no other file contains it.
"""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import combinations
from typing import Any

from torch import nn

from clasp.convert.importers.lilt_checkpoint import (
    LILT_BLOCK_PREFIXES,
    LiltCheckpoint,
    LiltTower,
    Modality,
    lilt_adapter_method,
)
from clasp.models.tuning.spec import apply_tuning
from clasp.models.zoo.folder import build_on_meta
from clasp.types import UserError


@dataclass(frozen=True, slots=True)
class _TowerFlags:
    """The flags and name substrings that the authors' code uses for a tower."""

    freeze_flag: str
    """flag that freezes the tower"""
    only_value: str
    """value of a flag that restricts it to this tower"""
    norms: str
    dense: str
    attention: str
    extra_prefix: str
    """name prefix of what is unfrozen together with the last block; "-" for nothing"""
    always_freeze_key: str
    """key of ``always_freeze``"""
    paper_sizes: tuple[tuple[int, int], ...]
    """widths and depths of the paper's towers, for a file without flags"""


_TOWER_FLAGS: dict[Modality, _TowerFlags] = {
    "image": _TowerFlags(
        freeze_flag="freeze_vision_encoder",
        only_value="vision_only",
        norms="norm",
        dense="mlp",
        attention="attn",
        extra_prefix="norm.",
        always_freeze_key="visual_encoder",
        paper_sizes=((192, 12), (384, 12), (768, 12), (1024, 24)),
    ),
    "text": _TowerFlags(
        freeze_flag="freeze_text_encoder",
        only_value="language_only",
        norms="LayerNorm",
        dense="dense",
        attention="attention",
        extra_prefix="-",
        always_freeze_key="text_encoder",
        paper_sizes=((128, 2), (512, 4), (768, 12), (1024, 24)),
    ),
}
APPENDED_BLOCK_METHOD = "deep(1, init='random')"
# combinations are tried by increasing size; the two match() methods are for the text tower, where LilT's substrings
# match more than our "mlp" and "attention"
_CANDIDATE_METHODS = (
    "norms",
    "biases",
    "last(1)",
    "mlp",
    "attention",
    "match('*.dense.*')",
    "match('*.attention.*')",
    "full",
)


@dataclass(frozen=True, slots=True)
class LiltTuning:
    """The tuning of one tower."""

    methods: list[str]
    appended_blocks: int
    """number of blocks that the base tower does not have"""
    trained: frozenset[str]
    """our names of the parameters that were trainable"""
    notes: list[str]


def infer_lilt_tuning(lilt: LiltCheckpoint, modality: Modality) -> LiltTuning:
    """The tuning of one tower. Raises ``UserError`` for a flag value that LilT does not have."""
    side, flags = lilt.towers[modality], lilt_flags(lilt)
    appended = _appended_blocks(side, flags)
    trained = _trained_by_default(side, appended) if flags is None else _trained_by_flags(side, flags)
    net = build_on_meta(side.base_tower(appended)[0])
    inserted = [APPENDED_BLOCK_METHOD] if appended else []
    inserted += [lilt_adapter_method(modality, side.reduction)] if side.reduction else []
    added = apply_tuning(net, inserted or ["none"], seed=0)
    methods = inserted + _fewest_methods(net, trained, added)
    notes = []
    if frozen := len(added - trained):
        notes.append(
            f"{frozen} tensors of the {modality} tower were frozen; no base tower has them, so they train here"
        )
    return LiltTuning(methods or ["none"], appended, frozenset(trained), notes)


def explain_lilt_tuning(lilt: LiltCheckpoint, in_towers: int) -> list[str]:
    """Notes on how the tuning was inferred; ``in_towers`` is the number of tensors of both towers assumed trainable."""
    notes, flags = [], lilt_flags(lilt)
    heads_frozen = flags is not None and _is_set(flags, "freeze_proj")
    trained = in_towers + 1 + (0 if heads_frozen else 4)  # the temperature is always trainable
    if flags is None:
        notes.append("the file has no flags; adapters, appended layers and all norms are assumed to have been trained")
    elif _is_set(flags, "unlock_random"):
        notes.append("unlock_random: the file does not contain which layers were drawn, so they are frozen here")
    if heads_frozen:
        notes.append("freeze_proj: the heads were frozen; no base tower has them, so they train here")
    if lilt.optimizer_tensors not in (None, trained):
        notes.append(
            f"its optimizer has {lilt.optimizer_tensors} tensors, but {trained} are assumed to have been trained"
        )
    return notes


def lilt_flags(lilt: LiltCheckpoint) -> Mapping[str, Any] | None:
    """The configuration, if it contains the flags of both towers."""
    config = lilt.config
    return (
        config
        if config is not None and {names.freeze_flag for names in _TOWER_FLAGS.values()} <= config.keys()
        else None
    )


# --- flags -----------------------------------------------------------------------------------------------------------


def _is_set(flags: Mapping[str, Any], name: str) -> bool:
    value = flags.get(name) or False
    if not isinstance(value, bool):
        raise UserError(f"the checkpoint's config has {name} = {value!r}; LilT has true and false")
    return value


def _applies_to(flags: Mapping[str, Any], name: str, names: _TowerFlags) -> bool:
    """Whether a flag, which may be restricted to one tower, is set for this one."""
    value, known = flags.get(name) or False, [each.only_value for each in _TOWER_FLAGS.values()]
    if not isinstance(value, bool) and value not in known:
        raise UserError(f"the checkpoint's config has {name} = {value!r}; LilT has true, false, {', '.join(known)}")
    return value is True or value == names.only_value


def _appended_blocks(side: LiltTower, flags: Mapping[str, Any] | None) -> int:
    """Number of appended blocks: from the flags, or without them from the sizes of the paper's towers."""
    if flags is None:
        return int((side.settings.width, side.settings.layers - 1) in _TOWER_FLAGS[side.modality].paper_sizes)
    if not _is_set(flags, "adapter_append") or side.settings.layers < 2:
        return 0
    if side.modality == "text":
        return int(flags.get("pretrained_text") is not False)  # otherwise the authors' code ignores the flag
    dino = "dino" in str(flags.get("vision_encoder"))  # the DINO builder ignores adapter settings
    return int(not dino or side.settings.layers == 13)


def _trained_by_flags(side: LiltTower, flags: Mapping[str, Any]) -> set[str]:
    """Our names of what the authors' code leaves unfrozen, flag by flag, in its order."""
    names = _TOWER_FLAGS[side.modality]
    last = f"{LILT_BLOCK_PREFIXES[side.modality]}{side.settings.layers - 1}."

    def unlocks(name: str) -> bool:
        return (
            not _is_set(flags, names.freeze_flag)
            or (_applies_to(flags, "unlock_layernorm", names) and names.norms in name)
            or (_applies_to(flags, "bitfit", names) and "bias" in name)
            or (_is_set(flags, "unlock_dense") and names.dense in name)
            or (_is_set(flags, "unlock_attn") and names.attention in name)
            or (_is_set(flags, "add_adapter") and name.startswith((last, names.extra_prefix)))
            or "adapter" in name
        )

    refrozen = flags.get("always_freeze") or {}
    refrozen = refrozen.get(names.always_freeze_key) or [] if isinstance(refrozen, dict) else refrozen
    if not isinstance(refrozen, list):
        raise UserError(f"always_freeze in the checkpoint's config is not a table of lists of blocks, but {refrozen!r}")
    frozen = tuple(f"{LILT_BLOCK_PREFIXES[side.modality]}{block}." for block in refrozen)
    return {ours for ours, name in side.original_names.items() if unlocks(name) and not name.startswith(frozen)}


def _trained_by_default(side: LiltTower, appended: int) -> set[str]:
    """Trainable parameters of LilT's two main recipes: norms, and what was added."""
    names = _TOWER_FLAGS[side.modality]
    prefixes = (
        (f"{LILT_BLOCK_PREFIXES[side.modality]}{side.settings.layers - 1}.", names.extra_prefix) if appended else ()
    )
    return {
        ours
        for ours, name in side.original_names.items()
        if names.norms in name or "adapter" in name or name.startswith(prefixes)
    }


# --- methods ---------------------------------------------------------------------------------------------------------


def _fewest_methods(net: nn.Module, trained: set[str], added: set[str]) -> list[str]:
    """The fewest methods that select ``trained``, given that ``added`` (modules inserted into ``net``) are selected."""
    names = {name for name, _ in net.named_parameters()}
    wanted = trained | added
    selections = {method: selected for method in _CANDIDATE_METHODS if (selected := _selected(net, method)) <= wanted}
    for count in range(len(selections) + 1):
        for methods in combinations(selections, count):
            if added.union(*(selections[method] for method in methods)) == wanted:
                return list(methods)
    patterns: dict[str, None] = {}  # by name, with a wildcard for the block number where it matches nothing else
    for name in sorted(wanted - added):
        pattern = re.sub(r"\.\d+\.", ".*.", name)
        exact = set(fnmatch.filter(names, pattern)) <= wanted
        patterns[f"match({(pattern if exact else name)!r})"] = None
    return list(patterns)


def _selected(net: nn.Module, method: str) -> set[str]:
    if not method.startswith("match"):
        return apply_tuning(net, [method], seed=0)
    pattern = method.removeprefix("match('").removesuffix("')")
    return set(fnmatch.filter([name for name, _ in net.named_parameters()], pattern))
