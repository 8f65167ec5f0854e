"""The command as a person meets it: what goes to which stream, exit codes, and one line for every mistake."""

from __future__ import annotations

import errno
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch

from clasp import cli
from clasp.commands import fit_run
from clasp.config import run_plan
from clasp.data import atomic_files
from clasp.data.atomic_files import without_checksum
from clasp.evaluation.zeroshot import read_templates
from clasp.training import loop, run_folder
from clasp.types import UserError
from toydata import add_member, toys, write_classes, write_csv, write_folder, write_images
from toyruns import recipe, run, save_image_tower, save_text_tower, save_towers, spoil

TOYS = toys(48)
VERBS = (
    "demo",
    "params",
    "doctor",
    "train",
    "resume",
    "pair",
    "eval",
    "compare",
    "analyze",
    "report",
    "maps",
    "index",
    "search",
    "serve",
    "watch",
    "export",
    "import",
)
GROUPED = ("store copy", "store export", "store import")


@dataclass
class Said:
    """What a command left: its exit code and its two streams."""

    code: int
    out: str
    err: str

    @property
    def mistake(self) -> str:
        """The one line about a mistake of the user's, and nothing else on either stream."""
        assert self.code == 2, self
        assert not self.out and self.err.count("\n") == 1 and self.err.startswith("clasp: "), self.err
        assert "Traceback" not in self.err and "Error" not in self.err, self.err
        return self.err


Command = Callable[..., Said]


@pytest.fixture
def clasp(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Command:
    """Types a command, in this process."""

    def typed(*words: str | Path) -> Said:
        monkeypatch.setattr(sys, "argv", ["clasp", *map(str, words)])
        capfd.readouterr()
        code = 0
        try:
            cli.main()
        except SystemExit as stop:
            code = stop.code if isinstance(stop.code, int) else 0
        return Said(code, *capfd.readouterr())

    return typed


@dataclass
class World:
    """Towers, pairs, a recipe file and a finished run, made once."""

    folder: Path
    towers: Path
    pairs: Path
    toml: Path
    run: Path


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    folder = tmp_path_factory.mktemp("world")
    towers, pairs = save_towers(folder / "towers"), write_csv(TOYS, folder / "pairs")
    toml = folder / "toy.toml"
    toml.write_text(recipe(towers, pairs, "train.epochs=1").to_toml())
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CLASP_CACHE", str(folder / "cache"))
        run(recipe(towers, pairs, "train.epochs=1"), folder / "run")
    return World(folder, towers, pairs, toml, folder / "run")


@pytest.fixture(autouse=True)
def cache(world: World, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("CLASP_CACHE", str(world.folder / "cache"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.chdir(tmp_path)


# --- help and params -------------------------------------------------------------------------------------------------


def test_help_of_every_verb_needs_nothing_heavy() -> None:
    """In a process of its own: torch takes seconds to import, which nobody waits for who asks for help."""
    code = """
import sys
from clasp import cli
for verb in sys.argv[1].split(","):
    sys.argv = ["clasp", *verb.split(), "--help"]
    try:
        cli.main()
    except SystemExit as stop:
        assert not stop.code, (verb, stop.code)
heavy = {"torch", "numpy", "transformers"} & set(sys.modules)
assert not heavy, heavy
"""
    started = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-c", code, ",".join(("", *VERBS, *GROUPED))],
        capture_output=True,
        text=True,
        timeout=60,
        env={**os.environ, "PYTHONPATH": str(Path(cli.__file__).parents[2])},
    )
    assert done.returncode == 0, done.stderr
    assert time.monotonic() - started < 20, "half a second on a quiet machine"
    for words in (
        *VERBS,
        "store",
        "RECIPE",
        "RUN",
        "KEY=VALUE",
        "--json",
        "--image",
        "--grid",
        "retention:",
        "anchor=",
    ):
        assert words in done.stdout


LIGHT_MISTAKES = (
    "trian",
    "train strat data.train=x",
    "train heads train.batch_size",
    "train heads train.lr=1e-3 train.lr=1e-4",
    "train heads --name a/b",
    "train heads --foo",
    "train heads --grid train.lr=1,2 --minutes 5",
    "params recipes/none.toml",
    "doctor none.toml",
    "resume runs/none",
    "pair --image a --text b train.lr=1 train.lr=2",
    "eval runs/none retrieval data=x",
    "eval runs/none retreival",
    "eval runs/none retrieval dat=x",
    "compare runs/none runs/none retrieval data=x",
    "compare a b knn k=",
    "analyze runs/none",
    "report runs/none",
    "maps runs/none",
    "index runs/none images",
    "watch runs/none images",
    "search runs/none words",
    "search . --image a.png --image-weight 2 --image-weight 3",
    "serve runs/none",
    "export runs/none --to onnx -o out",
    "store copy runs/none --to edge",
    "store export runs/none -o out",
    "store import runs/none folder",
)


RECIPE_MISTAKES = (
    "train start train.bacth=4",
    "train heads --minutes 1",
    "params heads train.epochs=abc",
    "doctor heads head.kind=lineer",
    "params heads image.net.width=7 image.tower.x=1",
    "train heads head.init=cca head.standardize=false",
)
SOURCE_MISTAKES = ("train heads data.train=pears.csv", "train start", "doctor heads data.train=a/b.csv")


@pytest.mark.parametrize(
    ("mistakes", "heavy"),
    [
        (LIGHT_MISTAKES, ("torch", "numpy", "pyarrow", "PIL")),
        (RECIPE_MISTAKES, ("torch", "pyarrow")),
        (SOURCE_MISTAKES, ("torch",)),
    ],
    ids=["names", "recipes", "sources"],
)
def test_mistakes_are_told_before_anything_heavy_is_imported(
    mistakes: tuple[str, ...], heavy: tuple[str, ...], tmp_path: Path
) -> None:
    """All in one process of their own: each alone takes a second or less, and torch some seconds."""
    code = """
import sys
from clasp import cli
heavy = set(sys.argv[1:])
for words in sys.stdin.read().splitlines():
    sys.argv = ["clasp", *words.split()]
    try:
        cli.main()
    except SystemExit as stop:
        assert stop.code == 2, words
    assert not heavy & set(sys.modules), (words, heavy & set(sys.modules))
"""
    done = subprocess.run(
        [sys.executable, "-c", code, *heavy],
        input="\n".join(mistakes),
        capture_output=True,
        text=True,
        timeout=60,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(Path(cli.__file__).parents[2])},
    )
    assert done.returncode == 0, done.stderr
    assert len(done.stderr.splitlines()) == len(mistakes), "one line for each"


def test_params_prints_one_object_and_nothing_else(clasp: Command) -> None:
    said = clasp("params", "lilt/lwa", "--json")
    assert said.code == 0 and said.err == "" and said.out.count("\n") == 1
    facts = json.loads(said.out)
    assert set(facts) == {"total", "trained", "percent", "delta_bytes", "image", "text", "heads", "scale"}
    parts = [facts[part] for part in ("image", "text", "heads", "scale")]
    for key in ("total", "trained", "delta_bytes"):
        assert facts[key] == sum(part[key] for part in parts) > 0
    assert all(set(part) == {"total", "trained", "percent", "delta_bytes"} for part in parts)
    assert facts["percent"] == pytest.approx(100 * facts["trained"] / facts["total"], abs=1e-4)


def test_params_takes_overrides_and_prints_a_table(clasp: Command) -> None:
    said = clasp("params", "lilt/heads", 'tune.image=["norms"]')
    assert said.code == 0 and said.err == ""
    assert re.search(r"image tower +│ +85,844,736 │ +38,400 │ +0.04 ", said.out), said.out


# --- the way from pairs to a search ----------------------------------------------------------------------------------


def test_one_folder_one_command_and_what_it_says_to_type_next(clasp: Command, world: World, tmp_path: Path) -> None:
    folder = write_classes(TOYS, tmp_path / "my pictures")
    trained = clasp("train", world.toml, f"data.train={folder}", "--runs", tmp_path / "my runs")
    assert trained.code == 0 and "zeroshot" in trained.out and "top1" in trained.out and "Traceback" not in trained.err
    last = trained.err.splitlines()[-1]
    index, search = re.fullmatch(r"index and search with: clasp (.*)  then: clasp (.*)", last).groups()
    indexed = clasp(*_shell(index))
    assert indexed.code == 0 and f"{len(TOYS)} images added" in indexed.err and indexed.out == ""
    assert "nothing to encode" in clasp(*_shell(index)).err
    found = clasp(*_shell(search.replace("your words", "a red ring")), "-k", "3", "--json")
    hits = json.loads(found.out)
    assert found.err == "" and len(hits["hits"]) == 3 and Path(hits["sheet"]).stat().st_size > 1000
    assert all((folder / hit["id"]).is_file() and Path(hit["meta"]["name"]).is_file() for hit in hits["hits"])
    assert [hit["score"] for hit in hits["hits"]] == sorted((hit["score"] for hit in hits["hits"]), reverse=True)
    filtered = ("--where", "folder~ring", "--where", "caption!=a red ring")
    ringed = json.loads(clasp(*_shell(search.replace("your words", "ring -red")), *filtered, "--json").out)
    assert ringed["hits"] and all("ring/" in hit["id"] for hit in ringed["hits"])
    assert {"p_value", "close_count", "note"} < set(ringed) and ringed["hits"][0]["z"] is not None
    shelf = clasp(*_shell(search.replace("your words", "ring")), "--where", "shelf=1").mistake
    assert "no entry has the field 'shelf'; there are folder, caption" in shelf
    assert "cancels itself out" in clasp(*_shell(search.replace("your words", "ring -ring"))).mistake
    alike = clasp("search", tmp_path / "my runs" / "toy", "--image", folder / hits["hits"][0]["id"], "-k", "1")
    assert alike.code == 0 and "1.000" in alike.out and Path(hits["hits"][0]["id"]).name in alike.out.replace("\n", "")
    first, second = (folder / hit["id"] for hit in hits["hits"][:2])
    images = ("--image", first, "--image", second, "--image-weight", "1", "--image-weight", "-0.5")
    mixed = clasp("search", tmp_path / "my runs" / "toy", *images, "-k", "20", "--json")
    assert second.name in json.loads(mixed.out)["query"] and "with weight -0.5" in json.loads(mixed.out)["query"]
    other = (*images[:5], "-0.5", "--image-weight", "1")
    swapped = clasp("search", tmp_path / "my runs" / "toy", *other, "-k", "20", "--json")
    best, last = (json.loads(each.out)["hits"] for each in (mixed, swapped))
    assert best[0]["id"] == hits["hits"][0]["id"] and last[0] != best[0], "weights are those of the images in order"
    ring = _shell(search.replace("your words", "ring"))
    whole, close = (json.loads(clasp(*ring, *option, "--json").out) for option in ((), ("--only-close",)))
    count = close["close_count"]
    assert count == whole["close_count"] < len(whole["hits"]) and close["hits"] == whole["hits"][:count]
    again = clasp("train", world.toml, "--runs", tmp_path / "my runs")
    assert again.code == 0 and "toy-2" in again.err and "recall@" not in again.out and "R@10" in again.out


def _shell(line: str) -> list[str]:
    import shlex

    return shlex.split(line)


def test_stopped_before_training_keeps_what_was_computed(
    clasp: Command, world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(fit_run, "initialize_heads", interrupted)
    said = clasp("train", world.toml, "--runs", tmp_path / "runs")
    assert said.code == 130 and "stopped before training" in said.err and "Traceback" not in said.err


@pytest.mark.parametrize(
    "task, options, metric",
    [
        ("zeroshot", ["data={classes}"], "top1"),
        ("zeroshot", ["data={classes}", "templates=the {{c}}"], "mean_per_class"),
        ("retrieval", ["data={pairs}"], "recall@10"),
        ("multilingual", ["data={spoken}", "languages=sw,en"], "median_rank"),
    ],
)
def test_eval_answers_and_keeps_the_answer(
    task: str, options: list[str], metric: str, clasp: Command, world: World, tmp_path: Path
) -> None:
    write_images(TOYS, tmp_path)
    rows = [{"image": f"images/{t.key}.png", "caption": {"en": t.caption, "sw": t.shape}} for t in TOYS]
    (tmp_path / "spoken.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    places = {
        "classes": write_classes(TOYS, tmp_path / "classes"),
        "pairs": world.pairs,
        "spoken": tmp_path / "spoken.jsonl",
    }
    words = ["eval", world.run, task, *(option.format(**places) for option in options)]
    said = clasp(*words, "--json")
    assert said.code == 0, said.err
    answer = json.loads(said.out)
    assert answer["task"] == task and all(metric in row["metrics"] for row in answer["results"])
    kept = [without_checksum(json.loads(line)) for line in (world.run / "results.jsonl").read_text().splitlines()]
    assert kept[-len(answer["results"]) :] == answer["results"]
    card = (world.run / "README.md").read_text()
    assert card.count("\n## Evaluations\n") == 1 and f"\n| {task} on " in card.partition("\n## Evaluations\n")[2]
    shown = clasp(*words)
    assert shown.code == 0 and "chance" in shown.out and shown.out.count("\n") < 15
    assert max(map(len, shown.out.splitlines())) <= 100


def test_eval_runs_a_task_from_outside_that_lies_in_the_current_folder(
    clasp: Command, world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copy(Path(__file__).parents[1] / "toytasks.py", tmp_path / "mytasks.py")
    monkeypatch.setattr(sys, "path", [*sys.path])
    words = ["eval", world.run, "mytasks:POSITIVE", f"data={world.pairs}"]
    said = clasp(*words, "axis=3", "--json")
    (row,) = json.loads(said.out)["results"]
    assert said.code == 0 and "axis 3" in said.err
    assert row["task"] == "positive" and 0 <= row["metrics"]["share"] <= 1 and row["n"] == len(TOYS)
    assert without_checksum(json.loads((world.run / "results.jsonl").read_text().splitlines()[-1])) == row
    shown = clasp(*words)
    assert "share" in shown.out and "50.0" in shown.out and "axis 0" in shown.err
    assert "'axes=1' is not an option; did you mean axis=…? it takes data, axis" in clasp(*words, "axes=1").mistake


def test_index_reads_what_the_run_was_trained_on_as_it_was_read_then(
    clasp: Command, world: World, tmp_path: Path
) -> None:
    source = write_csv(TOYS, tmp_path)
    source.write_text(source.read_text().replace("filepath,title", "where,what", 1))
    columns = ["data.columns.image=where", "data.columns.caption=what"]
    assert clasp("train", world.toml, f"data.train={source}", *columns, "--name", "own").code == 0
    assert clasp("index", "runs/own", source).code == 0
    assert clasp("eval", "runs/own", "retrieval", f"data={source}").code == 0
    assert clasp("eval", "runs/own", "retrieval", f"data={source}", "caption=where").code == 2


RECIPE_KEYS = "data.columns.image=NAME data.columns.caption=NAME"
OPTIONS = "columns of other names: image=NAME caption=NAME"
HINTS = {
    "train TOML data.train=CSV": RECIPE_KEYS,
    "train TOML data.train=CSV --grid train.lr=1e-3,2e-3": RECIPE_KEYS,
    "doctor TOML data.train=CSV": RECIPE_KEYS,
    "pair --image TOWERS/image --text TOWERS/text data.train=CSV image.size=32": RECIPE_KEYS,
    "eval RUN retrieval data=CSV": OPTIONS,
    "compare RUN RUN retrieval data=CSV": OPTIONS,
    "analyze RUN data=CSV": OPTIONS,
    "maps RUN data=CSV": OPTIONS,
    "index RUN CSV": "rename the columns, or index the folder of the images",
}


@pytest.mark.parametrize("words", HINTS)
def test_a_missing_column_is_answered_with_what_the_verb_takes(
    words: str, clasp: Command, world: World, tmp_path: Path
) -> None:
    source = tmp_path / "other.csv"
    source.write_text("where,what\na.png,a dog\n")
    places = {"TOML": world.toml, "CSV": source, "RUN": world.run, "TOWERS": f"file:{world.towers}"}
    typed = words
    for name, place in places.items():
        typed = typed.replace(name, str(place))
    said = clasp(*typed.split())
    line = said.err.splitlines()[-1]
    assert said.code == 2 and "has no column 'filepath'; needed: 'filepath', 'title'; it has 'where', 'what'" in line
    assert HINTS[words] in line


def test_a_sweep_prints_a_table_and_the_run_to_use(clasp: Command, world: World, tmp_path: Path) -> None:
    swept = clasp(
        "train", world.toml, "--grid", "train.lr=1e-3,1e30", "--grid", "head.kind=linear,mlp", "--name", "two"
    )
    assert swept.code == 0 and "runs/two: 4 of 4 runs" in swept.out and "mean recall" in swept.out
    best, failed, why, *_ = (line for line in swept.out.splitlines() if "kind=linear" in line)
    assert re.search(r"train.lr=1e-3 head.kind=linear +│ +[\d.]+ │ +[\d.]+–[\d.]+ │", best)
    assert "failed" in failed and "train.lr=1e30 head.kind=linear failed: the loss" in why
    run = re.search(r"^best: (\S+);", swept.err, re.MULTILINE)[1]
    assert clasp("eval", run, "retrieval", f"data={world.pairs}").code == 0
    again = clasp(
        "train", world.toml, "--grid", "head.kind=linear,mlp", "--grid", "train.lr=1e-3,2e-3", "--name", "two"
    )
    assert "runs/two holds another sweep" in again.mistake
    none = clasp("train", world.toml, "--grid", "train.lr=1e29,1e30", "--name", "three")
    assert none.code == 2 and "failed" in none.out
    assert none.err.splitlines()[-1].startswith("clasp: no run of runs/three finished; the first: the loss is")


def test_what_was_typed_is_shown_as_it_was_typed(clasp: Command, world: World, tmp_path: Path) -> None:
    run, folder = shutil.copytree(world.run, tmp_path / "run [/b]"), tmp_path / "a [/folder]"
    write_images(TOYS[:2], tmp_path)
    (folder / "odd [").mkdir(parents=True)
    (folder / "broken [").mkdir()
    for toy, name in zip(TOYS[:2], ("odd [/b] name.png", "esc \x1b[31m\nline.png"), strict=True):
        shutil.copy(tmp_path / "images" / f"{toy.key}.png", folder / name)
    (folder / "broken [/x].png").write_bytes(b"no picture")
    indexed = clasp("index", run, folder)
    assert indexed.code == 0 and "broken [/x].png" in indexed.err and "'run [/b]'" in indexed.err
    for words in ("end of [/quote] here", "a red [circle]", "two\nlines\t:cat:"):
        found = clasp("search", run, words)
        assert found.code == 0 and found.out.splitlines()[0] == words.replace("\n", r"\n").replace("\t", r"\t")
        assert "odd [/b] name.png" in found.out and r"esc \x1b[31m\nline.png" in found.out
        assert "picture of the hits: run [/b]/search.png" in found.err
        assert "\x1b" not in found.out + found.err and max(map(len, found.out.splitlines())) <= 100
    assert r"no [/such] \x1b.png" in clasp("search", run, "x", "--image", "no [/such] \x1b.png").mistake
    assert "no [/such] run" in clasp("eval", "no [/such]\nrun", "retrieval", "data=x").mistake


# --- every mistake is one line ---------------------------------------------------------------------------------------


def mistakes(world: World, here: Path) -> dict[str, tuple[list, list[str]]]:
    """What is typed, and what the line must say."""
    train = ["train", world.toml, "--name", "new"]
    write_images(TOYS, here)
    header = "filepath,title\n"
    (here / "columns.csv").write_text("filepath,titel\nimages/a.png,a dog\n")
    (here / "empty.csv").write_text(f"{header}images/{TOYS[0].key}.png,a\nimages/{TOYS[1].key}.png,\n")
    (here / "torn.tar").write_bytes(_tar()[:3000])
    (here / "twice.txt").write_text("ring\ncircle\nring\n")
    (here / "classes.txt").write_text("ring\ncircle\n")
    (here / "void").mkdir()
    (here / "broken.toml").write_text("[image\n")
    classes = write_classes(TOYS, here / "classes")
    few = write_csv(TOYS[:6], here / "few")
    return {
        "missing column": (
            [*train, "data.train=columns.csv"],
            ["columns.csv", "no column 'title'", "did you mean 'titel'"],
        ),
        "empty caption": ([*train, "data.train=empty.csv"], ["1 of 2 pairs have an empty caption", "line 3"]),
        "truncated tar": ([*train, "data.train=torn.tar"], ["torn.tar is truncated"]),
        "zero pairs": ([*train, "data.languages=['sw']"], ["zero pairs", "sw"]),
        "no pairs there": ([*train, "data.train=void"], ["void"]),
        "no such data": ([*train, "data.train=pears.csv"], ["pears.csv does not exist"]),
        "no data": (["train", "start", "--name", "new"], ["data.train"]),
        "unknown tower": ([*train, "image.tower=pip:efficientnet-lite1"], ["efficientnet-lite1", "efficientnet-lite0"]),
        "unknown scheme": ([*train, "image.tower=hff:a/b"], ["hff", "did you mean hf:a/b"]),
        "tower without scheme": ([*train, "image.tower=dinov2"], ["'dinov2' has no scheme"]),
        "no such folder": ([*train, "text.tower=file:void"], ["file:void", "config.json"]),
        "no such hub model": ([*train, "text.tower=hf:nobody/nothing"], ["hf:nobody/nothing"]),
        "no such factory": ([*train, "text.tower=no.such.module:tower"], ["no.such.module"]),
        "wrong modality": ([*train, "image.tower=pip:minilm-l6"], ["pip:minilm-l6"]),
        "unknown key": ([*train, "train.bacth=4"], ["unknown key 'train.bacth'", "train.batch_size"]),
        "unknown key, counting": (["params", "start", "train.bacth=4"], ["did you mean train.batch_size"]),
        "wrong value": ([*train, "loss.kind=triplet"], ["loss.kind = 'triplet'", "'infonce' or 'sigmoid'"]),
        "matches nothing": ([*train, "tune.text=[\"match('layer.99.*')\"]"], ["matches nothing in BertModel"]),
        "matches nothing, counting": (["params", world.toml, "tune.text=[\"match('x')\"]"], ["matches nothing"]),
        "too many blocks": ([*train, 'tune.text=["last(3)"]'], ["2 blocks"]),
        "nothing trains": ([*train, "head.standardize=false", "tune.head=none", "tune.scale=none"], ["nothing trains"]),
        "batch too large": ([*train, "train.batch_size=1000"], ["train.batch_size = 1000 is more than the", "at most"]),
        "one pair": ([*train, f"data.train={few}", "train.batch_size=64"], ["train.batch_size = 64"]),
        "heads too wide": ([*train, "head.init=cca", "head.width=64"], ["head.width = 64", "at most 32"]),
        "no such recipe": (["train", "strat", "data.train=few"], ["no recipe 'strat'", "start"]),
        "no such recipe file": (["params", "recipes/none.toml"], ["recipes/none.toml"]),
        "broken recipe": (["params", "broken.toml"], ["broken.toml is not a TOML file"]),
        "no grid": ([*train, "--grid", "train.lr"], ["'train.lr' is not key=value,value"]),
        "grid with a budget": ([*train, "--grid", "train.lr=1,2", "--steps", "9"], ["--minutes and --steps", "--grid"]),
        "one of a grid": ([*train, "--grid", "head.kind=mlp,lineer"], ["with head.kind=lineer", "'linear', 'mlp'"]),
        "nothing to diagnose": (["doctor", world.toml, "data.train=void"], ["void"]),
        "no override": ([*train, "train.batch_size"], ["'train.batch_size' is not key=value"]),
        "name that exists": ([*train[:-1], world.run.name, "--runs", world.folder], ["holds a run already", "--name"]),
        "resume a finished run": (["resume", world.run], ["finished"]),
        "resume nothing": (["resume", "runs/none"], ["no run at runs/none"]),
        "resume a folder": (["resume", "void"], ["void is not a run folder"]),
        "classes twice": (
            ["eval", world.run, "zeroshot", f"data={classes}", "classes=twice.txt"],
            ["twice.txt", "'ring'"],
        ),
        "classes unlike labels": (
            ["eval", world.run, "zeroshot", f"data={classes}", "classes=classes.txt"],
            ["not one of the 2"],
        ),
        "no class list": (["eval", world.run, "zeroshot", f"data={classes}", "classes=none.txt"], ["none.txt"]),
        "no place in template": (
            ["eval", world.run, "zeroshot", f"data={classes}", "templates=a photo"],
            ["'a photo'", "{}"],
        ),
        "no classes": (["eval", world.run, "zeroshot", f"data={world.pairs}"], ["no column 'class'", "label="]),
        "unknown task": (["eval", world.run, "retreival", "data=x"], ["'retreival'", "did you mean retrieval?"]),
        "unknown option": (["eval", world.run, "retrieval", "dat=x"], ["'dat=x'", "did you mean data=…?"]),
        "eval without data": (["eval", world.run, "retrieval"], ["needs data="]),
        "eval of no run": (["eval", "runs/none", "retrieval", f"data={world.pairs}"], ["no run at runs/none"]),
        "option without a value": (
            ["eval", world.run, "zeroshot", f"data={classes}", "templates="],
            ["templates= is empty", "a photo of a {}."],
        ),
        "folder without a name": (["eval", world.run, "--suite", "elevater-20", "--data", ""], ["'' after --data"]),
        "unknown language": (["eval", world.run, "multilingual", f"data={world.pairs}"], ["no caption of"]),
        "index of nothing": (["index", world.run, "void"], ["void has no images"]),
        "index of what is not there": (["index", world.run, "none"], ["none does not exist"]),
        "index of no run": (["index", "runs/none", "images"], ["no run at runs/none"]),
        "search without index": (["search", world.run, "words"], ["no index yet", "clasp index"]),
        "search for nothing": (["search", world.run], ["say what to look for"]),
        "search in no run": (["search", "runs/none", "words"], ["no run at runs/none"]),
        "search that is blank": (["search", world.run, " "], ["the words ' '", "blank"]),
        "image weight alone": (
            ["search", world.run, "words", "--image-weight", "2"],
            ["--image-weight is 2 for no image"],
        ),
        "one weight of two": (
            ["search", world.run, "--image", "a.png", "--image", "b.png", "--image-weight", "2"],
            ["--image-weight is 2 for 2 images", "one weight for each image"],
        ),
        "close to an image": (["search", world.run, "--image", "a.png", "--only-close"], ["a.png", "add words"]),
        "filter that is none": (["search", world.run, "words", "--where", "folder"], ["folder=holidays"]),
        "serve without index": (["serve", world.run], ["no index yet", "--pictures FOLDER"]),
        "serve no run": (["serve", "runs/none"], ["no run at runs/none"]),
        "serve to everybody": (["serve", world.run, "--pictures", "x", "--host", "0.0.0.0"], ["--token"]),
        "serve at no port": (["serve", world.run, "--pictures", "x", "--port", "99999"], ["99999", "65535"]),
    }


MISTAKES = (
    "missing column|empty caption|truncated tar|zero pairs|no pairs there|no such data|no data|unknown tower|"
    "unknown scheme|tower without scheme|no such folder|no such hub model|no such factory|wrong modality|unknown key|"
    "unknown key, counting|wrong value|matches nothing|matches nothing, counting|too many blocks|nothing trains|"
    "batch too large|one pair|heads too wide|no such recipe|no such recipe file|broken recipe|"
    "no grid|grid with a budget|one of a grid|nothing to diagnose|no override|"
    "name that exists|resume a finished run|resume nothing|resume a folder|classes twice|classes unlike labels|"
    "no class list|no place in template|no classes|unknown task|unknown option|eval without data|eval of no run|"
    "option without a value|folder without a name|unknown language|index of nothing|index of what is not there|"
    "index of no run|search without index|search for nothing|search in no run|search that is blank|image weight alone|"
    "one weight of two|close to an image|filter that is none|serve without index|serve no run|"
    "serve to everybody|serve at no port"
).split("|")


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_one_line_and_exit_code_2(mistake: str, clasp: Command, world: World, tmp_path: Path) -> None:
    words, wanted = mistakes(world, tmp_path)[mistake]
    said = clasp(*words)
    after_the_plan = ("heads too wide",)  # told when the towers' widths are known, after a remark on batch and epochs
    line = said.mistake if mistake not in after_the_plan else said.err.splitlines()[-1]
    assert said.code == 2 and line.startswith("clasp: ")
    for part in wanted:
        assert part in line, line
    assert not (tmp_path / "runs" / "new" / "delta.safetensors").exists()


def test_every_mistake_is_tried(world: World, tmp_path: Path) -> None:
    assert list(mistakes(world, tmp_path)) == MISTAKES


def test_pictures_that_are_none_stop_the_run_with_their_names(clasp: Command, world: World, tmp_path: Path) -> None:
    folder = write_folder(TOYS, tmp_path / "pairs")
    for toy in TOYS:
        (folder / f"{toy.key}.png").write_bytes(b"no picture")
    said = clasp("train", world.toml, f"data.train={folder}", "--name", "new")
    lines = said.err.splitlines()
    assert said.code == 2 and "images cannot be read" in lines[-1] and f"{min(toy.key for toy in TOYS)}.png" in said.err
    assert len(lines) == 3 and "pairs:" in lines[0] and "warning: few" in lines[1], "the plan, then the mistake"


def test_one_picture_that_is_none_is_named(clasp: Command, world: World, tmp_path: Path) -> None:
    folder = write_folder(TOYS, tmp_path / "pairs")
    made = clasp("train", world.toml, f"data.train={folder}", "--name", "new")
    assert made.code == 0
    (folder / "not.png").write_bytes(b"no picture")
    indexed = clasp("index", "runs/new", folder)
    assert indexed.code == 0 and "1 skipped" in indexed.err and "not.png" in indexed.err
    line = clasp("search", "runs/new", "--image", folder / "not.png").mistake
    assert "not.png" in line
    assert "none.png" in clasp("search", "runs/new", "--image", tmp_path / "none.png").mistake


def test_a_picture_whose_name_is_not_utf8_is_named_wherever_it_is_written(
    clasp: Command, world: World, tmp_path: Path
) -> None:
    folder = write_folder(TOYS, tmp_path / "pairs")
    odd = "caf\udce9"  # the bytes b"caf\xe9"
    (folder / f"{odd}.png").write_bytes(b"no picture")
    (folder / f"{odd}.txt").write_text("a picture that is none")
    (folder / f"good-{odd}.png").write_bytes(TOYS[0].png)
    (folder / f"good-{odd}.txt").write_text(TOYS[0].caption)
    made = clasp("train", world.toml, f"data.train={folder}", "--name", "new")
    assert made.code == 0, made.err
    log = [json.loads(line) for line in Path("runs/new/log.jsonl").read_text("utf-8").splitlines()]
    assert f"{odd}.png" in [row["id"] for row in log if row["event"] == "skipped"]
    for name in ("README.md", "results.jsonl", "recipe.toml"):
        Path("runs/new", name).read_text("utf-8")
    indexed = clasp("index", "runs/new", folder)
    assert indexed.code == 0 and "caf\\udce9.png" in indexed.err
    for extra in ([], ["--json"]):
        found = clasp("search", "runs/new", TOYS[0].caption, "-k", "80", *extra)
        assert found.code == 0 and "good-caf\\udce9.png" in found.out
    assert f"good-{odd}.png" in [hit["id"] for hit in json.loads(found.out)["hits"]]
    assert clasp("doctor", world.toml, f"data.train={folder}").code == 0
    assert clasp("eval", "runs/new", "retrieval", f"data={folder}", "--json").code == 0
    only = tmp_path / "only"
    only.mkdir()
    (only / f"{odd}.png").write_bytes(b"no picture")
    assert "the first: caf\\udce9.png" in clasp("index", "runs/new", only).err
    assert "caf\\udce9.png" in clasp("search", "runs/new", "--image", only / f"{odd}.png").mistake


def test_a_source_whose_path_is_not_utf8_is_refused_before_training(
    clasp: Command, world: World, tmp_path: Path
) -> None:
    folder = write_folder(TOYS, tmp_path / "caf\udce9")
    line = clasp("train", world.toml, f"data.train={folder}", "--name", "new").mistake
    assert "caf\\udce9" in line and "not valid Unicode" in line


def test_templates_may_be_a_json_list(tmp_path: Path) -> None:
    (tmp_path / "lines.txt").write_text("a {}\n\nthe {}\n")
    (tmp_path / "list.json").write_text('[\n "a {}",\n "the {}"\n]\n')
    files = (str(tmp_path / "lines.txt"), str(tmp_path / "list.json"))
    for given in ('["a {}", "the {}"]', ' ["a {}", "the {}"] ', *files):
        assert read_templates(given) == ["a {}", "the {}"]
    for single in ("a [{}]", "[photo] a {}"):
        assert read_templates(single) == [single]
    for wrong in ("[]", "[1]", '[""]', "['a {}']", '["a {}"'):
        with pytest.raises(UserError, match="templates="):
            read_templates(wrong)


def test_what_is_passed_over_is_told_by_train_and_index(clasp: Command, world: World, tmp_path: Path) -> None:
    folder = write_folder(TOYS, tmp_path / "pairs")
    (folder / "new.heic").write_bytes(b"x")
    (folder / "new.txt").write_text("a picture of a format that is not read")
    line = f"{folder}: passed over 1 × image of a format that is not read (.heic) (new.heic)"
    made = clasp("train", world.toml, f"data.train={folder}", "--name", "new")
    assert made.err.splitlines().count(line) == 1
    assert f"look  pairs: {line}" in clasp("doctor", world.toml, f"data.train={folder}").out
    assert line.partition(": ")[2] in clasp("index", "runs/new", folder).err


def test_other_base_weights_are_refused(clasp: Command, tmp_path: Path) -> None:
    towers = tmp_path / "towers"
    save_image_tower(towers / "image")
    save_text_tower(towers / "text")
    pairs = write_csv(TOYS, tmp_path / "pairs")
    run(recipe(towers, pairs, "train.epochs=1"), tmp_path / "run")
    spoil(towers / "text")
    line = clasp("eval", tmp_path / "run", "retrieval", f"data={pairs}").mistake
    assert "other weights of the text tower" in line and "1 of " in line


# --- no space left ---------------------------------------------------------------------------------------------------


def _full(*args: object, **options: object) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def _full_in_disguise(*args: object, **options: object) -> None:
    raise Exception("No space left on device (os error 28)")


def _full_tensors(*args: object, **options: object) -> None:
    raise safetensors.SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")


@pytest.mark.parametrize(
    "owner, name, fails",
    [
        (atomic_files.os, "replace", _full),
        (run_folder.Tokenizer, "save", _full_in_disguise),
        (safetensors.torch, "save_file", _full_tensors),
        (run_folder.RunFolder, "write", _full),
    ],
    ids=["text", "tokenizer", "tensors", "anything else"],
)
def test_no_space_left_is_one_line(
    owner: object, name: str, fails: Callable, clasp: Command, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(owner, name, fails)
        said = clasp("train", world.toml, "--name", "new")
    last = said.err.splitlines()[-1]
    assert said.code == 2 and "no space left" in last and "Traceback" not in said.err
    assert not list(Path("runs/new").rglob("*.part"))
    again = clasp("train", world.toml, "--name", "new")  # where room was found
    assert again.code == 0


def test_a_disk_that_is_too_small_is_told_before_features_are_computed(
    clasp: Command, world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CLASP_CACHE", str(tmp_path / "cache"))
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    auto = [f"image.tower=file:{world.towers / 'image'}", f"text.tower=file:{world.towers / 'text'}", "image.size=32"]
    for words in (
        ["train", world.toml, "--name", "new"],
        ["train", "auto", *auto, f"data.train={world.pairs}", "--name", "climb", "--steps", "4"],
    ):
        with monkeypatch.context() as patch:
            patch.setattr(shutil, "disk_usage", lambda path: usage)
            last = clasp(*words).err.splitlines()[-1]
        assert "cannot keep" in last and "1,000 are free" in last and "CLASP_CACHE" in last
    assert not list((tmp_path / "cache").rglob("*.npy")) and not list((tmp_path / "cache").rglob("*.part"))
    assert not Path("runs/new/recipe.toml").exists()


def test_a_second_ctrl_c_says_what_is_kept(clasp: Command, world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("clasp.training.loop._train_step", interrupted)
        said = clasp("train", world.toml, "--name", "new")
    assert said.code == 130 and "resume from it with: clasp resume runs/new" in said.err
    assert clasp("resume", "runs/new").code == 0


def test_an_interrupted_run_ends_with_130_so_that_nothing_follows_it(
    clasp: Command, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = loop._train_step

    def pressed(*given: Any) -> None:
        os.kill(os.getpid(), signal.SIGINT)
        real(*given)

    with monkeypatch.context() as patch:
        patch.setattr(loop, "_train_step", pressed)
        said = clasp("train", world.toml, "--name", "new")
    assert said.code == 130 and "clasp resume runs/new" in said.err
    said = clasp("eval", "runs/new", "retrieval", f"data={world.pairs}")
    assert "runs/new was stopped at step 1 of " in said.err and "go on with: clasp resume runs/new" in said.err
    assert "was stopped" not in clasp("eval", world.run, "retrieval", f"data={world.pairs}").err


@pytest.mark.parametrize(
    ("words", "wanted"),
    [
        (["trian"], "No such command 'trian'"),
        (["train"], "Missing argument 'RECIPE'"),
        (["train", "heads", "--foo"], "No such option: --foo"),
        (["search", "run", "-k", "many"], "Invalid value for '-k'"),
        (["params", "heads", "train.lr=1e-3", "train.lr=1e-4"], "train.lr is given twice, first as 'train.lr=1e-3'"),
        (["params", "heads", "train.epochs=9999999999"], "train.epochs = 9999999999 should be less than or equal"),
        (["params", "heads", "train.seed=99999999999999999999"], "train.seed"),
        (["resume", "nowhere"], "no run at nowhere"),
    ],
)
def test_every_usage_error_is_one_line(words: list[str], wanted: str, clasp: Command) -> None:
    said = clasp(*words)
    assert said.code == 2 and wanted in said.mistake


@pytest.mark.parametrize(
    "words",
    [
        ["doctor", "{toml}", "data.train={long}"],
        ["doctor", "{long}"],
        ["params", "{toml}", "image.tower=file:{long}"],
        ["eval", "{long}", "retrieval"],
        ["resume", "{long}"],
        ["train", "{toml}", "--runs", "{long}"],
        ["train", "{toml}", "--runs", "{loop}"],
        ["report", "{run}", "-o", "{long}.html"],
    ],
    ids=" ".join,
)
def test_a_path_that_no_file_can_have_is_one_line(
    words: list[str], clasp: Command, world: World, tmp_path: Path
) -> None:
    (tmp_path / "loop").symlink_to("loop")
    paths = {"toml": world.toml, "run": world.run, "long": "a" * 300, "loop": tmp_path / "loop"}
    said = clasp(*(word.format(**paths) for word in words))
    assert said.code == 2 and said.mistake


def test_a_file_that_may_not_be_read_is_one_line(clasp: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*args: object, **options: object) -> None:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), "somewhere/recipe.toml")

    monkeypatch.setattr("clasp.config.recipe.check_recipe_file", refused)
    assert "somewhere/recipe.toml cannot be read or written: Permission denied" in clasp("params", "heads").mistake


def test_python_m_clasp_is_the_command() -> None:
    done = subprocess.run([sys.executable, "-m", "clasp", "trian"], capture_output=True, text=True, timeout=60)
    assert done.returncode == 2 and done.stderr.startswith("clasp: No such command 'trian'")


def test_a_mistake_of_ours_is_no_mistake_of_theirs(
    clasp: Command, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*args: object, **options: object) -> None:
        raise ValueError("a bug")

    monkeypatch.setattr(run_plan, "plan_training", broken)
    with pytest.raises(ValueError, match="a bug"):
        clasp("train", world.toml, "--name", "new")


def _tar() -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as tar:
        for toy in TOYS[:4]:
            add_member(tar, f"{toy.key}.png", toy.png)
            add_member(tar, f"{toy.key}.txt", toy.caption.encode())
    return file.getvalue()


@pytest.mark.parametrize("name", [" ", "a/b", "../x", ".."])
def test_a_name_that_is_not_one_folder_is_refused(name: str, clasp: Command, world: World) -> None:
    assert "is not the name of one folder" in clasp("train", world.toml, "--name", name).mistake


@pytest.mark.parametrize("name", ["a\nb", "a\rb", "a\x1b[2J", "a\u2028b", "a\u202eb", "a\x7f"], ids=ascii)
def test_a_name_that_no_command_could_be_pasted_with_is_refused(name: str, clasp: Command, world: World) -> None:
    checkpoint = world.folder / "none.pth"
    for typed in (
        ["train", world.toml, "--name", name],
        ["train", world.toml, "--runs", name],
        ["train", world.toml, "--name", name, "--grid", "train.lr=1e-3,2e-3"],
        ["train", "auto", f"data.train={world.folder}", "--name", name],
        ["demo", "--quick", "--out", name],
        ["import", "lilt", checkpoint, "-o", name],
        ["export", world.run, "--to", "hub", "-o", name],
    ):
        said = clasp(*typed).mistake
        assert "without control characters and line breaks" in said and repr(name)[1:-1] in said, typed


def test_closed_standard_streams_are_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdout", None)
    from clasp.cli.program import _replace_closed_streams

    _replace_closed_streams()
    print("into nothing")
    sys.stdout.close()


def test_a_head_that_no_memory_holds_is_refused(clasp: Command) -> None:
    assert "head.width = 1000000000000" in clasp("params", "start", "head.width=1000000000000").mistake


def test_an_index_in_parts_exported_and_imported(clasp: Command, world: World, tmp_path: Path) -> None:
    run, other = shutil.copytree(world.run, tmp_path / "parts"), shutil.copytree(world.run, tmp_path / "other")
    write_images(TOYS[:6], tmp_path)
    assert "--part 3/2" in clasp("index", run, "images", "--part", "3/2").mistake
    assert "one at a time" in clasp("index", run, "images", "--part", "1/2", "--merge", "2").mistake
    first = clasp("index", run, "images", "--part", "1/2")
    assert first.code == 0 and "not done yet: 2/2" in first.err
    assert "that are not done: 2/2" in clasp("index", run, "images", "--merge", "2").mistake
    last = clasp("index", run, "images", "--part", "2/2")
    assert last.code == 0 and "6 images added, 0 of them encoded" in last.err
    assert "6 entries in out" in clasp("store", "export", run, "-o", "out").err
    assert "6 entries added; 0 left out" in clasp("store", "import", other, "out").err
    assert "in the store flat already" in clasp("store", "copy", run, "--to", "flat").mistake
    assert "not an engine of a store; there are flat, edge" in clasp("store", "copy", run, "--to", "lancedb").mistake
    assert "nowhere is not a folder" in clasp("watch", run, "nowhere").mistake
