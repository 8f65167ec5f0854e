"""Parse one row: a line of a table, or a JSON object.

Input: a row as a mapping, and the names of its columns. Output: a ``PairRow``, its captions as ``Caption``s. Note:
captions come in four forms (see ``ColumnNames.caption``). Empty captions are not dropped but counted, so that opening
the source fails with the number of such rows. A value of the wrong type is an error; it is never converted to text.
"""

import difflib
import json
import re
import unicodedata
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, NamedTuple

from clasp.data.formats.setting_hints import ColumnError
from clasp.plain_types import Caption, UserError


@dataclass(frozen=True, slots=True, kw_only=True)
class ColumnNames:
    """Names of the columns of a table, or of the keys of a JSON object; empty: the default of the format.

    A column named here is required in every row; of the defaults only image and caption are required. All other
    columns go to ``Pair.meta``.
    """

    image: str = ""
    """A path, relative to the image root or absolute (``image``; in csv and tsv ``filepath``)."""
    caption: str = ""
    """A text, a list of texts, {language: text or list}, or [{"text", "language"}] (``caption``; csv: ``title``)."""
    id: str = ""
    """Unique id of the pair (``id``)."""
    language: str = ""
    """Language of captions without a tag, or a list of one for each caption (``language``)."""
    group: str = ""
    """Pairs of one group are positives of each other (``group``; in LilT's lists ``image_id``)."""

    @property
    def named(self) -> tuple[str, ...]:
        """The names that are set, in the order of the fields."""
        return tuple(name for name in self._all if name)

    def with_defaults(self, default: "ColumnNames") -> "ColumnNames":
        """These names, with those of ``default`` where none is set."""
        names = [given or fallback for given, fallback in zip(self._all, default._all, strict=True)]
        return ColumnNames(**{field.name: name for field, name in zip(fields(self), names, strict=True)})

    @property
    def _all(self) -> tuple[str, ...]:
        return (self.image, self.caption, self.id, self.language, self.group)


DEFAULT_COLUMNS = ColumnNames()


class PairRow(NamedTuple):
    """A parsed row; ``id`` and ``group`` are empty if missing."""

    image: Any
    captions: tuple[Caption, ...]
    id: str
    group: str
    meta: dict[str, Any]


@dataclass(frozen=True, slots=True)
class RowReader:
    """Parses the rows of one table."""

    columns: ColumnNames
    required: tuple[str, ...]
    used_columns: tuple[str, ...]
    """The columns that do not go to ``meta``."""

    @classmethod
    def of(cls, given: ColumnNames, default: ColumnNames) -> "RowReader":
        columns = given.with_defaults(default)
        return cls(columns, tuple(dict.fromkeys((columns.image, columns.caption, *given.named))), columns.named)

    def __call__(self, record: Mapping[str, Any], where: str) -> PairRow:
        require_columns(self.required, record, where)
        columns = self.columns
        return PairRow(
            image=record[columns.image],
            captions=parse_captions(record[columns.caption], record.get(columns.language), where),
            id=as_text(record.get(columns.id), where, columns.id),
            group=as_text(record.get(columns.group), where, columns.group),
            meta={key: value for key, value in record.items() if key not in self.used_columns},
        )


def require_columns(names: Sequence[str], have: Collection[str], where: str) -> None:
    """``ColumnError`` for the first missing column, listing those needed, those present and the nearest name."""
    for name in names:
        if name not in have:
            present = list(have)
            near = difflib.get_close_matches(name, present, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            wanted = f"; needed: {', '.join(map(repr, names))}" if len(names) > 1 else ""
            raise ColumnError(
                f"{where} has no column {name!r}{wanted}; it has {', '.join(map(repr, present)) or 'none'}{hint}"
            )


def load_json(text: str | bytes) -> Any:
    """Parse JSON; ``ValueError`` if it is invalid, or an object has a duplicate key."""
    if isinstance(text, bytes):
        text = text.decode(json.detect_encoding(text), "surrogatepass")
    try:
        return _DECODER.decode(text)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def unique_keys(items: list[tuple[str, Any]]) -> dict[str, Any]:
    """An ``object_pairs_hook`` that raises ``ValueError`` for duplicate keys."""
    record = dict(items)
    if len(record) < len(items):
        keys = [key for key, _ in items]
        raise ValueError(f"the key {next(key for key in keys if keys.count(key) > 1)!r} is given twice")
    return record


_DECODER = json.JSONDecoder(object_pairs_hook=unique_keys)  # made once: ``json.loads`` makes one a text


def as_text(value: Any, where: str, column: str) -> str:
    """An id or group as text; empty for ``None``. ``UserError`` for other than a string or an integer."""
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    return _as_string(value, where, f"{column!r} must be a text or a whole number")


def _as_language(value: Any, where: str) -> str:
    """A language tag; empty for ``None``."""
    return _as_string(value, where, "a language must be a text, or a list of as many as there are captions")


def _as_string(value: Any, where: str, rule: str) -> str:
    if value is None:
        return ""
    if not isinstance(value, str):
        raise UserError(f"{where}: {rule}, not {shorten(value)}")
    return require_unicode(value, where).strip()


def shorten(value: Any) -> str:
    """The ``repr`` of a value, truncated to 80 characters."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def require_unicode(text: str, where: str) -> str:
    """The text; ``UserError`` if it has a lone surrogate, which cannot be encoded as UTF-8, or a NUL character."""
    if "\0" in text:
        at = text.index("\0") + 1
        raise UserError(f"{where}: the text {shorten(text)} is not text: character {at} is NUL, as in binary files")
    if not text.isascii() and (half := re.search("[\ud800-\udfff]", text)):
        raise UserError(
            f"{where}: the text {shorten(text)} is not valid Unicode: character {half.start() + 1} is a lone surrogate"
        )
    return text


def parse_captions(value: Any, language: Any, where: str) -> tuple[Caption, ...]:
    """The captions of a row in any of the forms of ``ColumnNames.caption``, stripped.

    ``language`` is that of all, or a list of one for each. An empty text remains, as an empty caption, so that it can
    be counted; a language whose value is null is left out. ``UserError`` for a value of any other form.
    """
    value, language = _parse_cell(value, where), _parse_cell(language, where)
    if value is None:
        return ()
    if isinstance(language, list):
        texts = value if isinstance(value, list) else [value]
        if isinstance(value, Mapping) or len(texts) != len(language):
            raise UserError(
                f"{where}: {len(language)} languages are given for {len(texts)} captions; give as many, or one for all"
            )
        zipped = zip(texts, language, strict=True)
        return tuple(caption for text, tag in zipped for caption in parse_captions(text, tag, where))
    tag = _as_language(language, where)
    if isinstance(value, str):
        return (Caption(require_unicode(value, where).strip(), tag),)
    if isinstance(value, Mapping):
        if "text" in value and value.keys() <= {"text", "language"}:
            tagged = value.get("language")
            return parse_captions(value["text"], tagged if tagged else tag, where)
        return tuple(caption for key, texts in value.items() for caption in parse_captions(texts, key, where))
    if isinstance(value, tuple) and len(value) == 2:  # an entry of a parquet map; JSON has no tuples
        return parse_captions(value[1], value[0], where)
    if isinstance(value, list):
        nested = next((item for item in value if isinstance(item, list)), None)
        if nested is not None:
            raise UserError(f"{where}: captions must be one list of texts, not a list in a list: {shorten(nested)}")
        return tuple(caption for item in value for caption in parse_captions(item, tag, where))
    raise UserError(f"{where}: a caption must be a text, a list of texts or {{language: text}}, not {shorten(value)}")


_LIST_LIKE = re.compile(r"""\s*(\[\s*["'].*["'],?\s*\]|\{\s*["'].*["'\]]\s*\}|\[\s*\]|\{\s*\})\s*""", re.DOTALL)


def _parse_cell(value: Any, where: str) -> Any:
    """Parse a cell that is a JSON list or object; other values are returned unchanged."""
    if not isinstance(value, str) or value.lstrip()[:1] not in ("[", "{") or not _LIST_LIKE.fullmatch(value):
        return value
    try:
        return load_json(value)
    except ValueError:
        raise UserError(
            f'{where}: {shorten(value)} looks like a list and is not JSON; several are written ["a dog", "a puppy"]'
        ) from None


# invisible, though letters, marks or symbols in Unicode: Hangul fillers, the Braille blank, joiners, selectors
_INVISIBLE = re.compile(
    "[\u034f\u115f\u1160\u17b4\u17b5\u180b-\u180f\u2800\u3164\ufe00-\ufe0f\uffa0\U000e0100-\U000e01ef]"
)


def is_blank(text: str) -> bool:
    """Whether a text is empty, or only of spaces, control and invisible characters such as U+200B."""
    if text.isascii():
        return not any("!" <= character <= "~" for character in text)
    hidden = ("Cc", "Cf", "Zs", "Zl", "Zp")
    return all(unicodedata.category(character) in hidden for character in _INVISIBLE.sub("", text))


class CaptionCheck:
    """Counts the pairs of a source without a caption or with an empty one; ``finish`` raises one ``UserError``."""

    def __init__(self, name: str):
        self.name, self.seen, self.empty, self.first = name, 0, 0, ""

    def add(self, where: str, captions: tuple[Caption, ...]) -> None:
        self.seen += 1
        if not captions or any(is_blank(caption.text) for caption in captions):
            self.empty += 1
            self.first = self.first or where

    def finish(self) -> None:
        if self.empty:
            first = f"the first is {self.first}" if self.empty > 1 else self.first
            raise UserError(f"{self.name}: {self.empty} of {self.seen} pairs have an empty caption or none; {first}")
