"""``clasp eval RUN retention`` on toy runs: nothing lost where nothing moved, one line for a mistake."""

from __future__ import annotations

import ast
import json
import shutil
import sys
import tarfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import pytest

from clasp import cli
from clasp.commands import evaluate
from clasp.commands.evaluate import evaluate_run
from clasp.evaluation.results import EvaluationResult
from clasp.report.figures import draw_retention
from clasp.types import UserError
from toydata import Toy, add_member, toys, write_classes, write_csv, write_images
from toyruns import lines, recipe, run, save_towers

TOYS = toys(120)
WORDS = {"en": "a {} {}", "de": "rot {} {}", "sw": "nyekundu {} {}"}
HEADS = ("tune.image=none", "tune.text=none")


def write_pairs(
    toys: Sequence[Toy], folder: Path, *, name: str = "pairs.jsonl", **more: Callable[[Toy], object]
) -> Path:
    """Captions in three languages; ``more`` sets other columns, or captions of another kind."""
    write_images(toys, folder)
    rows = []
    for toy in toys:
        captions: object = {language: words.format(toy.colour, toy.shape) for language, words in WORDS.items()}
        row = {"image": f"images/{toy.key}.png", "caption": captions, "group": toy.key}
        rows.append({**row, **{column: value(toy) for column, value in more.items()}})
    file = folder / name
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return file


class Asked(NamedTuple):
    """What was found, and what was said beside it."""

    results: list[EvaluationResult]
    said: list[str]


@dataclass
class World:
    """Towers and pairs, and runs as they are asked for."""

    folder: Path
    towers: Path
    pairs: Path
    runs: dict[tuple[str, ...], Path]
    asked: dict[tuple[Path, tuple[str, ...]], Asked]

    def run(self, *overrides: str) -> Path:
        """A run with these overrides, made once."""
        if overrides not in self.runs:
            at = self.folder / f"run-{len(self.runs)}"
            settings = ("train.epochs=2", "head.standardize=false", 'data.languages=["en","de"]', *overrides)
            run(recipe(self.towers, self.pairs, *(_as_list(each) for each in settings)), at)
            self.runs[overrides] = at
        return self.runs[overrides]

    def ask(self, *overrides: str, options: tuple[str, ...] = ()) -> Asked:
        """What kept finds of such a run and ``pairs``, asked once."""
        key = (at := self.run(*overrides)), options
        if key not in self.asked:
            self.asked[key] = ask(at, f"data={self.pairs}", *options)
        return self.asked[key]


def _as_list(override: str) -> str:
    key, _, value = override.partition("=")
    return f'{key}=["{value}"]' if key in ("tune.image", "tune.text") else override


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    folder = tmp_path_factory.mktemp("kept")
    pairs = write_pairs(TOYS, folder / "pairs", **{"class": lambda toy: toy.shape, "colour": lambda toy: toy.colour})
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CLASP_CACHE", str(folder / "cache"))
        patch.setitem(evaluate.TASK_FIGURES, "retention", lambda *_: None)  # takes a second; one test draws
        yield World(folder, save_towers(folder / "towers"), pairs, {}, {})


def ask(at: Path, *options: str) -> Asked:
    said: list[str] = []
    return Asked(evaluate_run(at, "retention", options, say=said.append), said)


def by_task(results: Sequence[EvaluationResult]) -> dict[tuple[str, str], EvaluationResult]:
    return {(result.task.removeprefix("retention/"), result.language): result for result in results}


def drift(results: Sequence[EvaluationResult], side: str) -> dict[str, Mapping[str, float]]:
    """Part of a tower to what its drift is."""
    head = f"retention/{side}_drift/"
    return {r.task.removeprefix(head): r.metrics for r in results if r.task.startswith(head)}


# --- what it shows ---------------------------------------------------------------------------------------------------


def test_towers_that_nothing_trained_in_know_exactly_what_they_did(world: World):
    results, said = world.ask(*HEADS)
    probes = [result for result in results if "change" in result.metrics]
    assert [result.task for result in probes[:2]] == ["retention/image_knn", "retention/image_linear"]
    for result in probes:
        assert result.metrics["before"] == result.metrics["after"] and result.metrics["change"] == 0
        assert tuple(result.interval["change"]) == (0, 0)
    for side in ("image", "text"):
        for part, measured in drift(results, side).items():
            assert measured["weights" if part != "output" or side == "image" else "new"] == 0
            assert measured.get("cka", 1.0) == 1.0 and measured["new"] == 0
        assert [p for p in drift(results, side)] == ["input", "block 1", "block 2", "output", "all"]
        assert drift(results, side)["block 2"]["cka"] == 1.0
    assert not [result for result in results if result.task == "retention/interpolation"]
    assert "nothing inside the towers was tuned" in "\n".join(said)


def test_the_same_holds_where_nothing_is_cached(world: World):
    """Both towers run, once, on live inputs, and say the same of themselves."""
    cached = by_task(world.ask(*HEADS).results)
    live = by_task(world.ask(*HEADS, "data.feature_cache=off").results)
    assert cached.keys() == live.keys()
    for key, result in live.items():
        assert result.metrics == pytest.approx(cached[key].metrics, abs=0.03)
    assert live["image_drift/block 1", ""].metrics["cka"] == 1.0


def test_full_tuning_drifts_and_heads_do_not(world: World):
    full = world.ask("tune.image=full", "tune.text=full").results
    heads = world.ask(*HEADS).results
    for side in ("image", "text"):
        for part in ("input", "block 1", "block 2", "all"):
            assert drift(full, side)[part]["weights"] > 0.001
            assert drift(heads, side)[part]["weights"] == 0
        assert drift(full, side)["block 2"]["cka"] < 0.999 and drift(full, side)["all"]["cka"] < 0.999
        assert all(measured["new"] == 0 for measured in drift(full, side).values())


def test_probes_have_chance_levels_and_intervals(world: World):
    rows = by_task(world.ask("tune.image=full", "tune.text=full", options=("label=colour",)).results)
    knn, linear = rows["image_knn", ""], rows["image_linear", ""]
    assert knn.metrics["before"] > 0.5 > knn.chance["before"], "colours can be told from random features"
    assert linear.metrics["before"] > 0.5
    assert 0.1 < knn.chance["before"] < 0.3, "six colours, about as often"
    assert knn.interval["before"].low < knn.metrics["before"] < knn.interval["before"].high
    assert 40 < knn.n < 80, "half of the images"
    shape = by_task(world.ask("tune.image=full", "tune.text=full").results)
    assert shape["image_knn", ""].metrics["before"] < knn.metrics["before"]


def test_languages_trained_on_come_before_those_that_were_not(world: World):
    rows = world.ask(*HEADS).results
    asked = [(r.task, r.language) for r in rows if "recall" in r.task]
    assert asked == [
        ("retention/text_recall@1/trained", "de"),
        ("retention/text_recall@1/never_trained", "sw"),
        ("retention/text_recall@5/trained", "de"),
        ("retention/text_recall@5/never_trained", "sw"),
    ]
    german = by_task(rows)["text_recall@1/trained", "de"]
    # a group is a picture and 30 captions go round: four pictures have the same one, so one in 30 is right
    assert german.chance["before"] == pytest.approx(1 / 120) and german.n == 120
    assert by_task(rows)["text_recall@5/trained", "de"].chance["before"] == pytest.approx(5 / 120)


def test_the_anchor_can_be_another_language(world: World):
    rows = by_task(world.ask(*HEADS, options=("anchor=sw", "languages=en")).results)
    assert ("text_recall@1/trained", "en") in rows
    assert not [task for task, language in rows if language in ("de", "sw")]


def test_languages_of_the_training_pairs_count_where_the_recipe_names_none(world: World, tmp_path: Path):
    asked = write_pairs(TOYS[:40], tmp_path, caption=lambda toy: {"en": toy.caption, "km": f"the {toy.shape}"})
    rows = by_task(ask(world.run(*HEADS, "data.languages=[]"), f"data={asked}").results)
    assert ("text_recall@1/never_trained", "km") in rows
    assert ("text_recall@1/trained", "sw") in by_task(world.ask(*HEADS, "data.languages=[]").results)


def test_languages_nobody_can_tell_are_said_to_be_unknown(world: World, tmp_path: Path):
    plain = write_csv(TOYS[:40], tmp_path / "train")
    run(recipe(world.towers, plain, "train.epochs=1"), tmp_path / "run")
    results, said = ask(tmp_path / "run", f"data={world.pairs}")
    rows = by_task(results)
    assert ("text_recall@1", "de") in rows and ("text_recall@1", "macro:all") in rows
    assert "which languages run was trained on is unknown" in "\n".join(said)


def test_several_captions_in_one_language_ask_for_each_other(world: World, tmp_path: Path):
    given = write_pairs(TOYS[:30], tmp_path, caption=lambda toy: [toy.caption, f"{toy.caption} ."])
    results, said = ask(world.run(*HEADS), f"data={given}")
    rows = by_task(results)
    row = rows["captions_recall@1", ""]
    assert row.n == 60 and row.chance["before"] == pytest.approx(1 / 30)
    assert row.metrics["before"] > 0.2
    assert ("image_knn", "") not in rows
    assert "the image tower is not probed" in said[0]


def test_untouched_blocks_have_not_moved_though_others_did(world: World):
    """The trunk's states are read from the cache, for both states of the tower."""
    results = world.ask("tune.image=last(1)", "tune.text=last(1)").results
    for side in ("image", "text"):
        parts = drift(results, side)
        assert parts["block 1"] == {"weights": 0, "new": 0, "cka": 1.0}
        assert parts["block 2"]["weights"] > 0 and 0 < parts["block 2"]["cka"] < 1


def test_new_parts_are_listed_apart(world: World):
    results = world.ask("tune.image=adapters", "tune.text=lora(rank=4)").results
    for side in ("image", "text"):
        block = drift(results, side)["block 1"]
        assert block["weights"] == 0 and 0 < block["new"] < 0.5 and block["cka"] < 1
    deep = drift(world.ask("tune.image=deep(1)", "tune.text=none").results, "image")
    assert deep["block 3"] == {"new": 1.0}
    assert deep["block 2"]["weights"] == 0 and deep["block 2"]["cka"] == 1.0


def test_a_learned_pooling_is_no_part_of_what_the_tower_knows(world: World):
    results = world.ask(*HEADS, "image.pool=attention", "text.pool=attention").results
    assert by_task(results)["image_knn", ""].metrics["change"] == 0
    assert drift(results, "image")["output"]["new"] > 0 and drift(results, "image")["all"]["cka"] == 1.0


# --- the way between -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["full", "adapters", "lora(rank=4)"])
def test_the_way_begins_at_the_base_and_ends_at_the_run(world: World, method: str):
    at = world.run(f"tune.image={method}", f"tune.text={method}")
    results = world.ask(f"tune.image={method}", f"tune.text={method}", options=("label=colour",)).results
    way = [result for result in results if result.task == "retention/interpolation"]
    assert [result.metrics["alpha"] for result in way] == [0, 0.25, 0.5, 0.75, 1]
    knn = by_task(results)["image_knn", ""].metrics
    assert (way[0].metrics["image_knn"], way[-1].metrics["image_knn"]) == pytest.approx((knn["before"], knn["after"]))
    text = [r.metrics for r in results if r.task.startswith("retention/text_recall@1/")]
    for point, state in ((way[0], "before"), (way[-1], "after")):
        mean = sum(metrics[state] for metrics in text) / len(text)
        assert point.metrics["text_recall@1"] == pytest.approx(mean)
    (zeroshot,) = evaluate_run(at, "zeroshot", [f"data={world.pairs}", "label=colour"])
    assert way[-1].metrics["zeroshot_top1"] == pytest.approx(zeroshot.metrics["top1"])


def test_without_classes_the_way_is_told_by_retrieval(world: World, tmp_path: Path):
    given = write_pairs(TOYS, tmp_path)
    at = world.run("tune.image=full", "tune.text=full")
    way = [result for result in ask(at, f"data={given}").results if result.task == "retention/interpolation"]
    rows = evaluate_run(at, "multilingual", [f"data={given}"])
    macro = next(row for row in rows if row.language == "macro:all" and "/" not in row.task)
    assert way[-1].metrics["retrieval_mean_recall"] == pytest.approx(macro.metrics["mean_recall"])
    assert "image_knn" not in way[0].metrics


@pytest.mark.parametrize(
    ("method", "reason"), [("deep(1)", "1 appended block"), ("prompts(2)", "prompts"), ("dora(rank=2)", "dora")]
)
def test_a_way_that_is_not_straight_is_left_out(world: World, method: str, reason: str):
    results, said = world.ask(f"tune.image={method}", "tune.text=norms")
    assert not [result for result in results if result.task == "retention/interpolation"]
    assert [line for line in said if "is not straight" in line and f"image: {reason}" in line]


def test_each_tower_is_heard_once_in_each_state(world: World):
    titles: list[str] = []

    @contextmanager
    def bar(title: str) -> Iterator[Callable[[int, int], None]]:
        titles.append(title.rpartition(": ")[2])
        yield lambda done, total: None

    at = world.run("tune.image=full", "tune.text=full")
    evaluate_run(at, "retention", [f"data={world.pairs}"], bar=bar)
    states = ("before", "after", "at 0.25", "at 0.5", "at 0.75")
    assert sorted(titles) == sorted(f"{what}, {state}" for what in ("images", "captions") for state in states)


# --- where the pairs come from ---------------------------------------------------------------------------------------


def test_a_fit_set_of_its_own(world: World, tmp_path: Path):
    fit = write_pairs(toys(60, seed=5), tmp_path, **{"class": lambda toy: toy.shape})
    rows = by_task(ask(world.run(*HEADS), f"data={world.pairs}", f"fit={fit}").results)
    assert rows["image_knn", ""].n == len(TOYS)


def test_class_folders_and_numbers_in_a_tar(world: World, tmp_path: Path):
    folders = write_classes([toy._replace(shape="ring") for toy in TOYS], tmp_path / "classes")
    results, said = ask(world.run(*HEADS), f"data={folders}")
    rows = by_task(results)
    assert rows["image_knn", ""].chance["before"] == pytest.approx(1 / 6, abs=0.1)
    assert "the text tower is not probed" in said[0]

    with tarfile.open(tmp_path / "toys.tar", "w") as tar:
        for toy in TOYS:
            add_member(tar, f"{toy.key}.png", toy.png)
            add_member(tar, f"{toy.key}.txt", toy.caption.encode())
            add_member(tar, f"{toy.key}.cls", str(len(toy.shape)).encode())
    numbered = ask(world.run(*HEADS), f"data={tmp_path / 'toys.tar'}", "label=label").results
    assert ("image_knn", "") in by_task(numbered)


def test_groups_are_not_fitted_and_asked_about(world: World, tmp_path: Path):
    """Four pictures of each kind, all of one kind on one side: colours alone still tell half of the kinds."""
    grouped = write_pairs(
        TOYS, tmp_path, **{"class": lambda toy: toy.colour, "group": lambda toy: f"{toy.colour}-{toy.shape}"}
    )
    row = by_task(ask(world.run(*HEADS), f"data={grouped}").results)["image_knn", ""]
    assert row.n % 4 == 0, "whole groups"


def test_unreadable_pictures_are_left_out(world: World, tmp_path: Path):
    broken = write_pairs(TOYS, tmp_path, **{"class": lambda toy: toy.shape})
    (tmp_path / "images" / f"{TOYS[3].key}.png").write_bytes(b"no picture")
    for overrides in (HEADS, ("tune.image=full", "tune.text=full")):
        rows = by_task(ask(world.run(*overrides), f"data={broken}").results)
        assert rows["image_drift/all", ""].n == len(TOYS) - 1


# --- what is left of it ----------------------------------------------------------------------------------------------


def test_results_and_figure_stay_in_the_run(world: World, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(evaluate.TASK_FIGURES, "retention", draw_retention)
    at = world.run("tune.image=full", "tune.text=full")
    before = len(lines(at / "results.jsonl"))
    results = ask(at, f"data={world.pairs}").results
    kept = lines(at / "results.jsonl")[before:]
    assert [(row["task"], row["language"]) for row in kept] == [(r.task, r.language) for r in results]
    fields = {"task", "data", "language", "metrics", "chance", "n", "interval", "seconds", "checksum"}
    fields |= {"options", "evaluation_id"}
    assert all(set(row) == fields for row in kept)
    text = (at / "results.jsonl").read_text()
    assert "NaN" not in text and "Infinity" not in text
    png = (at / f"retention-{world.pairs.stem}-{kept[0]['evaluation_id'][:8]}.png").read_bytes()
    assert png.startswith(b"\x89PNG") and len(png) > 20_000


def test_the_command_prints_one_table_or_one_object(
    world: World, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
):
    at = world.run("tune.image=full", "tune.text=full")

    def typed(*words: str) -> tuple[str, str]:
        monkeypatch.setattr(sys, "argv", ["clasp", "eval", str(at), "retention", f"data={world.pairs}", *words])
        capfd.readouterr()
        with pytest.raises(SystemExit) as stop:
            cli.main()
        assert not stop.value.code
        return tuple(capfd.readouterr())

    out, err = typed()
    assert out.count("chance: the chance level") == 1 and "image: k-NN" in out and "text R@1, never trained: sw" in out
    assert "image tower: weights moved by" in out and "text tower: weights moved by" in out
    assert f"retention-{world.pairs.stem}-" in err
    out, _ = typed("--json")
    answer = json.loads(out)
    assert answer["task"] == "retention" and out.count("\n") == 1
    tasks = {row["task"] for row in answer["results"]}
    assert {
        "retention/image_knn",
        "retention/image_drift/block 1",
        "retention/text_drift/all",
        "retention/interpolation",
    } <= tasks


def test_figures_are_drawn_in_one_place():
    """matplotlib is imported by ``report`` alone, scikit-learn by the probes, and neither by importing clasp."""
    source = Path(cli.__file__).parents[1]
    found: dict[str, set[str]] = {"matplotlib": set(), "sklearn": set()}
    for path in source.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            for name in names:
                if (package := name.partition(".")[0]) in found:
                    found[package].add(path.relative_to(source).as_posix())
    assert found == {"matplotlib": {"report/figures.py"}, "sklearn": {"evaluation/probes.py"}}


# --- mistakes, in one line -------------------------------------------------------------------------------------------


def refused(at: Path, *options: str) -> str:
    before = (at / "results.jsonl").read_bytes()
    with pytest.raises(UserError) as error:
        ask(at, *options)
    line = str(error.value)
    assert "\n" not in line and (at / "results.jsonl").read_bytes() == before
    return line


def test_an_imported_run_has_no_before(world: World, tmp_path: Path):
    run = shutil.copytree(world.run(*HEADS), tmp_path / "theirs")
    (run / "imported.json").write_text("{}")
    assert "theirs was imported" in refused(run, f"data={write_csv(TOYS, tmp_path)}")


def test_nothing_to_probe(world: World, tmp_path: Path):
    line = refused(world.run(*HEADS), f"data={write_csv(TOYS, tmp_path)}")
    assert "nothing to probe" in line and "label=" in line


def test_unknown_options_are_named(world: World):
    line = refused(world.run(*HEADS), f"data={world.pairs}", "ancor=en")
    assert "'ancor=en' is not an option" in line and "did you mean anchor=…" in line


def test_a_fit_set_without_the_classes(world: World, tmp_path: Path):
    no_rings = [toy for toy in toys(60, seed=5) if toy.shape != "ring"]
    fit = write_pairs(no_rings, tmp_path, **{"class": lambda toy: toy.shape})
    assert "no image of 1 of the 5 classes: 'ring'" in refused(world.run(*HEADS), f"data={world.pairs}", f"fit={fit}")
    unlabelled = write_pairs(no_rings, tmp_path, name="plain.jsonl")
    line = refused(world.run(*HEADS), f"data={world.pairs}", f"fit={unlabelled}")
    assert "'class'" in line and "plain.jsonl" in line


def test_a_fit_set_that_holds_the_images_asked_about(world: World):
    line = refused(world.run(*HEADS), f"data={world.pairs}", f"fit={world.pairs}")
    assert f"{len(TOYS)} of {len(TOYS)} images" in line


def test_a_fit_set_without_anything_to_fit(world: World, tmp_path: Path):
    plain = write_pairs(TOYS, tmp_path)
    assert "has no column 'class'" in refused(world.run(*HEADS), f"data={plain}", f"fit={world.pairs}")


def test_one_class_is_too_few(world: World, tmp_path: Path):
    one = write_pairs(TOYS, tmp_path, **{"class": lambda toy: "toy"})
    assert "'class' is 'toy' for every image" in refused(world.run(*HEADS), f"data={one}")


def test_a_label_that_is_not_there(world: World):
    line = refused(world.run(*HEADS), f"data={world.pairs}", "label=shape")
    assert "'shape'" in line and "colour" in line


def test_languages_that_are_not_there(world: World):
    assert "no caption" in (line := refused(world.run(*HEADS), f"data={world.pairs}", "languages=de,fr"))
    assert "is in fr" in line and "de, en, sw" in line
    assert "is in fr" in refused(world.run(*HEADS), f"data={world.pairs}", "anchor=fr")


def test_an_anchor_that_was_not_chosen(world: World, tmp_path: Path):
    given = write_pairs(TOYS, tmp_path, caption=lambda toy: {"de": f"rot {toy.colour}", "sw": f"nyekundu {toy.shape}"})
    line = refused(world.run(*HEADS), f"data={given}")
    assert "the anchor language 'en'" in line and "de, sw" in line
