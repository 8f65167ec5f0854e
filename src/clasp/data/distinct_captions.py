"""Whether the text tower can tell captions or prompts apart. Where it cannot, nothing can be learned from them or
found by them, and validation on one pair or one caption would show 100 % all the same.

Input: the distinct captions and the tokenizer. Output: why they cannot be told apart, or an error. Note: captions can
be told apart where one has a token that another lacks, so few are tokenized but where all are alike. Neither the
number of unknown tokens nor their places tell captions apart, unless they differ in their order alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from clasp.data.pairs import has_columns
from clasp.data.tokenizer import Tokenizer
from clasp.errors import UserError

_CAPTIONS_AT_ONCE = 1_000
_SHOWN_CHARACTERS = 60


@dataclass(frozen=True, slots=True)
class TextWords:
    """In a reason: what the texts are, what follows, and what to do where the text tower does not know their words."""

    what: str
    consequence: str = ""
    remedy: str = ""


TRAINING = TextWords("captions to train on", remedy="; choose another text.tower, such as pip:multilingual-e5-small")
EVALUATION = TextWords("texts to evaluate on", consequence="; results on them are near chance")


def require_different_captions(texts: Sequence[str], source: str) -> None:
    """Raises ``UserError`` where ``equal_captions`` finds that all are one. Needs no tower."""
    if reason := equal_captions(texts, source):
        raise UserError(reason)


def equal_captions(texts: Sequence[str], source: str) -> str:
    """Why nothing can be learned where the captions to train on are one; empty where they are not. ``texts``: the
    distinct captions; ``source``: their pairs, as given."""
    return all_equal("to train on", texts[0], source, "data.columns.caption=") if len(texts) == 1 else ""


def all_equal(which: str, text: str, source: str, setting: str) -> str:
    """The reason that every caption is ``text``; ``setting`` names another column, where the source has columns."""
    hint = f"; {setting} names the column of captions" if has_columns(source) else ""
    return f"every caption {which} is {shown_text(text)}, so nothing tells the images apart{hint}"


def require_distinct_captions(texts: Sequence[str], tokenizer: Tokenizer) -> None:
    """Raises ``UserError`` where ``indistinct_captions`` finds why nothing can be learned from the captions."""
    if reason := indistinct_captions(texts, tokenizer):
        raise UserError(reason)


def indistinct_captions(texts: Sequence[str], tokenizer: Tokenizer, words: TextWords = TRAINING) -> str:
    """Why the text tower reads all captions alike; empty where it does not, or where there is one. ``texts``: the
    distinct captions."""
    if len(texts) < 2:
        return ""
    rows = set[tuple[int, ...]]()
    for first in range(0, len(texts), _CAPTIONS_AT_ONCE):
        some = [texts[number] for number in range(first, min(first + _CAPTIONS_AT_ONCE, len(texts)))]
        rows |= set(map(tuple, tokenizer.encode(some)))
        if len(set(map(frozenset, rows))) > 1:
            return ""
    unknown = tokenizer.unknown_id
    known = {tuple(token for token in row if token != unknown) for row in rows}
    if len(rows) > 1 and (len(known) > 1 or len({tuple(sorted(row)) for row in rows}) == 1):
        return ""  # the same tokens in another order, or another number of times
    every = f"the {len(texts):,} different {words.what}, such as {shown_text(texts[0])} and {shown_text(texts[1])}"
    beyond = f"unknown to its vocabulary{words.remedy}"
    if len(rows) > 1:
        return f"the text tower cannot tell apart {every}: what differs in them is {beyond}{words.consequence}"
    settings = f"text.clean = {tokenizer.settings.clean!r} and text.max_tokens = {tokenizer.max_tokens}"
    lacking = f", some of them {beyond}" if unknown in next(iter(rows)) else ""
    reason = f"they are the same tokens with {settings}{lacking}{words.consequence}"
    return f"the text tower cannot tell apart {every}: {reason}"


def shown_text(text: str) -> str:
    """A text in quotes, for an error; a long one is cut."""
    return repr(text if len(text) <= _SHOWN_CHARACTERS else f"{text[:_SHOWN_CHARACTERS]}…")
