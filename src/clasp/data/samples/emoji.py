"""The emoji sample data set inside the package, unpacked into pairs that any recipe can read.

Input: the packaged archives: 1,391 emoji concepts in three drawing styles with names and keywords in 42 languages.
Output: a folder of images and one ``.jsonl`` per split, as a user would write them. Note: train, val and test are split
by concept, so that near-duplicates stay together. Sources and licences: ``data/samples/files/LICENSES.md``.
"""

from __future__ import annotations

import gzip
import json
import os
import shutil
import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import as_file, files
from pathlib import Path
from typing import Any

from clasp.plain_types import UserError

# Held-out languages are never trained on. The split was fixed before any result was known; the low-resource ones were
# chosen so that both sides are about equally hard for the text tower alone and span several scripts.
TRAINED_LANGUAGES = ("en", "de", "fr", "es", "ru", "tr", "ar", "hi", "ja", "zh")
TRAINED_LOW_RESOURCE = ("sw", "yo", "ig", "cy", "eu", "km", "my", "si", "so", "mn")
QUICK_TRAINED_LANGUAGES = ("en", "sw", "km")
HELD_OUT_LOW_RESOURCE = ("am", "zu", "ha", "gd", "lo", "qu")
HELD_OUT_LANGUAGES = ("it", "pt", "nl", "sv", "pl", "cs", "uk", "el", "he", "fa", "bn", "ta", "vi", "th", "id", "ko")
LANGUAGE_NAMES = {
    "en": "English", "de": "German", "fr": "French", "es": "Spanish", "ru": "Russian", "tr": "Turkish", "ar": "Arabic",
    "hi": "Hindi", "ja": "Japanese", "zh": "Chinese", "sw": "Swahili", "yo": "Yoruba", "ig": "Igbo", "cy": "Welsh",
    "eu": "Basque", "km": "Khmer", "my": "Burmese", "si": "Sinhala", "so": "Somali", "mn": "Mongolian", "am": "Amharic",
    "zu": "Zulu", "ha": "Hausa", "gd": "Scottish Gaelic", "lo": "Lao", "qu": "Quechua", "it": "Italian",
    "pt": "Portuguese", "nl": "Dutch", "sv": "Swedish", "pl": "Polish", "cs": "Czech", "uk": "Ukrainian", "el": "Greek",
    "he": "Hebrew", "fa": "Persian", "bn": "Bengali", "ta": "Tamil", "vi": "Vietnamese", "th": "Thai",
    "id": "Indonesian", "ko": "Korean",
}  # fmt: skip
_KEYWORD_LANGUAGES = ("en", "de", "fr", "es")
"""Languages whose training captions also come with keywords"""

_STYLES = ("noto", "twemoji", "fluent3d")
_SPLITS = ("train", "val", "test")
_VERSION = "3"


@dataclass(frozen=True, slots=True)
class EmojiSample:
    """The files of the unpacked sample."""

    folder: Path

    def pairs(self, split: str) -> Path:
        """The ``.jsonl`` of a split: captions in the trained languages."""
        return self.folder / f"{split}.jsonl"

    def multilingual_test(self) -> Path:
        """The test split with its names in all 42 languages."""
        return self.folder / "questions.jsonl"


SAMPLE_SCHEME = "sample:"
_SAMPLES = {"emoji": False, "emoji-quick": True}
"""Name of a packaged sample -> whether it has one drawing style and three languages only"""


def sample_file(source: str, cache: Path) -> Path:
    """The file of ``sample:NAME`` or ``sample:NAME/SPLIT`` (train where left out), unpacked into ``cache``.

    Raises ``UserError`` for an unknown name or split.
    """
    name, _, split = source.removeprefix(SAMPLE_SCHEME).partition("/")
    if name not in _SAMPLES or (split or "train") not in _SPLITS:
        choices = ", ".join(f"{SAMPLE_SCHEME}{each}" for each in _SAMPLES)
        raise UserError(f"{source} is not a packaged sample; there are {choices}, each with /{', /'.join(_SPLITS)}")
    return unpack_emoji_sample(cache, quick=_SAMPLES[name]).pairs(split or "train")


def unpack_emoji_sample(cache: Path, *, quick: bool) -> EmojiSample:
    """Unpack the sample into ``cache``, once; ``quick``: one drawing style and three training languages."""
    folder = cache / "demo" / f"{_VERSION}{'-quick' if quick else ''}"
    if (folder / "ready").exists():
        return EmojiSample(folder)
    part = folder.with_name(folder.name + ".part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    styles = _STYLES[:1] if quick else _STYLES
    trained = QUICK_TRAINED_LANGUAGES if quick else (*TRAINED_LANGUAGES, *TRAINED_LOW_RESOURCE)
    with as_file(files("clasp.data.samples") / "files") as data:
        _unpack_images(data, part, styles)
    concepts = _concepts()
    for split in _SPLITS:
        chosen = [concept for concept in concepts if concept["split"] == split]
        keywords = _KEYWORD_LANGUAGES if split == "train" else ()
        _write(part / f"{split}.jsonl", _records(chosen, styles, trained, keywords, part))
        if split == "test":
            _write(part / "questions.jsonl", _records(chosen, styles, list(chosen[0]["locales"]), (), part))
    (part / "ready").touch()
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(part, folder)
    return EmojiSample(folder)


def _unpack_images(data: Path, folder: Path, styles: Sequence[str]) -> None:
    for style in styles:
        (folder / "images" / style).mkdir(parents=True)
        with tarfile.open(data / f"{style}.tar.gz") as tar:
            for member in tar:
                stem, _, suffix = member.name.rpartition(".")
                picture = tar.extractfile(member)
                if suffix == "webp" and picture is not None:
                    name = f"{stem.partition('_')[2]}.webp"
                    (folder / "images" / style / name).write_bytes(picture.read())


def concept_names() -> dict[str, dict[str, str]]:
    """Concept to its name in every language."""
    return {each["concept"]: {key: entry["name"] for key, entry in each["locales"].items()} for each in _concepts()}


@cache
def _concepts() -> list[dict[str, Any]]:
    with (files("clasp.data.samples") / "files" / "captions.jsonl.gz").open("rb") as packed:
        return [json.loads(line) for line in gzip.open(packed, "rt", encoding="utf-8")]


def _records(
    concepts: Sequence[dict[str, Any]],
    styles: Sequence[str],
    languages: Sequence[str],
    keywords: Sequence[str],
    folder: Path,
) -> Iterator[dict[str, Any]]:
    for concept in concepts:
        captions = []
        for language in languages:
            entry = concept["locales"].get(language)
            if entry is not None:
                captions.append({"text": entry["name"], "language": language})
                if language in keywords and entry["keywords"]:
                    captions.append({"text": f"{entry['name']}: {', '.join(entry['keywords'])}", "language": language})
        for style in styles:
            image = f"images/{style}/{concept['concept']}.webp"
            if (folder / image).exists():
                key = f"{style}/{concept['concept']}"
                yield {
                    "id": key,
                    "image": image,
                    "group": concept["concept"],
                    "char": concept["char"],
                    "caption": captions,
                }


def _write(path: Path, rows: Iterator[dict[str, Any]]) -> None:
    with open(path, "w", encoding="utf-8") as file:
        for row in rows:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
