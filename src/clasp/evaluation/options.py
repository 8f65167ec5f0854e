"""Options of evaluation tasks, ``clasp analyze`` and ``clasp maps``: ``name=value``, as they are typed.

Input: the options that there are, and what was typed. Output: option to value, of what was typed and of defaults. Note:
nothing heavy is imported here, since the help texts are made of these.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Literal

from clasp.errors import UserError


@dataclass(frozen=True, slots=True)
class TaskOption:
    """One ``name=value``. ``default`` is the value of an option that is left out; ``None``: it has no value then.

    ``in_place_of``: the name of an option that is not used where this one is given; both are an error. ``names``: what
    the value names, whose content metrics depend on: ``file`` (where there is one, else the value itself) or ``pairs``;
    ``reading``: how pairs are read, which their content shows.
    """

    name: str
    help: str
    default: str | None = None
    required: bool = False
    in_place_of: str | None = None
    names: Literal["", "file", "pairs", "reading"] = ""


PAIR_OPTIONS = (
    TaskOption(
        "data", "a folder of class folders, or pairs (.csv .tsv .jsonl .parquet .tar)", required=True, names="pairs"
    ),
    TaskOption("image", "column of the images"),
    TaskOption("caption", "column of the captions", names="reading"),
    TaskOption("image_root", "folder that image paths start from"),
)
"""Those of every task: the pairs it runs on"""


MAX_ANALYZED_PAIRS = 2000
"""Of ``clasp analyze``: the Gram matrices of all text blocks are held at once, 36 MB each"""
MAX_NEIGHBOURS = 100
ANALYZE_OPTIONS = (
    PAIR_OPTIONS[0],
    TaskOption("pairs", f"analyse at most so many pairs, up to {MAX_ANALYZED_PAIRS:,}", "1000"),
    TaskOption("language", "language of the captions; the first caption of each pair if left out"),
    TaskOption("neighbours", f"K of the mutual k-nearest neighbours, up to {MAX_NEIGHBOURS}", "10"),
    *PAIR_OPTIONS[1:],
)
"""Those of ``clasp analyze``"""
DEFAULT_MAPPED_PAIRS = "6"
MAX_MAPPED_PAIRS, MAX_MAPPED_WORDS = 50, 20
MAP_OPTIONS = (
    PAIR_OPTIONS[0],
    TaskOption("pairs", f"draw so many pairs, up to {MAX_MAPPED_PAIRS}; {DEFAULT_MAPPED_PAIRS} if none are named"),
    TaskOption(
        "ids",
        "draw the pairs with these ids (column id, else the image path), separated by commas; quote one with a comma",
    ),
    TaskOption("words", "words to map, separated by commas; the longest six of each caption if left out"),
    ANALYZE_OPTIONS[2],
    *PAIR_OPTIONS[1:],
)
"""Those of ``clasp maps``"""


def parse_options(name: str, options: Sequence[TaskOption], typed: Sequence[str]) -> dict[str, str]:
    """Option to value, of what was typed and of defaults. Raises ``UserError``: unknown, twice, empty, one in
    place of another beside it, or a required one left out."""
    from clasp.data.formats.setting_hints import suggest_key

    known = {option.name: option for option in options}
    paths = [option.name for option in options if option.names == "pairs"]
    given: dict[str, str] = {}
    for text in typed:
        key, equals, value = text.partition("=")
        if not equals or key not in known:
            near = get_close_matches(key, known, n=1)
            hint = f"; did you mean {near[0]}=…?" if near else ""
            if not equals:
                hint = suggest_key(text, paths, [word.partition("=")[0] for word in typed if "=" in word]) or hint
            raise UserError(f"{name}: {text!r} is not an option{hint or ';'} it takes {', '.join(known)}")
        if key in given:
            raise UserError(f"{name}: {key}= is given twice, {given[key]!r} and {value!r}")
        if not value.strip():
            instead = "it is required" if known[key].required else "leave it out for the default"
            raise UserError(f"{name}: {key}= is empty; {instead}: {describe_option(known[key]).strip()}")
        given[key] = value
    for option in known.values():
        if option.required and option.name not in given:
            raise UserError(f"{name} needs {option.name}=, {option.help}; options: {', '.join(known)}")
        if option.name in given and option.in_place_of in given:
            raise UserError(f"{name}: {option.name}= is in place of {option.in_place_of}=; give one of the two")
    defaults = {key: option.default for key, option in known.items() if option.default is not None}
    return defaults | given


def describe_option(option: TaskOption) -> str:
    """A line about an option, for help."""
    default = "" if option.default is None else f" (default: {option.default})"
    return f"  {option.name}=  {option.help}{default}{' (required)' if option.required else ''}"
