"""The card of a run: what it is, what it was made of, what it can do, how to use it. Markdown, for people.

In goes what the run knows of itself; every number in the card is one of its own results. ``grids`` is how results are
laid out for people, here and in the terminal.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from clasp.evaluate.tasks import Result
from clasp.model import DualEncoder
from clasp.recipe import Recipe
from clasp.train.state import Fitted

TITLES = {"mean_per_class": "mean per class", "median_rank": "median rank"}
LEFT_OUT = ("mean_recall",)  # the mean of its neighbours


@dataclass(frozen=True, slots=True)
class Grid:
    """Results of one task: a row each, a column per metric."""

    task: str
    columns: list[str]
    rows: list[list[str]]


def grids(results: Sequence[Result]) -> list[Grid]:
    """Results as tables: fractions in per cent with their interval, ranks as they are.

    Where a language was asked in both directions, only their mean is shown.
    """
    both = {(result.task, result.language) for result in results if "/" not in result.task}
    made: dict[tuple[str, tuple[str, ...]], Grid] = {}
    for result in results:
        task, _, direction = result.task.partition("/")
        if direction and result.language and (task, result.language) in both:
            continue
        names = [name for name in result.metrics if name not in LEFT_OUT]
        titles = [TITLES.get(name, name.replace("recall@", "R@")) for name in names]
        grid = made.setdefault((task, tuple(names)), Grid(task, [task, *titles, "guessing"], []))
        is_mean = not direction and any(other.task.startswith(f"{task}/") for other in results)
        what = (
            result.language.removeprefix("macro:")
            or direction.replace("_", " ")
            or ("both ways" if is_mean else result.data)
        )
        guess = [number(name, result.chance[name]) for name in names if name in result.chance]
        grid.rows.append([what, *(_with_interval(result, name) for name in names), " / ".join(guess)])
    return list(made.values())


def _with_interval(result: Result, name: str) -> str:
    value, interval = number(name, result.metrics[name]), result.interval.get(name)
    return f"{value} ({number(name, interval.low)}–{number(name, interval.high)})" if interval else value


def number(name: str, value: float) -> str:
    """A rank as it is, a fraction in per cent."""
    return f"{value:,.1f}" if "rank" in name else f"{100 * value:.1f}"


def card(
    recipe: Recipe,
    model: DualEncoder,
    run: Path,
    fitted: Fitted,
    results: Sequence[Result],
    train_pairs: int,
    val_pairs: int,
) -> str:
    """The text of the run's ``README.md``."""
    counts = model.counts()
    state = "Stopped before its end; `clasp resume` goes on." if fitted.interrupted else "Trained to its end."
    parts = [[name, f"{c.total:,}", f"{c.trained:,}", f"{c.percent:.2f}"] for name, c in counts.items()]
    tables = "\n\n".join(_markdown(grid.columns, grid.rows) for grid in grids(results))
    answers = f"\nIn per cent, with 95 % intervals:\n\n{tables}\n" if results else ""
    skipped = f"\n{len(fitted.skipped)} samples could not be read and were skipped; `log.jsonl` names them.\n"
    return f"""# {run.name}

An image–text model aligned with clasp: `{recipe.image.tower}` and `{recipe.text.tower}` in one space of
{recipe.head.width} dimensions. {state}

{_markdown(["part", "parameters", "trained", "%"], parts)}

Trained on {train_pairs:,} pairs of `{recipe.data.train}`, validated on {val_pairs:,} others;
{fitted.pairs:,} pairs seen in {fitted.seconds:.0f} s, in {fitted.precision}, seed {recipe.train.seed}.
{skipped if fitted.skipped else ""}{answers}
```python
import clasp
model = clasp.load("{run}")
images = model.encode_image(["a.jpg"])
texts = model.encode_text(["a caption"])
model.similarity(images, texts)
```

`recipe.toml` is everything that decided this run. `delta.safetensors` holds what was trained and nothing else: it
stands on the weights named in `base.json` and is refused by others. The two towers keep their own licences.
"""


def _markdown(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
