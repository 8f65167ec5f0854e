"""LilT's switches, read as a tuning spec: what trained when a checkpoint was made.

In goes a ``LiltCheckpoint``, out comes, for each tower, a list of methods whose selection is what the authors' code
left unfrozen, and what had to be assumed. Unusual: that code unlocks by substrings of its own names, one switch after
the other, so this is done as it does it, on its names; then the fewest methods of ours are sought that select the same.
What LilT adds to a tower (adapters, an appended layer) is always in the selection: no other file has it.
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
    """What the authors' code looks for in the names of a tower."""

    freeze_flag: str
    """the switch that freezes the tower"""
    only_value: str
    """the value of a switch that means this tower alone"""
    norms: str
    dense: str
    attention: str
    extra_prefix: str
    """beginning of what trains together with the last block; "-" for nothing"""
    always_freeze_key: str
    """key of ``always_freeze``"""
    paper_sizes: tuple[tuple[int, int], ...]
    """widths and blocks of the paper's towers, for a file without switches"""


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
# tried alone and together, the fewest first; the last two are for the text tower, where LilT's words go further
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
    """What trains in one tower."""

    methods: list[str]
    appended_blocks: int
    """blocks that are not of the plain tower"""
    trained: frozenset[str]
    """our names of what trained when the file was made"""
    notes: list[str]


def infer_lilt_tuning(lilt: LiltCheckpoint, modality: Modality) -> LiltTuning:
    """Read one tower. Raises ``UserError`` for a switch with a value that LilT does not know."""
    side, switches = lilt.towers[modality], lilt_flags(lilt)
    appended = _appended_blocks(side, switches)
    trained = _trained_by_default(side, appended) if switches is None else _trained_by_flags(side, switches)
    net = build_on_meta(side.base_tower(appended)[0])
    structure = [APPENDED_BLOCK_METHOD] if appended else []
    structure += [lilt_adapter_method(modality, side.reduction)] if side.reduction else []
    added = apply_tuning(net, structure or ["none"], seed=0)
    methods = structure + _fewest_methods(net, trained, added)
    notes = []
    if idle := len(added - trained):
        notes.append(f"{idle} tensors of the {modality} tower were frozen; no plain tower has them, so they train here")
    return LiltTuning(methods or ["none"], appended, frozenset(trained), notes)


def explain_lilt_tuning(lilt: LiltCheckpoint, in_towers: int) -> list[str]:
    """What a person should know of how this was found out; ``in_towers`` tensors of both are taken to have trained."""
    said, switches = [], lilt_flags(lilt)
    heads_frozen = switches is not None and _is_set(switches, "freeze_proj")
    trained = in_towers + 1 + (0 if heads_frozen else 4)  # the temperature always does
    if switches is None:
        said.append("the file has no switches; adapters, appended layers and all norms are taken to have trained")
    elif _is_set(switches, "unlock_random"):
        said.append("unlock_random: which layers were drawn to train is not in the file, so they are frozen here")
    if heads_frozen:
        said.append("freeze_proj: the heads were frozen; no tower has them, so they train here")
    if lilt.optimizer_tensors not in (None, trained):
        said.append(f"its optimizer held {lilt.optimizer_tensors} tensors, and {trained} are taken to have trained")
    return said


def lilt_flags(lilt: LiltCheckpoint) -> Mapping[str, Any] | None:
    """The configuration, where it says what trained."""
    config = lilt.config
    return (
        config
        if config is not None and {words.freeze_flag for words in _TOWER_FLAGS.values()} <= config.keys()
        else None
    )


# --- the switches ----------------------------------------------------------------------------------------------------


def _is_set(switches: Mapping[str, Any], name: str) -> bool:
    value = switches.get(name) or False
    if not isinstance(value, bool):
        raise UserError(f"the checkpoint's config has {name} = {value!r}; LilT knows true and false")
    return value


def _applies_to(switches: Mapping[str, Any], name: str, flags: _TowerFlags) -> bool:
    """Whether a switch of either or both towers is on for this one."""
    value, known = switches.get(name) or False, [each.only_value for each in _TOWER_FLAGS.values()]
    if not isinstance(value, bool) and value not in known:
        raise UserError(f"the checkpoint's config has {name} = {value!r}; LilT knows true, false, {', '.join(known)}")
    return value is True or value == flags.only_value


def _appended_blocks(side: LiltTower, switches: Mapping[str, Any] | None) -> int:
    """How many of the blocks were appended: the switches say it, without them the sizes of the paper's towers do."""
    words = _TOWER_FLAGS[side.modality]
    if switches is None:
        return int((side.settings.width, side.settings.layers - 1) in words.paper_sizes)
    if not _is_set(switches, "adapter_append") or side.settings.layers < 2:
        return 0
    if side.modality == "text":
        return int(switches.get("pretrained_text") is not False)  # else the authors' code forgets the setting
    dino = "dino" in str(switches.get("vision_encoder"))  # its builder forgets settings of adapters
    return int(not dino or side.settings.layers == 13)


def _trained_by_flags(side: LiltTower, flags: Mapping[str, Any]) -> set[str]:
    """Our names of what the authors' code leaves unfrozen, switch by switch, in its order."""
    words = _TOWER_FLAGS[side.modality]
    last = f"{LILT_BLOCK_PREFIXES[side.modality]}{side.settings.layers - 1}."

    def unlocks(name: str) -> bool:
        return (
            not _is_set(flags, words.freeze_flag)
            or (_applies_to(flags, "unlock_layernorm", words) and words.norms in name)
            or (_applies_to(flags, "bitfit", words) and "bias" in name)
            or (_is_set(flags, "unlock_dense") and words.dense in name)
            or (_is_set(flags, "unlock_attn") and words.attention in name)
            or (_is_set(flags, "add_adapter") and name.startswith((last, words.extra_prefix)))
            or "adapter" in name
        )

    again = flags.get("always_freeze") or {}
    again = again.get(words.always_freeze_key) or [] if isinstance(again, dict) else again
    if not isinstance(again, list):
        raise UserError(f"always_freeze is no table of lists of blocks in the checkpoint's config, but {again!r}")
    frozen = tuple(f"{LILT_BLOCK_PREFIXES[side.modality]}{block}." for block in again)
    return {ours for ours, name in side.original_names.items() if unlocks(name) and not name.startswith(frozen)}


def _trained_by_default(side: LiltTower, appended: int) -> set[str]:
    """What LilT's two recipes train: norms, and what was added."""
    words = _TOWER_FLAGS[side.modality]
    starts = (
        (f"{LILT_BLOCK_PREFIXES[side.modality]}{side.settings.layers - 1}.", words.extra_prefix) if appended else ()
    )
    return {
        ours
        for ours, name in side.original_names.items()
        if words.norms in name or "adapter" in name or name.startswith(starts)
    }


# --- methods ---------------------------------------------------------------------------------------------------------


def _fewest_methods(net: nn.Module, trained: set[str], added: set[str]) -> list[str]:
    """The fewest methods that select ``trained``; ``added`` are selected already. ``net`` has them in it."""
    names = {name for name, _ in net.named_parameters()}
    wanted = trained | added
    selections = {method: selected for method in _CANDIDATE_METHODS if (selected := _selected(net, method)) <= wanted}
    for count in range(len(selections) + 1):
        for methods in combinations(selections, count):
            if added.union(*(selections[method] for method in methods)) == wanted:
                return list(methods)
    patterns: dict[str, None] = {}  # by name, each block alike where that is so
    for name in sorted(wanted - added):
        pattern = re.sub(r"\.\d+\.", ".*.", name)
        fits = set(fnmatch.filter(names, pattern)) <= wanted
        patterns[f"match({(pattern if fits else name)!r})"] = None
    return list(patterns)


def _selected(net: nn.Module, method: str) -> set[str]:
    if not method.startswith("match"):
        return apply_tuning(net, [method], seed=0)
    pattern = method.removeprefix("match('").removesuffix("')")
    return set(fnmatch.filter([name for name, _ in net.named_parameters()], pattern))
