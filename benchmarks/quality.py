"""Quality against wall time: ``clasp train auto`` and VisionTextDualEncoder with peft LoRA, the same towers and pairs.

    python -m benchmarks.quality --pairs 'train-{00..03}.tar' --test val.tar            # ten minutes for each run
    python -m benchmarks.quality --pairs … --test … --budgets 1,2,5 --seeds 0,1         # ours in less, two races
    python -m benchmarks.quality --pairs … --test … --minutes 0.5 --recipe peft/lora    # a trial, of another recipe

Input: pairs whose meta has a class, and test photos of these classes. Output: ``quality.md`` and ``quality.png``: the
best zero-shot top-1 and top-5 so far on held-out photos against seconds since the process started (imports, from
bytecode, decoding and caching are in it), the time to the peer's final quality as a ratio, and the test photos once for
each side and seed. Note: ``auto`` plans for its budget, so ours is a run for each of ``--budgets``, from an empty
cache; the time is that of the first to reach the quality, the test photos are those of the largest. It is compared with
the time that the peer was given, and with the time at which it first had that quality. The peer runs at several
learning rates, for the same time each; the best on the held-out photos is compared. Each of ``--seeds`` is a race of
its own: order, crops and what is drawn; the photos are the same. A race is kept in ``quality.jsonl``, and its runs in
``--work``, as it ends: the same command goes on after a failure. Not part of ``make bench``: it needs photos, and up to
an hour of a machine of its own.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

import clasp
from benchmarks import class_photos, harness, quality_peer, sample_data
from benchmarks.peers import repair_torchvision
from benchmarks.quality_page import (
    PEER,
    RACES_FILE,
    Curve,
    Outcome,
    Point,
    Race,
    append_race,
    choose_rate,
    draw,
    read_races,
)
from clasp.config.build import ModelAndPreprocessing
from clasp.data.pairs import open_pairs
from clasp.evaluation.results import EvaluationResult
from clasp.models.precision import detect_precision
from clasp.plain_types import Precision
from clasp.types import UserError

HERE = Path(__file__).parent
SPLITS = ("train", "val", "test")
_CLASP = "import sys; from clasp.cli import main; sys.exit(main())"


# --- the two sides ---------------------------------------------------------------------------------------------------


def run_clasp(work: Path, given: argparse.Namespace, precision: Precision, minutes: float, seed: int) -> Curve:
    """``clasp train`` in a process of its own, with an empty feature cache; its log is read as it is written."""
    run = run_folder(work, minutes)
    auto = given.recipe == "auto"  # chooses its heads, and ends by itself
    options = ["--minutes", f"{minutes:g}"] if auto else [f"head.width={sample_data.WIDTH}"]
    settings = (
        f"image.tower=pip:dinov2-small-focus image.size={given.size} text.tower=pip:minilm-l6 "
        f"train.precision={precision} train.seed={seed} "
        f"data.train={work / 'train.jsonl'} data.val={work / 'val.jsonl'}"
    )
    command = [sys.executable, "-c", _CLASP, "train", given.recipe, *settings.split(), *given.set, *options]
    name = f"clasp train {given.recipe}" + (f" --minutes {minutes:g}" if auto else "")
    shutil.rmtree(work / "cache", ignore_errors=True)
    return _follow(name, [*command, "--runs", str(work), "--name", run.name], work, run.rglob)


def run_folder(work: Path, minutes: float) -> Path:
    """The folder of our run with a budget."""
    return work / f"run-{minutes:g}"


def run_peer(work: Path, given: argparse.Namespace, precision: Precision, lr: float, seed: int) -> Curve:
    """The peer in a process of its own."""
    options = {"work": work, "size": given.size, "lr": lr, "seconds": 60 * given.minutes, "seed": seed}
    words = [word for name, value in options.items() for word in (f"--{name}", str(value))]
    command = [sys.executable, "-m", "benchmarks.quality_peer", *words, "--precision", precision]
    began = time.time()
    _follow(f"peer, lr {lr:g}", command, work, lambda name: ())
    lines = map(json.loads, quality_peer.curve_file(work, lr).read_text().splitlines())
    points = [Point(line["time"] - began, line["top1"], line["top5"]) for line in lines]
    return Curve(f"{PEER}, lr {lr:g}", points)


def _follow(name: str, command: Sequence[str], work: Path, logs: Callable[[str], Iterable[Path]]) -> Curve:
    """Run a command to its end; every evaluation that its ``log.jsonl`` files name meanwhile, with its time.

    Raises ``RuntimeError`` with the last line of the error output where it fails.
    """
    print(f"{name} ...", file=sys.stderr, flush=True)
    curve, read, errors = Curve(name), dict[Path, int](), work / "errors.txt"
    environment = _environment(work)
    began = time.time()
    with errors.open("w") as file:
        process = subprocess.Popen(command, stdout=file, stderr=file, env=environment)
    running = True
    while running:
        running = process.poll() is None
        now = time.time() - began
        for path in logs("log.jsonl"):
            text = path.read_text(encoding="utf-8")
            whole = text[: text.rfind("\n") + 1]
            for line in map(json.loads, whole[read.get(path, 0) :].splitlines()):
                if line["event"] == "evaluation" and "top1" in line["metrics"]:
                    curve.points.append(Point(now, line["metrics"]["top1"], line["metrics"]["top5"]))
            read[path] = len(whole)
        time.sleep(0.1)
    if process.returncode:
        lines = [line for line in errors.read_text().splitlines() if line.strip()]
        raise RuntimeError(f"{shlex.join(command)}: {lines[-1] if lines else process.returncode}")
    return curve


def _environment(work: Path) -> dict[str, str]:
    """That of both sides. Bytecode of what they import is kept in ``work``: an installation by pip has it, and where
    the caller's environment forbids writing it, each process would compile for three seconds."""
    kept = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    own = {"CLASP_CACHE": str(work / "cache"), "PYTHONPYCACHEPREFIX": str(work / "bytecode")}
    return {**kept, **own, "HF_HUB_OFFLINE": "1", "PYTHONWARNINGS": "ignore"}


def _compile_imports(work: Path) -> None:
    """Import once what both sides import, so that the first run finds its bytecode."""
    modules = "benchmarks.quality_peer, clasp.commands.auto, peft, torch._dynamo, transformers.modeling_utils"
    subprocess.run([sys.executable, "-c", f"import {modules}"], env=_environment(work), check=True)


# --- the races --------------------------------------------------------------------------------------------------------


def compare(given: argparse.Namespace, work: Path) -> Outcome:
    """Races of both sides on the same pairs, one run after the other; then the test photos."""
    pairs, test = (open_pairs(source) for source in (given.pairs, given.test))
    precision = detect_precision(torch.device("cpu")).precision
    races = list[Race]()
    settings = {**race_settings(given), "precision": precision}
    kept = {race.seed: race for race in read_races(given.out / RACES_FILE, settings)}
    for seed in given.seeds:
        folder, race = work / f"seed-{seed}", kept.get(seed)
        if race is None or not folder.is_dir():  # the test photos need the runs
            shutil.rmtree(folder, ignore_errors=True)
            class_photos.write_splits(pairs, test, folder, label=given.label, template=given.template)
            _compile_imports(folder)
            race = run_race(folder, given, precision, seed)
            append_race(given.out / RACES_FILE, race, settings)
        races.append(race)
    sizes = {split: len(class_photos.open_split(work / f"seed-{given.seeds[0]}", split)) for split in SPLITS}
    chosen = choose_rate(races)
    for race in races:
        race.tests = run_tests(work / f"seed-{race.seed}", given, race, chosen)
    about = harness.machine()
    versions = ", ".join(f"{name} {version}" for name, version in about["versions"].items())
    ends = "" if given.recipe == "auto" else f" (the recipe {given.recipe} ends by itself)"
    rates = len(given.peer_lr)
    facts = (
        f"{about['date']}; {about['processor']}, {about['threads']} threads; {precision}. {versions}. DINOv2 ViT-S/14 "
        f"at {given.size} px and MiniLM-L6; {sizes['train']:,} pairs, {sizes['val']:,} held-out photos, "
        f"{sizes['test']:,} test photos; {given.minutes:g} minutes for each run of "
        f"the peer{ends}, {rates} learning rate{'s' if rates > 1 else ''}. Everything is chosen on the "
        "held-out photos; the test photos are read once for each side and seed."
    )
    return Outcome(races, chosen, 60 * given.minutes, facts)


def run_race(work: Path, given: argparse.Namespace, precision: Precision, seed: int) -> Race:
    """Both sides with one seed."""
    ours = [run_clasp(work, given, precision, minutes, seed) for minutes in sorted(given.budgets or [given.minutes])]
    for curve in ours:
        if not curve.points:
            raise RuntimeError(f"{curve.name} logged no zero-shot evaluation")
    return Race(seed, ours, {lr: run_peer(work, given, precision, lr, seed) for lr in given.peer_lr})


def race_settings(given: argparse.Namespace) -> dict[str, Any]:
    """What a race depends on, beside its seed, as it is written to the file of races."""
    return {name: value for name, value in vars(given).items() if name not in ("seeds", "out", "work")}


def work_folder(given: argparse.Namespace) -> Path:
    """``--work``, or a temporary folder that the same settings find again."""
    name = hashlib.sha256(json.dumps(race_settings(given), sort_keys=True).encode()).hexdigest()[:12]
    return given.work or Path(tempfile.gettempdir()) / f"clasp-quality-{name}"


def run_tests(work: Path, given: argparse.Namespace, race: Race, chosen: float) -> dict[str, EvaluationResult]:
    """The test photos, for our largest budget and the chosen peer."""
    parts: ModelAndPreprocessing = sample_data.parts(sample_data.recipe(f"image.size={given.size}"))
    task = class_photos.zero_shot(class_photos.open_split(work, "test"), parts, data="test")
    largest = run_folder(work, max(given.budgets or [given.minutes]))
    return {
        race.ours[-1].name: task.results(clasp.load(largest).encoder)[0],
        race.peers[chosen].name: task.results(quality_peer.load(work, chosen, parts))[0],
    }


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.quality", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--pairs", required=True, help="training pairs, as data.train; their meta has the class")
    parser.add_argument("--test", required=True, help="photos of the same classes, none of them in --pairs")
    parser.add_argument("--minutes", type=float, default=10.0, help="of each run (default 10)")
    parser.add_argument("--budgets", type=_numbers, help="minutes of our runs of auto, with commas (default --minutes)")
    parser.add_argument("--recipe", default="auto", help="ours (default auto)")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="a key of our recipe")
    parser.add_argument("--peer-lr", type=_numbers, default=[3e-4, 1e-3, 3e-3], help="learning rates, with commas")
    parser.add_argument("--label", default="class", help="where the meta of a pair has its class (default class)")
    parser.add_argument("--template", default="a photo of a {}", help="the prompt of a class")
    parser.add_argument("--size", type=int, default=56, help="side of the images, pixels (default 56)")
    parser.add_argument("--seeds", type=_seeds, default=[0], help="seeds of the races, with commas (default 0)")
    parser.add_argument("--out", type=Path, default=HERE, help="folder of quality.md, quality.png and quality.jsonl")
    parser.add_argument("--work", type=Path, help="folder of the runs, deleted when the page is written")
    return parser.parse_args()


def _numbers(text: str) -> list[float]:
    return [float(word) for word in text.split(",")]


def _seeds(text: str) -> list[int]:
    return list(dict.fromkeys(int(word) for word in text.split(",")))


def main() -> None:
    given = arguments()
    repair_torchvision()
    given.out.mkdir(parents=True, exist_ok=True)
    work = work_folder(given)
    try:
        outcome = compare(given, work)
    except UserError as error:
        sys.exit(str(error))
    except RuntimeError as error:
        sys.exit(f"{error}\nthe races that ended are kept in {given.out / RACES_FILE}; the same command goes on")
    (given.out / "quality.md").write_text(outcome.markdown(), encoding="utf-8")
    draw(outcome.races, given.out / "quality.png")
    shutil.rmtree(work)
    print(outcome.markdown())


if __name__ == "__main__":
    main()
