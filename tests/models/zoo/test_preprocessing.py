"""``preprocessor_config.json``, field by field, against the image processors of ``transformers`` (those on Pillow)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers as hf
from PIL import Image

from clasp.models.tower_settings import ImageTowerSettings
from clasp.models.zoo.preprocessing import read_preprocessing
from clasp.models.zoo.registry import load_backbone
from clasp.types import UserError
from toysavedtowers import PREPROCESSOR, save

SQUARE = {"height": 32, "width": 32}
EDGE = {"shortest_edge": 36}
CROP = {"crop_size": SQUARE, "do_center_crop": True}
HONOURED: list[tuple[str, dict[str, Any]]] = [  # the processor, and what is put over mean, deviation and a 32 px square
    ("ViT", {}),
    ("ViT", {"do_rescale": False, "image_mean": 127.5, "image_std": 127.5}),
    ("ViT", {"do_rescale": False, "image_mean": [127.5] * 3, "image_std": [50.0, 60.0, 70.0]}),
    ("ViT", {"do_rescale": False, "do_normalize": False}),
    ("ViT", {"rescale_factor": 1 / 127.5}),
    ("ViT", {"rescale_factor": 1.0, "image_mean": [120.0, 110.0, 100.0], "image_std": [60.0] * 3}),
    ("ViT", {"image_mean": 0.5, "image_std": 0.25}),
    ("ViT", {"do_normalize": False, "image_mean": None, "image_std": None}),
    ("ViT", {"do_convert_rgb": False}),
    ("ViT", {"do_convert_rgb": True, "resample": 2}),
    ("ViT", {"do_resize": True, "resample": 1}),
    ("ViT", {"size": 32}),
    ("CLIP", {"size": EDGE, **CROP}),
    ("CLIP", {"size": EDGE, "crop_size": 32, "do_center_crop": True}),
    ("CLIP", {"size": SQUARE, **CROP}),
    ("Siglip", {}),
    ("Bit", {"size": EDGE, **CROP}),
    ("ConvNext", {"size": {"shortest_edge": 32}, "crop_pct": 0.875}),
    ("Levit", {"size": {"shortest_edge": 32}, **CROP}),
    ("PoolFormer", {"size": {"shortest_edge": 32}, "crop_pct": 0.88, **CROP}),
    ("EfficientNet", {"include_top": True, "rescale_factor": 1 / 127.5, "rescale_offset": True, "resample": 2}),
    ("EfficientNet", {"include_top": False, "resample": 2}),
    ("MobileNetV2", {"size": EDGE, **CROP}),
    ("MobileViT", {"size": EDGE, **CROP, "do_flip_channel_order": True, "do_normalize": False}),
    ("MobileViT", {"size": EDGE, **CROP, "do_flip_channel_order": False, "do_normalize": False}),
    ("Beit", {"do_center_crop": False, "do_reduce_labels": True}),
    ("Segformer", {}),
]
REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"image_mean": [0.5], "image_std": [0.5]}, "image_mean = [0.5]: it is one number, or three"),
    ({"image_std": [0.5, 0.5, 0.0]}, "image_std = [0.5, 0.5, 0.0]"),
    ({"image_std": 0}, "image_std = 0"),
    ({"image_mean": "0.5"}, "image_mean = 0.5"),
    ({"image_mean": None}, "has no image_mean"),
    ({"num_channels": 1}, "num_channels = 1: pictures are RGB here"),
    ({"do_resize": False}, "do_resize = False"),
    ({"do_pad": True}, "do_pad = True"),
    ({"do_color_quantize": True}, "do_color_quantize = True"),
    ({"do_thumbnail": True}, "do_thumbnail = True"),
    ({"do_flip_channel_order": True}, "do_flip_channel_order = True"),
    ({"size_divisor": 32}, "size_divisor = 32"),
    ({"resample": 9}, "resample = 9"),
    ({"rescale_factor": 0}, "rescale_factor = 0"),
    ({"size": {"shortest_edge": 32, "longest_edge": 64}}, "wants pictures of size"),
    ({"size": {"longest_edge": 64}}, "wants pictures of size"),
    ({"size": "large"}, "wants pictures of size"),
    ({"size": SQUARE, "crop_size": 24, "do_center_crop": True}, "crop_size = 24"),
    ({"size": {"shortest_edge": 24}, **CROP}, "it is larger than size"),
    ({"size": 36, **CROP, "image_processor_type": "PerceiverImageProcessor"}, "it crops before it resizes"),
]


def picture() -> Image.Image:
    """Wider than high, and smooth, so that a shift by a fraction of a pixel shows and rounding does not."""
    high, wide = np.mgrid[0:60, 0:90] / 60
    waves = [np.sin(3 * high + phase) * np.cos(4 * wide - phase) for phase in (0, 1, 2)]
    return Image.fromarray((127.5 * (1 + np.stack(waves, axis=-1))).astype(np.uint8))


@pytest.mark.parametrize(("kind", "said"), HONOURED, ids=lambda value: value if isinstance(value, str) else str(value))
def test_pixels_are_the_processors(kind: str, said: dict[str, Any]):
    facts = {**PREPROCESSOR, "image_processor_type": f"{kind}ImageProcessor", **said}
    processor = getattr(hf, f"{kind}ImageProcessorPil")(**{k: v for k, v in facts.items() if v is not None})
    theirs = torch.as_tensor(np.stack(processor(picture())["pixel_values"]), dtype=torch.float32)[0]
    prepared = read_preprocessing(facts, ImageTowerSettings(tower="hf:a"))
    ours = prepared.transform(picture())
    ours = ours.flip(0) if prepared.bgr else ours
    assert ours.shape == theirs.shape
    # two levels of 256, in what a level is here
    level = 1 / (255 * min(prepared.transform.std))
    assert (ours - theirs).abs().max() <= 2.01 * level and (ours - theirs).abs().mean() <= 0.5 * level


@pytest.mark.parametrize(("said", "reason"), REFUSED, ids=lambda value: str(value)[:60])
def test_what_has_no_place_in_a_transform_is_refused(said: dict[str, Any], reason: str):
    with pytest.raises(UserError) as caught:
        read_preprocessing({**PREPROCESSOR, **said}, ImageTowerSettings(tower="hf:a"))
    assert reason in str(caught.value) and "\n" not in str(caught.value)


def test_a_geometry_of_ones_own_stands_for_theirs():
    own = ImageTowerSettings(tower="hf:a", size=48, resize="pad")
    for said in ({"do_resize": False}, {"size": {"shortest_edge": 24}, **CROP}, {"size": {"longest_edge": 64}}):
        assert read_preprocessing({**PREPROCESSOR, **said}, own).transform.size == 48


def test_a_net_of_one_channel_is_refused(tmp_path: Path):
    save("vit", tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "num_channels": 1}))
    for meta in (True, False):
        with pytest.raises(UserError, match=r"reads 1 channels|cannot be loaded"):
            load_backbone(ImageTowerSettings(tower=f"file:{tmp_path}"), meta=meta)
