"""The quality benchmark, without training: what is held out, what a curve says, and when a quality is reached."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from benchmarks import quality
from benchmarks.class_photos import open_split, write_splits
from benchmarks.harness import Measured
from benchmarks.quality import _follow, choose_rate
from benchmarks.quality_page import RACES_FILE, Curve, Outcome, Point, Race, append_race, draw, read_races

from clasp.data.pairs import open_pairs
from clasp.types import UserError
from toydata import toys, write_classes, write_csv


def test_a_tenth_of_each_class_is_held_out(tmp_path: Path):
    photos = open_pairs(write_classes(toys(120), tmp_path / "classes"))
    some = open_pairs(write_classes(toys(30), tmp_path / "test"))
    work = tmp_path / "work"
    sizes = write_splits(photos, some, work, label="class", template="a photo of {}")
    assert sizes["train"] + sizes["val"] == 120 and sizes["test"] == 30
    train, val, test = (open_split(work, split) for split in ("train", "val", "test"))
    assert {pair.meta["class"] for pair in val} == {f"a photo of {pair.meta['class']}" for pair in photos}
    assert all(pair.captions[0].text == pair.meta["class"] for split in (val, test) for pair in split)
    images = [pair.image.read() for split in (train, val) for pair in split]
    assert sorted(images) == sorted(pair.image.read() for pair in photos), "each is in one of them"
    assert {pair.captions[0].text for pair in train} <= {pair.captions[0].text for pair in photos}


def test_photos_without_a_class(tmp_path: Path):
    captioned = open_pairs(write_csv(toys(12), tmp_path / "pairs"))
    with pytest.raises(UserError, match=r"has no 'class'; .*--label"):
        write_splits(captioned, captioned, tmp_path / "work", label="class", template="{}")
    one, other = toys(60)[:2], [toy._replace(colour="mauve") for toy in toys(60)[:2]]
    photos = open_pairs(write_classes([toy for toy in one for _ in range(2)], tmp_path / "one"))
    with pytest.raises(UserError, match=r"has one photo|no photo in --pairs"):
        write_splits(
            photos,
            open_pairs(write_classes(other, tmp_path / "other")),
            tmp_path / "again",
            label="class",
            template="{}",
        )


def curve(name: str, *points: tuple[float, float]) -> Curve:
    return Curve(name, [Point(seconds, top1, 2 * top1) for seconds, top1 in points])


def test_the_time_to_the_quality_of_the_peer():
    short = curve("clasp, 1 minutes", (10, 0.1), (60, 0.35), (90, 0.3))
    ours = [short, curve("clasp, 5 minutes", (100, 0.2), (300, 0.42))]
    peers = {lr: curve(f"peer, lr {lr:g}", (30, 0.01), (400, top1)) for lr, top1 in ((1e-3, 0.2), (3e-3, 0.33))}
    assert short.best_so_far("top1") == [0.1, 0.35, 0.35]
    outcome = Outcome([Race(0, ours, peers)], 3e-3, 600, "")
    assert [row.ratio for row in outcome.rows()] == [60 / 600, 60 / 400] * 2 and outcome.rows()[0].verdict == "reached"
    assert outcome.rows()[0].note == "clasp, 1 minutes", "the first of ours to reach it"
    assert "| 0 | peer, lr 0.003 (chosen) | 400 | 33.0 | 66.0 |" in outcome.markdown()
    (never, *_) = Outcome([Race(0, [curve("clasp", (10, 0.1))], peers)], 3e-3, 600, "").rows()
    assert never.verdict == "**missed**" and never.note == "not reached: 10.0 % at most"


def test_races_of_several_seeds():
    """Each has its own quality and times; the rows take medians, and the rate is the best on average."""
    first = Race(0, [curve("clasp", (50, 0.4))], {0.1: curve("a", (100, 0.4)), 0.2: curve("b", (100, 0.1))})
    second = Race(1, [curve("clasp", (80, 0.2), (90, 0.3))], {0.1: curve("a", (300, 0.3)), 0.2: curve("b", (9, 0.39))})
    assert choose_rate([first, second]) == 0.1 and choose_rate([second]) == 0.2
    outcome = Outcome([first, second], 0.1, 600, "")
    (total, there, *_) = outcome.rows()
    assert (total.ours.values, there.ours.values, there.theirs) == ((50, 90), (50, 90), Measured("", (100, 300)))
    assert total.ratio == 70 / 600 and there.ratio == 70 / 200 and "40.0, 30.0 %" in total.work
    assert "| 1 | a (chosen) | 300 | 30.0 | 60.0 |" in outcome.markdown()


def test_a_race_is_kept_as_it_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A failure in a later one loses none: the same command goes on, and the figure is drawn from the file."""
    photos = write_classes(toys(120), tmp_path / "classes")
    words = ["quality", "--pairs", str(photos), "--test", str(photos), "--seeds", "0,1", "--out", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", [*words, "--work", str(tmp_path / "work")])
    raced, fails = list[int](), {1}

    def run_race(folder: Path, given: object, precision: str, seed: int) -> Race:
        if seed in fails:
            raise RuntimeError("no memory")
        raced.append(seed)
        return Race(seed, [curve("clasp", (50, 0.4), (60, 0.3))], {1e-3: curve("peer", (100, 0.4 + seed / 10))})

    monkeypatch.setattr(quality, "run_race", run_race)
    monkeypatch.setattr(quality, "run_tests", lambda *given: {})
    monkeypatch.setattr(quality, "_compile_imports", lambda work: None)
    with pytest.raises(SystemExit, match=r"no memory\nthe races that ended are kept in .*quality\.jsonl"):
        quality.main()
    fails.clear()
    quality.main()
    assert raced == [0, 1], "the first was not run again"
    assert "| 0 | clasp | 60 | 40.0 | 80.0 |" in (tmp_path / "quality.md").read_text()
    assert not (tmp_path / "work").exists() and (tmp_path / "quality.png").exists()
    races = read_races(tmp_path / RACES_FILE)
    assert [race.seed for race in races] == [0, 1] and races[1].peers[1e-3].points == [Point(100, 0.5, 1.0)]
    append_race(tmp_path / RACES_FILE, races[0], {"minutes": 1})
    assert len(read_races(tmp_path / RACES_FILE)) == 1, "others have other settings"
    (tmp_path / "quality.png").unlink()
    draw(races, tmp_path / "quality.png")
    assert (tmp_path / "quality.png").exists()


def test_logs_are_read_while_they_are_written(tmp_path: Path):
    """Those of the stages, too, and no other events."""
    row = {"event": "evaluation", "metrics": {"top1": 0.5, "top5": 0.75}}
    script = (
        "import json, pathlib, time\n"
        f"for stage in ('1', '2'):\n"
        f"    folder = pathlib.Path({str(tmp_path)!r}, 'run', 'stages', stage); folder.mkdir(parents=True)\n"
        f"    (folder / 'log.jsonl').write_text({json.dumps(row)!r} + '\\n' + json.dumps(dict(event='step')) + '\\n')\n"
        "    time.sleep(0.4)\n"
    )
    found = _follow("run", [sys.executable, "-c", script], tmp_path, (tmp_path / "run").rglob)
    assert [(point.top1, point.top5) for point in found.points] == [(0.5, 0.75)] * 2
    assert found.points[1].seconds - found.points[0].seconds > 0.2
    with pytest.raises(RuntimeError, match="ZeroDivisionError"):
        _follow("run", [sys.executable, "-c", "1 / 0"], tmp_path, (tmp_path / "none").rglob)
