"""What differs between two recipes: keys with both values. Input: recipes as nested dictionaries. Output: lines."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

_UNSET = object()


def describe_changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """``train.lr = 0.01 (was 0.001)`` for each key that differs; trackers do not matter."""
    old, new = dotted_settings(before), dotted_settings(now)
    keys = [key for key in old | new if key != "train.trackers" and old.get(key, _UNSET) != new.get(key, _UNSET)]
    return [f"{_setting(new, key)} (was {_setting(old, key).removeprefix(f'{key} = ')})" for key in keys]


def dotted_settings(section: Mapping[str, Any], before: str = "") -> dict[str, Any]:
    """A recipe with dotted keys: ``train.lr`` to its value."""
    found: dict[str, Any] = {}
    for name, value in section.items():
        found |= (
            dotted_settings(value, f"{before}{name}.") if isinstance(value, Mapping) else {f"{before}{name}": value}
        )
    return found


def _setting(settings: Mapping[str, Any], key: str) -> str:
    return f"{key} = {json.dumps(settings[key], ensure_ascii=False) if key in settings else 'not set'}"
