"""Filters on the metadata of entries as data: a field, an operator and a value, such as ``folder=holidays``.

Input: conditions as text, and the metadata of an entry (see ``clasp.search.entries``). Output: a ``MetadataFilter``, a
callable that returns whether an entry passes, for ``where`` of ``SearchEngine``. Note: ``folder``, ``caption``,
``language``, ``group`` and ``name`` exist for every entry; all other fields are those of the pairs' ``meta`` and of
the file (``clasp.data.file_fields``). Text is compared without regard to case, numbers as numbers; dates in ISO format
compare correctly as text.
"""

from __future__ import annotations

import operator
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from clasp.data.file_fields import EXIF_FIELDS
from clasp.data.formats.rows import shorten
from clasp.plain_types import UserError

FILTER_OPERATORS = ("!=", ">=", "<=", "=", "~", ">", "<")
"""Equal, not equal, contains (``~``), and order; longer ones first, as they are looked for"""
ENTRY_FIELDS = ("folder", "caption", "language", "group", "name")
_CONDITION = re.compile(r"\s*(?P<field>[^!<>=~]+?)\s*(?P<operator>!=|>=|<=|=|~|>|<)\s*(?P<value>.*?)\s*", re.DOTALL)
_DATE = re.compile(r"[0-9]{4}-[0-9]{2}-[0-9]{2}([T ][0-9]{2}(:.*)?)?", re.DOTALL)
_DATE_START = re.compile(r"[0-9]{4}(-[0-9]{2}(-[0-9]{2}(?![0-9]).*)?)?$", re.DOTALL)
_ORDER: dict[str, Callable[[Any, Any], bool]] = {
    ">=": operator.ge,
    "<=": operator.le,
    ">": operator.gt,
    "<": operator.lt,
}


@dataclass(frozen=True, slots=True)
class MetadataFilter:
    """One condition. An entry without the field passes ``!=`` only; a field of several values passes if one does
    (``!=``: if none is equal). ``folder=a`` and ``folder=a/b`` hold for images anywhere below a folder of that name."""

    field: str
    operator: str
    value: str

    def __str__(self) -> str:
        return f"{self.field}{self.operator}{self.value}"

    def __call__(self, meta: Mapping[str, Any]) -> bool:
        values = entry_values(meta, self.field)
        if self.operator == "!=":
            return not any(self._equal(value) for value in values)
        return any(self._holds(value) for value in values)

    def _holds(self, value: Any) -> bool:
        if self.operator == "=":
            return self._equal(value)
        if self.operator == "~":
            return self.value.casefold() in str(value).casefold()
        left, right = as_number(value), as_number(self.value)
        compare = _ORDER[self.operator]
        if left is not None and right is not None:
            return compare(left, right)
        return compare(str(value).casefold(), self.value.casefold())

    def _equal(self, value: Any) -> bool:
        if self.field == "folder":
            wanted = self.value.strip("/").casefold()
            return f"/{wanted}/" in f"/{str(value).strip('/').casefold()}/"
        left, right = as_number(value), as_number(self.value)
        if left is not None and right is not None:
            return left == right
        return str(value).casefold() == self.value.casefold()


def parse_filter(condition: str) -> MetadataFilter:
    """``folder=holidays``, ``caption~snow``, ``year>=2020``: the condition as data. ``UserError`` if it is none."""
    match = _CONDITION.fullmatch(condition)
    if match is None or not match["value"]:
        choices = ", ".join(FILTER_OPERATORS)
        raise UserError(
            f"the filter {shorten(condition)} is not FIELD, one of {choices}, and VALUE, e.g. folder=holidays"
        )
    return MetadataFilter(match["field"], match["operator"], match["value"])


@dataclass(frozen=True, slots=True)
class MetadataFilters:
    """Conditions that must all hold; a store can read them from here to search fewer entries."""

    filters: tuple[MetadataFilter, ...]

    def __call__(self, meta: Mapping[str, Any]) -> bool:
        return all(each(meta) for each in self.filters)


def all_of(filters: Sequence[MetadataFilter]) -> MetadataFilters | None:
    """One function that returns whether an entry passes every filter; ``None`` without filters."""
    return MetadataFilters(tuple(filters)) if filters else None


class _Kind(NamedTuple):
    """Values of one kind: what is stored, and what is typed to be compared with it."""

    name: str
    is_stored: Callable[[Any], bool]
    is_typed: Callable[[str], bool]


_KINDS = (
    _Kind(
        "number",
        lambda value: not isinstance(value, bool) and as_number(value) is not None,
        lambda typed: as_number(typed) is not None,
    ),
    _Kind("date", lambda value: bool(_DATE.fullmatch(str(value))), lambda typed: bool(_DATE_START.match(typed))),
)


class FilterFields:
    """The fields that filters of a collection can name, and of what kind the values of each are, all of them."""

    def __init__(self, metadata: Iterable[Mapping[str, Any]] = ()) -> None:
        self._kinds: dict[str, tuple[_Kind, ...]] = {}
        self._examples: dict[str, str] = {}
        for meta in metadata:
            self.add(meta)

    def add(self, meta: Mapping[str, Any]) -> None:
        """Take up the fields of an entry."""
        for field, value in entry_fields(meta).items():
            name = str(field)
            kinds = self._kinds.setdefault(name, _KINDS)
            values = value if isinstance(value, list) else [] if value is None else [value]
            if kinds and values:
                self._examples.setdefault(name, str(values[0]))
                self._kinds[name] = tuple(kind for kind in kinds if all(map(kind.is_stored, values)))

    def is_settled(self, each: MetadataFilter) -> bool:
        """Whether ``check`` takes a filter, whatever the fields of further entries are."""
        if each.field in ENTRY_FIELDS:
            return True
        kinds = self._kinds.get(each.field, ())
        typed = each.operator in ("~", "!=") or all(kind.is_typed(each.value) for kind in kinds)
        return each.field in self._examples and typed

    @property
    def names(self) -> list[str]:
        """Those of every entry, then those of pairs and files, sorted."""
        return [*ENTRY_FIELDS, *sorted(set(self._kinds) - set(ENTRY_FIELDS))]

    def check(self, filters: Iterable[MetadataFilter]) -> None:
        """``UserError`` for a field that no entry has, and for a value that none of a field can be compared with."""
        names = self.names
        for each in filters:
            if each.field not in names:
                exif = ", which is read from EXIF data" if each.field in EXIF_FIELDS else ""
                raise UserError(f"no entry has the field {shorten(each.field)}{exif}; there are {', '.join(names)}")
            if each.operator in ("~", "!=") or each.field in ENTRY_FIELDS or each.field not in self._examples:
                continue
            kinds = self._kinds[each.field]
            if kinds and not any(kind.is_typed(each.value) for kind in kinds):
                raise UserError(
                    f"the filter {shorten(str(each))} has no {kinds[0].name} to compare with: {each.field} is a "
                    f"{kinds[0].name} in every entry that has it, such as {self._examples[each.field][:80]}"
                )


def check_filters(filters: Sequence[MetadataFilter], metadata: Iterable[Mapping[str, Any]]) -> None:
    """``UserError`` as of ``FilterFields.check``; reads no more metadata than it takes to know."""
    fields, entries = FilterFields(), iter(metadata)
    while not all(map(fields.is_settled, filters)):
        if (meta := next(entries, None)) is None:
            return fields.check(filters)
        fields.add(meta)


def entry_values(meta: Mapping[str, Any], name: str) -> list[Any]:
    """The values of a field of an entry, none where it has no such field."""
    if name == "folder":
        return [entry_folder(meta)]
    if name == "caption":
        return [caption["text"] for caption in meta["captions"]]
    if name == "language":
        return list(meta["languages"])
    if name in ("group", "name"):
        return [meta[name]]
    found = entry_fields(meta).get(name)
    if found is None:
        return []
    return list(found) if isinstance(found, list) else [found]


def entry_fields(meta: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of the pair and those of the file; of the same name, that of the pair."""
    return {**meta.get("file", {}), **meta["meta"]}  # entries of older versions of clasp have no fields of the file


def entry_folder(meta: Mapping[str, Any]) -> str:
    """The folder of an image; for a member of a tar, the tar's path and the folder inside."""
    return str(meta["name"]).replace("::", "/").rpartition("/")[0]


def as_number(value: Any) -> float | None:
    """The value as a number, ``None`` where it is none."""
    try:
        return float(value)
    except (TypeError, ValueError, OverflowError):
        return None
