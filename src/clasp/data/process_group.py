"""The processes that divide a piece of work between them: what reading needs of ``training.distributed``.

Input: a ``ProcessGroup``; by default ``SINGLE``, this process alone, for which nothing is exchanged. Output: the share
of a sequence that a process works on, and errors that all processes raise. Note: ``raise_together`` and
``gather_objects`` are collective: every process of the group calls them in the same order.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar, runtime_checkable

from clasp.plain_types import UserError

_T = TypeVar("_T")


@runtime_checkable
class ProcessGroup(Protocol):
    """Process ``rank`` of ``size``."""

    @property
    def rank(self) -> int: ...

    @property
    def size(self) -> int: ...

    def gather_objects(self, value: _T) -> list[_T]:
        """The value of every process, in order of rank; pickled."""
        ...


@dataclass(frozen=True)
class SingleProcess:
    """A process that works alone."""

    rank: int = 0
    size: int = 1

    def gather_objects(self, value: _T) -> list[_T]:
        """The value alone."""
        return [value]


SINGLE = SingleProcess()


def own_share(items: Sequence[_T], group: ProcessGroup) -> Sequence[_T]:
    """Consecutive items, as many for each process but for one: those of all processes, by rank, are ``items``."""
    bounds = [len(items) * rank // group.size for rank in (group.rank, group.rank + 1)]
    return items[slice(*bounds)]


def raise_together(group: ProcessGroup, call: Callable[[], _T]) -> _T:
    """The own result of ``call``. Raises on every process what it raised on the first one that failed: ``UserError`` or
    ``KeyboardInterrupt``; ``call`` must not be collective itself."""
    results: list[_T] = []
    failed: UserError | KeyboardInterrupt | None = None
    try:
        results.append(call())
    except (UserError, KeyboardInterrupt) as error:
        failed = error
    for error in group.gather_objects(failed):
        if error is not None:
            raise error
    return results[0]
