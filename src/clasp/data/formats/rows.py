"""What one row says: a line of a table, a JSON object.

Goes in: a row as a mapping, and the names of its columns. Comes out: a ``PairRow``, its captions as ``Caption``s.
Unusual: captions come in four forms (see ``ColumnNames.caption``). An empty one is not dropped but counted, so that a
source is refused as a whole when it is opened, with the number of such rows.
"""

import difflib
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, fields
from typing import Any, NamedTuple

from clasp.types import Caption, UserError


@dataclass(frozen=True, slots=True, kw_only=True)
class ColumnNames:
    """The columns of a table, or the keys of a JSON object, that carry a meaning; empty: the format's own name.

    A name given here must be in every row; of the formats' own names only image and caption must.
    What is in no such column becomes ``Pair.meta``.
    """

    image: str = ""
    """A path, relative to the image root or absolute (``image``; in csv and tsv ``filepath``)."""
    caption: str = ""
    """A text, a list of texts, {language: text or list}, or [{"text", "language"}] (``caption``; csv: ``title``)."""
    id: str = ""
    """What the pair is called; unique (``id``)."""
    language: str = ""
    """The language of captions that do not tell theirs (``language``)."""
    group: str = ""
    """Pairs of one group show the same thing (``group``; in LilT's lists ``image_id``)."""

    @property
    def named(self) -> tuple[str, ...]:
        """The names given, in the order of the fields."""
        return tuple(name for name in self._all if name)

    def with_defaults(self, default: "ColumnNames") -> "ColumnNames":
        """These names, and the default's where none is given."""
        names = [own or other for own, other in zip(self._all, default._all, strict=True)]
        return ColumnNames(**{field.name: name for field, name in zip(fields(self), names, strict=True)})

    @property
    def _all(self) -> tuple[str, ...]:
        return (self.image, self.caption, self.id, self.language, self.group)


DEFAULT_COLUMNS = ColumnNames()


class PairRow(NamedTuple):
    """A row, read: ``id`` and ``group`` are empty where it gives none."""

    image: Any
    captions: tuple[Caption, ...]
    id: str
    group: str
    meta: dict[str, Any]


@dataclass(frozen=True, slots=True)
class RowReader:
    """Reads the rows of one table."""

    columns: ColumnNames
    required: tuple[str, ...]
    used_columns: tuple[str, ...]
    """What does not go to ``meta``."""

    @classmethod
    def of(cls, asked: ColumnNames, default: ColumnNames) -> "RowReader":
        columns = asked.with_defaults(default)
        return cls(columns, tuple(dict.fromkeys((columns.image, columns.caption, *asked.named))), columns.named)

    def __call__(self, record: Mapping[str, Any], where: str) -> PairRow:
        require_columns(self.required, record, where)
        columns = self.columns
        language = as_text(record.get(columns.language))
        return PairRow(
            image=record[columns.image],
            captions=parse_captions(record[columns.caption], language, where),
            id=as_text(record.get(columns.id)),
            group=as_text(record.get(columns.group)),
            meta={key: value for key, value in record.items() if key not in self.used_columns},
        )


def require_columns(names: Iterable[str], have: Collection[str], where: str) -> None:
    """``UserError`` for the first name that is missing, with the names there are and the nearest of them."""
    for name in names:
        if name not in have:
            present = list(have)
            near = difflib.get_close_matches(name, present, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise UserError(
                f"{where} has no column {name!r}; it has {', '.join(map(repr, present)) or 'none'}{hint}; columns of "
                "other names: data.columns.image=NAME data.columns.caption=NAME"
            )


def as_text(value: Any) -> str:
    """An id, a group or a language as text; empty for none."""
    return "" if value is None else str(value).strip()


def parse_captions(value: Any, language: str, where: str) -> tuple[Caption, ...]:
    """The captions in any of the forms a row may give them in (see ``ColumnNames.caption``), stripped.

    An empty text stays, as an empty caption, so that it can be counted; a language with null is left out.
    """
    if value is None:
        return ()
    if isinstance(value, str):
        return (Caption(value.strip(), language),)
    if isinstance(value, Mapping):
        if "text" in value and value.keys() <= {"text", "language"}:
            return parse_captions(value["text"], as_text(value.get("language")) or language, where)
        return tuple(caption for tag, texts in value.items() for caption in parse_captions(texts, tag, where))
    if isinstance(value, tuple) and len(value) == 2:  # an entry of a parquet map; JSON has no tuples
        return parse_captions(value[1], value[0], where)
    if isinstance(value, list):
        return tuple(caption for item in value for caption in parse_captions(item, language, where))
    raise UserError(f"{where}: a caption must be a text, a list of texts or {{language: text}}, not {value!r}")


class CaptionCheck:
    """Counts the pairs of a source that have no caption, or an empty one among them, and complains once."""

    def __init__(self, name: str):
        self.name, self.seen, self.empty, self.first = name, 0, 0, ""

    def add(self, where: str, captions: tuple[Caption, ...]) -> None:
        self.seen += 1
        if not captions or not all(caption.text for caption in captions):
            self.empty += 1
            self.first = self.first or where

    def finish(self) -> None:
        if self.empty:
            first = f"the first is {self.first}" if self.empty > 1 else self.first
            raise UserError(f"{self.name}: {self.empty} of {self.seen} pairs have an empty caption or none; {first}")
