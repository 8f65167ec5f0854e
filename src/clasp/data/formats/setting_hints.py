"""Which setting mends an error of a reader, in the words of what opened the pairs; and which one a bare path is for.

Input: an error that another name of a column, or another folder of the images, would mend. Output: the same error with
a hint. Note: readers raise without one, since each verb names these settings in its own way: a recipe by its keys,
``clasp eval`` by its options, ``clasp index`` not at all.
"""

from __future__ import annotations

import os
import shlex
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from clasp.errors import UserError


class ColumnError(UserError):
    """A column is missing, or it is not clear which one is meant."""


class OutsideRootError(UserError):
    """An image path leads out of the folder that relative paths start from."""


@dataclass(frozen=True, slots=True)
class SettingHints:
    """What to set: ``columns``, names of columns; ``images``, where images are not there; ``image_root``, where their
    paths lead out of a folder."""

    columns: str
    images: str
    image_root: str

    @classmethod
    def of_keys(cls, prefix: str, root: str) -> SettingHints:
        """Those of a vocabulary of ``key=value``; ``prefix`` is before the name of a column, ``root`` the whole key."""
        return cls(
            f"columns of other names: {prefix}image=NAME {prefix}caption=NAME",
            f"name the folder that relative paths start from: {root}=FOLDER",
            f"where that is meant, name the folder that relative paths start from: {root}=FOLDER",
        )

    @contextmanager
    def added(self) -> Iterator[None]:
        """A block whose errors of the two kinds leave with a hint."""
        try:
            yield
        except ColumnError as error:
            raise UserError(f"{error}; {self.columns}") from None
        except OutsideRootError as error:
            raise UserError(f"{error}; {self.image_root}") from None


def suggest_key(word: str, keys: Sequence[str], given: Collection[str]) -> str:
    """``; it is a path: did you mean KEY=word?`` for a word that is an existing path, with the first of ``keys`` that
    is not among the given ones; empty for any other word."""
    free = [key for key in keys if key not in given]
    if not free or "\0" in word or not os.path.exists(word):
        return ""
    return f"; it is a path: did you mean {free[0]}={shlex.quote(word)}?"


RECIPE_HINTS = SettingHints.of_keys("data.columns.", "data.image_root")
"""The keys of a recipe: train, doctor, pair, and what reads the pairs of a run"""
OPTION_HINTS = SettingHints.of_keys("", "image_root")
"""The options of a task: eval, compare, analyze, maps"""
PYTHON_HINTS = SettingHints(
    "columns of other names: columns=ColumnNames(image=NAME, caption=NAME)",
    "name the folder that relative paths start from: image_root=FOLDER",
    "where that is meant, name the folder that relative paths start from: image_root=FOLDER",
)
"""The arguments of ``open_pairs``"""
FIXED_HINTS = SettingHints(
    "other names are read only where the run was trained on this source: rename the columns, or index the folder of "
    "the images",
    "index the folder of the images",
    "other folders are read only where the run was trained on this source: index the folder of the images",
)
"""Verbs that take no such setting: index, serve, watch"""
