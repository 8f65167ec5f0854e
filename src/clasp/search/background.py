"""Calibrated scores: how far the score of a hit exceeds what captions of other things score, and when nothing is close.

Input: embeddings of some hundreds of background captions, and a store. Output: a ``Background``, saved beside the index
as ``background.safetensors``. Note: a cosine alone means nothing: images differ in what any caption scores with them.
A hit's ``z`` is its cosine minus the mean, over the standard deviation, of the cosines of its image with the background
captions (as test normalisation in speaker verification: Auckenthaler et al. 2000, Digital Signal Processing 10). The
largest z of a query's best hits is compared with that of each background caption. Some of these name things that are
in the collection, so the null distribution is a normal one fitted to the lower half alone (Efron 2004, JASA 99, "the
choice of a null hypothesis"; ours uses the median and the 16th percentile). A hit is close if its z has a p-value below
``FALSE_ALARM_RATE``.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import NormalDist
from typing import NamedTuple

import numpy as np
from jaxtyping import Float
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from clasp.data.atomic_files import replace_file
from clasp.plain_types import Store

BACKGROUND_FILE = "background.safetensors"
FALSE_ALARM_RATE = 0.05
"""Nominal fraction of queries about absent things for which a hit is called close all the same.

Measured: 5 of 40 such queries in 800 photographs (``clasp train photos``), where the same rule on the largest cosine
gave 10; random vectors in place of embeddings: 12 of 50, since their largest z has a longer upper tail."""
BEST_HITS = 10
"""Hits whose largest z is the statistic of a query"""
_FORMAT = 2  # 1 had no texts of the captions


class BackgroundCaption(NamedTuple):
    """A caption as it was encoded, in its language, and what it means in English."""

    text: str
    english: str


@dataclass(frozen=True, slots=True)
class BackgroundFacts:
    """What was measured on one collection, as plain data."""

    model: str
    """Fingerprint of the model of the captions' embeddings"""
    entries: int
    """Entries of the store when it was measured"""
    median: float
    """Median over the background captions of the largest z among their best hits"""
    deviation: float
    """Median minus 16th percentile of the same"""
    near_duplicate: float
    """Cosine from which two images count as near-duplicates (``near_duplicates``)"""
    format: int = _FORMAT


@dataclass(frozen=True, slots=True)
class Background:
    """Embeddings of background captions, the captions, and the facts measured with them."""

    vectors: Float[np.ndarray, "captions E"]
    facts: BackgroundFacts
    captions: tuple[BackgroundCaption, ...]

    @property
    def threshold(self) -> float:
        """The z from which a hit is close."""
        return self.facts.median + self.facts.deviation * NormalDist().inv_cdf(1 - FALSE_ALARM_RATE)

    def z_scores(self, texts: Float[np.ndarray, "q E"], images: Float[np.ndarray, "n E"]) -> list[list[float]]:
        """The calibrated score of each text's embedding with each image."""
        mean, deviation = _image_moments(self.vectors, images)
        return (((texts @ images.T) - mean) / deviation).tolist()

    def p_value(self, z: float) -> float:
        """Probability that the best hits of a query about other things score at least this."""
        return 1 - NormalDist(self.facts.median, self.facts.deviation).cdf(z)

    def save(self, path: Path) -> None:
        """Write atomically. Raises ``OSError``."""
        facts = {"facts": json.dumps(asdict(self.facts)), "captions": json.dumps(self.captions)}
        vectors = np.ascontiguousarray(self.vectors, np.float32)
        with replace_file(path) as part:
            try:
                save_file({"captions": vectors}, part, {**facts, "checksum": _checksum(facts, vectors)})
            except SafetensorError as error:  # hides the system's error, such as that of a full disk, in its text
                raise OSError(str(error)) from None


def measure_background(
    captions: Sequence[BackgroundCaption],
    vectors: Float[np.ndarray, "captions E"],
    store: Store,
    image_vectors: Callable[[Sequence[str]], Float[np.ndarray, "n E"]],
    model: str,
    near_duplicate: float,
) -> Background:
    """Fit the null distribution on a store. ``image_vectors(ids)`` returns the stored vectors ``[n E]``."""
    largest = []
    for query, hits in zip(vectors, store.search(vectors, BEST_HITS), strict=True):
        if hits:
            images = image_vectors([hit.id for hit in hits])
            mean, deviation = _image_moments(vectors, images)
            largest.append(float((((images @ query) - mean) / deviation).max()))
    low, median = np.quantile(largest or [0.0, 1.0], (0.1587, 0.5)).tolist()
    facts = BackgroundFacts(model, store.count(), median, max(median - low, 1e-6), near_duplicate)
    return Background(vectors, facts, tuple(captions))


def read_background(path: Path, model: str) -> Background | None:
    """The saved background; ``None`` if there is none, or it is damaged or of another model: it is measured again."""
    try:
        with safe_open(path, "np") as file:
            saved = file.metadata() or {}
            facts = BackgroundFacts(**json.loads(saved["facts"]))
            captions = tuple(BackgroundCaption(*each) for each in json.loads(saved["captions"]))
            made = Background(file.get_tensor("captions"), facts, captions)
            if saved["checksum"] != _checksum(saved, made.vectors):
                return None
    except (OSError, SafetensorError, ValueError, TypeError, KeyError, RecursionError):
        return None
    whole = len(captions) == len(made.vectors)
    return made if whole and facts.model == model and facts.format == _FORMAT else None


def _checksum(facts: Mapping[str, str], vectors: Float[np.ndarray, "captions E"]) -> str:
    """The CRC-32 of the texts and of the vectors."""
    texts = zlib.crc32(f"{facts['facts']}{facts['captions']}".encode())
    return f"{zlib.crc32(vectors.tobytes(), texts):08x}"


def nothing_close_line(p_value: float) -> str:
    """One line for a search whose best hit is not close."""
    return f"nothing is close: the best hit scores like a random caption does (p = {_rounded(p_value)})"


def _rounded(p_value: float) -> str:
    return f"{p_value:.1g}" if p_value < 0.1 else f"{p_value:.2f}".rstrip("0").rstrip(".")


def _image_moments(
    captions: Float[np.ndarray, "captions E"], images: Float[np.ndarray, "n E"]
) -> tuple[Float[np.ndarray, " n"], Float[np.ndarray, " n"]]:
    """Mean and standard deviation of the cosines of each image with the captions."""
    cosines = images @ captions.T
    return cosines.mean(axis=1), np.maximum(cosines.std(axis=1, ddof=1), 1e-6)
