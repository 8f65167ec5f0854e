"""The background of a run's index: measured when images are indexed, read when they are searched.

Input: a run folder and the engine of its index. Output: a ``Background`` (see ``clasp.search.background``), in
``RUN/background.safetensors``. Note: the captions are packaged, the same for every run: names of ImageNet classes, and
of emoji in all languages of the sample, since queries come in any language. A run's training captions are not used,
since they would often describe what is in the collection.
"""

from __future__ import annotations

import logging
import random
from pathlib import Path

import numpy as np

from clasp.data.decoding import ImageError, shrink_to_fit
from clasp.data.image_header import read_image_header
from clasp.data.samples.emoji import concept_names
from clasp.models.zoo.imagenet import imagenet_concepts
from clasp.plain_types import Hit, UserError
from clasp.search.background import (
    BACKGROUND_FILE,
    Background,
    BackgroundCaption,
    measure_background,
    read_background,
)
from clasp.search.engine import SearchEngine
from clasp.search.near_duplicates import duplicate_threshold

_log = logging.getLogger(__name__)

_PER_SOURCE = 250  # captions of each of the two sources
_COPIES = 24  # images that are copied to measure the threshold of near-duplicates
_COPY_QUALITY = 80  # of JPEG
_MAX_PIXELS = 1 << 26
_CHANGE = 0.1  # fraction by which the number of entries may change before the background is measured again


def background_captions() -> list[BackgroundCaption]:
    """Names of classes and of emoji, evenly spread over both lists; the emoji in each language in turn."""
    classes = [BackgroundCaption(concept.names[0], concept.names[0]) for concept in imagenet_concepts()[:1000]]
    spoken = [
        BackgroundCaption(list(names.values())[place % len(names)], names["en"])
        for place, names in enumerate(concept_names().values())
    ]
    found: dict[str, BackgroundCaption] = {}
    for caption in (*_every(classes), *_every(spoken)):
        found.setdefault(caption.text, caption)
    return list(found.values())


def open_background(run: Path, engine: SearchEngine) -> Background:
    """The background of the index, measured anew if there is none of this model, or the collection has changed.

    The captions are not encoded again as long as the model stays. A folder that cannot be written is no error.
    """
    path = run / BACKGROUND_FILE
    model, count = engine.model.fingerprint, engine.store.count()
    saved = read_background(path, model)
    if saved is not None and abs(saved.facts.entries - count) <= _CHANGE * count:
        return saved
    captions = background_captions() if saved is None else saved.captions
    vectors = engine.encode_texts([caption.text for caption in captions]) if saved is None else saved.vectors
    threshold = _duplicate_threshold(engine)
    made = measure_background(captions, vectors, engine.store, engine.stored_vectors, model, threshold)
    try:
        made.save(path)
    except OSError as error:
        _log.warning("%s cannot be written, so the next search measures it again: %s", path, error.strerror or error)
    return made


def _duplicate_threshold(engine: SearchEngine) -> float:
    """From copies of a random sample of the indexed images; those that can no longer be read are left out."""
    stored = [Hit(name, 1.0, meta) for name, meta in engine.store.scan()]
    ids, copies = [], []
    for hit in random.Random(0).sample(stored, min(_COPIES, len(stored))):
        try:
            data = engine.read_image(hit)
            read_image_header(data, _MAX_PIXELS)
            copies.append(
                np.asarray(
                    engine.model.transform(shrink_to_fit(data, engine.model.transform.size, "JPEG", _COPY_QUALITY))
                )
            )
            ids.append(hit.id)
        except (UserError, ImageError):
            continue
    if not ids:
        return 1.0
    copied = np.asarray(engine.model.encode_pixels(np.stack(copies)))
    return duplicate_threshold(engine.stored_vectors(ids), copied)


def _every(captions: list[BackgroundCaption]) -> list[BackgroundCaption]:
    """``_PER_SOURCE`` of the captions, at equal distances."""
    return captions[:: max(1, len(captions) // _PER_SOURCE)][:_PER_SOURCE]
