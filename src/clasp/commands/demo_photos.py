"""The photographs of ``clasp demo``: pictures inside installed packages, never trained on, and what is asked of them.

Input: none. Output: their paths, each verified by its sha256, as pairs on disk. Note: scikit-image is not imported, its
files are read only. They are the photographs, micrographs and scans in the wheels of three packages, less a second view
and a detail of pictures that are there; drawings and charts are left out. Licences: ``data/samples/files/LICENSES.md``.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import NamedTuple

from clasp.models.zoo.installed_file import InstalledFile

_PACKAGES = {
    "skimage": ("scikit-image", "0.26.0"),
    "sklearn": ("scikit-learn", "1.9.1"),
    "matplotlib": ("matplotlib", "3.11.2"),
}
_FOLDERS = {
    "skimage": "skimage/data",
    "sklearn": "sklearn/datasets/images",
    "matplotlib": "matplotlib/mpl-data/sample_data",
}
_PHOTOS = {
    "skimage": {
        "astronaut.png": "88431cd9653ccd539741b555fb0a46b61558b301d4110412b5bc28b5e3ea6cb5",
        "brick.png": "7966caf324f6ba843118d98f7a07746d22f6a343430add0233eca5f6eaaa8fcf",
        "camera.png": "b0793d2adda0fa6ae899c03989482bff9a42d3d5690fc7e3648f2795d730c23a",
        "cell.png": "8d23a7fb81f7cc877cd09f330357fc7f595651306e84e17252f6e0a1b3f61515",
        "chelsea.png": "596aa1e7cb875eb79f437e310381d26b338a81c2da23439704a73c4651e8c4bb",
        "clock_motion.png": "f029226b28b642e80113d86622e9b215ee067a0966feaf5e60604a1e05733955",
        "coffee.png": "cc02f8ca188b167c775a7101b5d767d1e71792cf762c33d6fa15a4599b5a8de7",
        "coins.png": "f8d773fc9cfa6f4d8e5942dc34d0a0788fcaed2a4fefbbed0aef5398d7ef4cba",
        "grass.png": "b6b6022426b38936c43a4ac09635cd78af074e90f42ffa8227ac8b7452d39f89",
        "gravel.png": "c48615b451bf1e606fbd72c0aa9f8cc0f068ab7111ef7d93bb9b0f2586440c12",
        "hubble_deep_field.jpg": "3a19c5dd8a927a9334bb1229a6d63711b1c0c767fb27e2286e7c84a3e2c2f5f4",
        "ihc.png": "f8dd1aa387ddd1f49d8ad13b50921b237df8e9b262606d258770687b0ef93cef",
        "moon.png": "78739619d11f7eb9c165bb5d2efd4772cee557812ec847532dbb1d92ef71f577",
        "motorcycle_left.png": "db18e9c4157617403c3537a6ba355dfeafe9a7eabb6b9b94cb33f6525dd49179",
        "page.png": "341a6f0a61557662b02734a9b6e56ec33a915b2c41886b97509dedf2a43b47a3",
        "retina.jpg": "38a07f36f27f095e818aea7b96d34202c05176d30253c66733f2e00379e9e0e6",
        "rocket.jpg": "c2dd0de7c538df8d111e479619b129464d0269d0ae5fd18ca91d33a7fdfea95c",
    },
    "sklearn": {
        "china.jpg": "8378025ad2519d649d02e32bd98990db4ab572357d9f09841c2fbfbb4fefad29",
        "flower.jpg": "a77f6ec41e353afdf8bdff2ea981b2955535d8d83294f8cfa49cf4e423dd5638",
    },
    "matplotlib": {
        "grace_hopper.jpg": "a8ca6d734765703b09728ab47fe59f473d93ae3967fc24c7c0288c3c7adb7130",
    },
}  # fmt: skip
"""Folder of a package -> file name -> sha256; those of scikit-image are also in its own ``data/_registry.py``"""


class PhotoQuery(NamedTuple):
    """A photograph to find, and the emoji concept whose name is searched for, in one language."""

    photo: str
    concept: str
    language: str


# The rule, fixed before any search was run: those photographs whose noun in their package's documentation ("Brick
# wall", "Chelsea the cat") is the name or a keyword of a packaged concept, and the retina (an eye), by name; the
# concept with that name, else the nearest by meaning ("hot beverage" of coffee). Photographs in alphabetical order of
# that noun, languages in the order given: seven of them trained on, five never.
PHOTO_QUERIES = tuple(
    PhotoQuery(photo, concept, language)
    for (photo, concept), language in zip(
        (
            ("brick.png", "1f9f1"),
            ("camera.png", "1f4f7"),
            ("chelsea.png", "1f408"),
            ("clock_motion.png", "23f0"),
            ("coffee.png", "2615"),
            ("coins.png", "1fa99"),
            ("flower.jpg", "1f33c"),
            ("moon.png", "1f315"),
            ("motorcycle_left.png", "1f3cd"),
            ("page.png", "1f4c4"),
            ("retina.jpg", "1f441"),
            ("rocket.jpg", "1f680"),
        ),
        ("en", "sw", "zh", "bn", "es", "vi", "hi", "pt", "ar", "id", "fr", "th"),
        strict=True,
    )
)


def installed_photos() -> dict[str, Path]:
    """File name to path of every photograph. Raises ``UserError`` where a package is missing or a file is another."""
    return {
        name: InstalledFile(f"{_FOLDERS[module]}/{name}", sha256).find("clasp demo", *_PACKAGES[module])
        for module, files in _PHOTOS.items()
        for name, sha256 in files.items()
    }


def write_photo_pairs(path: Path) -> Path:
    """Write the photographs as pairs, ``.jsonl``, without captions that anything reads; returns ``path``."""
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = [{"id": name, "image": str(file), "caption": name} for name, file in installed_photos().items()]
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path
