"""Encoding images and captions: clasp against open_clip, sentence-transformers and transformers' pipelines.

The same two towers with the same weights everywhere. Images are JPEG files of 640 x 480 with the spectrum of
photographs, and reading, decoding and resizing them is included; captions are those of the demo's sample. Each peer is
called as in its own documentation.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image  # noqa: TID251  # as the peers do

from benchmarks import harness, peer_models, sample_data
from benchmarks.harness import Contestant, Row, Run, sized
from benchmarks.peers import attempt, imported
from benchmarks.sample_data import SIZE
from clasp.config.build import ModelAndPreprocessing
from clasp.models.inference import EmbeddingModel, EncoderPrecision

IMAGES = sized(160, 8)
CAPTIONS = sized(1000, 32)
BATCH = 64
FASTER_IMAGES, FASTER_CAPTIONS = 1.3, 2.0
Maker = Callable[..., Run]
"""Towers, and a peer's dtype of the weights or our precision, to what encodes with them."""


def photos(count: int) -> list[Path]:
    """JPEG files of 1/f noise, the spectrum of photographs, so that they compress and decode like photographs."""
    folder = sample_data.WORK / "photos"
    folder.mkdir(parents=True, exist_ok=True)
    height, width = 480, 640
    frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)) + 1 / width
    paths = [folder / f"{number}.jpg" for number in range(count)]
    for number, path in enumerate(paths):
        if not path.exists():
            noise = np.random.default_rng(number).standard_normal((3, height, width))
            waves = np.fft.irfft2(np.fft.rfft2(noise) / frequency, (height, width))
            waves = 128 + 48 * waves / waves.std()
            Image.fromarray(waves.clip(0, 255).astype(np.uint8).transpose(1, 2, 0)).save(path, quality=90)
    return paths


def rows() -> Sequence[Row]:
    return [
        *compare("encode images", "images/s", FASTER_IMAGES, our_images, IMAGE_PEERS),
        *compare("encode captions", "captions/s", FASTER_CAPTIONS, our_captions, CAPTION_PEERS),
    ]


def compare(work: str, unit: str, target: float, ours: Maker, peers: dict[str, Maker]) -> list[Row]:
    parts = sample_data.untouched()
    made = {name: attempt(partial(maker, parts)) for name, maker in peers.items()}
    contestants = [Contestant("clasp", ours(parts))]
    contestants += [Contestant(name, run) for name, run in made.items() if not isinstance(run, str)]
    rates = harness.race(contestants)
    bound = harness.profiled(contestants[0].run)
    count = IMAGES if unit == "images/s" else CAPTIONS
    return [
        Row(
            work,
            unit,
            rates["clasp"],
            name,
            rates.get(name),
            target,
            "higher",
            run if isinstance(run, str) else f"{count:,} of them",
            bound,
        )
        for name, run in made.items()
    ]


# --- images ----------------------------------------------------------------------------------------------------------


def our_images(parts: ModelAndPreprocessing, precision: EncoderPrecision | None = None) -> Run:
    model, paths = our_model(parts, precision), photos(IMAGES)
    return lambda: len(model.encode_image(paths))


def our_model(parts: ModelAndPreprocessing, precision: EncoderPrecision | None) -> EmbeddingModel:
    return EmbeddingModel(parts.model.eval(), parts.transform, parts.tokenizer, precision=precision)


def open_clip_images(parts: ModelAndPreprocessing, dtype: torch.dtype = torch.float32) -> Run:
    model = peer_models.open_clip_model(parts).eval().to(dtype)
    transform = parts.transform
    preprocess = imported("open_clip").transform.image_transform(
        SIZE, is_train=False, mean=transform.mean, std=transform.std
    )
    paths = photos(IMAGES)

    def run() -> int:
        with torch.no_grad():
            found = [
                model.encode_image(
                    torch.stack([preprocess(Image.open(path)) for path in paths[at : at + BATCH]]).to(dtype)
                )
                for at in range(0, len(paths), BATCH)
            ]
        return sum(map(len, found))

    return run


def pipeline_images(parts: ModelAndPreprocessing, dtype: torch.dtype = torch.float32) -> Run:
    from transformers import pipeline

    folder = str(peer_models.saved_image(parts))
    pipe = pipeline("image-feature-extraction", model=folder, image_processor=folder, device="cpu", dtype=dtype)
    paths = [str(path) for path in photos(IMAGES)]
    return lambda: len(pipe(paths, batch_size=BATCH))


def sentence_transformers_images(parts: ModelAndPreprocessing, dtype: torch.dtype = torch.float32) -> Run:
    model = _sentence_transformer(str(peer_models.saved_image(parts)), "cls").to(dtype)
    paths = photos(IMAGES)

    def run() -> int:
        return len(model.encode([Image.open(path) for path in paths], batch_size=BATCH))

    assert model.encode([Image.open(paths[0])]).shape == (1, 384)
    return run


# --- captions --------------------------------------------------------------------------------------------------------


def our_captions(parts: ModelAndPreprocessing, precision: EncoderPrecision | None = None) -> Run:
    model, texts = our_model(parts, precision), sample_data.captions(CAPTIONS)
    return lambda: len(model.encode_text(texts))


def open_clip_captions(parts: ModelAndPreprocessing, dtype: torch.dtype = torch.float32) -> Run:
    model = peer_models.open_clip_model(parts).eval().to(dtype)
    tokenizer = imported("open_clip").tokenizer.HFTokenizer(str(peer_models.saved_text(parts)))
    texts = sample_data.captions(CAPTIONS)

    def run() -> int:
        with torch.no_grad():
            found = [
                model.encode_text(tokenizer(texts[at : at + BATCH]), normalize=True)
                for at in range(0, len(texts), BATCH)
            ]
        return sum(map(len, found))

    return run


def pipeline_captions(parts: ModelAndPreprocessing, dtype: torch.dtype = torch.float32) -> Run:
    from transformers import pipeline

    pipe = pipeline("feature-extraction", model=str(peer_models.saved_text(parts)), device="cpu", dtype=dtype)
    texts = sample_data.captions(CAPTIONS)
    return lambda: len(pipe(texts, batch_size=BATCH, return_tensors=True))


def sentence_transformers_captions(parts: ModelAndPreprocessing, dtype: torch.dtype = torch.float32) -> Run:
    model = _sentence_transformer(str(peer_models.saved_text(parts)), "mean")
    texts = sample_data.captions(CAPTIONS)
    with torch.no_grad():  # verify that the towers are equal
        right = parts.model.text.pooled(parts.tokenizer(texts[:4]))
    torch.testing.assert_close(torch.from_numpy(model.encode(texts[:4])), right, rtol=1e-3, atol=1e-3)
    model.to(dtype)
    return lambda: len(model.encode(texts, batch_size=BATCH))


def _sentence_transformer(folder: str, pooling: str) -> Any:
    imported("sentence_transformers")
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.base.modules.transformer import Transformer
    from sentence_transformers.sentence_transformer.modules.pooling import Pooling

    tower = Transformer(folder)
    return SentenceTransformer(modules=[tower, Pooling(384, pooling_mode=pooling)], device="cpu")


IMAGE_PEERS: dict[str, Maker] = {
    "open_clip": open_clip_images,
    "sentence-transformers": sentence_transformers_images,
    "transformers pipeline": pipeline_images,
}
CAPTION_PEERS: dict[str, Maker] = {
    "open_clip": open_clip_captions,
    "sentence-transformers": sentence_transformers_captions,
    "transformers pipeline": pipeline_captions,
}

if __name__ == "__main__":
    harness.main(rows)
