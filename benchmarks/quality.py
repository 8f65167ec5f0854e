"""Quality against wall time: ``clasp train auto`` and VisionTextDualEncoder with peft LoRA, the same towers and pairs.

    python -m benchmarks.quality --pairs 'train-{00..03}.tar' --test val.tar            # ten minutes for each run
    python -m benchmarks.quality --pairs … --test … --budgets 1,2,5                     # ours in less
    python -m benchmarks.quality --pairs … --test … --minutes 0.5 --recipe peft/lora    # a trial, of another recipe

Input: pairs whose meta has a class, and test photos of these classes. Output: ``quality.md`` and ``quality.png``: the
best zero-shot top-1 and top-5 so far on held-out photos against seconds since the process started (imports, from
bytecode, decoding and caching are in it), the time to the peer's final quality as a ratio, and the test photos once for
each side. Note: ``auto`` plans for its budget, so ours is a run for each of ``--budgets``, from an empty cache; the
time is that of the first to reach the quality, the test photos are those of the largest. The peer runs at several
learning rates, for the same time each; the best on the held-out photos is compared. Not part of ``make bench``: it
needs photos, and up to an hour of a machine of its own.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import torch

import clasp
from benchmarks import class_photos, harness, quality_peer, sample_data
from benchmarks.harness import Measured, Row
from benchmarks.peers import repair_torchvision
from clasp.config.build import ModelAndPreprocessing
from clasp.data.pairs import open_pairs
from clasp.evaluation.results import EvaluationResult
from clasp.models.precision import detect_precision
from clasp.types import UserError

HERE = Path(__file__).parent
METRICS = ("top1", "top5")
TARGET = 0.33  # of the peer's time
PEER = "VisionTextDualEncoder + peft LoRA r=8"
_CLASP = "import sys; from clasp.cli import main; sys.exit(main())"


class Point(NamedTuple):
    """Validation metrics, fractions, after some seconds of wall time."""

    seconds: float
    top1: float
    top5: float


@dataclass
class Curve:
    """The evaluations of one run, in order."""

    name: str
    points: list[Point] = field(default_factory=list)

    def best_so_far(self, metric: str) -> list[float]:
        """The highest value up to each point: the weights of the best evaluation are those that a run keeps."""
        values, best = [], 0.0
        for point in self.points:
            best = max(best, getattr(point, metric))
            values.append(best)
        return values

    def seconds_to(self, metric: str, value: float) -> float | None:
        """The time of the first evaluation that reaches ``value``; ``None`` where none does."""
        return next((point.seconds for point in self.points if getattr(point, metric) >= value), None)


# --- the two sides ---------------------------------------------------------------------------------------------------


def run_clasp(work: Path, given: argparse.Namespace, precision: str, minutes: float) -> Curve:
    """``clasp train`` in a process of its own, with an empty feature cache; its log is read as it is written."""
    run = run_folder(work, minutes)
    auto = given.recipe == "auto"  # chooses its heads, and ends by itself
    options = ["--minutes", f"{minutes:g}"] if auto else [f"head.width={sample_data.WIDTH}"]
    settings = (
        f"image.tower=pip:dinov2-small-focus image.size={given.size} text.tower=pip:minilm-l6 "
        f"train.precision={precision} train.seed={given.seed} "
        f"data.train={work / 'train.jsonl'} data.val={work / 'val.jsonl'}"
    )
    command = [sys.executable, "-c", _CLASP, "train", given.recipe, *settings.split(), *given.set, *options]
    name = f"clasp train {given.recipe}" + (f" --minutes {minutes:g}" if auto else "")
    shutil.rmtree(work / "cache", ignore_errors=True)
    return _follow(name, [*command, "--runs", str(work), "--name", run.name], work, run.rglob)


def run_folder(work: Path, minutes: float) -> Path:
    """The folder of our run with a budget."""
    return work / f"run-{minutes:g}"


def run_peer(work: Path, given: argparse.Namespace, precision: str, lr: float) -> Curve:
    """The peer in a process of its own."""
    options = {"work": work, "size": given.size, "lr": lr, "seconds": 60 * given.minutes, "seed": given.seed}
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


# --- the result ------------------------------------------------------------------------------------------------------


@dataclass
class Outcome:
    """Curves of ours by budget and of the peer by learning rate, and the test photos, once for each side."""

    ours: list[Curve]
    peers: dict[float, Curve]
    chosen: float
    tests: dict[str, EvaluationResult]
    facts: str

    @property
    def peer(self) -> Curve:
        return self.peers[self.chosen]

    def rows(self) -> list[Row]:
        """Seconds to the best that the chosen peer reached; the note is where clasp never did."""
        rows = []
        for metric in METRICS:
            final = max(getattr(point, metric) for point in self.peer.points)
            reached = {curve.name: curve.seconds_to(metric, final) for curve in self.ours}
            times = {name: seconds for name, seconds in reached.items() if seconds is not None}
            theirs = self.peer.seconds_to(metric, final)
            assert theirs is not None
            work = f"time to {metric} {100 * final:.1f} % on held-out photos"
            if times:
                note = min(times, key=lambda name: times[name])
                mine = times[note]
            else:
                best = max(getattr(point, metric) for curve in self.ours for point in curve.points)
                mine, note = float("inf"), f"not reached: {100 * best:.1f} % at most"
            rows.append(
                Row(work, "s", Measured("", (mine,)), self.peer.name, Measured("", (theirs,)), TARGET, "lower", note)
            )
        return rows

    def markdown(self) -> str:
        """The page."""
        head = ["run", "seconds to its last evaluation", "top-1 on held-out photos, at best", "top-5"]
        lines = [" | ".join(head), " | ".join(["---"] * len(head))]
        for curve in (*self.ours, *self.peers.values()):
            mark = " (chosen)" if curve is self.peer and len(self.peers) > 1 else ""
            best = [f"{100 * max(getattr(point, metric) for point in curve.points):.1f}" for metric in METRICS]
            lines.append(" | ".join([f"{curve.name}{mark}", f"{curve.points[-1].seconds:.0f}", *best]))
        tests = [" | ".join(["test photos", "n", "top-1", "95 % interval", "top-5"]), " | ".join(["---"] * 5)]
        for name, row in self.tests.items():
            low, high = row.interval["top1"]
            cells = [name, f"{row.n:,}", f"{100 * row.metrics['top1']:.1f}", f"{100 * low:.1f} to {100 * high:.1f}"]
            tests.append(" | ".join([*cells, f"{100 * row.metrics['top5']:.1f}"]))
        tables = ["\n".join(f"| {line} |" for line in part) for part in (lines, tests)]
        parts = ["# Quality against wall time", self.facts, harness.table(self.rows()), *tables, "![](quality.png)"]
        return "\n\n".join(parts) + "\n"


def draw(outcome: Outcome, path: Path) -> None:
    """The best value so far against seconds, one panel for each metric."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, len(METRICS), figsize=(9, 3.6), layout="constrained")
    others = [curve for lr, curve in outcome.peers.items() if lr != outcome.chosen]
    for axis, metric in zip(axes, METRICS, strict=True):
        drawn = [(curve, "C0", 1.0 + place) for place, curve in enumerate(outcome.ours)]
        drawn += [(outcome.peer, "C1", 2.0), *((curve, "0.75", 1.0) for curve in others)]
        for curve, colour, width in drawn:
            values = [100 * value for value in curve.best_so_far(metric)]
            seconds = [point.seconds for point in curve.points]
            axis.step(seconds, values, where="post", color=colour, lw=width, marker="o", ms=3, label=curve.name)
        axis.set(xlabel="seconds since the start of the process", ylabel=f"zero-shot {metric}, %", xlim=(0, None))
        axis.set_ylim(0, None)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].legend(frameon=False, fontsize=7)
    figure.savefig(path, dpi=110)


def compare(given: argparse.Namespace, work: Path) -> Outcome:
    """Both sides on the same pairs, one after the other; then the test photos."""
    pairs, test = (open_pairs(source) for source in (given.pairs, given.test))
    sizes = class_photos.write_splits(pairs, test, work, label=given.label, template=given.template)
    precision = detect_precision(torch.device("cpu")).precision
    budgets = sorted(given.budgets or [given.minutes])
    _compile_imports(work)
    ours = [run_clasp(work, given, precision, minutes) for minutes in budgets]
    for curve in ours:
        if not curve.points:
            raise RuntimeError(f"{curve.name} logged no zero-shot evaluation")
    peers = {lr: run_peer(work, given, precision, lr) for lr in given.peer_lr}
    chosen = max(peers, key=lambda lr: max(point.top1 for point in peers[lr].points))
    parts: ModelAndPreprocessing = sample_data.parts(sample_data.recipe(f"image.size={given.size}"))
    task = class_photos.zero_shot(class_photos.open_split(work, "test"), parts, data="test")
    theirs = quality_peer.load(work, chosen, parts)
    tests = {
        ours[-1].name: task.results(clasp.load(run_folder(work, budgets[-1])).encoder)[0],
        peers[chosen].name: task.results(theirs)[0],
    }
    about = harness.machine()
    versions = ", ".join(f"{name} {version}" for name, version in about["versions"].items())
    ends = "" if given.recipe == "auto" else f" (the recipe {given.recipe} ends by itself)"
    facts = (
        f"{about['date']}; {about['processor']}, {about['threads']} threads; {precision}. {versions}. DINOv2 ViT-S/14 "
        f"at {given.size} px and MiniLM-L6; {sizes['train']:,} pairs, {sizes['val']:,} held-out photos, "
        f"{sizes['test']:,} test photos; {given.minutes:g} minutes for each run of "
        f"the peer{ends}, {len(peers)} learning rate{'s' if len(peers) > 1 else ''}. Everything is chosen on the "
        "held-out photos; the test photos are read once."
    )
    return Outcome(ours, peers, chosen, tests, facts)


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
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=HERE, help="folder of quality.md and quality.png")
    return parser.parse_args()


def _numbers(text: str) -> list[float]:
    return [float(word) for word in text.split(",")]


def main() -> None:
    given = arguments()
    repair_torchvision()
    with tempfile.TemporaryDirectory(prefix="clasp-quality-") as work:
        try:
            outcome = compare(given, Path(work))
        except UserError as error:
            sys.exit(str(error))
    given.out.mkdir(parents=True, exist_ok=True)
    (given.out / "quality.md").write_text(outcome.markdown(), encoding="utf-8")
    draw(outcome, given.out / "quality.png")
    print(outcome.markdown())


if __name__ == "__main__":
    main()
