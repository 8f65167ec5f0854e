"""Captions, class names and images that are equal, so that no model can tell them apart and results are near chance.

Input: pairs or class names. Output: an error where all are equal, status lines where some are. Note: no text is
tokenized and of images few are read; texts that one text tower reads alike are found when the model is there
(``DeferredInputs``).
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Collection, Iterator, Sequence

from clasp.data.decoding import ImageError, ResizeSettings, decode_resized
from clasp.data.distinct_captions import all_equal, shown_text
from clasp.data.pairs import has_columns
from clasp.errors import counted
from clasp.evaluation.name_checks import quote_first
from clasp.types import Caption, Pair, UserError


def equal_caption_lines(pairs: Sequence[Pair], data: str, languages: Collection[str] | None = None) -> Iterator[str]:
    """A warning where captions are those of several groups. Raises ``UserError`` where all are equal, and there are two
    groups. ``languages``: those evaluated, each on its own; ``None``: all captions are evaluated together."""
    first: dict[Caption, str] = {}
    others: defaultdict[Caption, set[str]] = defaultdict(set)
    for pair in pairs:
        for text, language in pair.captions:
            if languages is not None and language not in languages:
                continue
            caption = Caption(text, "" if languages is None else language)
            if first.setdefault(caption, pair.group) != pair.group:
                others[caption].add(pair.group)
    if not others:
        return
    count = Counter(caption.language for caption in first)
    for text, language in others:
        if count[language] == 1:
            raise UserError(all_equal(f"of {data}{f' in {language}' if language else ''}", text, data, "caption="))
    top = max(others, key=lambda caption: len(others[caption]))
    yield (
        f"warning: {len(others):,} of the {counted(len(first), 'different caption')} of {data} are those of "
        f"several images, such as {shown_text(top.text)} ({len(others[top]) + 1:,}); each is right for its own alone"
    )


def like_class_name_lines(classes: Sequence[str]) -> Iterator[str]:
    """A warning where class names differ in case and spaces alone, which many text towers do not see."""
    alike: defaultdict[str, list[str]] = defaultdict(list)
    for name in classes:
        alike["".join(name.casefold().split())].append(name)
    if several := [name for names in alike.values() if len(names) > 1 for name in names]:
        yield f"warning: class names that differ in case or spaces alone: {quote_first(several, 6)}"


def require_different_images(pairs: Sequence[Pair], data: str) -> None:
    """Raises ``UserError`` where all images are the same bytes, and there are two groups. Reads images until one
    differs or cannot be read; equal files that are no images are reported where images are decoded."""
    first = pairs[0]
    several = False
    try:
        content = first.image.read()
        for pair in pairs:
            if pair.group != first.group:
                several = True
                if pair.image.read() != content:
                    return
        if several:
            decode_resized(content, ResizeSettings(1))
    except (OSError, UserError, ImageError):  # reported where images are read
        return
    if several:
        hint = "; image= names the column of images" if has_columns(data) else ""
        same = f"every image of {data} is the same, byte for byte, such as {first.image.name}"
        raise UserError(f"{same}, so nothing tells them apart{hint}")
