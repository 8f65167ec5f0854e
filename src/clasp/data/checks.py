"""What may be odd about pairs: findings for people, and the same as facts for programs.

In go the pairs of both parts, a tokenizer, an image transform; out come ``CheckReport``s. Note: of many images and
captions a sample is looked at, evenly spread, and each finding says so.
"""

from __future__ import annotations

import hashlib
from collections import Counter, defaultdict
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np

from clasp.data.images import Augment, ImageTransform
from clasp.data.loader import BadSampleLimit
from clasp.data.pairs import Pairs, skipped_lines
from clasp.data.readers import LiveImageReader, PairIndex
from clasp.data.tokenizer import Tokenizer
from clasp.types import Pair, ProgressFactory, SkippedSample, UserError

HASH_SAMPLE_SIZE, DECODE_SAMPLE_SIZE, TOKENIZE_SAMPLE_SIZE = (
    5_000,
    500,
    50_000,
)  # of more than these a sample is looked at
_MIN_VAL_PAIRS = 100  # the 95 % interval of a recall over fewer is some ten points to either side
_NO_TOKEN_LIMIT = 1_000_000  # tokens

Severity = Literal["ok", "look", "stop"]


@dataclass(frozen=True, slots=True)
class Finding:
    """``ok``: as it should be; ``look``: training will run, and may not do what was meant; ``stop``: it would stop."""

    level: Severity
    about: str
    text: str

    def __str__(self) -> str:
        return f"{self.level:<4}  {self.about}: {self.text}"


@dataclass(frozen=True, slots=True)
class CheckReport:
    """One subject: plain values, and what to say of them."""

    about: str
    facts: dict[str, Any]
    findings: list[Finding] = field(default_factory=list)

    def add_finding(self, level: Severity, text: str) -> None:
        """Add a finding."""
        self.findings.append(Finding(level, self.about, text))


def check_pairs(train: Pairs, val: Pairs) -> CheckReport:
    """How many pairs and captions, in which languages."""
    spoken = Counter(caption.language for pairs in (train, val) for pair in pairs for caption in pair.captions)
    captions, unnamed = spoken.total(), spoken.pop("", 0)
    languages = dict(spoken.most_common())
    facts = {"train": len(train), "val": len(val), "captions": captions, "languages": languages}
    made = CheckReport("pairs", {**facts, "captions_without_language": unnamed})
    made.facts["skipped_files"] = {pairs.name: pairs.skipped_files.counts for pairs in (train, val)}
    for line in skipped_lines(train, val):
        made.add_finding("look", line)
    made.add_finding("ok", f"{len(train):,} to train on, {len(val):,} to validate on; {captions:,} captions")
    if len(val) < _MIN_VAL_PAIRS:
        made.add_finding("look", f"only {len(val)} to validate on: intervals will be wide")
    named = ", ".join(f"{name} {count:,}" for name, count in list(languages.items())[:10])
    more = f" and {len(languages) - 10} more" if len(languages) > 10 else ""
    if not languages:
        made.add_finding("ok", "captions name no language")
    else:
        lacking = f"; {unnamed:,} captions name none" if unnamed else ""
        made.add_finding("look" if unnamed else "ok", f"languages: {named}{more}{lacking}")
    return made


def check_captions(listing: PairIndex, tokenizer: Tokenizer) -> CheckReport:
    """How often captions repeat, and how long the different ones are, beside what the text tower reads of them."""
    often = np.bincount(listing.caption)
    repeated, top = float(often[often > 1].sum() / often.sum()), int(often.argmax())
    some = [listing.texts[number] for number in _evenly_spaced(len(listing.texts), TOKENIZE_SAMPLE_SIZE)]
    lengths = np.array([len(ids) for ids in tokenizer.with_settings(max_tokens=_NO_TOKEN_LIMIT).encode(some)])
    cut, longest = float((lengths > tokenizer.max_tokens).mean()), int(lengths.max())
    p50, p95 = (int(np.percentile(lengths, part, method="higher")) for part in (50, 95))
    facts = {"different": len(often), "repeated_share": repeated, "looked_at": len(some)}
    facts |= {"most_frequent": listing.texts[top], "most_frequent_count": int(often[top])}
    facts |= {"tokens": {"p50": p50, "p95": p95, "max": longest}, "max_tokens": tokenizer.max_tokens, "cut_share": cut}
    made = CheckReport("captions", facts)
    different = f"{len(often):,} different ones to train on"
    if repeated:
        different += f"; {100 * repeated:.0f} % of all captions have their equal, most often "
        different += f"{listing.texts[top][:60]!r} ({often[top]:,} times), which counts as a right answer"
    made.add_finding("look" if repeated > 0.5 else "ok", different)
    read = f"half have up to {p50} tokens, 95 % up to {p95}, the longest {longest}"
    if cut:
        read += f"; {100 * cut:.1f} % are cut at text.max_tokens = {tokenizer.max_tokens}"
    made.add_finding("look" if cut >= 0.01 else "ok", read + _sample_note(len(some), len(often)))
    return made


@dataclass(frozen=True)
class _SizeRecorder(Augment):
    """Changes nothing, and keeps the width and height of what it was shown."""

    sizes: list[tuple[float, float]] = field(default_factory=list)

    def crop(self, box: Any, params: Any) -> Any:
        self.sizes.append((box[2] - box[0], box[3] - box[1]))
        return box


def check_images(
    train: Pairs, val: Pairs, transform: ImageTransform, max_bad_fraction: float, bar: ProgressFactory
) -> CheckReport:
    """Which of a sample cannot be read, how large they are, and which are the same byte for byte."""
    measuring = _SizeRecorder()
    # squashed, all of a picture is shown, so the box is its size
    reader = LiveImageReader(replace(transform, resize="squash", crop_fraction=1.0), measuring)
    some = _SampledPairs((train, val), DECODE_SAMPLE_SIZE)
    tallies = [BadSampleLimit(len(pairs), max_bad_fraction) for pairs in (train, val)]
    skipped, stop = [], None
    with bar("images looked at") as progress:
        for done, (part, pair) in enumerate(some, 1):
            bad = reader.decode([(pair.id, pair.image, 0)]).skipped
            skipped += bad
            try:
                tallies[part].add(bad)
            except UserError as error:
                stop = str(error)
            progress(done, len(some))
    made = CheckReport("images", {"looked_at": len(some), "unreadable": [sample._asdict() for sample in skipped]})
    _check_readable(made, skipped, stop, len(some), len(train) + len(val))
    if measuring.sizes:
        _check_sizes(made, np.array(measuring.sizes), transform.size)
    _check_duplicates(made, train, val)
    return made


def _check_readable(
    made: CheckReport, skipped: Sequence[SkippedSample], stop: str | None, looked_at: int, count: int
) -> None:
    of = f"of {looked_at:,} looked at{'' if looked_at == count else f' (there are {count:,})'}"
    named = ", ".join(f"{name} ({reason})" for name, reason in skipped[:3])
    if stop:
        made.add_finding("stop", stop)
    elif skipped:
        made.add_finding("look", f"{len(skipped)} {of} cannot be read and will be left out: {named}")
    else:
        made.add_finding("ok", f"all {of} can be read")


def _check_sizes(made: CheckReport, sizes: np.ndarray, size: int) -> None:
    shorter = sizes.min(axis=1)
    low, middle = (int(np.percentile(shorter, part, method="lower")) for part in (5, 50))
    small = float((shorter < size).mean())
    made.facts["shorter_side"] = {"p5": low, "p50": middle, "enlarged_share": small, "tower": size}
    text = f"their shorter side is {middle} px in the middle, and the tower sees {size} px"
    if small > 0.1:
        made.add_finding("look", f"{text}; {100 * small:.0f} % are smaller and will be enlarged")
    else:
        made.add_finding("ok", text)


def _check_duplicates(made: CheckReport, train: Pairs, val: Pairs) -> None:
    """Equal bytes in different groups are taken for different things: false negatives, and answers known beforehand."""
    seen: defaultdict[bytes, dict[str, str]] = defaultdict(dict)
    trained: set[bytes] = set()
    hashed, shared, count = 0, 0, len(train) + len(val)
    for part, pair in _SampledPairs((train, val), HASH_SAMPLE_SIZE):
        with suppress(OSError, UserError):  # told of as unreadable
            digest = hashlib.sha256(pair.image.read()).digest()
            seen[digest].setdefault(pair.group, pair.id)
            hashed += 1
            if part == 0:
                trained.add(digest)
            elif digest in trained:
                shared += 1
    same = [list(ids.values()) for ids in seen.values() if len(ids) > 1]
    made.facts.update(hashed=hashed, duplicates=sum(len(ids) - 1 for ids in same), in_both_parts=shared)
    if same:
        text = f"{made.facts['duplicates']} are byte for byte the picture of another group, such as {same[0][1]} and "
        text += f"{same[0][0]}; give them one group"
        made.add_finding("look", text + _sample_note(hashed, count))
    else:
        made.add_finding("ok", "no two of different groups are the same byte for byte" + _sample_note(hashed, count))
    if shared:
        made.add_finding("look", f"{shared} to validate on are also trained on" + _sample_note(hashed, count))


class _SampledPairs(Sequence[tuple[int, Pair]]):
    """At most about ``most`` pairs of both parts, evenly spread, each with the number of its part; read when asked."""

    def __init__(self, parts: Sequence[Pairs], most: int) -> None:
        count = sum(map(len, parts))
        self._parts = parts
        self._chosen = [
            (number, row)
            for number, pairs in enumerate(parts)
            for row in _evenly_spaced(len(pairs), -(-most * len(pairs) // count))
        ]

    def __len__(self) -> int:
        return len(self._chosen)

    def __getitem__(self, place: Any) -> Any:
        number, row = self._chosen[place]
        return number, self._parts[number][row]


def _evenly_spaced(count: int, most: int) -> list[int]:
    """At most ``most`` of the numbers below ``count``, evenly spread."""
    return np.unique(np.linspace(0, count - 1, min(count, most)).astype(np.int64)).tolist()


def _sample_note(looked_at: int, count: int) -> str:
    return "" if looked_at >= count else f" (of {looked_at:,} looked at)"
