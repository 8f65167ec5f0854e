"""What the tests run under refuses a wrong type and sizes that differ, in functions with and without tensors."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import jaxtyping
import pytest
import torch
from beartype import beartype
from jaxtyping import Float, TypeCheckError
from torch import Tensor

from clasp.evaluation.language_sets import macro_set
from clasp.types import Embeddings, Pixels

checked = jaxtyping.jaxtyped(typechecker=beartype)


@checked
def together(one: Float[Tensor, "n d"], other: list[Float[Tensor, "n d"]] | None) -> Float[Tensor, " n"]:
    return one.sum(dim=1) if other is None else other[0][0]


@checked
def length(of: str, later: Later | None = None) -> int:
    return len(of) if of else None  # pyright: ignore[reportReturnType]


@checked
def twice(of: int) -> Iterator[int]:
    yield from (of, of)


@checked
@dataclass
class Later:
    name: str
    values: dict[str, int]


def test_sizes_agree_among_arguments_and_result():
    assert together(torch.zeros(3, 2), None).shape == (3,)
    for wrong in (
        lambda: together(torch.zeros(3, 2), [torch.zeros(3, 4)]),
        lambda: together(torch.zeros(3, 2), [torch.zeros(3, 2)]),
        lambda: together(torch.zeros(3), None),
    ):
        with pytest.raises(TypeCheckError):
            wrong()


def test_types_of_arguments_results_and_fields():
    assert length("abc") == 3 and list(twice(2)) == [2, 2] and Later("a", {"b": 1}).name == "a"
    for wrong in (lambda: length(3), lambda: length(""), lambda: twice("2"), lambda: Later("a", {"b": "c"})):
        with pytest.raises(TypeCheckError):
            wrong()
    assert length.__annotations__["of"] == "str"


def test_the_package_is_checked():
    for wrong in (
        lambda: macro_set(3),  # pyright: ignore[reportArgumentType]
        lambda: Pixels("red"),  # pyright: ignore[reportArgumentType]
        lambda: Embeddings(torch.zeros(2, 3), torch.zeros(2, 4), torch.ones(()), None),
    ):
        with pytest.raises(TypeCheckError):
            wrong()
