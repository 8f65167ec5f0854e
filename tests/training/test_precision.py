"""The precision probe: decided by time, never by starting something long, and only once."""

from __future__ import annotations

import pytest
import torch

from clasp.training import precision
from clasp.training.precision import detect_precision, resolve_precision, time_matmul


@pytest.mark.parametrize(
    ("speed", "expected", "sizes"),
    [
        (2.0, "bfloat16", [32, 64, 128, 256, 512]),
        (1.1, "float32", [32, 64, 128, 256, 512]),  # faster, but the casts would eat it
        (1 / 300, "float32", [32, 64]),  # computed without instructions for it
        (1 / 30_000, "float32", [32]),
    ],
)
def test_probe(monkeypatch: pytest.MonkeyPatch, speed: float, expected: str, sizes: list[int]) -> None:
    asked = []

    def product(dtype: torch.dtype, size: int) -> float:
        seconds = 2 * size**3 / 1e11 / (speed if dtype == torch.bfloat16 else 1.0)
        asked.append((size, seconds))
        return seconds

    monkeypatch.setattr(precision, "time_matmul", product)
    found = precision._probe()
    assert found.precision == expected and f"{sizes[-1]} × {sizes[-1]}" in found.reason
    assert sorted({size for size, _ in asked}) == sizes
    assert max(seconds for _, seconds in asked[2:]) <= 0.005 if asked[2:] else True, "only the first may be long"


def test_this_machine_is_asked_once_and_truly() -> None:
    found = detect_precision(torch.device("cpu"))
    assert detect_precision(torch.device("cpu")) is found and "float32" in found.reason
    assert time_matmul(torch.float32, 8) > 0


def test_the_recipe_has_the_last_word_and_other_devices_stay_in_float32() -> None:
    assert resolve_precision("bfloat16", torch.device("cpu")) == ("bfloat16", "set by the recipe")
    assert resolve_precision("auto", torch.device("cpu")) == detect_precision(torch.device("cpu"))
    assert resolve_precision("auto", torch.device("meta")).precision == "float32"
