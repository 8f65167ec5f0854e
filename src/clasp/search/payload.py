"""Entries as points of a vector database: the payload of an entry, and the conditions that a filter becomes.

Input: an id with its metadata, or a ``MetadataFilters``. Output: plain data, and conditions on it. Note: a condition
admits all entries that pass its filter, and may admit more: the store checks each candidate with the filter, so the
answer is the same in every store. Not compiled, only checked: ``!=``, ``~``, what is about captions, and ``bytes=``
(nearly every file has a size of its own). The payload is ASCII (file names need not be Unicode): ``entry`` (JSON of id
and metadata), ``order`` (of indexing), ``terms`` (``field=value``, indexed) and, for each field of the pair and of the
file, its values as numbers, where they can be compared.
"""

from __future__ import annotations

import hashlib
import json
import math
import sys
import uuid
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from clasp.search.metadata_filter import MetadataFilter, MetadataFilters, as_number, entry_fields, entry_values

TERMS, ORDER, ENTRY = "terms", "order", "entry"
_TERM_FIELDS = ("language", "group", "name")
_VARIED_FIELDS = ("bytes",)
_TERM_CHARS = 120  # of a value in a term; longer ones are cut on both sides
_PREFIX_BYTES = 6  # of a text as a number; a float64 represents 2**48 exactly


@dataclass(frozen=True, slots=True)
class HasTerm:
    """This term is among those of the entry."""

    term: str


@dataclass(frozen=True, slots=True)
class InRange:
    """A number under this key of the payload is within the bounds, both inclusive; ``None`` is no bound."""

    key: str
    low: float | None
    high: float | None


Condition = tuple[HasTerm | InRange, ...]
"""Alternatives: it holds if one of them does"""


# --- entries ---------------------------------------------------------------------------------------------------------


def point_id(name: str) -> str:
    """The UUID under which an id is stored, a hash of it: adding an id again replaces its point."""
    return str(uuid.UUID(bytes=hashlib.sha256(name.encode("utf-8", "surrogatepass")).digest()[:16]))


def encode_payload(name: str, meta: Mapping[str, Any], order: int) -> dict[str, Any]:
    """The payload of an entry. Metadata that is not of an image (without ``meta``) has no terms."""
    entry = json.dumps({"id": name, "meta": dict(meta)})
    payload: dict[str, Any] = {ENTRY: entry, ORDER: order}
    if "meta" not in meta:
        return payload
    own = [field for field in entry_fields(meta) if field not in (*_TERM_FIELDS, "folder", "caption")]
    terms = {
        term for field in (*_TERM_FIELDS, *own) for value in entry_values(meta, field) for term in _terms(field, value)
    }
    terms |= {term for folder in entry_values(meta, "folder") for term in _folder_terms(folder)}
    payload[TERMS] = sorted(terms)
    for field in own:
        for key, number in _order_keys(field, entry_values(meta, field)):
            payload.setdefault(key, []).append(number)
    return payload


def decode_payload(payload: Mapping[str, Any]) -> tuple[str, Mapping[str, Any]]:
    """Id and metadata of a payload."""
    entry = json.loads(payload[ENTRY])
    return entry["id"], entry["meta"]


def range_keys(payload: Mapping[str, Any]) -> set[str]:
    """The keys of a payload that ``InRange`` conditions can name."""
    return set(payload) - {ENTRY, ORDER, TERMS}


# --- filters ---------------------------------------------------------------------------------------------------------


def compile_filters(where: Callable[[Mapping[str, Any]], bool] | None) -> list[Condition]:
    """Conditions that every entry which passes ``where`` meets; none for a function, which cannot be read."""
    if not isinstance(where, MetadataFilters):
        return []
    return [condition for each in where.filters for condition in _compile(each)]


def without_absent(conditions: Sequence[Condition], keys: Collection[str]) -> list[Condition]:
    """The conditions without alternatives on keys that no payload has, which would be looked for in all of them."""
    kept = [tuple(each for each in one if isinstance(each, HasTerm) or each.key in keys) for one in conditions]
    return [narrow or one for narrow, one in zip(kept, conditions, strict=True)]


def _compile(condition: MetadataFilter) -> Iterator[Condition]:
    field, value = condition.field, condition.value
    if condition.operator == "=" and field == "folder":
        yield from ((HasTerm(term),) for term in _folder_terms(value))
    elif condition.operator == "=" and field not in ("caption", *_VARIED_FIELDS):
        terms = _equal_terms(field, value)
        infinite = terms[-1].endswith("inf")  # as typed; an integer of JSON that is as long is stored as a text
        yield tuple(map(HasTerm, terms if infinite else terms[-1:]))  # else a number equals numbers alone
    elif condition.operator in (">", ">=", "<", "<=") and field not in (*_TERM_FIELDS, "folder", "caption"):
        yield tuple(_ranges(field, condition.operator, value))


def _terms(field: str, value: Any) -> list[str]:
    """Terms of a stored value: as text without regard to case, as number, and that it is a number."""
    equal = [] if field in _VARIED_FIELDS else _equal_terms(field, value)
    return equal + ([_ascii(f"{field}#")] if as_number(value) is not None else [])


def _equal_terms(field: str, value: Any) -> list[str]:
    """As text and, of a number, as number; equal values have the last of them in common, of either."""
    number, text = as_number(value), _ascii(f"{field}={str(value).casefold()[:_TERM_CHARS]}")
    return [text] if number is None else [text, _ascii(f"{field}#{number + 0.0!r}")]  # + 0.0: minus zero equals zero


def _folder_terms(folder: Any) -> list[str]:
    return [_ascii(f"folder/{part[:_TERM_CHARS]}") for part in str(folder).casefold().split("/") if part]


def _ascii(text: str) -> str:
    return text.encode("ascii", "backslashreplace").decode()


def _order_keys(field: str, values: list[Any]) -> Iterator[tuple[str, float]]:
    for value in values:
        number = as_number(value)
        if number is None:
            yield _key("text", field), _prefix_number(str(value))
        elif not math.isnan(number):
            yield _key("number", field), _finite(number)


def _ranges(field: str, operator: str, value: str) -> Iterator[HasTerm | InRange]:
    """Numbers are compared with a number, everything else as text."""
    number, prefix, above = as_number(value), _prefix_number(value), operator.startswith(">")
    yield InRange(_key("text", field), prefix if above else None, None if above else prefix)
    if number is None:
        yield HasTerm(_ascii(f"{field}#"))  # a stored number is compared as text with a text
    elif not math.isnan(number):
        bound = _finite(number)
        yield InRange(_key("number", field), bound if above else None, None if above else bound)


def _key(kind: str, field: str) -> str:
    """A key that is a plain word, whatever the name of the field."""
    return f"{kind}_{hashlib.sha256(field.encode('utf-8', 'surrogatepass')).hexdigest()[:16]}"


def _prefix_number(text: str) -> float:
    """The first bytes of a text as a number: a text that is not smaller has a number that is not smaller."""
    start = text.casefold().encode("utf-8", "surrogatepass")[:_PREFIX_BYTES]
    return float(int.from_bytes(start.ljust(_PREFIX_BYTES, b"\0"), "big"))


def _finite(number: float) -> float:
    largest = sys.float_info.max
    return min(max(number, -largest), largest)
