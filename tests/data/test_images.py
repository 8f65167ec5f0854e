"""Pixels of hand-made pictures, against worked answers and against the slow obvious way."""

import io
import os
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from clasp.data import decoding
from clasp.data.images import Augment, ImageError, ImageTransform
from clasp.types import UserError

ZERO, ONE = (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def plain(size: int, **settings) -> ImageTransform:
    """Pixels as they are, in [0, 1]."""
    return ImageTransform(size, ZERO, ONE, **settings)


def encoded(picture: Image.Image, form: str = "PNG", **options) -> bytes:
    file = io.BytesIO()
    picture.save(file, form, **options)
    return file.getvalue()


def levels(values: torch.Tensor) -> np.ndarray:
    """``[3 h w]`` in [0, 1] to ``[h w 3]`` in 0..255."""
    return (values * 255).round().to(torch.uint8).permute(1, 2, 0).numpy()


def photo(width: int, height: int, seed: int = 0) -> Image.Image:
    """Smooth, with some detail: noise at three scales."""
    random = np.random.default_rng(seed)
    layers = []
    for cells, weight in ((4, 0.6), (16, 0.3), (48, 0.1)):
        small = Image.fromarray(random.integers(0, 256, (cells, cells, 3), dtype=np.uint8))
        layers.append(weight * np.asarray(small.resize((width, height), Image.Resampling.BICUBIC), dtype=np.float64))
    return Image.fromarray(sum(layers).round().astype(np.uint8))


RED, GREEN, BLUE, WHITE = (255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255)
TWO_BY_TWO = np.array([[RED, GREEN], [BLUE, WHITE]], dtype=np.uint8)

# the stored array that must come out as TWO_BY_TWO, by EXIF orientation, from the standard's own words
STORED = {
    1: TWO_BY_TWO,
    2: TWO_BY_TWO[:, ::-1],
    3: TWO_BY_TWO[::-1, ::-1],
    4: TWO_BY_TWO[::-1],
    5: TWO_BY_TWO.transpose(1, 0, 2),  # row 0 is the left side, column 0 the top
    6: np.rot90(TWO_BY_TWO, 1),  # row 0 is the right side, column 0 the top
    7: TWO_BY_TWO[::-1, ::-1].transpose(1, 0, 2),
    8: np.rot90(TWO_BY_TWO, -1),
}

INVERSE = {  # what a camera held that way does to an upright picture
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_90,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_270,
}


# --- kinds of pictures ---------------------------------------------------------------------------------------------


def test_a_known_picture_comes_out_as_it_is(tmp_path: Path) -> None:
    data = encoded(Image.fromarray(TWO_BY_TWO))
    (tmp_path / "a.png").write_bytes(data)
    for image in (data, tmp_path / "a.png", str(tmp_path / "a.png"), Image.fromarray(TWO_BY_TWO)):
        np.testing.assert_array_equal(levels(plain(2)(image)), TWO_BY_TWO)


@pytest.mark.parametrize("orientation", STORED)
def test_exif_orientation(orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored = Image.fromarray(np.ascontiguousarray(STORED[orientation]))
    np.testing.assert_array_equal(levels(plain(2)(encoded(stored, exif=exif))), TWO_BY_TWO)


@pytest.mark.parametrize("orientation", STORED)
def test_exif_orientation_comes_before_the_crop(orientation: int) -> None:
    upright = photo(90, 41)
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored = upright if orientation == 1 else upright.transpose(INVERSE[orientation])
    transform = plain(16, crop_fraction=0.8)
    got = levels(transform(encoded(stored, exif=exif))).astype(int)
    assert np.abs(got - levels(transform(upright))).max() <= 1


@pytest.mark.parametrize("orientation", STORED)
def test_exif_orientation_of_a_reduced_jpeg(orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    blocks = np.kron(STORED[orientation], np.ones((256, 384, 1), dtype=np.uint8))
    if orientation >= 5:
        blocks = np.kron(STORED[orientation], np.ones((384, 256, 1), dtype=np.uint8))
    out = levels(plain(64)(encoded(Image.fromarray(blocks), "JPEG", quality=95, exif=exif)))
    corners = out[[8, 8, 55, 55], [8, 55, 8, 55]].reshape(2, 2, 3)
    assert np.abs(corners.astype(int) - TWO_BY_TWO).max() <= 3


# every container that Pillow writes an orientation into, and whether its pixels come back as they were
CONTAINERS = {"PNG": 0, "TIFF": 0, "JPEG": 3, "MPO": 3, "WEBP": 4, "AVIF": 4}


@pytest.mark.parametrize("orientation", STORED)
@pytest.mark.parametrize("form", CONTAINERS)
def test_every_container_is_upright_once(form: str, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    high, wide = (32, 48) if orientation < 5 else (48, 32)
    data = encoded(Image.fromarray(np.kron(STORED[orientation], np.ones((high, wide, 1), np.uint8))), form, exif=exif)
    for resize in ("crop", "pad", "squash"):
        corners = levels(plain(32, resize=resize)(data))[[10, 10, 21, 21], [4, 27, 4, 27]].reshape(2, 2, 3)
        assert np.abs(corners.astype(int) - TWO_BY_TWO).max() <= CONTAINERS[form], resize
    with Image.open(io.BytesIO(data)) as picture:
        picture.load()  # a caller's own, decoded already
        corners = levels(plain(32)(picture))[[10, 10, 21, 21], [4, 27, 4, 27]].reshape(2, 2, 3)
    assert np.abs(corners.astype(int) - TWO_BY_TWO).max() <= CONTAINERS[form]


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_no_container_that_can_hold_an_orientation_is_left_out_of_the_table() -> None:
    Image.init()
    holding = set()
    for form in Image.SAVE:
        exif = Image.Exif()  # AVIF takes it out
        exif[0x0112] = 6
        try:
            data = encoded(Image.new("RGB", (64, 32)), form, exif=exif)
            with Image.open(io.BytesIO(data)) as picture:
                holding |= {form} if picture.getexif().get(0x0112) else set()
        except (OSError, ValueError, RuntimeError):  # no writer, no such mode, nothing Pillow reads again
            continue
    assert holding == set(CONTAINERS)


@pytest.mark.parametrize("compression", ["raw", "tiff_lzw", "tiff_adobe_deflate"])
@pytest.mark.parametrize("orientation", STORED)
def test_a_tiff_is_upright_however_it_is_compressed_and_however_many_pages(orientation: int, compression: str) -> None:
    stored = Image.fromarray(np.ascontiguousarray(STORED[orientation]))
    tags = {0x0112: orientation}
    for pages in ([], [stored]):
        data = encoded(stored, "TIFF", compression=compression, tiffinfo=tags, save_all=True, append_images=pages)
        np.testing.assert_array_equal(levels(plain(2)(data)), TWO_BY_TWO)


@pytest.mark.parametrize("orientation", [0, 9, 65535])
@pytest.mark.parametrize("form", ["JPEG", "PNG", "TIFF"])
def test_an_orientation_that_is_none_changes_nothing(form: str, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    picture = photo(48, 32)
    stored, bare = encoded(picture, form, exif=exif), encoded(picture, form)
    assert torch.equal(plain(8)(stored), plain(8)(bare))


QUARTERS = np.kron(TWO_BY_TWO, np.ones((8, 8, 1), np.uint8))
GREYS = np.repeat(np.array([[76, 150], [25, 255]])[..., None], 3, axis=2)
MODES = {
    "RGB": ("PNG", "TIFF", "BMP", "PPM", "JPEG2000"),
    "RGBA": ("PNG", "TIFF", "JPEG2000"),
    "P": ("PNG", "GIF", "BMP", "TIFF"),
    "PA": ("TIFF",),
    "CMYK": ("TIFF", "JPEG2000"),
    "YCbCr": ("TIFF",),
    "L": ("PNG", "TIFF", "GIF", "BMP"),
    "LA": ("PNG", "TIFF"),
    "I;16": ("PNG", "TIFF", "PPM"),
}


@pytest.mark.parametrize("mode, form", [(mode, form) for mode, forms in MODES.items() for form in forms])
def test_every_mode_shows_the_same_picture(mode: str, form: str) -> None:
    if mode == "I;16":
        grey = np.asarray(Image.fromarray(QUARTERS).convert("L")).astype(np.uint16) * 257
        picture = Image.fromarray(grey)
    else:
        picture = Image.fromarray(QUARTERS).convert(mode)
    out = levels(plain(4)(encoded(picture, form))).astype(int)[[0, 0, 3, 3], [0, 3, 0, 3]].reshape(2, 2, 3)
    assert np.abs(out - (GREYS if mode in ("L", "LA", "I;16") else TWO_BY_TWO)).max() <= 1


@pytest.mark.parametrize("form", ["GIF", "PNG", "WEBP", "AVIF", "TIFF"])
def test_of_a_moving_picture_the_first_frame_is_read(form: str) -> None:
    frames = [Image.new("RGB", (16, 16), colour) for colour in (RED, BLUE)]
    data = encoded(frames[0], form, save_all=True, append_images=frames[1:])
    assert np.abs(levels(plain(1)(data)).astype(int) - RED).max() <= 4


def test_damaged_exif_does_not_lose_the_picture() -> None:
    data = encoded(Image.fromarray(TWO_BY_TWO), exif=b"Exif\0\0not a TIFF header at all")
    np.testing.assert_array_equal(levels(plain(2)(data)), TWO_BY_TWO)


def test_alpha_shows_the_ground() -> None:
    values = np.zeros((1, 3, 4), dtype=np.uint8)
    values[0] = [(200, 100, 0, 255), (200, 100, 0, 0), (200, 100, 0, 51)]  # opaque, clear, one fifth
    want = np.array([[(200, 100, 0), (10, 20, 30), (48, 36, 24)]])
    transform = plain(3, resize="pad", background=(10, 20, 30))
    out = levels(transform(encoded(Image.fromarray(values))))
    assert np.abs(out[1:2].astype(int) - want).max() <= 1
    np.testing.assert_array_equal(out[[0, 2]], np.full((2, 3, 3), (10, 20, 30)))


def test_grey_with_alpha() -> None:
    values = np.array([[(80, 255), (80, 0)], [(80, 0), (0, 255)]], dtype=np.uint8)
    out = levels(plain(2)(encoded(Image.fromarray(values))))
    np.testing.assert_array_equal(out[..., 0], [[80, 255], [255, 0]])


@pytest.mark.parametrize("clear", [1, bytes([255, 0, 255])], ids=["index", "table"])
def test_palette_with_a_clear_colour(clear: int | bytes) -> None:
    picture = Image.fromarray(np.array([[0, 1], [1, 2]], dtype=np.uint8)).convert("P")
    picture.putpalette([255, 0, 0, 0, 255, 0, 0, 0, 255])
    out = levels(plain(2, background=(9, 9, 9))(encoded(picture, transparency=clear)))
    np.testing.assert_array_equal(out, [[RED, (9, 9, 9)], [(9, 9, 9), BLUE]])


def test_palette_without_alpha() -> None:
    picture = Image.fromarray(np.array([[0, 1], [1, 2]], dtype=np.uint8)).convert("P")
    picture.putpalette([255, 0, 0, 0, 255, 0, 0, 0, 255])
    np.testing.assert_array_equal(levels(plain(2)(encoded(picture))), [[RED, GREEN], [GREEN, BLUE]])


def test_cmyk_jpeg() -> None:
    inks = np.full((16, 16, 4), (0, 255, 255, 0), dtype=np.uint8)  # no cyan, full magenta and yellow: red
    out = levels(plain(16)(encoded(Image.fromarray(inks, "CMYK"), "JPEG", quality=95)))
    assert np.abs(out.astype(int) - RED).max() <= 3


def test_sixteen_bit_grey_keeps_its_range() -> None:
    values = np.array([[0, 400], [32768, 65535]], dtype=np.uint16)
    picture = Image.fromarray(values)
    assert picture.mode == "I;16"
    want = np.repeat(np.array([[0, 2], [128, 255]])[..., None], 3, axis=2)
    np.testing.assert_array_equal(levels(plain(2)(encoded(picture))), want)
    np.testing.assert_array_equal(levels(plain(2)(Image.fromarray(values.astype(np.int32)))), want)


def test_one_bit() -> None:
    picture = Image.fromarray(np.array([[0, 255], [255, 0]], dtype=np.uint8)).convert("1")
    np.testing.assert_array_equal(levels(plain(2)(encoded(picture)))[..., 1], [[0, 255], [255, 0]])


@pytest.mark.parametrize(
    "values",
    [
        np.float32([[0.5]]),
        np.int32([[70000]]),
        np.int32([[0, 255]]),
        np.int32([[-1, 40000]]),
        np.int32([[0, 4095]]),
        np.uint16([[0, 255]]),
    ],
    ids=["float", "32 bits", "8 in 32 bits", "negative", "12 in 32 bits", "8 in 16 bits"],
)
def test_pixels_of_unknown_range_are_refused(values: np.ndarray) -> None:
    with pytest.raises(ImageError, match="range is not known"):
        plain(1)(encoded(Image.fromarray(values), "TIFF"))


def test_first_frame_of_a_moving_picture() -> None:
    frames = [Image.new("RGB", (4, 4), colour) for colour in (RED, BLUE)]
    data = encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])
    np.testing.assert_array_equal(levels(plain(1)(data)), [[RED]])


def test_two_pictures_in_one_jpeg_file() -> None:
    data = encoded(photo(400, 300), "MPO", save_all=True, append_images=[photo(400, 300, seed=1)], quality=90)
    error = (plain(64)(data) - plain(64)(photo(400, 300))).abs() * 255
    assert error.mean() < 2


def test_the_callers_picture_is_not_changed() -> None:
    with Image.open(io.BytesIO(encoded(photo(640, 480), "JPEG"))) as picture:
        before = picture.size
        first, again = plain(32)(picture), plain(32)(picture)
        assert picture.size == before
    assert torch.equal(first, again)


# --- what cannot be read -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("data", [b"", b"not an image", b"\xff\xd8\xff\xe0 but no more"])
def test_not_an_image(data: bytes) -> None:
    with pytest.raises(ImageError):
        plain(2)(data)


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP", "GIF", "TIFF"])
@pytest.mark.parametrize("share", [0.3, 0.7])
def test_truncated(form: str, share: float) -> None:
    data = encoded(photo(200, 150), form)
    with pytest.raises(ImageError):
        plain(64)(data[: int(len(data) * share)])


def test_flipped_bytes_never_raise_anything_else() -> None:
    random = np.random.default_rng(0)
    raised = 0
    for form in ("JPEG", "PNG", "WEBP", "GIF", "TIFF", "BMP"):
        data = np.frombuffer(encoded(photo(40, 30), form), dtype=np.uint8)
        for _ in range(40):
            damaged = data.copy()
            places = random.integers(0, min(len(data), 400), 6)
            damaged[places] = random.integers(0, 256, 6)
            try:
                assert plain(8)(damaged.tobytes()).shape == (3, 8, 8)
            except ImageError:
                raised += 1
    assert raised > 20


@pytest.mark.parametrize("form", ["TIFF", "PNG"])
def test_a_black_or_dark_picture_of_a_known_range_is_read(form: str) -> None:
    assert plain(1)(encoded(Image.fromarray(np.zeros((2, 2), np.uint16)), form)).max() == 0
    dark = b"P5 2 2 1000\n" + np.full((2, 2), 200, ">u2").tobytes()
    assert float(plain(1)(dark)[0, 0, 0]) == pytest.approx(0.2, abs=0.003)


def test_missing_file_and_folder(tmp_path: Path) -> None:
    with pytest.raises(ImageError, match="no such file"):
        plain(2)(tmp_path / "none.png")
    with pytest.raises(ImageError, match="Is a directory"):
        plain(2)(tmp_path)


@pytest.mark.parametrize("limit", [4999, 2499], ids=["above the limit", "above twice the limit"])
def test_a_bomb_is_refused(limit: int, monkeypatch: pytest.MonkeyPatch) -> None:
    data = encoded(Image.new("RGB", (100, 50)))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
    with pytest.raises(ImageError, match="too large"):
        plain(2)(data)


# --- geometry ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear", "lanczos"])
@pytest.mark.parametrize("fraction", [1.0, 0.875])
@pytest.mark.parametrize("side", [(97, 60), (60, 97), (64, 64), (31, 400)])
def test_crop_is_resize_then_centre_crop(side: tuple[int, int], fraction: float, interpolation: str) -> None:
    """The slow obvious way, as torchvision does it: the whole picture first, in whole pixels.

    Pillow may take rows or columns first, and rounds to 8 bits in between: two grey levels at most.
    """
    picture = photo(*side)
    shorter = int(32 / fraction)
    wide, high = (int(shorter * edge / min(side)) for edge in side)
    whole = picture.resize((wide, high), Image.Resampling[interpolation.upper()])
    left, top = round((wide - 32) / 2), round((high - 32) / 2)
    slow = np.asarray(whole.crop((left, top, left + 32, top + 32))).astype(int)
    fast = levels(plain(32, crop_fraction=fraction, interpolation=interpolation)(picture)).astype(int)
    assert np.abs(fast - slow).max() <= 2
    assert np.abs(fast - slow).mean() <= 0.3


def test_squash_shows_all_of_it_and_pad_keeps_its_shape() -> None:
    picture = Image.new("RGB", (40, 20), RED)
    picture.paste(BLUE, (0, 0, 10, 20))
    squashed = levels(plain(8, resize="squash", interpolation="bilinear")(picture))
    np.testing.assert_array_equal(squashed[:, 0], [BLUE] * 8)
    np.testing.assert_array_equal(squashed[:, 7], [RED] * 8)
    padded = levels(plain(8, resize="pad", background=(1, 2, 3))(picture))
    np.testing.assert_array_equal(padded[[0, 1, 6, 7]], np.full((4, 8, 3), (1, 2, 3)))
    np.testing.assert_array_equal(padded[2:6, 7], [RED] * 4)
    cropped = levels(plain(8)(picture))
    np.testing.assert_array_equal(cropped[:, 7], [RED] * 8)


@pytest.mark.parametrize("side", [(1, 1), (1, 3000), (3000, 1)])
@pytest.mark.parametrize("resize", ["crop", "squash", "pad"])
def test_extreme_shapes(side: tuple[int, int], resize: str) -> None:
    assert plain(16, resize=resize)(Image.new("RGB", side, RED)).shape == (3, 16, 16)


# --- reduced-scale decoding ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("resize", ["crop", "squash", "pad"])
@pytest.mark.parametrize("side", [(640, 480), (1283, 965), (481, 2001)])
def test_reduced_jpeg_agrees_with_full_decoding(side: tuple[int, int], resize: str) -> None:
    """Within one grey level on average and 12 at worst; a Pillow image is always decoded in full."""
    data = encoded(photo(*side), "JPEG", quality=90)
    transform = plain(128, resize=resize)
    with Image.open(io.BytesIO(data)) as picture:
        full = levels(transform(picture)).astype(int)
    error = np.abs(levels(transform(data)).astype(int) - full)
    assert error.mean() <= 1.0
    assert error.max() <= 12


def test_reduced_decoding_is_used_and_is_faster(monkeypatch: pytest.MonkeyPatch) -> None:
    data = encoded(photo(1600, 1200), "JPEG", quality=90)
    transform = plain(128)

    def seconds() -> float:
        times = []
        for _ in range(3):
            start = time.process_time()
            transform(data)
            times.append(time.process_time() - start)
        return min(times)

    reduced = seconds()
    monkeypatch.setattr("clasp.data.decoding._REDUCING_GAP", 1e9)
    assert seconds() > 1.5 * reduced


def test_a_jpeg_that_hardly_shrinks_is_decoded_in_full() -> None:
    data = encoded(photo(250, 250), "JPEG")
    with Image.open(io.BytesIO(data)) as picture:
        assert torch.equal(plain(128)(data), plain(128)(picture))


# --- normalisation -------------------------------------------------------------------------------------------------


def test_normalisation_is_exact() -> None:
    """All 256 levels in each channel, one rounding a step, as numpy does it in float32."""
    values = np.arange(256, dtype=np.uint8).reshape(16, 16)
    values = np.stack([values, values[::-1], values.T], axis=2)
    got = ImageTransform(16, MEAN, STD)(Image.fromarray(values))
    want = (values.astype(np.float32) / np.float32(255) - np.float32(MEAN)) / np.float32(STD)
    assert got.dtype == torch.float32 and got.is_contiguous()
    assert torch.equal(got, torch.from_numpy(want.transpose(2, 0, 1).copy()))


# --- augmentation --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("resize", ["crop", "squash", "pad"])
def test_default_augmentation_changes_nothing(resize: str) -> None:
    data = encoded(photo(90, 61))
    for seed in range(5):
        assert torch.equal(plain(32, resize=resize).augmented(data, Augment(), seed), plain(32, resize=resize)(data))


STRONG = Augment((0.3, 0.9), (0.7, 1.4), flip=0.5, rotate=20.0, shift=0.1, grayscale=0.3, brightness=0.3, contrast=0.3)


def test_augmentation_depends_on_the_seed_alone() -> None:
    data, transform = encoded(photo(90, 61)), plain(32)
    torch.manual_seed(0)
    first = [transform.augmented(data, STRONG, seed) for seed in range(8)]
    torch.manual_seed(1)
    again = [transform.augmented(data, STRONG, seed) for seed in reversed(range(8))][::-1]
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert len({tuple(values.flatten().tolist()) for values in first}) == 8


def test_crops_stay_inside_and_have_the_areas_asked_for() -> None:
    """A picture whose colour is its place: red grows to the right, green downwards."""
    ramp = np.linspace(0, 255, 256).round().astype(np.uint8)
    place = np.stack(np.broadcast_arrays(ramp[None, :], ramp[:, None], np.uint8(0)), axis=2)
    augment = Augment(crop_scale=(0.25, 0.64))
    areas, corners = [], []
    for seed in range(200):
        out = plain(64).augmented(Image.fromarray(np.ascontiguousarray(place)), augment, seed)
        wide = (out[0, 32, 60] - out[0, 32, 3]) / 57 * 64
        high = (out[1, 60, 32] - out[1, 3, 32]) / 57 * 64
        assert abs(wide - high) < 0.03
        areas.append(float(wide * high))
        corners.append((float(out[0, 32, 0]), float(out[1, 0, 32])))
    assert 0.23 < min(areas) < 0.30 and 0.58 < max(areas) < 0.67
    assert np.min(corners) >= 0 and np.max(corners) <= 0.55
    assert np.std(corners, axis=0).min() > 0.08


def test_each_change_stays_within_its_range() -> None:
    grey = Image.new("RGB", (8, 8), (100, 100, 100))
    seen = [float(plain(8).augmented(grey, Augment(brightness=0.2), seed)[0, 4, 4]) * 255 for seed in range(100)]
    assert 79 <= min(seen) < 85 and 115 < max(seen) <= 121

    halves = Image.new("RGB", (8, 8), (50, 50, 50))
    halves.paste((150, 150, 150), (4, 0, 8, 8))
    spread = []
    for seed in range(100):
        out = plain(8).augmented(halves, Augment(contrast=0.5), seed)
        spread.append(float(out[0, 4, 6] - out[0, 4, 1]) * 255)
    assert 48 <= min(spread) < 65 and 135 < max(spread) <= 152

    marked = Image.new("RGB", (32, 32), (255, 255, 255))
    marked.paste(RED, (16, 16, 17, 17))
    places = []
    for seed in range(100):
        out = plain(32).augmented(marked, Augment(shift=0.25), seed)
        assert out[0].min() == 1.0  # the ground is white, as the picture is
        places.append(np.argwhere(out[1].numpy() == 0)[0] - 16)
    assert np.abs(places).max() == 8 and np.std(places, axis=0).min() > 3

    bar = Image.new("RGB", (65, 65), (255, 255, 255))
    bar.paste((0, 0, 0), (0, 31, 65, 34))
    angles = []
    for seed in range(100):
        dark = 1 - plain(65).augmented(bar, Augment(rotate=15.0), seed)[0].numpy()
        left, right = (np.average(np.arange(65), weights=dark[:, x]) for x in (10, 54))
        angles.append(np.degrees(np.arctan2(right - left, 44)))
    assert -15.5 < min(angles) < -12 and 12 < max(angles) < 15.5


def test_flip_and_grey_come_as_often_as_asked() -> None:
    picture = Image.fromarray(TWO_BY_TWO)
    flips = [levels(plain(2).augmented(picture, Augment(flip=0.25), seed))[0, 0].tolist() for seed in range(400)]
    assert flips.count(list(GREEN)) + flips.count(list(RED)) == 400
    assert 70 <= flips.count(list(GREEN)) <= 130
    greys = [levels(plain(2).augmented(picture, Augment(grayscale=0.25), seed))[0, 0].tolist() for seed in range(400)]
    assert greys.count(list(RED)) + greys.count([76, 76, 76]) == 400
    assert 70 <= greys.count([76, 76, 76]) <= 130


@pytest.mark.parametrize(
    "settings",
    [{"crop_scale": (0.0, 1.0)}, {"crop_scale": (0.5, 1.5)}, {"aspect": (2.0, 1.0)}, {"flip": 1.5}, {"rotate": -1.0}],
    ids=str,
)
def test_impossible_augmentation(settings: dict) -> None:
    with pytest.raises(UserError, match=next(iter(settings))):
        Augment(**settings)


# --- the contact sheet ---------------------------------------------------------------------------------------------


# --- settings ------------------------------------------------------------------------------------------------------


def test_settings_round_trip_and_fingerprint() -> None:
    base = ImageTransform(224, MEAN, STD)
    assert ImageTransform.from_dict(base.to_dict()) == base
    others = [
        ImageTransform(225, MEAN, STD),
        ImageTransform(224, ZERO, STD),
        ImageTransform(224, MEAN, ONE),
        ImageTransform(224, MEAN, STD, resize="pad"),
        ImageTransform(224, MEAN, STD, interpolation="bilinear"),
        ImageTransform(224, MEAN, STD, background=(0, 0, 0)),
        ImageTransform(224, MEAN, STD, crop_fraction=0.875),
    ]
    assert len({transform.fingerprint for transform in [base, *others]}) == 8
    assert ImageTransform.from_dict(base.to_dict()).fingerprint == base.fingerprint


def test_wrong_settings_name_the_right_ones() -> None:
    with pytest.raises(UserError, match=r"'sizes'.*size, mean"):
        ImageTransform.from_dict({"sizes": 3})
    with pytest.raises(UserError, match="lack 'mean'"):
        ImageTransform.from_dict({"size": 3})
    with pytest.raises(UserError, match=r"'stretch'.*crop, squash, pad"):
        ImageTransform.from_dict({**plain(8).to_dict(), "resize": "stretch"})
    with pytest.raises(UserError, match="crop_fraction"):
        plain(8, resize="pad", crop_fraction=0.9)
    with pytest.raises(UserError, match="positive"):
        ImageTransform(8, ZERO, (1.0, 0.0, 1.0))


def test_only_formats_that_are_read_are_decoded(tmp_path: Path):
    """An EPS would be given to Ghostscript, whatever the file is named."""
    (tmp_path / "cat.jpg").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\nshowpage\n%%EOF\n")
    with pytest.raises(ImageError, match="of a format that"):
        ImageTransform(8, (0.5,) * 3, (0.5,) * 3)(tmp_path / "cat.jpg")


def test_no_pipe_is_waited_for(tmp_path: Path):
    os.mkfifo(tmp_path / "cat.jpg")
    with pytest.raises(ImageError, match="is a pipe"):
        ImageTransform(8, (0.5,) * 3, (0.5,) * 3)(tmp_path / "cat.jpg")


def test_large_images_are_decoded_one_at_a_time(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(decoding, "_LARGE_IMAGE_PIXELS", 100)
    inside, most = [], []

    def watched(picture: Image.Image, ground: object) -> Image.Image:
        inside.append(1)
        most.append(len(inside))
        time.sleep(0.05)
        inside.pop()
        return picture.convert("RGB")

    monkeypatch.setattr(decoding, "to_opaque", watched)
    file = io.BytesIO()
    Image.new("RGB", (20, 20)).save(file, "PNG")
    transform = ImageTransform(8, (0.5,) * 3, (0.5,) * 3)
    with ThreadPoolExecutor(3) as pool:
        list(pool.map(transform, [file.getvalue()] * 3))
    assert most == [1, 1, 1]
