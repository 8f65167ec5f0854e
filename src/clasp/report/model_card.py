"""The card of a run: what it is, what it was made of, what it can do and cost, how to use it. Markdown, for people.

In goes what the run knows of itself; every number in the card is one of its own results. ``result_tables`` is how
results are laid out for people, here and in the terminal.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from clasp.config.recipe import Recipe
from clasp.evaluation.tasks import EvaluationResult
from clasp.models.dual_encoder import DualEncoder
from clasp.training.cost.ledger import RunCost, format_si
from clasp.training.state import FitResult

METRIC_TITLES = {"mean_per_class": "mean per class", "median_rank": "median rank"}
_HIDDEN_METRICS = ("mean_recall",)  # the mean of its neighbours


@dataclass(frozen=True, slots=True)
class ResultTable:
    """Results of one task: a row each, a column per metric."""

    task: str
    columns: list[str]
    rows: list[list[str]]


def result_tables(results: Sequence[EvaluationResult]) -> list[ResultTable]:
    """Results as tables: fractions in per cent with their interval, ranks as they are.

    Where a language was asked in both directions, only their mean is shown.
    """
    both = {(result.task, result.language) for result in results if "/" not in result.task}
    made: dict[tuple[str, tuple[str, ...]], ResultTable] = {}
    for result in results:
        task, _, direction = result.task.partition("/")
        if direction and result.language and (task, result.language) in both:
            continue
        names = [name for name in result.metrics if name not in _HIDDEN_METRICS]
        titles = [METRIC_TITLES.get(name, name.replace("recall@", "R@")) for name in names]
        grid = made.setdefault((task, tuple(names)), ResultTable(task, [task, *titles, "guessing"], []))
        is_mean = not direction and any(other.task.startswith(f"{task}/") for other in results)
        what = (
            result.language.removeprefix("macro:")
            or direction.replace("_", " ")
            or ("both ways" if is_mean else result.data)
        )
        guess = [format_metric(name, result.chance[name]) for name in names if name in result.chance]
        grid.rows.append([what, *(_with_interval(result, name) for name in names), " / ".join(guess)])
    return list(made.values())


def _with_interval(result: EvaluationResult, name: str) -> str:
    value, interval = format_metric(name, result.metrics[name]), result.interval.get(name)
    return f"{value} ({format_metric(name, interval.low)}–{format_metric(name, interval.high)})" if interval else value


def format_metric(name: str, value: float) -> str:
    """A rank as it is, a fraction in per cent."""
    return f"{value:,.1f}" if "rank" in name else f"{100 * value:.1f}"


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelCard:
    """What the card of a run is made of; ``train_pairs`` and ``val_pairs`` count them."""

    recipe: Recipe
    model: DualEncoder
    run: Path
    fitted: FitResult
    results: Sequence[EvaluationResult]
    cost: RunCost
    train_pairs: int
    val_pairs: int

    def render(self) -> str:
        """The text of the run's ``README.md``."""
        recipe, fitted, sharing = self.recipe, self.fitted, self.model.sharing
        state = "Stopped before its end; `clasp resume` goes on." if fitted.interrupted else "Trained to its end."
        counts = self.model.parameter_counts()
        parts = [[name, f"{c.total:,}", f"{c.trained:,}", f"{c.percent:.2f}"] for name, c in counts.items()]
        tables = "\n\n".join(_markdown_table(grid.columns, grid.rows) for grid in result_tables(self.results))
        answers = f"\nIn per cent, with 95 % intervals:\n\n{tables}\n" if self.results else ""
        shared = "" if sharing is None else f"\nWhat the two nets share:\n\n```\n{sharing}\n```\n"
        skipped = f"\n{len(fitted.skipped)} samples could not be read and were skipped; `log.jsonl` names them.\n"
        return f"""# {self.run.name}

An image–text model aligned with clasp: `{recipe.image.tower}` and `{recipe.text.tower}` in one space of
{recipe.head.width} dimensions. {state}

{_markdown_table(["part", "parameters", "trained", "%"], parts)}
{shared}
Trained on {self.train_pairs:,} pairs of `{recipe.data.train}`, validated on {self.val_pairs:,} others;
{fitted.pairs:,} pairs seen in {fitted.seconds:.0f} s, in {fitted.precision}, seed {recipe.train.seed}.
{skipped if fitted.skipped else ""}{answers}
{_markdown_table(["cost", ""], cost_rows(self.cost))}

```python
import clasp
model = clasp.load("{self.run}")
images = model.encode_image(["a.jpg"])
texts = model.encode_text(["a caption"])
model.similarity(images, texts)
```

`recipe.toml` is everything that decided this run. `delta.safetensors` holds what was trained and nothing else: it
stands on the weights named in `base.json` and is refused by others. The two towers keep their own licences.
"""


def cost_rows(cost: RunCost) -> list[list[str]]:
    """What a run cost, and how each number was come by, a row each; ``cost.json`` has all of it."""
    work, last = cost.work, cost.sessions[-1]
    rows = []
    if work is not None:
        of = f"a pair, in a step of {work.pairs:,}"
        of += "" if work.micro_batch == work.pairs else f", {work.micro_batch:,} at a time"
        forward, backward = (format_si(flops / work.pairs, "FLOP") for flops in (work.forward, work.backward))
        rows.append([f"forward / backward, {of}", f"{forward} / {backward}"])
        if work.left_out:
            rows.append(["not counted, for want of a formula", ", ".join(work.left_out)])
    rows += [[f"frozen and kept: {once.what}", format_si(once.flops, "FLOP")] for once in cost.once.values()]
    peak = "not measured" if cost.peak_bytes is None else format_si(cost.peak_bytes, "B")
    rows.append([f"peak memory ({last.peak})", peak])
    if cost.pairs_per_second is not None:
        what = "pairs/s in a step, without the wait for data (median)"
        rows.append([what, f"{cost.pairs_per_second:,.1f}"])
    seconds = ", ".join(f"{stage} {spent:,.1f}" for stage, spent in cost.seconds.items())
    rows.append([f"seconds in {len(cost.sessions)} sessions" if len(cost.sessions) > 1 else "seconds", seconds])
    energy = "" if cost.energy_kwh is None else f"{1000 * cost.energy_kwh:.3g} Wh"
    rows.append([f"energy ({last.energy})" if energy else "energy", energy or last.energy])
    if cost.delta_bytes is not None:
        rows.append(["delta", format_si(cost.delta_bytes, "B")])
    at = last.machine
    rows.append(["on", f"{at['gpu'] or at['cpu']}, {at['threads']} of {at['cores']} cores, torch {at['torch']}"])
    return rows


def _markdown_table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
