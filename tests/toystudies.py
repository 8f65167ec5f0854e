"""Folders of photos and of drawings in the layout of those that the studies read, of toys."""

from __future__ import annotations

import gzip
import json
import tarfile
from pathlib import Path

from studies.lilt.emoji_names import HELD_OUT, STYLE_TO_ASK, STYLE_TO_CHOOSE, STYLES, TRAINED

from toydata import Toy, add_member, toys


def write_photos(folder: Path) -> Path:
    """Shards of photos of ten classes; half of these are in the studies of LilT."""
    drawings = [toy for toy in toys(900) if toy.shape in ("circle", "cross")]
    classes = sorted({toy.caption[2:] for toy in drawings})
    tiny = folder / "tinyimagenet"
    for number in range(6):
        _write(tiny / f"tinyimagenet-train-{number:02}.tar", drawings[number * 50 :][:50], classes)
    _write(tiny / "tinyimagenet-val.tar", drawings[300:340], classes)
    _write(folder / "cifar10/cifar10-train.tar", drawings[:40], classes)
    _write(folder / "cifar10/cifar10-test.tar", drawings[40:70], classes)
    _write(folder / "flickr8k-sample/flickr8k-sample-train.tar", drawings[:6], classes)
    _write(folder / "flickr8k-sample/flickr8k-sample-val.tar", drawings[6:12], classes)
    for name in ("tinyimagenet", "cifar10"):
        (folder / name / "classnames.txt").write_text("\n".join(classes), encoding="utf-8")
        (folder / name / "zeroshot_classification_templates.txt").write_text("a {c}\na photo of a {c}\n", "utf-8")
    return folder


def _write(file: Path, drawings: list[Toy], classes: list[str]) -> None:
    """A shard; what of its parts a kind of photo lacks is in the others as well."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(file, "w") as tar:
        for number, toy in enumerate(drawings):
            label = classes.index(toy.caption[2:])
            said = [f"{toy.caption} {n} {toy.key}" for n in range(2)] if "flickr" in str(file) else [toy.caption]
            about = {"class": classes[label], "wnid": f"n{label}", "label": label, "captions": said}
            add_member(tar, f"{number}.png", toy.png)
            add_member(tar, f"{number}.json", json.dumps(about).encode())


def write_drawings(folder: Path) -> Path:
    """Drawings of thirty concepts in five styles, named in every language of the studies."""
    spoken = [language for sets in (TRAINED, HELD_OUT) for languages in sets.values() for language in languages]
    drawings = toys(30)
    with gzip.open(folder / "captions.jsonl.gz", "wt", encoding="utf-8") as file:
        for number, toy in enumerate(drawings):
            split = ("train", "train", "train", "val", "test")[number % 5]
            locales = {language: {"name": f"{toy.colour} {toy.shape}"} for language in spoken}
            file.write(json.dumps({"concept": f"c{number}", "core": True, "split": split, "locales": locales}) + "\n")
    for place, style in enumerate((*STYLES, STYLE_TO_CHOOSE, STYLE_TO_ASK)):
        with tarfile.open(folder / f"{style}.tar", "w") as tar:
            for number, toy in enumerate(toys(30, seed=0, size=32 + place)):
                add_member(tar, f"{style}_c{number}.webp", toy.png)
    return folder
