"""Near-duplicate images: the same picture in another size or compression, in different groups or in both parts.

Input: training and validation pairs. Output: a ``CheckReport``. Note: images are compared by small thumbnails, in
colour, which takes milliseconds an image and no model; a crop, a mirror image or another photograph of the same thing
is not found. Pictures with hardly any contrast are left out, since all of them look alike.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from clasp.data.checks import CheckReport, SampledPairs, sample_note
from clasp.data.images import ImageError, thumbnail
from clasp.data.pairs import Pairs
from clasp.plain_types import Pair, ProgressFactory, UserError

THUMBNAIL_SAMPLE_SIZE = 3_000  # images; all of them are compared with all
_SIDE = 16  # pixels
# Correlation of two thumbnails. Copies at half of the size, in JPEG of quality 60 to 80, reach 0.995 (tests); of 60
# different drawings the nearest two 0.92. Variants of one emoji reach it too.
_MIN_CORRELATION = 0.98
_MIN_CONTRAST = 16.0  # standard deviation of a thumbnail, of 255


class _Thumbnails(NamedTuple):
    """Thumbnails, centred and of unit length, with their pairs and the part (0: training, 1: validation) of each."""

    values: Float[Tensor, "n values"]
    parts: list[int]
    pairs: list[Pair]
    looked_at: int


def check_near_duplicates(train: Pairs, val: Pairs, bar: ProgressFactory) -> CheckReport:
    """Near-duplicates of different groups (false negatives), and of both training and validation (leakage)."""
    made = _read_thumbnails(SampledPairs((train, val), THUMBNAIL_SAMPLE_SIZE), bar)
    near = (made.values @ made.values.T).triu(1) >= _MIN_CORRELATION
    found = [(one, two) for one, two in near.nonzero().tolist() if made.pairs[one].group != made.pairs[two].group]
    leaked = {two for one, two in found if made.parts[one] != made.parts[two]}
    note = sample_note(made.looked_at, len(train) + len(val))
    facts = {"looked_at": made.looked_at, "compared": len(made.pairs), "pairs_of_images": len(found)}
    report = CheckReport("near_duplicates", {**facts, "leaked_into_validation": len(leaked)})
    if not found:
        report.add_finding("ok", f"no two of different groups are nearly one picture{note}")
        return report
    one, two = found[0]
    images = len({two for _, two in found})
    example = f"such as {made.pairs[two].id} and {made.pairs[one].id}"
    text = f"{images:,} are nearly the picture of another group (another size or compression), {example}"
    report.add_finding("look", f"{text}; give them one group where they show the same{note}")
    if leaked:
        report.add_finding("look", f"{len(leaked):,} to validate on are near-duplicates of pictures trained on{note}")
    return report


def _read_thumbnails(some: Sequence[tuple[int, Pair]], bar: ProgressFactory) -> _Thumbnails:
    values, parts, pairs = [], [], []
    with bar("thumbnails") as progress:
        for done, (part, pair) in enumerate(some, 1):
            with suppress(ImageError, OSError, UserError):  # reported as unreadable by check_images
                pixels = np.asarray(thumbnail(pair.image.read(), _SIDE), dtype=np.float32).reshape(-1)
                if pixels.std() >= _MIN_CONTRAST:
                    centred = pixels - pixels.mean()
                    values.append(centred / np.linalg.norm(centred))
                    parts.append(part)
                    pairs.append(pair)
            progress(done, len(some))
    stacked = torch.from_numpy(np.stack(values)) if values else torch.zeros(0, 3 * _SIDE**2)
    return _Thumbnails(stacked, parts, pairs, len(some))
