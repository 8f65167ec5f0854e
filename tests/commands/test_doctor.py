"""The doctor says beforehand what a run then does: its numbers are held against what training writes."""

from __future__ import annotations

import json
import shlex
import shutil
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from clasp import cli
from clasp.cli.train import _doctor_with
from clasp.commands import step_timing
from clasp.commands import train as main_job
from clasp.commands.doctor import diagnose, fits_recipe, raise_on_stop
from clasp.commands.forecast import images_or_captions
from clasp.config import datasets
from clasp.config.build import build_model_and_preprocessing
from clasp.config.recipe import Recipe, read_recipe, recipe_from_dict
from clasp.config.recipe_files import require_single_keys
from clasp.data.checks import CheckReport, check_images
from clasp.data.feature_cache.features import text_features
from clasp.data.feature_cache.replay import CachedFeatures
from clasp.data.images import ImageTransform
from clasp.data.pairs import open_pairs
from clasp.models import cache_policy, text_side
from clasp.models.cache_policy import CachePlan
from clasp.models.tower import Tower
from clasp.training.loop import count_evaluations
from clasp.training.run_folder import RunFolder
from clasp.training.settings import TrainSettings
from clasp.training.state_files import StateFiles
from clasp.types import UserError, no_progress_bar
from toyclassifiers import save_colour_classifier
from toydata import COLOURS, toys, write_classes, write_csv, write_folder, write_images
from toyruns import delta, lines, recipe, run

TOYS = toys(48)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("CLASP_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def spoken(folder: Path) -> Path:
    """Pairs in two languages, one of which not all are in."""
    write_images(TOYS, folder)
    rows = [{"image": f"images/{t.key}.png", "caption": {"en": t.caption, "sw": f"nyekundu {t.shape}"}} for t in TOYS]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder / "pairs.jsonl"


WAYS = {
    "heads": (write_csv, []),
    "classes": (write_classes, []),
    "languages": (lambda toys, folder: spoken(folder), []),
    "plain heads": (write_csv, ["head.standardize=false", "data.captions=all"]),
    "top block of the text tower": (write_csv, ['tune.text=["last(1)"]']),
    "both, in int8": (write_csv, ['tune.text=["last(1)"]', 'tune.image=["last(1)"]', "data.feature_cache=int8"]),
    "views": (write_csv, ["data.augment.rotate=10", "data.cached_augmentations=2"]),
    "augmented anew": (write_csv, ["data.augment.rotate=10", "head.standardize=false"]),
    "low rank": (write_csv, ['tune.image=["lora(rank=2)"]', 'tune.text=["lora(rank=2)"]']),
    "off": (write_csv, ["data.feature_cache=off"]),
}


@pytest.mark.parametrize("way", WAYS)
def test_its_numbers_are_those_of_the_run(way: str, towers: Path, tmp_path: Path, cache: Path) -> None:
    write, changes = WAYS[way]
    made = recipe(towers, write(TOYS, tmp_path), "train.batch_size=auto", "train.epochs=2", *changes)
    before = told(made)
    assert not (cache / "features").exists()
    run(made, tmp_path / "run")

    files = list((cache / "features").glob("*.npy")) if (cache / "features").exists() else []
    kept = before["features"].facts["feature_cache"]
    on_disk = sorted(file.stat().st_size - np.load(file, mmap_mode="r").offset for file in files)
    assert sorted(each["bytes"] for each in kept) == on_disk
    assert not any(each["file"] for each in kept) and (kept or way in ("low rank", "off"))
    about = [json.loads(file.with_suffix(".json").read_text()) for file in files]
    assert sorted(each["storage"] for each in kept) == sorted(each["storage"] for each in about)

    after = told(made)["features"].facts["feature_cache"]
    assert {each["file"] for each in after} == {str(file) for file in files}
    assert [each | {"file": None} for each in after] == kept

    settled = lines(tmp_path / "run" / "log.jsonl")[-1], main_job.RunFolder(tmp_path / "run").recipe()["train"]
    steps = before["steps"].facts
    assert (steps["steps"], steps["batch_size"]) == (settled[0]["step"], settled[1]["batch_size"])
    trained = before["trains"].facts["model"]
    tensors = delta(tmp_path / "run").values()
    assert trained["trained"] == sum(t.numel() for t in tensors)
    assert trained["delta_bytes"] == sum(t.numel() * t.element_size() for t in tensors)


def told(made: Recipe) -> dict[str, CheckReport]:
    return {section.about: section for section in diagnose(made)}


def stopping(made: Recipe) -> list[str]:
    """What would stop training, which is an error that names it."""
    sections = list(diagnose(made))
    with pytest.raises(UserError, match=r"training would stop: \w+, as found above"):
        raise_on_stop(sections)
    return [finding.text for section in sections for finding in section.findings if finding.level == "stop"]


def levels(section: CheckReport) -> dict[str, str]:
    """The text of each level, joined."""
    found: dict[str, str] = {}
    for finding in section.findings:
        found[finding.level] = f"{found.get(finding.level, '')}{finding.text}\n"
    return found


def test_class_pairs_are_counted_and_their_names_cached(towers: Path, tmp_path: Path, cache: Path) -> None:
    tower = save_colour_classifier(tmp_path / "classifier", TOYS, list(COLOURS))
    made = recipe(towers, write_csv(TOYS, tmp_path), f"image.tower=file:{tower}", "head.init=cca", "train.epochs=0")
    before = told(made)
    facts = before["class_pairs"].facts
    assert facts == {"classes": 6, "texts": 6, "weight": 10.0, "source": "labels of the checkpoint"}
    assert "6 classes (labels of the checkpoint)" in levels(before["class_pairs"])["ok"]
    assert "class_pairs" not in told(made.with_overrides(["data.class_weight=0"]))
    run(made, tmp_path / "run")
    after = told(made)["features"].facts["feature_cache"]
    assert {each["file"] for each in after} == {str(file) for file in (cache / "features").glob("*.npy")}
    assert [each | {"file": None} for each in after] == before["features"].facts["feature_cache"]
    event = next(line for line in lines(tmp_path / "run" / "log.jsonl") if line["event"] == "class_pairs")
    sentence = "6 classes (labels of the checkpoint), 6 names and definitions; a class counts as 10 training pairs"
    assert event["message"] == f"class pairs: {sentence}"
    assert f"The heads' closed form also has class pairs: {sentence}." in (tmp_path / "run" / "README.md").read_text()


def test_what_is_there_is_there_for_these_pairs_only(towers: Path, tmp_path: Path) -> None:
    pairs = write_csv(TOYS, tmp_path)
    made = recipe(towers, pairs, "train.epochs=1")
    run(made, tmp_path / "run")
    pairs.write_text(pairs.read_text().replace(f"images/{TOYS[0].key}.png,a ", f"images/{TOYS[0].key}.png,the "))
    kept = told(made)["features"].facts["feature_cache"]
    there = [each["what"] for each in kept if each["file"]]
    assert there.count("images") == 2 and there.count("captions") == 1, "one part has another caption"
    other = told(made.with_overrides(["image.resize=pad", "text.prefix='the '"]))["features"].facts["feature_cache"]
    assert not [each for each in other if each["file"]]


def test_it_runs_no_tower(towers: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def run_all(*args):
        raise AssertionError("a tower ran")

    made = recipe(towers, write_csv(TOYS, tmp_path))
    monkeypatch.setattr(Tower, "pooled", run_all)
    monkeypatch.setattr(Tower, "prefix_states", run_all)
    told(made)


# --- pairs and captions ----------------------------------------------------------------------------------------------


def test_pairs_and_languages_are_counted(towers: Path, tmp_path: Path) -> None:
    source = spoken(tmp_path)
    section = told(recipe(towers, source))["pairs"]
    train, val = datasets.open_training_pairs(recipe(towers, source))
    assert section.facts["train"] == len(train) and section.facts["val"] == len(val)
    assert section.facts["languages"] == {"en": 48, "sw": 48} and section.facts["captions"] == 96
    assert f"few validation pairs ({len(val)})" in levels(section)["look"]
    rows = source.read_text().splitlines()
    plain = json.loads(rows[0]) | {"caption": "a thing"}
    source.write_text("\n".join([json.dumps(plain), *rows[1:]]) + "\n")
    section = told(recipe(towers, source))["pairs"]
    assert section.facts["captions_without_language"] == 1 and "none named: 1 caption" in levels(section)["look"]


def test_captions_are_measured_as_the_tower_reads_them(towers: Path, tmp_path: Path) -> None:
    rows = [toy._replace(shape=" ".join([toy.shape] * (number % 12 + 1))) for number, toy in enumerate(TOYS)]
    made = recipe(towers, write_csv(rows, tmp_path), "text.max_tokens=8")
    train, _ = datasets.open_training_pairs(made)
    whole = build_model_and_preprocessing(made).tokenizer.with_settings(max_tokens=1000)
    texts = sorted({caption.text for pair in train for caption in pair.captions})
    lengths = sorted(len(whole.encode([text])[0]) for text in texts)
    section = told(made)["captions"]
    assert section.facts["tokens"]["max"] == lengths[-1] and section.facts["different"] == len(texts)
    assert section.facts["tokens"]["p50"] == lengths[(len(lengths) - 1 + 1) // 2]
    cut = sum(length > 8 for length in lengths) / len(lengths)
    assert section.facts["cut_share"] == pytest.approx(cut) and cut > 0.1
    assert f"{100 * cut:.1f} % are cut at text.max_tokens = 8" in levels(section)["look"]
    assert "cut" not in str(levels(told(made.with_overrides(["text.max_tokens=64"]))["captions"]))


def test_captions_that_repeat_are_counted(towers: Path, tmp_path: Path) -> None:
    made = recipe(towers, write_csv([toy._replace(shape="ring") for toy in TOYS], tmp_path))
    train, _ = datasets.open_training_pairs(made)
    texts = [caption.text for pair in train for caption in pair.captions]
    section = told(made)["captions"]
    most = max(texts, key=texts.count)
    assert section.facts["most_frequent_count"] == texts.count(most) > 1
    repeated = [text for text in texts if texts.count(text) > 1]
    assert section.facts["repeated_share"] == pytest.approx(len(repeated) / len(texts)) and "look" in levels(section)


# --- images ----------------------------------------------------------------------------------------------------------


def test_equal_pictures_and_those_on_both_sides_are_found(towers: Path, tmp_path: Path) -> None:
    folder = write_folder(TOYS, tmp_path / "pairs")
    made = recipe(towers, folder)
    train, val = datasets.open_training_pairs(made)
    assert levels(told(made)["images"]).keys() == {"ok"}
    shutil.copy(folder / train[0].id, folder / train[5].id)
    shutil.copy(folder / train[0].id, folder / val[2].id)
    section = told(made)["images"]
    assert section.facts["duplicates"] == 2 and section.facts["in_both_parts"] == 1
    looks = levels(section)["look"]
    assert "2 are byte for byte" in looks and train[0].id in looks and "1 to validate on are also trained on" in looks


def test_rows_of_one_picture_are_no_duplicates(towers: Path, tmp_path: Path) -> None:
    pairs = write_csv(TOYS, tmp_path)
    rows = pairs.read_text().splitlines()
    pairs.write_text("\n".join([*rows, *(f"{row.partition(',')[0]},the thing" for row in rows[1:9])]) + "\n")
    assert told(recipe(towers, pairs))["images"].facts["duplicates"] == 0


def test_pictures_smaller_than_the_tower_sees_are_told(towers: Path, tmp_path: Path) -> None:
    made = recipe(towers, write_csv(TOYS, tmp_path), "image.size=48")
    section = told(made)["images"]
    assert section.facts["shorter_side"] == {"p5": 32, "p50": 32, "enlarged_share": 1.0, "tower": 48}
    assert "100 % are smaller" in levels(section)["look"]


def test_unreadable_pictures_are_named_and_too_many_stop(towers: Path, tmp_path: Path) -> None:
    folder = write_folder(TOYS, tmp_path / "pairs")
    made = recipe(towers, folder)
    train, _ = datasets.open_training_pairs(made)
    (folder / train[0].id).write_bytes(b"no picture")
    (folder / train[3].id).unlink()
    (folder / train[3].id).symlink_to(folder / "gone")
    section = told(made)["images"]
    assert {sample["id"] for sample in section.facts["unreadable"]} == {train[0].id, train[3].id}
    count = len(train)
    each = f"2 of {count} to train on, 1 missing; 0 of {len(TOYS) - count} to validate on"
    assert f"2 of {len(TOYS)} looked at cannot be read and will be left out ({each}): " in levels(section)["look"]
    assert section.facts["splits"]["train"] == {"looked_at": count, "unreadable": 2, "missing": 1}
    for pair in train[5:9]:
        (folder / pair.id).write_bytes(b"no picture")
    foretold = stopping(made)
    with pytest.raises(UserError) as happened:
        run(made, tmp_path / "run")
    assert foretold == [str(happened.value)]


def test_of_many_a_sample_is_looked_at(towers: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, most in (("DECODE_SAMPLE_SIZE", 8), ("HASH_SAMPLE_SIZE", 16), ("TOKENIZE_SAMPLE_SIZE", 4)):
        monkeypatch.setattr(f"clasp.data.checks.{name}", most)
    sections = told(recipe(towers, write_csv(TOYS, tmp_path)))
    facts = sections["images"].facts
    assert 8 <= facts["looked_at"] <= 9 and 16 <= facts["hashed"] <= 17 and sections["captions"].facts["looked_at"] == 4
    assert "of 4 looked at" in str(sections["captions"].findings) and "(there are 48)" in str(
        sections["images"].findings
    )


# --- the disk --------------------------------------------------------------------------------------------------------


FEW = ["tune.text=[\"norms(blocks='1:')\"]", "head.width=8", "train.select=last", "train.epochs=1"]
"""Few tensors of its own, for which there is room where there is none for hidden states"""


def full(monkeypatch: pytest.MonkeyPatch, folder: Path, free: int) -> None:
    usage = shutil.disk_usage(folder)
    monkeypatch.setattr(cache_policy.shutil, "disk_usage", lambda at: usage._replace(free=free))


def test_states_that_would_fill_the_disk_are_told(
    towers: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cache: Path
) -> None:
    made = recipe(towers, write_csv(TOYS, tmp_path), *FEW)
    size = next(each for each in told(made)["features"].facts["feature_cache"] if each["what"] == "captions")["bytes"]
    full(monkeypatch, tmp_path, 4 * size - 1)
    kept = told(made)["features"].facts["feature_cache"]
    assert next(each["storage"] for each in kept if each["what"] == "captions") is None
    run(made, tmp_path / "run")
    stored = [json.loads(file.read_text())["storage"] for file in (cache / "features").glob("*.json")]
    assert sorted(stored) == sorted(each["storage"] for each in kept if each["storage"])


def test_states_that_are_there_are_read_however_little_is_free(
    towers: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cache: Path
) -> None:
    """A sweep fills the disk with what its next run reads."""
    made = recipe(towers, write_csv(TOYS, tmp_path), *FEW)
    run(made, tmp_path / "one")
    full(monkeypatch, tmp_path, 4 * max(each["bytes"] for each in told(made)["features"].facts["feature_cache"]) - 1)
    assert all(each["file"] for each in told(made)["features"].facts["feature_cache"])
    written = sorted((file.name, file.stat().st_mtime_ns) for file in (cache / "features").iterdir())
    said: list[str] = []
    main_job.train_recipe(made, tmp_path / "two", say=said.append)
    assert any("computed once and cached" in line for line in said) and not any("recomputed" in line for line in said)
    assert written == sorted((file.name, file.stat().st_mtime_ns) for file in (cache / "features").iterdir())


def test_a_full_disk_stops_in_the_words_of_training(
    towers: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = recipe(towers, write_csv(TOYS, tmp_path), "train.epochs=1")
    full(monkeypatch, tmp_path, 1000)
    foretold = stopping(made)
    with pytest.raises(UserError) as happened:
        run(made, tmp_path / "run")
    assert foretold == [str(happened.value)]


@pytest.mark.parametrize("select", ["best", "last"])
def test_room_for_states_is_asked_for_beside_the_features(
    select: str, towers: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = recipe(towers, write_csv(TOYS, tmp_path), "train.epochs=1", f"train.select={select}")
    features = sum(each["bytes"] for each in told(made)["features"].facts["feature_cache"])
    delta_bytes = told(made)["trains"].facts["model"]["delta_bytes"]
    room = {"best": 7, "last": 5}[select] * delta_bytes
    full(monkeypatch, tmp_path, features + room - 1)
    with pytest.raises(UserError, match=f"{room - 1:,} are free beside the feature cache; --runs") as happened:
        run(made, tmp_path / "run")
    assert f"cannot keep {room:,} bytes of training states" in str(happened.value)
    assert "CLASP_CACHE" not in str(happened.value) and not (tmp_path / "cache" / "features").exists()
    full(monkeypatch, tmp_path, features + room)
    run(made, tmp_path / "run")
    full(monkeypatch, tmp_path, room)
    run(made, tmp_path / "again")  # on features that are there


def test_features_are_found_in_the_attention_kernel_of_the_run(
    towers: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = recipe(towers, write_csv(TOYS, tmp_path), "train.epochs=1", "train.attention=plain")
    run(made, tmp_path / "run")
    assert all(each["file"] for each in told(made)["features"].facts["feature_cache"])
    fused = made.with_overrides(["train.attention=fused"])
    assert not any(each["file"] for each in told(fused)["features"].facts["feature_cache"])
    full(monkeypatch, tmp_path, 7 * told(made)["trains"].facts["model"]["delta_bytes"])
    run(made, tmp_path / "again")


# --- the forecast ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", ["heads", "top block of the text tower", "low rank"])
def test_a_forecast_is_measured_and_leaves_nothing(
    way: str, towers: Path, tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write, changes = WAYS[way]
    monkeypatch.setitem(sys.modules, "codecarbon", None)
    made = recipe(towers, write(TOYS, tmp_path), "train.epochs=40", *changes)
    forecast = next(section for section in diagnose(made, measured=True) if section.about == "forecast")
    assert not (cache / "features").exists()
    seconds = forecast.facts["seconds"]
    assert (seconds["features"] > 0) == (way != "low rank") and seconds["evaluation"] > 0
    states: list[int] = []
    monkeypatch.setattr(StateFiles, "remove", lambda files: states.extend(p.stat().st_size for p in files.paths))
    done = run(made, tmp_path / "run")
    steps = done.fitted.position.step
    assert seconds["training"] == pytest.approx(steps * forecast.facts["step_seconds"])
    spent = done.cost.seconds
    assert spent["training"] / 10 < seconds["training"] < 10 * spent["training"], "milliseconds, on a machine in use"
    disk, headers = forecast.facts["disk_bytes"], 40_000
    assert disk["delta"] <= done.delta_bytes <= disk["delta"] + headers
    assert disk["states"] / 2 <= max(states) <= disk["states"] / 2 + headers, "the one before the first step has less"
    cached = sum(file.stat().st_size for file in (cache / "features").glob("*.npy"))
    assert disk["features"] <= cached <= disk["features"] + headers
    assert forecast.facts["energy_kwh"] is None and forecast.facts["energy"].startswith("not measured: ")
    evaluations = sum(row["event"] == "evaluation" for row in lines(tmp_path / "run" / "log.jsonl"))
    assert evaluations == count_evaluations(resolved(tmp_path / "run"))


def test_steps_are_timed_whatever_max_steps_is(towers: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    counted: list[int] = []
    monkeypatch.setattr(step_timing, "median", lambda cycles: counted.append(len(cycles)) or 1.0)
    monkeypatch.setattr(step_timing, "_COUNTED", 100)
    made = recipe(towers, write_csv(TOYS, tmp_path), "train.max_steps=1")
    timing = step_timing.time_steps(made, datasets.open_training_pairs(made), no_progress_bar)
    assert counted[0] >= 6 and counted[0] % timing.steps_per_epoch == 0 and timing.steps_per_epoch > 1


def test_an_evaluation_is_forecast_without_the_features_that_the_first_computes(
    towers: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def slow(*args: Any, **kwargs: Any) -> CachedFeatures:
        time.sleep(0.5)
        return text_features(*args, **kwargs)

    monkeypatch.setattr(text_side, "text_features", slow)
    made = recipe(towers, write_csv(TOYS, tmp_path), "train.epochs=40")
    forecast = next(section for section in diagnose(made, measured=True) if section.about == "forecast")
    seconds = forecast.facts["seconds"]
    assert seconds["evaluation"] < 2 and seconds["features"] > 0.5, "a dozen evaluations, of which one is slow"


def test_augmented_views_count_in_the_forecast() -> None:
    key = {"views": 4}
    assert images_or_captions(CachePlan("images", 10, "float32", 1, None, key)) == 40
    assert images_or_captions(CachePlan("captions", 10, "float32", 1, None, {})) == 10


def resolved(folder: Path) -> TrainSettings:
    """The settings that a run was trained with."""
    return recipe_from_dict(RunFolder(folder).recipe(), "run").train


def test_a_budget_is_no_forecast(towers: Path, tmp_path: Path) -> None:
    made = read_recipe("start", [f"data.train={write_csv(TOYS, tmp_path)}"], budget={"steps": "10"})
    with pytest.raises(UserError, match="--measure: a recipe with"):
        next(diagnose(towered(made, towers), measured=True))


def test_steps_that_cannot_be_are_a_finding_and_nothing_is_measured(towers: Path, tmp_path: Path) -> None:
    made = recipe(towers, write_csv(TOYS, tmp_path), "train.batch_size=5000")
    *_, last = list(diagnose(made, measured=True))
    assert last.about == "steps" and levels(last)["stop"].startswith("train.batch_size = 5000 is more than the ")


def towered(made: Recipe, towers: Path) -> Recipe:
    return made.with_overrides([f"image.tower=file:{towers / 'image'}", f"text.tower=file:{towers / 'text'}"])


# --- as it is typed --------------------------------------------------------------------------------------------------


def typed(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, *words: str | Path) -> tuple:
    """Exit code and both streams of ``clasp doctor``."""
    monkeypatch.setattr(sys, "argv", ["clasp", "doctor", *map(str, words)])
    capfd.readouterr()
    code = 0
    try:
        cli.main()
    except SystemExit as stop:
        code = stop.code
    return (code, *capfd.readouterr())


def test_lines_for_people_and_one_object_for_programs(
    towers: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    made = recipe(towers, write_csv(TOYS, tmp_path))
    (tmp_path / "toy.toml").write_text(made.to_toml())
    full(monkeypatch, tmp_path, 10**9)  # others use this disk too
    code, out, _ = typed(capfd, monkeypatch, tmp_path / "toy.toml")
    assert code == 0 and {line.partition(" ")[0] for line in out.splitlines()} == {"ok", "look"}
    code, one, _ = typed(capfd, monkeypatch, tmp_path / "toy.toml", "--json")
    assert code == 0 and one.count("\n") == 1
    facts, sections = json.loads(one), list(diagnose(made))
    assert {about: facts[about] for about in facts if about != "findings"} == {s.about: s.facts for s in sections}
    findings = [finding for section in sections for finding in section.findings]
    assert facts["findings"] == [asdict(finding) | {"fix": list(finding.fix)} for finding in findings]
    assert out.splitlines() == [str(finding) for finding in findings]


def unreadable(toys: list, folder: Path) -> Path:
    pairs = write_csv(toys, folder)
    for toy in toys[:6]:
        (folder / "images" / f"{toy.key}.png").write_bytes(b"no picture")
    return pairs


def partly_tagged(toys: list, folder: Path) -> Path:
    source = spoken(folder)
    first, *rows = source.read_text().splitlines()
    source.write_text("\n".join([json.dumps(json.loads(first) | {"caption": "a thing"}), *rows]) + "\n")
    return source


def long_captions(toys: list, folder: Path) -> Path:
    return write_csv([toy._replace(shape=" ".join([toy.shape] * 12)) for toy in toys], folder)


def many_rows(toys: list, folder: Path) -> Path:
    pairs = write_csv(toys, folder)
    header, *rows = pairs.read_text().splitlines()
    for number in range(1, 8):  # images of their own, since the rows of one are one query
        shutil.copytree(folder / "images", folder / f"images{number}")
    copies = (row.replace("images/", f"images{number or ''}/") + f" {number}" for number in range(8) for row in rows)
    pairs.write_text("\n".join([header, *copies]) + "\n")
    return pairs


# what has a fix: pairs, changes, free bytes; the section, and the beginning of the fix
FIXES = {
    "few validation pairs": (many_rows, [], None, "pairs", "data.val_fraction=0.2865"),
    "truncated captions": (long_captions, ["text.max_tokens=8"], None, "captions", "text.max_tokens="),
    "unreadable images": (unreadable, [], None, "images", "data.max_bad_fraction=0.11"),
    "augmented anew": (
        write_csv,
        ["data.augment.rotate=10", "head.standardize=false"],
        None,
        "towers",
        "data.cached_augmentations=4",
    ),
    "states above a quarter of the disk": (
        write_csv,
        ['tune.text=["last(1)"]'],
        "a little less than four times the states",
        "features",
        "data.feature_cache=int8",
    ),
    "full disk": (write_csv, [], 10, "features", "data.feature_cache=off"),
    "batch of more than there are": (write_csv, ["train.batch_size=5000"], None, "steps", "train.batch_size=auto"),
    "class pairs where a tower runs": (
        write_csv,
        ["data.class_ratio=1", "head.init=cca", 'tune.text=["last(1)"]'],
        None,
        "steps",
        'tune.image=["none"]',
    ),
}


@pytest.mark.parametrize("kind", FIXES)
def test_a_fix_is_a_command_that_mends_the_finding(
    kind: str, towers: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write, changes, free, about, wanted = FIXES[kind]
    if kind.startswith("class pairs"):
        changes = [f"image.tower=file:{save_colour_classifier(tmp_path / 'classifier', TOYS, list(COLOURS))}", *changes]
    made = recipe(towers, write(TOYS, tmp_path), *changes)
    if isinstance(free, str):
        free = 4 * max(each["bytes"] for each in told(made)["features"].facts["feature_cache"]) - 1
    if free is not None:
        full(monkeypatch, tmp_path, free)
    found = next(finding for finding in told(made)[about].findings if finding.fix)
    assert found.level != "ok" and found.fix[0].startswith(wanted)
    (tmp_path / "toy.toml").write_text(made.to_toml())
    command = shlex.split(_doctor_with(str(tmp_path / "toy.toml"), [*changes, "train.seed=3"], found.fix, True))
    _, verb, path, *typed, last = command
    assert verb == "doctor" and "train.seed=3" in typed and last == "--measure"
    require_single_keys(typed)
    mended = told(read_recipe(path, typed))[about]
    assert found.text not in [finding.text for finding in mended.findings]
    assert not any(finding.level == "stop" for finding in mended.findings)


def all_unreadable(toys: list, folder: Path) -> Path:
    pairs = write_csv(toys, folder)
    for image in (folder / "images").glob("*.png"):
        image.write_bytes(b"no picture")
    return pairs


# what no setting mends: pairs, changes, the section, and words of the finding
NO_FIXES = {
    "captions of no language": (partly_tagged, [], "pairs", "none named: 1 caption"),
    "few validation pairs beside a limit": (many_rows, ["data.max_pairs=40"], "pairs", "few validation pairs"),
    "no image can be read": (all_unreadable, [], "images", "cannot be read"),
}


@pytest.mark.parametrize("kind", NO_FIXES)
def test_what_no_setting_mends_has_no_fix(kind: str, towers: Path, tmp_path: Path) -> None:
    write, changes, about, words = NO_FIXES[kind]
    found = [
        each for each in told(recipe(towers, write(TOYS, tmp_path), *changes))[about].findings if words in each.text
    ]
    assert found and not any(each.fix for each in found)


@pytest.mark.parametrize(
    "source, fix, fits",
    [
        ("msclip/small", "text.tower=pip:multilingual-e5-small", False),
        ("auto", "data.feature_cache=off", False),
        ("auto", "data.val_fraction=0.25", True),
        ("auto", "data.feature_cache=auto", False),
    ],
)
def test_a_fix_is_another_recipe(source: str, fix: str, fits: bool) -> None:
    assert fits_recipe(read_recipe(source, ["data.train=pairs.csv"]), (fix,)) is fits


@pytest.mark.parametrize("bad, fix", [(4, ("data.max_bad_fraction=0.09",)), (48, ())])
def test_bad_images_to_validate_on_are_not_spread_over_those_to_train_on(
    bad: int, fix: tuple[str, ...], tmp_path: Path
) -> None:
    write_folder(TOYS, tmp_path / "train")
    for image in sorted(write_folder(TOYS, tmp_path / "val").glob("*.png"))[:bad]:
        image.write_bytes(b"no picture")
    train, val = open_pairs(tmp_path / "train"), open_pairs(tmp_path / "val")
    report = check_images(
        train, val, ImageTransform(size=32, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5)), 0.08, no_progress_bar
    )
    assert [finding.fix for finding in report.findings if finding.level == "stop"] == [fix]


def test_what_stops_is_listed_once_with_its_fix(
    towers: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "toy.toml").write_text(recipe(towers, unreadable(TOYS, tmp_path)).to_toml())
    code, out, err = typed(capfd, monkeypatch, tmp_path / "toy.toml")
    assert code == 2 and (out + err).count("images cannot be read") == 1
    assert err.splitlines()[-1] == "clasp: training would stop: images, as found above"
    assert f"to mend it: clasp doctor {tmp_path / 'toy.toml'} data.max_bad_fraction=0.11" in out


@pytest.mark.parametrize(
    "change, wanted",
    [
        ("data.train=pears.csv", "pears.csv does not exist"),
        ("train.batch_size=1000", "training would stop: steps, as found above"),
        ("tune.text=[\"match('x')\"]", "matches nothing"),
        ("train.bacth=4", "did you mean train.batch_size"),
        ("pictures that are none", "training would stop: images, as found above"),
    ],
)
def test_what_would_stop_training_is_one_line_and_exit_code_2(
    change: str,
    wanted: str,
    towers: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    folder = write_folder(TOYS, tmp_path / "pairs")
    (tmp_path / "toy.toml").write_text(recipe(towers, folder).to_toml())
    if change == "pictures that are none":
        for image in folder.glob("*.png"):
            image.write_bytes(b"no picture")
        change = "train.epochs=1"
    code, out, err = typed(capfd, monkeypatch, tmp_path / "toy.toml", change, "--json")
    mistake = [line for line in err.splitlines() if line.startswith("clasp: ")]
    assert code == 2 and len(mistake) == 1 and wanted in mistake[0] and err.splitlines()[-1] == mistake[0]
    assert out == "" or "stop" in {finding["level"] for finding in json.loads(out)["findings"]}
    assert "Traceback" not in err
