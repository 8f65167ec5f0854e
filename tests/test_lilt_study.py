"""The studies of LilT's claims on toy worlds: a cell end to end, going on after a stop, and a page from recorded lines.

The folders of photos and of drawings are made here in the layout of the real ones; towers are tiny. Numbers with
intervals are held against hand-made counts.
"""

from __future__ import annotations

import json
import os
import signal
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import tomlkit
import torch

pytest.importorskip("matplotlib")
pytest.importorskip("sklearn")

from studies.evaluation import Seen, answer, images_seen, sentences
from studies.lilt import costs, figures, pages
from studies.lilt.__main__ import main
from studies.lilt.cells import Cell, Row, Runner
from studies.lilt.claim_records import find
from studies.lilt.claims import CLAIMS, SMALL, compared, to_choose
from studies.lilt.emoji_names import Names
from studies.lilt.initial_heads import closed_form
from studies.lilt.photos import Photos, Sizes, drawn
from studies.lilt.rows import FULL, HEADS, LAYERWISE, both, half
from studies.lilt.speed import run_alone
from studies.lilt.tables import TABLES
from studies.paired_intervals import Counts, Draws, difference, gained, itself, measured, pairs_to_reach, ratio
from studies.records import Record, Results

from clasp.config.build import build_feature_source, build_model_and_preprocessing
from clasp.config.recipe import read_recipe
from clasp.data.loader import BadSampleLimit
from clasp.data.pairs import Pairs
from clasp.data.readers import PairIndex
from clasp.training.initialize import initialize_heads
from clasp.types import ImageSource, Pair, PooledFeatures
from toyruns import save_towers
from toystudies import write_drawings, write_photos

NORMS = Row("norms", both('"norms"'), (1e-3, 3e-3))
LOCKED = Row("heads", (), (1e-4,))
TINY = replace(SMALL, photos=48, names=32, ladder=(16, 48), budget=16)


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory):
    """What frozen towers say is kept apart from that of others."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CLASP_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module")
def common(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A common recipe of tiny towers."""
    folder = tmp_path_factory.mktemp("towers")
    save_towers(folder)
    recipe = {
        "image": {"tower": f"file:{folder / 'image'}"},
        "text": {"tower": f"file:{folder / 'text'}"},
        "head": {"width": 16},
        "train": {"batch_size": 16, "epochs": 1, "lr": 1e-4, "precision": "float32", "select": "last", "log_every": 1},
    }
    file = folder / "common.toml"
    file.write_text(tomlkit.dumps(recipe), encoding="utf-8")
    return file


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory, common: Path) -> Photos:
    folder = write_photos(tmp_path_factory.mktemp("photos"))
    return Photos(folder, Sizes(held=20, test=30, objects=20, objects_to_fit=30, scenes=10), file=common)


@pytest.fixture(scope="module")
def names(tmp_path_factory: pytest.TempPathFactory, common: Path) -> Names:
    return Names(write_drawings(tmp_path_factory.mktemp("emoji")), file=common)


# --- cells -----------------------------------------------------------------------------------------------------------


def test_a_cell_is_trained_and_asked_and_a_study_goes_on_where_it_stopped(photos: Photos, tmp_path: Path):
    runner = Runner("photos", photos, Results(tmp_path))
    cells = list(compared([LOCKED, NORMS], "photos", TINY, runner.record))
    assert [(cell.row.name, cell.rate) for cell in cells] == [
        ("heads", 1e-4),
        ("heads", 1e-4),
        *[("norms", rate) for rate in NORMS.rates],
        *[("heads", 1e-4)] * 2,
    ]
    record = runner.run("claim1", cells[0])
    assert record["counts"]["model"]["trained"] == 2 * (32 * 16 + 16) + 1
    assert set(record["answers"]) >= {"zero-shot/tinyimagenet/top5", "kept/cifar10/knn", "kept/flickr8k/sentences"}
    top1 = record["answers"]["zero-shot/tinyimagenet/top1"]
    assert top1["mean"] > 2 * top1["chance"], "heads in closed form tell the toy world's colours and shapes apart"
    assert record["validation"] < 0
    runner.run("claim1", cells[2])

    with (tmp_path / "claim1.jsonl").open("a", encoding="utf-8") as file:
        file.write('{"key": "cut sho')  # as a stop in the middle of a line would leave it
    again = Runner("photos", photos, Results(tmp_path))
    left = again.missing(compared([LOCKED, NORMS], "photos", TINY, again.record))
    assert [(cell.row.name, cell.rate, cell.seed) for cell in left] == [
        ("norms", 3e-3, 0),
        ("heads", 1e-4, 1),
        ("heads", 1e-4, 2),
    ]


def test_the_same_cell_ends_in_the_same_answers(photos: Photos, tmp_path: Path):
    cell = Cell("photos", NORMS, 1e-3, 48, 1, "ask")
    one, other = (Runner("photos", photos, Results(tmp_path / name)).run("x", cell) for name in "ab")
    assert one["answers"] == other["answers"] and one["losses"] == other["losses"]
    assert "validation" not in one, "only seed 0 chooses learning rates"


def test_a_cell_that_is_stopped_is_not_written(photos: Photos, tmp_path: Path):
    class Stopping(Photos):
        def pairs(self, count: int, seed: int) -> tuple[Pairs, Pairs]:
            train, few = super().pairs(count, seed)
            return Pairs("stops", [[replace(train[0], image=Signal(train[0].image)), *list(train)[1:]]]), few

    @dataclass(frozen=True)
    class Signal:
        """An image on whose reading the process is told to end."""

        image: ImageSource

        @property
        def name(self) -> str:
            return self.image.name

        @property
        def version(self) -> str:
            return self.image.version

        def read(self) -> bytes:
            os.kill(os.getpid(), signal.SIGTERM)
            return self.image.read()

    stopping = Stopping(photos.folder, photos.sizes, file=photos.file)
    runner = Runner("photos", stopping, Results(tmp_path))
    with pytest.raises(KeyboardInterrupt):
        runner.run("claim1", Cell("photos", NORMS, 1e-3, 48, 0, "ask"))
    assert not (tmp_path / "claim1.jsonl").exists()


def test_names_are_asked_language_by_language(names: Names, tmp_path: Path):
    runner = Runner("names", names, Results(tmp_path))
    record = runner.run("claim4", Cell("names", Row("norms", ('tune.text=["norms"]',)), 1e-3, 32, 0, "ask"))
    t4, t3 = record["answers"]["T4/km/recall@5"], record["answers"]["T3/km/recall@5"]
    assert len(t4["right"]) == len(t3["right"]) == 6, "concepts are the groups"
    assert (t4["asked"], t3["asked"]) == (1, 3), "a drawing of each concept, or one in each of three styles"
    assert record["counts"]["image"]["trained"] == 0


def test_pairs_of_a_seed_are_nested_and_differ_between_seeds(photos: Photos):
    ids = {(count, seed): [pair.id for pair in photos.pairs(count, seed)[0]] for count in (10, 30) for seed in (0, 1)}
    assert ids[10, 0] == ids[30, 0][:10]
    assert set(ids[30, 0]) != set(ids[30, 1])
    held = {pair.image.name for pair in photos.pairs(1, 0)[1]}
    assert not held & {pair.image.name for pair in photos.pairs(100, 0)[0]}, "what chooses settings never trains"


# --- where heads start -----------------------------------------------------------------------------------------------


def test_heads_start_where_clasp_would_start_them(photos: Photos):
    first = drawn(photos._train, 60, 0)
    plain, own = (read_recipe(photos.file, changes) for changes in ([], ["head.standardize=true", "head.init=cca"]))
    ours, theirs = build_model_and_preprocessing(plain), build_model_and_preprocessing(own)
    inputs = build_feature_source(ours, plain)
    rows = photos._rows(ours, inputs, first)
    closed_form(rows, rows, width=16, ridge=(1.0, 1.0)).put(ours.model)
    sides = build_feature_source(theirs, own).batch_reader(first, PairIndex(first), None)
    initialize_heads(theirs.model, sides, own.head, BadSampleLimit(60, 0.0))
    seen = images_seen(ours.model, inputs, first).pooled
    with torch.no_grad():
        torch.testing.assert_close(
            ours.model.embed_image(PooledFeatures(seen)),
            theirs.model.embed_image(PooledFeatures(seen)),
            atol=1e-4,
            rtol=1e-3,
        )


def test_costs_are_those_of_what_trains(photos: Photos):
    pairs = photos.pairs(16, 0)[0]
    found = {}
    for name, row in (("full", Row("full", both('"full"'))), ("norms", NORMS), ("heads", LOCKED)):
        recipe = row.recipe(photos.recipe, 1e-3, 0)
        parts = build_model_and_preprocessing(recipe)
        found[name] = costs.counted(parts, recipe, pairs)
        model = parts.model.parameter_counts()["model"]
        assert found[name]["fixed_bytes"] == 4 * (model.total + 3 * model.trained)
    assert found["full"]["flops"] > found["norms"]["flops"] > found["heads"]["flops"] > found["heads"]["flops_forward"]
    assert found["full"]["kept_bytes"] > found["norms"]["kept_bytes"] > found["heads"]["kept_bytes"]


def test_a_row_is_timed_in_a_process_of_its_own(photos: Photos, tmp_path: Path):
    runner = Runner("photos", photos, Results(tmp_path))
    record = run_alone(CLAIMS["claim1"], Cell("photos", NORMS, 1e-3, 48, 0, "speed"), runner)
    assert record["pairs_per_second"] > 0 and record["stages"]["training"] > 0
    assert record == json.loads((tmp_path / "claim1.jsonl").read_text("utf-8"))


# --- learning rates --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("best, tries", [(1e-4, 4), (3e-4, 4), (1e-3, 3), (3e-3, 3), (1e-2, 4), (3e-2, 4)])
def test_a_learning_rate_is_looked_for_beyond_the_best(best: float, tries: int):
    tried: dict[float, Record] = {}

    def find(cell: Cell) -> Record | None:
        return tried.get(cell.rate)

    rate = None
    while rate is None:
        cells, rate = to_choose(NORMS, "photos", TINY, find)
        tried.update({cell.rate: {"validation": -abs(np.log(cell.rate / best))} for cell in cells})
    assert rate == best
    assert len(tried) == tries


# --- numbers ---------------------------------------------------------------------------------------------------------


def test_an_answer_keeps_what_was_right_of_each_group():
    told = answer(torch.tensor([1.0, 0.0, 1.0, 1.0, 0.0]).double(), ["b", "a", "b", "a", "a"], 0.25)
    assert told == {"mean": pytest.approx(0.6), "chance": 0.25, "right": "12", "asked": "32"}
    counts = Counts.of([told, told])
    assert counts.right.tolist() == [[1, 2], [1, 2]] and counts.asked.tolist() == [[3, 2], [3, 2]]
    assert counts.mean == pytest.approx(0.6) and (counts + counts).mean == pytest.approx(0.6)


def test_resamples_are_of_whole_groups_and_seeds():
    counts = Counts(np.array([[1.0, 0, 2], [0, 1, 3]]), np.array([[1.0, 1, 3], [1, 1, 3]]))
    draws = Draws(2, 3, resamples=5)
    slow = []
    for resample in range(5):
        right = asked = 0.0
        for seed in range(2):
            for group in range(3):
                times = draws.seeds[resample, seed] * draws.groups[resample, group]
                right += times * counts.right[seed, group]
                asked += times * counts.asked[seed, group]
        slow.append(right / asked)
    np.testing.assert_allclose(draws.means(counts), slow)
    assert (draws.seeds.sum(axis=1) == 2).all() and (draws.groups.sum(axis=1) == 3).all()


def test_rows_are_compared_on_the_same_draws():
    chance = np.random.Generator(np.random.PCG64(1))
    hard = chance.random((1, 400))
    row, other = (Counts((hard < share).astype(float).repeat(3, axis=0), np.ones((3, 400))) for share in (0.6, 0.5))
    apart = measured([row, other], difference)
    assert apart.low > 0 and apart.value == pytest.approx(row.mean - other.mean)
    assert apart.error < 0.7 * np.hypot(measured([row], itself).error, measured([other], itself).error)
    assert measured([row, row], difference).could_see == 0
    assert measured([row, other], ratio).value == pytest.approx(row.mean / other.mean)
    assert measured([row, row, other], gained).value == pytest.approx(1)


def test_pairs_to_reach_a_mean_are_read_off_between_the_rungs():
    of = pairs_to_reach((100, 200, 400))
    assert of(0.5, 0.4, 0.5, 0.6) == pytest.approx(200)
    assert of(0.55, 0.4, 0.5, 0.6) == pytest.approx(200 * 2**0.5)
    assert of(0.3, 0.4, 0.5, 0.6) == 100, "no fewer than the fewest tried"
    assert np.isnan(of(0.7, 0.4, 0.5, 0.6))
    assert of(0.5, 0.4, 0.6, 0.3) == pytest.approx(100 * 2**0.5), "once reached is reached"
    np.testing.assert_allclose(of(np.array([0.5, 0.7]), 0.4, np.array([0.5, 0.5]), 0.6), [200, np.nan])


def test_the_nearest_other_sentence_may_be_of_the_same_photo():
    seen = Seen(("a", "b", "c", "d"), torch.tensor([[1.0, 0], [0.9, 0.1], [0, 1], [1, 0.05]]))
    told = sentences(seen, {"a": "x", "b": "y", "c": "x", "d": "y"})
    assert told["right"] == "01" and told["asked"] == 2, "a's is d of y, b's is d of y, c's is b of y, d's is a of x"
    assert told["chance"] == pytest.approx(1 / 3)


# --- pages -----------------------------------------------------------------------------------------------------------


def record_lines(folder: Path, photos: Photos) -> Results:
    """Lines as cells would leave them: layerwise tuning is right on three photos of four, full training on all."""
    results = Results(folder)
    names = ["zero-shot/tinyimagenet/top5", "zero-shot/tinyimagenet/top1", "zero-shot/cifar10/top1"]
    names += ["retrieval/flickr8k/text_to_image/recall@5"]
    names += ["kept/cifar10/knn", "kept/cifar10/linear", "kept/flickr8k/sentences"]
    for row, right, trained in ((FULL, "1111", 100), (LAYERWISE, "1011", 7), (HEADS, "0001", 1)):
        for seed in range(2):
            for rate in (row.rates[0] / 3, *row.rates) if seed == 0 else row.rates[:1]:
                rung = float(f"{rate:.0e}")
                cell = Cell("photos", row, rung, SMALL.photos, seed, "ask")
                told = {"mean": right.count("1") / 4, "chance": 0.1, "right": right, "asked": 1}
                record = {"key": cell.key(photos.file), "row": row.name, "rate": rung, "seed": seed}
                record |= {"counts": {"model": {"trained": trained, "total": 100}}, "seconds": {"train": 30.0}}
                record |= {"answers": dict.fromkeys(names, told), "machine": {"torch": "2", "day": "2030-01-01"}}
                results.add("claim1", record | ({"validation": -abs(np.log(rung / row.rates[0]))} if seed == 0 else {}))
    return Results(folder)


def test_a_page_is_made_from_lines_and_keeps_what_a_person_wrote(photos: Photos, tmp_path: Path):
    runner = Runner("photos", photos, record_lines(tmp_path / "results", photos))
    claim = CLAIMS["claim1"]
    found = find(claim, SMALL, runner, [])
    file = pages.write(claim, SMALL, found, tmp_path)
    text = file.read_text("utf-8")
    line = next(line for line in text.splitlines() if line.startswith(f"| {LAYERWISE.name} | 7 |"))
    cells = [cell.strip() for cell in line.strip("|").split("|")]
    assert cells[2:4] == ["7.00", "2"]
    assert cells[4].startswith("75.0 (") and cells[6].startswith("-25.0 (") and cells[7].startswith("75.0 (")
    assert cells[8].startswith("66.7 ("), "of what full training adds to heads"
    assert "**Not complete.**" in text and "Not written yet." in text

    file.write_text(text.replace("Not written yet.", "It holds.\n\nTwice."), "utf-8")
    assert "It holds.\n\nTwice." in pages.write(claim, SMALL, found, tmp_path).read_text("utf-8")
    drawn_file = figures.draw(claim, SMALL, found, tmp_path)
    assert drawn_file is not None and drawn_file.read_bytes().startswith(b"\x89PNG")


def test_towers_of_half_the_blocks_are_found_at_the_rate_of_the_whole(photos: Photos, tmp_path: Path):
    results = record_lines(tmp_path / "results", photos)
    for seed in range(2):
        cell = Cell("photos", half(FULL), FULL.rates[0], SMALL.photos, seed, "ask")
        record = {"key": cell.key(photos.file), **({"validation": -1.0} if seed == 0 else {})}
        results.add("claim3", record)
    found = find(CLAIMS["claim3"], SMALL, Runner("photos", photos, results), [])
    assert found.seeds([(half(FULL).name, SMALL.photos)]) == [0, 1]


@pytest.mark.parametrize("name", CLAIMS)
def test_every_page_can_be_made_from_what_there_is(name: str, photos: Photos, tmp_path: Path):
    claim = CLAIMS[name]
    known = photos if claim.world == "photos" else Names(tmp_path)
    for results in (record_lines(tmp_path / "some", photos), Results(tmp_path / "none")):
        found = find(claim, SMALL, Runner(claim.world, known, results), [])
        assert "| --- |" in "\n".join(TABLES[name](found, SMALL))
        assert found.missing
        figures.draw(claim, SMALL, found, tmp_path)


def test_the_command_says_in_one_line_what_it_lacks(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit, match="claim1 needs --photos FOLDER"):
        main(["claim1"], tmp_path)
    with pytest.raises(SystemExit, match="is not a folder"):
        main(["claim4", "--emoji", str(tmp_path / "no")], tmp_path)
    main(["claim3", "--page"], tmp_path)
    assert "claim3.md" in capsys.readouterr().out
    assert "**Not complete.**" in (tmp_path / "claim3.md").read_text("utf-8")


def test_pairs_are_never_one_another_s_negatives_within_a_class(photos: Photos):
    pairs: list[Pair] = list(photos.pairs(40, 0)[0])
    assert {pair.group for pair in pairs} == {f"n{label}" for label in (0, 2, 4, 6, 8, 10)}
