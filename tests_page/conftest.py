"""The tests of the pages run under what all others do."""

from __future__ import annotations

from exactness import converted_towers, float32_by_default

__all__ = ["converted_towers", "float32_by_default"]
