"""Checks of captions against the tokenizer, language by language, and of class names against each other.

Input: training and validation pairs, a tokenizer. Output: a ``CheckReport`` for each subject. Note: a byte-level
tokenizer has no unknown token; a language that its vocabulary lacks takes more than one token a character instead.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from typing import NamedTuple

from clasp.data.checks import CheckReport, languages_override
from clasp.data.pairs import Pairs
from clasp.data.tokenizer import Tokenizer
from clasp.errors import counted

LANGUAGE_SAMPLE_SIZE = 2_000  # distinct captions of each language
_MAX_UNKNOWN_SHARE, _MAX_TOKENS_PER_CHARACTER = 0.01, 1.2  # above these, a vocabulary does not fit a language
_MULTILINGUAL_TOWER = "pip:multilingual-e5-small"  # in clasp's own dependencies; of a hundred languages
_MAX_CLASS_RATIO = 10  # pairs of the largest class to those of the smallest


class _LanguageTokens(NamedTuple):
    """How a tokenizer splits the captions of a language; special tokens are not counted."""

    language: str
    looked_at: int
    unknown_share: float | None
    """``None`` for a byte-level tokenizer"""
    tokens_per_character: float

    @property
    def fits(self) -> bool:
        if self.unknown_share is None:
            return self.tokens_per_character < _MAX_TOKENS_PER_CHARACTER
        return self.unknown_share < _MAX_UNKNOWN_SHARE

    def __str__(self) -> str:
        of = f"{counted(self.looked_at, 'caption')}{f' in {self.language}' if self.language else ''}"
        if self.unknown_share is None:
            return f"{of}: {self.tokens_per_character:.2g} tokens a character"
        return f"{of}: {100 * self.unknown_share:.1f} % of the tokens are unknown"


def check_languages(train: Pairs, tokenizer: Tokenizer, tower: str = "") -> CheckReport:
    """The share of unknown tokens, and tokens per character, in each language of the training captions. ``tower``:
    the name of the text tower."""
    texts: defaultdict[str, dict[str, None]] = defaultdict(dict)
    counts: Counter[str] = Counter()
    for pair in train:
        for text, language in pair.captions:
            counts[language] += 1
            if len(texts[language]) < LANGUAGE_SAMPLE_SIZE:
                texts[language][text] = None
    found = [_measure(language, list(some), tokenizer) for language, some in texts.items()]
    report = CheckReport("languages", {each.language: each._asdict() for each in found})
    mend = _mend_languages(found, counts, tower)
    for each in (each for each in found if not each.fits):
        lacks = "the vocabulary of the text tower lacks this language; choose another text.tower"
        report.add_finding("look", f"{each}; {lacks}", *mend)
    if fitting := [each for each in found if each.fits]:
        more = f"; and {counted(len(fitting) - 5, 'more language')}" if len(fitting) > 5 else ""
        report.add_finding("ok", "; ".join(map(str, fitting[:5])) + more)
    return report


def _mend_languages(found: Sequence[_LanguageTokens], counts: Counter[str], tower: str) -> tuple[str, ...]:
    """The packaged multilingual tower; where that is what lacks a language, the languages that it has, if most captions
    are in these."""
    if tower != _MULTILINGUAL_TOWER:
        return (f"text.tower={_MULTILINGUAL_TOWER}",)
    fitting = [each.language for each in found if each.fits and each.language]
    most = 2 * sum(counts[language] for language in fitting) > counts.total()
    return (languages_override(fitting),) if most else ()


def _measure(language: str, texts: Sequence[str], tokenizer: Tokenizer) -> _LanguageTokens:
    plain = tokenizer.with_settings(prefix="")
    special, unknown = plain.special_ids, plain.unknown_id
    rows = [[token for token in row if token not in special] for row in plain.encode(texts)]
    tokens, characters = max(1, sum(map(len, rows))), max(1, sum(map(len, texts)))
    unknown_share = None if unknown is None else sum(row.count(unknown) for row in rows) / tokens
    return _LanguageTokens(language, len(texts), unknown_share, tokens / characters)


def check_classes(train: Pairs, val: Pairs) -> CheckReport | None:
    """Pairs of each class, where every caption is a class name; ``None`` for other captions."""
    counts, held_out = _count_classes(train), _count_classes(val)
    if counts is None or held_out is None or not counts:
        return None
    if len(counts | held_out) == 1:
        (only,), report = counts, CheckReport("balance", {"classes": 1})
        report.add_finding("stop", f"zero-shot validation needs at least two classes; there is only {only!r}")
        return report
    (largest, most), (smallest, fewest) = counts.most_common(1)[0], counts.most_common()[-1]
    facts = {"classes": len(counts), "largest": {largest: most}, "smallest": {smallest: fewest}}
    untrained = sorted(held_out.keys() - counts.keys())
    report = CheckReport("balance", {**facts, "only_validated": untrained})
    text = f"{counted(len(counts), 'class')} to train on, of {fewest:,} ({smallest!r}) to {most:,} pairs ({largest!r})"
    if most > _MAX_CLASS_RATIO * fewest:
        report.add_finding("look", f"{text}: zero-shot accuracy will favour the large ones; compare macro averages")
    else:
        report.add_finding("ok", text)
    if untrained:
        named = ", ".join(map(repr, untrained[:5])) + (f" and {len(untrained) - 5} more" if len(untrained) > 5 else "")
        report.add_finding("look", f"validated on and not trained on: {counted(len(untrained), 'class')}: {named}")
    return report


def _count_classes(pairs: Pairs) -> Counter[str] | None:
    """Pairs by class; ``None`` where a pair has other captions than the name of its class."""
    counts: Counter[str] = Counter()
    for pair in pairs:
        if [caption.text for caption in pair.captions] != [pair.meta.get("class")]:
            return None
        counts[pair.captions[0].text] += 1
    return counts
