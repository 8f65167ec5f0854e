"""Whether the text tower can tell captions or prompts apart. Where it cannot, nothing can be learned from them or
found by them, and validation on one pair or one caption would show 100 % all the same.

Input: the distinct captions and the tokenizer. Output: why they cannot be told apart, or an error. Note: captions can
be told apart where one has a token that another lacks, so few are tokenized but where all are alike. Neither the
number of unknown tokens nor their places tell captions apart, unless they differ in their order alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from clasp.data.tokenizer import Tokenizer
from clasp.errors import UserError

_CAPTIONS_AT_ONCE = 1_000
_SHOWN_CHARACTERS = 60


@dataclass(frozen=True, slots=True)
class TextWords:
    """In a reason: what the texts are, and what to do where the vocabulary of the text tower lacks their words."""

    what: str
    other_tower: str


TRAINING = TextWords("captions to train on", "choose another text.tower, such as pip:multilingual-e5-small")
EVALUATION = TextWords("texts to evaluate on", "results on them are near chance")


def require_distinct_captions(texts: Sequence[str], tokenizer: Tokenizer) -> None:
    """Raises ``UserError`` where ``indistinct_captions`` finds why nothing can be learned from the captions."""
    if reason := indistinct_captions(texts, tokenizer):
        raise UserError(reason)


def indistinct_captions(texts: Sequence[str], tokenizer: Tokenizer, words: TextWords = TRAINING) -> str:
    """Why the text tower reads all captions alike; empty where it does not. ``texts``: the distinct captions."""
    if len(texts) == 1:
        return (
            f"every caption to train on is {shown_text(texts[0])}, so nothing tells the images apart; "
            "data.columns.caption names the column of captions"
        )
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
    other = words.other_tower
    if len(rows) > 1:
        return f"the text tower cannot tell apart {every}: what differs in them is unknown to its vocabulary; {other}"
    settings = f"text.clean = {tokenizer.settings.clean!r} and text.max_tokens = {tokenizer.max_tokens}"
    lacking = f", some of them unknown to its vocabulary; {other}" if unknown in next(iter(rows)) else ""
    return f"the text tower cannot tell apart {every}: they are the same tokens with {settings}{lacking}"


def shown_text(text: str) -> str:
    """A text in quotes, for an error; a long one is cut."""
    return repr(text if len(text) <= _SHOWN_CHARACTERS else f"{text[:_SHOWN_CHARACTERS]}…")
