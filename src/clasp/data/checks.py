"""Data set checks: findings in prose, and the same facts as plain values.

Input: training and validation pairs, a tokenizer, an image transform. Output: a ``CheckReport`` for each subject. Note:
of many images and captions an evenly spaced sample is checked, and the findings state its size.
"""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np

from clasp.data.distinct_captions import equal_captions, indistinct_captions
from clasp.data.images import Augment, ImageTransform
from clasp.data.loader import BadSampleLimit
from clasp.data.pairs import Pairs, skipped_lines
from clasp.data.readers import LiveImageReader, PairIndex
from clasp.data.sample_size import MIN_QUERIES, few_validation_pairs
from clasp.data.tokenizer import Tokenizer
from clasp.errors import counted
from clasp.plain_types import Pair, ProgressFactory, SkippedSample, UserError

HASH_SAMPLE_SIZE, DECODE_SAMPLE_SIZE, TOKENIZE_SAMPLE_SIZE = (
    5_000,
    500,
    50_000,
)  # above these counts, a sample is checked
_SPLITS = ("to train on", "to validate on")
_NO_TOKEN_LIMIT = 1_000_000  # tokens

Severity = Literal["ok", "look", "stop"]


@dataclass(frozen=True, slots=True)
class Finding:
    """``ok``; ``look``: training will run, but the data may not be as intended; ``stop``: training would fail.

    ``fix``: overrides of the recipe that mend it, ``key=value``; empty where no setting does.
    """

    level: Severity
    about: str
    text: str
    fix: tuple[str, ...] = ()

    def __str__(self) -> str:
        return f"{self.level:<4}  {self.about}: {self.text}"


@dataclass(frozen=True, slots=True)
class CheckReport:
    """One subject: facts as plain values, and findings about them."""

    about: str
    facts: dict[str, Any]
    findings: list[Finding] = field(default_factory=list)

    def add_finding(self, level: Severity, text: str, *fix: str) -> None:
        """Add a finding, with the overrides that mend it."""
        self.findings.append(Finding(level, self.about, text, fix))


def check_pairs(train: Pairs, val: Pairs, *, held_out: bool = False) -> CheckReport:
    """Counts of pairs, captions, languages and skipped files; ``held_out``: both are one set, split by a fraction."""
    counts = train.count_languages() + val.count_languages()
    captions, unnamed = counts.total(), counts.pop("", 0)
    languages = dict(counts.most_common())
    facts = {"train": len(train), "val": len(val), "captions": captions, "languages": languages}
    report = CheckReport("pairs", {**facts, "captions_without_language": unnamed})
    report.facts["skipped_files"] = {pairs.name: pairs.skipped_files.counts for pairs in (train, val)}
    for line in skipped_lines(train, val):
        report.add_finding("look", line)
    report.add_finding("ok", f"{len(train):,} to train on, {len(val):,} to validate on; {counted(captions, 'caption')}")
    for line in few_validation_pairs(val.group_count):
        report.add_finding(
            "look", line.removeprefix("warning: "), *_larger_fraction(train.group_count + val.group_count, held_out)
        )
    named = ", ".join(f"{name} {count:,}" for name, count in list(languages.items())[:10])
    more = f" and {len(languages) - 10} more" if len(languages) > 10 else ""
    if not languages:
        report.add_finding("ok", "captions name no language")
    else:
        lacking = f"; none named: {counted(unnamed, 'caption')}" if unnamed else ""
        report.add_finding("look" if unnamed else "ok", f"languages: {named}{more}{lacking}")
    return report


def _larger_fraction(count: int, held_out: bool) -> tuple[str, ...]:
    """The ``data.val_fraction`` that holds out as many pairs as metrics need, where that leaves most to train on."""
    fraction = math.ceil(11_000 * MIN_QUERIES / count) / 10_000  # groups are held out by a hash: about this many
    return (f"data.val_fraction={fraction:g}",) if held_out and fraction <= 0.5 else ()


def languages_override(names: Iterable[str]) -> str:
    """The override that keeps captions in these languages only."""
    return f"data.languages={json.dumps(sorted(names), ensure_ascii=False)}"


def check_captions(
    listing: PairIndex, tokenizer: Tokenizer, fits: Callable[[str], bool] = lambda override: True
) -> CheckReport:
    """Whether captions can be told apart, how often they repeat, the token lengths of the distinct ones, and how many
    are truncated. ``fits``: whether the text tower takes an override of ``text.max_tokens``."""
    often = np.bincount(listing.caption)
    repeated, top = float(often[often > 1].sum() / often.sum()), int(often.argmax())
    some = [listing.texts[number] for number in _evenly_spaced(len(listing.texts), TOKENIZE_SAMPLE_SIZE)]
    lengths = np.array([len(ids) for ids in tokenizer.with_settings(max_tokens=_NO_TOKEN_LIMIT).encode(some)])
    cut, longest = float((lengths > tokenizer.max_tokens).mean()), int(lengths.max())
    p50, p95 = (int(np.percentile(lengths, part, method="higher")) for part in (50, 95))
    facts = {"different": len(often), "repeated_share": repeated, "looked_at": len(some)}
    facts |= {"most_frequent": listing.texts[top], "most_frequent_count": int(often[top])}
    facts |= {"tokens": {"p50": p50, "p95": p95, "max": longest}, "max_tokens": tokenizer.max_tokens, "cut_share": cut}
    report = CheckReport("captions", facts)
    source = listing.pairs.name if isinstance(listing.pairs, Pairs) else ""
    if reason := equal_captions(listing.texts, source) or indistinct_captions(listing.texts, tokenizer):
        report.add_finding("stop", reason)
    different = f"{len(often):,} different ones to train on"
    if repeated:
        different += f"; {100 * repeated:.0f} % of all captions are duplicates, most often "
        different += f"{listing.texts[top][:60]!r} ({often[top]:,} times); equal captions are positives of each other"
    report.add_finding("look" if repeated > 0.5 else "ok", different)
    read = f"half have up to {p50} tokens, 95 % up to {p95}, the longest {longest}"
    if cut:
        read += f"; {100 * cut:.1f} % are cut at text.max_tokens = {tokenizer.max_tokens}"
    looks = cut >= 0.01
    longer = [f"text.max_tokens={count}" for count in (longest, p95) if looks and count > tokenizer.max_tokens]
    fix = next(((override,) for override in longer if fits(override)), ())
    report.add_finding("look" if looks else "ok", read + sample_note(len(some), len(often)), *fix)
    return report


@dataclass(frozen=True)
class _SizeRecorder(Augment):
    """An augmentation that changes nothing and records the width and height of each image."""

    sizes: list[tuple[float, float]] = field(default_factory=list)

    def crop(self, box: Any, params: Any) -> Any:
        self.sizes.append((box[2] - box[0], box[3] - box[1]))
        return box


def check_images(
    train: Pairs, val: Pairs, transform: ImageTransform, max_bad_fraction: float, bar: ProgressFactory
) -> CheckReport:
    """Unreadable images, image sizes, and byte-identical duplicates, each in a sample."""
    measuring = _SizeRecorder()
    # with "squash" the crop box is the whole image
    reader = LiveImageReader(replace(transform, resize="squash", crop_fraction=1.0), measuring)
    some = SampledPairs((train, val), DECODE_SAMPLE_SIZE)
    limits = [BadSampleLimit(len(pairs), max_bad_fraction) for pairs in (train, val)]
    looked_at, stops = [0, 0], dict[int, str]()
    skipped: list[list[SkippedSample]] = [[], []]
    with bar("images looked at") as progress:
        for done, (part, pair) in enumerate(some, 1):
            bad = reader.decode([(pair.id, pair.image, 0)]).skipped
            skipped[part] += bad
            looked_at[part] += 1
            try:
                limits[part].add(bad)
            except UserError as error:
                stops[part] = str(error)
            progress(done, len(some))
    facts: dict[str, Any] = {"looked_at": len(some)}
    facts["unreadable"] = [sample._asdict() for samples in skipped for sample in samples]
    facts["splits"] = {
        name: {"looked_at": count, "unreadable": len(samples), "missing": _count_missing(samples)}
        for name, count, samples in zip(("train", "val"), looked_at, skipped, strict=True)
    }
    report = CheckReport("images", facts)
    mend = _mend_unreadable([(len(limits[part].found), looked_at[part]) for part in stops])
    for text in stops.values():
        report.add_finding("stop", text, *mend)
    _check_readable(report, [sample for samples in skipped for sample in samples], len(train) + len(val))
    if measuring.sizes:
        _check_sizes(report, np.array(measuring.sizes), transform.size)
    _check_duplicates(report, train, val)
    return report


def _mend_unreadable(parts: Sequence[tuple[int, int]]) -> tuple[str, ...]:
    """The ``data.max_bad_fraction`` that allows what was found, as unreadable images and images looked at of each part
    that stops training; none allows all images of a part."""
    hundredths = (number for number in range(100) if all(number / 100 * total >= bad for bad, total in parts))
    return tuple(f"data.max_bad_fraction={number / 100:g}" for number in [*hundredths][:1])


def _count_missing(skipped: Sequence[SkippedSample]) -> int:
    """How many of the samples name a file that is not there."""
    return sum(sample.reason.endswith(os.strerror(errno.ENOENT)) for sample in skipped)


def _check_readable(report: CheckReport, skipped: Sequence[SkippedSample], count: int) -> None:
    """Of ``count`` images; how many of each split is in the facts."""
    splits = list(zip(_SPLITS, report.facts["splits"].values(), strict=True))
    looked_at = report.facts["looked_at"]
    of = f"of {looked_at:,} looked at{'' if looked_at == count else f' (there are {count:,})'}"
    if not skipped:
        return report.add_finding("ok", f"all {of} can be read")
    each = "; ".join(
        f"{found['unreadable']} of {found['looked_at']:,} {split}"
        + (f", {found['missing']} missing" if found["missing"] else "")
        for split, found in splits
    )
    stops = any(finding.level == "stop" for finding in report.findings)  # which name them
    named = ", ".join(f"{name} ({reason})" for name, reason in skipped[:3])
    text = f"{len(skipped)} {of} cannot be read"
    report.add_finding("look", f"{text}: {each}" if stops else f"{text} and will be left out ({each}): {named}")


def _check_sizes(report: CheckReport, sizes: np.ndarray, size: int) -> None:
    shorter = sizes.min(axis=1)
    low, middle = (int(np.percentile(shorter, part, method="lower")) for part in (5, 50))
    small = float((shorter < size).mean())
    report.facts["shorter_side"] = {"p5": low, "p50": middle, "enlarged_share": small, "tower": size}
    text = f"the median of their shorter side is {middle} px; the input of the tower is {size} px"
    if small > 0.1:
        report.add_finding("look", f"{text}; {100 * small:.0f} % are smaller and will be enlarged")
    else:
        report.add_finding("ok", text)


def _check_duplicates(report: CheckReport, train: Pairs, val: Pairs) -> None:
    """Byte-identical images in different groups (false negatives), and in both training and validation (leakage)."""
    seen: defaultdict[bytes, dict[str, str]] = defaultdict(dict)
    trained: set[bytes] = set()
    hashed, shared, count = 0, 0, len(train) + len(val)
    for part, pair in SampledPairs((train, val), HASH_SAMPLE_SIZE):
        with suppress(OSError, UserError):  # reported as unreadable
            digest = hashlib.sha256(pair.image.read()).digest()
            seen[digest].setdefault(pair.group, pair.id)
            hashed += 1
            if part == 0:
                trained.add(digest)
            elif digest in trained:
                shared += 1
    same = [list(ids.values()) for ids in seen.values() if len(ids) > 1]
    report.facts.update(hashed=hashed, duplicates=sum(len(ids) - 1 for ids in same), in_both_parts=shared)
    if same:
        text = f"{report.facts['duplicates']} are byte for byte the picture of another group, such as {same[0][1]} and "
        text += f"{same[0][0]}; give them one group"
        report.add_finding("look", text + sample_note(hashed, count))
    else:
        report.add_finding("ok", "no two of different groups are the same byte for byte" + sample_note(hashed, count))
    if shared:
        report.add_finding("look", f"{shared} to validate on are also trained on" + sample_note(hashed, count))


class SampledPairs(Sequence[tuple[int, Pair]]):
    """About ``most`` evenly spaced pairs of all parts, each with the number of its part; read lazily."""

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
    """At most ``most`` of the numbers below ``count``, evenly spaced."""
    return np.unique(np.linspace(0, count - 1, min(count, most)).astype(np.int64)).tolist()


def sample_note(looked_at: int, count: int) -> str:
    """The size of a sample, as the end of a finding; empty where all were looked at."""
    return "" if looked_at >= count else f" (of {looked_at:,} looked at)"
