"""What pairs alone show to be wrong is refused before a tower is loaded, in one line that says what to set."""

from __future__ import annotations

import csv
import errno
import os
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from clasp.commands.analyze import analyze_run
from clasp.commands.auto import AutoCallbacks, climb
from clasp.commands.compare import compare_models
from clasp.commands.evaluate import evaluate_run
from clasp.commands.evaluate_suite import evaluate_suite
from clasp.commands.evaluated_model import ModelSource
from clasp.commands.pair import rank_tower_pairs
from clasp.commands.patch_maps import map_patches
from clasp.commands.search_model import open_images
from clasp.commands.train import train_recipe
from clasp.config.recipe import DataSettings, Recipe, recipe_from_dict
from clasp.convert.onnx_model import MANIFEST_FILE
from clasp.data.formats.setting_hints import PYTHON_HINTS
from clasp.data.formats.sources import FileSource
from clasp.data.missing_images import require_images
from clasp.data.pairs import Pairs, open_pairs
from clasp.data.shard_stage import StagedShard
from clasp.evaluation.registry import EVALUATION_TASKS
from clasp.types import Pair, ProgressFactory, UserError

_LABELLED = {"zeroshot", "multilingual_zeroshot", "multilabel", "multilabel_probe", "knn", "probe", "robustness"}


def write_table(file: Path, *rows: dict[str, str]) -> Path:
    with file.open("w", newline="") as opened:
        writer = csv.DictWriter(opened, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return file


@pytest.fixture
def captions(tmp_path: Path) -> Path:
    """Four images that are there, with captions, and no other column than a number."""
    for number in range(4):
        Image.new("RGB", (8, 8), (number, 0, 0)).save(tmp_path / f"{number}.png")
    return write_table(
        tmp_path / "captions.csv",
        *({"filepath": f"{number}.png", "title": f"caption {number}", "year": "1"} for number in range(4)),
    )


@pytest.fixture
def moved(tmp_path: Path) -> Path:
    """A table of 600 images, none of which is there."""
    rows = ({"filepath": f"photos/{n}.jpg", "title": f"caption {n}", "class": f"c{n % 2}"} for n in range(600))
    return write_table(tmp_path / "moved.csv", *rows)


@pytest.fixture
def evaluated(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every model is found, and fails the test where it is loaded."""

    def load(bar: ProgressFactory) -> None:
        pytest.fail("the towers were loaded")

    def find(model: str | Path) -> ModelSource:
        return ModelSource(str(model), DataSettings(), load)  # type: ignore[arg-type]

    for verb in ("evaluate", "compare", "evaluate_suite"):
        monkeypatch.setattr(f"clasp.commands.{verb}.find_model", find)


def options(task: str, data: Path) -> list[str]:
    """What the task requires; every option that names a file names one that fits."""
    required = {option.name for option in EVALUATION_TASKS[task].options if option.required}
    classes = data.parent / "names.json"
    classes.write_text('{"en": [[0, 1], ["a", "b"]]}')
    values = {"classes": classes, "fit": data}
    return [f"data={data}", *(f"{name}={values[name]}" for name in sorted(required))]


def compare_with_itself(task: str, typed: list[str], out: Path) -> object:
    return compare_models(("a", "b"), task, typed)


def evaluate(task: str, typed: list[str], out: Path) -> object:
    return evaluate_run("a", task, typed, out=out)


VERBS: dict[str, Callable[[str, list[str], Path], object]] = {"eval": evaluate, "compare": compare_with_itself}
ASKED = [
    (verb, task)
    for verb in VERBS
    for task, entry in EVALUATION_TASKS.items()
    if not entry.needs_run and (verb == "eval" or entry.build is not None)
]


@pytest.mark.usefixtures("evaluated")
@pytest.mark.parametrize(("verb", "task"), [each for each in ASKED if each[1] in _LABELLED])
def test_pairs_without_labels_are_refused_with_the_columns_there_are(
    verb: str, task: str, captions: Path, tmp_path: Path
):
    with pytest.raises(UserError, match=r"label= one of: year; pairs of images and captions are.* retrieval$") as error:
        VERBS[verb](task, options(task, captions), tmp_path / "out")
    assert "\n" not in str(error.value)


@pytest.mark.usefixtures("evaluated")
@pytest.mark.parametrize(("verb", "task"), ASKED)
def test_images_that_are_all_missing_are_refused_by_every_task(verb: str, task: str, moved: Path, tmp_path: Path):
    with pytest.raises(UserError) as error:
        VERBS[verb](task, options(task, moved), tmp_path / "out")
    assert str(error.value) == (
        f"{moved}: none of its 600 images can be found; name the folder that relative paths start from: "
        f"image_root=FOLDER; {tmp_path}/photos/0.jpg cannot be read: No such file or directory"
    )


def toy_recipe(data: Path, **sections: object) -> Recipe:
    towers = {"image": {"tower": "file:image"}, "text": {"tower": "file:text"}}
    return recipe_from_dict({**towers, "data": {"train": str(data)}, **sections}, "toy")


def train(data: Path, run: Path) -> object:
    return train_recipe(toy_recipe(data), run, say=lambda line: None)


def train_auto(data: Path, run: Path) -> object:
    return climb(toy_recipe(data, auto={"minutes": 1}), run, AutoCallbacks(say=lambda line: None))


def rank_pair(data: Path, run: Path) -> object:
    return rank_tower_pairs(["file:image"], ["file:text"], [f"data.train={data}"])


@pytest.fixture
def unbuilt(towers: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Towers are there, and fail the test where these are loaded."""

    def load(*given: object) -> None:
        pytest.fail("the towers were loaded")

    monkeypatch.chdir(towers)
    for place in ("auto_closed_forms.build_model", "train.build_model"):
        monkeypatch.setattr(f"clasp.commands.{place}_and_preprocessing", load)
    for tower in ("image", "text"):
        monkeypatch.setattr(f"clasp.commands.pair.build_{tower}_tower", load)


def with_run(verb: Callable[[Path, list[str]], object]) -> Callable[[Path, Path], object]:
    """The verb on a folder with the recipe of a run, and no weights."""

    def on_run(data: Path, run: Path) -> object:
        run.mkdir()
        (run / "recipe.toml").write_text(toy_recipe(data).to_toml())
        for name in ("base.json", "transform.json"):
            (run / name).write_text("{}")
        (run / "tokenizer").mkdir()
        return verb(run, [f"data={data}"])

    return on_run


def index(data: Path, run: Path) -> object:
    run.mkdir()
    (run / MANIFEST_FILE).write_text("{}")
    return open_images(run, str(data))


@pytest.mark.usefixtures("unbuilt")
@pytest.mark.parametrize(
    ("verb", "hint"),
    [
        pytest.param(train, "name the folder that relative paths start from: data.image_root=FOLDER", id="train"),
        pytest.param(train_auto, "name the folder that relative paths start from: data.image_root=FOLDER", id="auto"),
        pytest.param(rank_pair, "name the folder that relative paths start from: data.image_root=FOLDER", id="pair"),
        pytest.param(with_run(analyze_run), "start from: image_root=FOLDER", id="analyze"),
        pytest.param(with_run(map_patches), "start from: image_root=FOLDER", id="maps"),
        pytest.param(index, "index the folder of the images", id="index"),
    ],
)
def test_images_that_are_all_missing_are_refused_by_every_verb(
    verb: Callable[[Path, Path], object], hint: str, moved: Path, tmp_path: Path
):
    first = f"{tmp_path}/photos/0.jpg cannot be read"
    with pytest.raises(UserError, match=f"^{moved}: none of its .* images can be found; .*{hint}; {first}"):
        verb(moved, tmp_path / "run")


def write_partly_missing(folder: Path, missing: int, total: int) -> Path:
    """A table of images of which the first are missing."""
    for number in range(missing, total):
        Image.new("RGB", (8, 8), (number, 0, 0)).save(folder / f"{number}.png")
    rows = ({"filepath": f"{n}.png", "title": f"caption {n}", "class": f"c{n % 2}"} for n in range(total))
    return write_table(folder / "partly.csv", *rows)


@pytest.mark.usefixtures("unbuilt", "evaluated")
@pytest.mark.parametrize("verb", [train, train_auto, rank_pair, *VERBS])
def test_more_missing_images_than_are_allowed_are_refused_by_every_verb_with_a_limit(
    verb: str | Callable[[Path, Path], object], tmp_path: Path
):
    table, run = write_partly_missing(tmp_path, 40, 48), tmp_path / "run"
    said = rf"^{table}: \d+ of its \d+ images cannot be found, which is more than data.max_bad_fraction = 0.02 allows: "
    said += r".*/\d+.png, .*/\d+.png, .*/\d+.png, …; .*image_root=FOLDER; .* cannot be read: No such file or directory$"
    with pytest.raises(UserError, match=said):
        VERBS[verb]("retrieval", [f"data={table}"], run) if isinstance(verb, str) else verb(table, run)


LIMITS = [  # missing, rows, rows of each image, data.max_bad_fraction, whether it is refused
    (3, 48, 1, 0.02, False),  # three are always allowed
    (4, 48, 1, 0.02, True),
    (4, 48, 1, 0.1, False),
    (5, 48, 1, 0.1, True),
    (15, 48, 5, 0.02, False),  # three images
    (20, 48, 5, 0.02, True),
    (2_000, 2_400, 1, 0.5, True),  # more than are looked at first
    (1_100, 2_400, 1, 0.5, False),
    (2_000, 2_400, 1, None, False),
    (2_400, 2_400, 1, None, True),
]


@pytest.mark.parametrize(("missing", "rows", "each", "limit", "refused"), LIMITS)
def test_the_limit_of_missing_images_is_that_of_unreadable_ones(
    missing: int, rows: int, each: int, limit: float | None, refused: bool, tmp_path: Path
):
    (tmp_path / "there.png").write_bytes(b"")
    images = [f"gone/{n // each}.png" if n < missing else "there.png" for n in range(rows)]
    other = [f"group {n // each}" for n in range(rows)]
    cells = ({"filepath": image, "title": "x", "group": group} for image, group in zip(images, other, strict=True))
    pairs = open_pairs(write_table(tmp_path / "pairs.csv", *cells))
    if not refused:
        return require_images(PYTHON_HINTS, pairs, max_bad_fraction=limit)
    with pytest.raises(UserError, match=r"none of its .* found|found, which is more"):
        require_images(PYTHON_HINTS, pairs, max_bad_fraction=limit)


def test_missing_images_among_others_in_turn_are_found(tmp_path: Path):
    (tmp_path / "there.png").write_bytes(b"")
    cells = ({"filepath": f"gone/{n}.png" if n % 2 else "there.png", "title": "x"} for n in range(2_048))
    pairs = open_pairs(write_table(tmp_path / "pairs.csv", *cells))
    with pytest.raises(UserError, match="found, which is more"):
        require_images(PYTHON_HINTS, pairs, max_bad_fraction=0.4)


def test_images_in_shards_are_not_looked_at_for_being_missing():
    """A shard at an address would be fetched: one whose pairs would all be counted as missing is not refused."""

    class Staged(list[Pair]):
        shard = object.__new__(StagedShard)

    gone = [Pair(str(number), FileSource("/gone"), (), str(number), {}) for number in range(10)]
    with pytest.raises(UserError, match=r"none of its 10 images"):
        require_images(PYTHON_HINTS, Pairs("pairs", [gone]))
    for parts in ([Staged(gone)], [Staged(gone), gone[:3]]):
        require_images(PYTHON_HINTS, Pairs("pairs", parts), max_bad_fraction=0.02)


@pytest.mark.usefixtures("evaluated")
@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.parametrize(
    ("task", "titles", "said"),
    [
        ("retrieval", ["a photo"] * 4, "every caption of .* is 'a photo', so nothing tells .* caption= names"),
        ("multilingual", ['{"en": "a photo"}'] * 4, "every caption of .* is 'a photo', so nothing tells"),
    ],
)
def test_equal_captions_are_refused(verb: str, task: str, titles: list[str], said: str, tmp_path: Path):
    table = write_images_and_table(tmp_path, titles)
    with pytest.raises(UserError, match=said):
        VERBS[verb](task, options(task, table), tmp_path / "out")


@pytest.mark.usefixtures("evaluated")
def test_a_suite_names_every_set_that_is_refused(captions: Path, tmp_path: Path):
    (tmp_path / "equal").mkdir()
    write_images_and_table(tmp_path / "equal", ["x"] * 4)
    suite = tmp_path / "mine.toml"
    suite.write_text(
        '[[set]]\nname = "equal"\ntask = "retrieval"\nfolder = "equal/images.csv"\n'
        f'[[set]]\nname = "bare"\ntask = "zeroshot"\nfolder = "{captions.name}"\n'
    )
    with pytest.raises(UserError, match=r"^equal: every caption of .* is 'x', .*; bare: .*label= one of: year"):
        evaluate_suite("a", str(suite), tmp_path, out=tmp_path / "out")


@pytest.mark.usefixtures("evaluated")
def test_a_metric_that_the_task_has_on_other_data_is_refused(tmp_path: Path):
    for name, classes in (("three", 3), ("two", 2)):
        (tmp_path / name).mkdir()
        for number in range(6):
            Image.new("RGB", (8, 8), (number, 0, 0)).save(tmp_path / name / f"{number}.png")
        rows = ({"filepath": f"{n}.png", "title": f"t {n}", "class": f"c{n % classes}"} for n in range(6))
        write_table(tmp_path / name / "pairs.csv", *rows)
    suite = tmp_path / "mine.toml"
    sets = (f'[[set]]\nname = "{name}"\nfolder = "{name}/pairs.csv"\nmetric = "roc_auc"\n' for name in ("two", "three"))
    suite.write_text("".join(sets))
    known = "top1, top5, mean_per_class"
    with pytest.raises(UserError, match=f"^three: zeroshot has no metric 'roc_auc' here; it has {known}$"):
        evaluate_suite("a", str(suite), tmp_path, out=tmp_path / "out")


@pytest.mark.usefixtures("unbuilt")
@pytest.mark.parametrize("verb", [train, train_auto, rank_pair])
def test_equal_captions_are_not_trained_on(verb: Callable[[Path, Path], object], tmp_path: Path):
    table = write_images_and_table(tmp_path, ["x"] * 24)
    with pytest.raises(UserError, match=r"^every caption to train on is 'x', .* apart; data\.columns\.caption= names"):
        verb(table, tmp_path / "run")


def test_images_in_a_folder_that_may_not_be_entered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    table = write_images_and_table(tmp_path, ["x", "y", "z"])

    def refuse(path: str) -> str:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), path)

    monkeypatch.setattr("clasp.data.formats.sources._on_disk", refuse)  # root may enter every folder
    with pytest.raises(UserError, match=r"can be found; .*; .*0\.png cannot be read: Permission denied$"):
        train(table, tmp_path / "run")


@pytest.mark.usefixtures("evaluated")
def test_one_image_may_have_several_hard_negatives(tmp_path: Path):
    """Captions are compared with negatives of their own, so that the images may all be the same."""
    write_images_and_table(tmp_path, ["x", "y"])
    image = (tmp_path / "0.png").read_bytes()
    cells = {"image": [{"bytes": image}] * 2, "caption": ["a cat", "a cat on a mat"], "negative_caption": ["b", "c"]}
    pq.write_table(pa.table(cells), tmp_path / "pairs.parquet")
    for verb in VERBS.values():
        with pytest.raises(pytest.fail.Exception, match="the towers were loaded"):
            verb("sugarcrepe", [f"data={tmp_path / 'pairs.parquet'}"], tmp_path / "out")


@pytest.mark.usefixtures("evaluated")
@pytest.mark.parametrize("task", ["retrieval", "zeroshot"])
def test_images_of_the_same_bytes_are_refused(task: str, captions: Path, tmp_path: Path):
    for file in tmp_path.glob("*.png"):
        file.write_bytes((tmp_path / "0.png").read_bytes())
    with pytest.raises(UserError, match=r"every image of .* is the same, byte for byte.* image= names"):
        evaluate(task, options(task, captions), tmp_path / "out")


def write_images_and_table(folder: Path, titles: list[str]) -> Path:
    for number in range(len(titles)):
        Image.new("RGB", (8, 8), (number, 0, 0)).save(folder / f"{number}.png")
    rows = ({"filepath": f"{number}.png", "title": title} for number, title in enumerate(titles))
    return write_table(folder / "images.csv", *rows)
