"""``clasp pair`` on toy towers: what is ranked is what ``clasp train auto`` starts from, and towers run once."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from clasp import cli
from clasp.cli.pair import repeat_option_names
from clasp.commands.auto import climb
from clasp.commands.auto_stages import AutoCallbacks
from clasp.commands.closed_form import ClosedFormTrial, choose_trial
from clasp.commands.pair import rank_tower_pairs
from clasp.config.recipe import read_recipe
from clasp.report.pair_table import TowerPair, pair_layer_table, pair_ranks, pair_table
from clasp.types import UserError
from toyclassifiers import save_colour_classifier
from toydata import COLOURS, toys, write_classes, write_csv
from toyruns import save_towers

SETTINGS = ["train.precision=float32", "data.val_fraction=0.25", "image.size=32"]


@pytest.fixture(scope="module")
def towers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = save_towers(tmp_path_factory.mktemp("towers"))
    settings = shutil.copytree(folder / "image", folder / "darker") / "preprocessor_config.json"
    settings.write_text(settings.read_text().replace("0.5, 0.5, 0.5", "0.1, 0.5, 0.9", 1))
    return folder


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CLASP_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module")
def ranked(towers: Path, tmp_path_factory: pytest.TempPathFactory, cache: None) -> tuple[list[TowerPair], list[str]]:
    pairs, titles = write_csv(toys(60), tmp_path_factory.mktemp("pairs")), []
    images = [f"file:{towers / name}" for name in ("image", "darker")]

    @contextmanager
    def bar(title: str):
        yield lambda done, total: titles.append(title) if done == total else None

    return rank_tower_pairs(images, [f"file:{towers / 'text'}"], [*SETTINGS, f"data.train={pairs}"], bar=bar), titles


def test_every_combination_is_ranked_by_its_metric(ranked: tuple[list[TowerPair], list[str]]):
    found, _ = ranked
    assert len({(pair.image, pair.text) for pair in found}) == 2
    assert [pair.metric for pair in found] == sorted((pair.metric for pair in found), reverse=True)
    for pair in found:
        assert pair.interval[0] <= pair.metric <= pair.interval[1] and pair.trained > 0
        assert pair.nearest is not None and pair.most_aligned is not None
        assert pair.most_aligned.cka - pair.most_aligned.cka_shuffled > 0
    assert [row[:2] for row in pair_layer_table(found).rows] == [[pair.image, pair.text] for pair in found]
    table = pair_table(found)
    assert len(table.rows) == 2 and all(len(row) == len(table.columns) for row in table.rows)
    assert table.notes[-1].startswith(f"go on with: clasp train auto image.tower={found[0].image} ")


def test_pairs_of_one_metric_share_their_rank(ranked: tuple[list[TowerPair], list[str]]):
    first = ranked[0][0]
    found = [replace(first, metric=metric, interval=(0.4, 0.6)) for metric in (0.5, 0.5, 0.45, 0.1)]
    table = pair_table(found)
    assert pair_ranks(found) == [row[0] for row in table.rows] == ["1=", "1=", "3", "4"]
    assert "2 of 3 others within the interval of the first: not told apart" in table.notes
    assert "not told apart" not in " ".join(pair_table(found[:1]).notes)


def test_each_tower_runs_once(ranked: tuple[list[TowerPair], list[str]]):
    found, titles = ranked
    for name in {pair.image for pair in found}:
        assert sum(title.startswith("images of") and title.endswith(name) for title in titles) == 2  # train, val
    assert all(titles.count(f"captions through {pair.text}") <= 2 for pair in found)


@pytest.mark.faults
def test_the_metric_is_that_of_auto(ranked: tuple[list[TowerPair], list[str]], towers: Path, tmp_path: Path):
    best = ranked[0][0]
    overrides = [f"image.tower={best.image}", f"text.tower={best.text}", *best.overrides]
    done = climb(read_recipe("auto", overrides, budget={"steps": "1"}), tmp_path / "run", AutoCallbacks(print))
    tried = {row.method: row for row in done.plan.rows if not row.stage}
    assert tried[best.layers].metric == pytest.approx(best.metric, abs=1e-6)
    assert tried[best.layers].trained == best.trained


def test_wrong_towers_are_all_named_before_any_compute(towers: Path, tmp_path: Path):
    with pytest.raises(UserError, match=r"no folder .*gone.*nope") as error:
        rank_tower_pairs([f"file:{towers / 'image'}", "file:/gone"], ["pip:nope"], ["data.train=missing"])
    assert "\n" not in str(error.value)
    for images, texts, message in (
        (["pip:a", "pip:a"], ["pip:b"], "--image names pip:a twice"),
        ([], ["pip:b"], "--image names no tower"),
        (["pip:a"], ["pip:b", str(towers)], f"is not a tower; it is a path: did you mean data.train={towers}"),
    ):
        with pytest.raises(UserError, match=message):
            rank_tower_pairs(images, texts, [])
    with pytest.raises(UserError, match="are those of --image and --text"):
        rank_tower_pairs(["pip:a"], ["pip:b"], ["image.tower=pip:c"])


def test_few_pairs_beside_class_pairs_take_the_last_layers(
    towers: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """As ``clasp train auto`` does."""
    tried: list[list[str]] = []

    def choose(trials: Sequence[ClosedFormTrial]) -> tuple[ClosedFormTrial, str]:
        tried.append([trial.candidate.image.name for trial in trials])
        return choose_trial(trials)

    monkeypatch.setattr("clasp.commands.pair.choose_trial", choose)
    classifier = f"file:{save_colour_classifier(tmp_path / 'classifier', toys(60), list(COLOURS))}"
    pairs = write_csv(toys(60), tmp_path)
    for least, image in ((256, classifier), (0, classifier), (256, f"file:{towers / 'image'}")):
        monkeypatch.setattr("clasp.commands.closed_form.PAIRS_FOR_LAYERS", least)
        rank_tower_pairs([image], [f"file:{towers / 'text'}"], [*SETTINGS, f"data.train={pairs}"])
    assert tried[0] == ["last"] and all(len(names) > 1 for names in tried[1:])


def test_class_folders_have_no_similarity_of_layers(towers: Path, tmp_path: Path):
    drawn = [toy for toy in toys(90) if toy.colour in ("red", "blue")]
    found = rank_tower_pairs(
        [f"file:{towers / 'image'}"],
        [f"file:{towers / 'text'}"],
        [*SETTINGS, f"data.train={write_classes(drawn, tmp_path)}"],
    )
    assert found[0].primary == "top1" and found[0].nearest is None and found[0].most_aligned is None
    notes = pair_table(found).notes
    assert notes[0].startswith("warning: few validation pairs (") and "too few training pairs" in notes[2]


def test_options_take_several_values(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    typed = ["--image", "A", "B", "--text", "X", "Y", "data.train=F", "--json"]
    repeated = ["--image", "A", "--image", "B", "--text", "X", "--text", "Y", "data.train=F", "--json"]
    assert repeat_option_names(typed, ("--image", "--text")) == repeated
    assert repeat_option_names(repeated, ("--image", "--text")) == repeated
    monkeypatch.setattr(sys, "argv", ["clasp", "pair", *typed[:4], "pip:minilm-l6", "data.train=F"])
    with pytest.raises(SystemExit):
        cli.main()
    assert "'A' has no scheme" in capsys.readouterr().err
