"""The card of a run: what it is, what it was made of, what it can do, how to use it. Markdown, for people.

In goes what the run knows of itself; every number in the card is one of its own results.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from clasp.evaluate.tasks import Result
from clasp.model import DualEncoder
from clasp.recipe import Recipe
from clasp.train.state import Fitted


def card(
    recipe: Recipe, model: DualEncoder, run: Path, fitted: Fitted, results: Sequence[Result], train_pairs: int, val_pairs: int
) -> str:
    """The text of the run's ``README.md``."""
    counts = model.counts()
    state = "Stopped before its end; `clasp resume` goes on." if fitted.interrupted else "Trained to its end."
    rows = "\n".join(
        f"| {name} | {count.total:,} | {count.trained:,} | {count.percent:.2f} |" for name, count in counts.items()
    )
    metrics = "\n".join(_row(row, name) for row in results for name in row.metrics)
    skipped = f"\n{len(fitted.skipped)} samples could not be read and were skipped; `log.jsonl` names them.\n"
    return f"""# {run.name}

An image–text model aligned with clasp: `{recipe.image.tower}` and `{recipe.text.tower}` in one space of
{recipe.head.width} dimensions. {state}

| part | parameters | trained | % |
|---|---|---|---|
{rows}

Trained on {train_pairs:,} pairs of `{recipe.data.train}`, validated on {val_pairs:,} others;
{fitted.pairs:,} pairs seen in {fitted.seconds:.0f} s, in {fitted.precision}, seed {recipe.train.seed}.
{skipped if fitted.skipped else ""}
| task | metric | value | 95 % interval | chance |
|---|---|---|---|---|
{metrics}

```python
import clasp
model = clasp.load("{run}")
images = model.encode_image(["a.jpg"])
texts = model.encode_text(["a caption"])
model.similarity(images, texts)
```

`recipe.toml` is everything that decided this run. `delta.safetensors` holds what was trained and nothing else: it stands
on the weights named in `base.json` and is refused by others. The two towers keep their own licences.
"""


def _row(result: Result, name: str) -> str:
    interval = result.interval.get(name)
    between = f"{interval.low:.3f} to {interval.high:.3f}" if interval else ""
    task = f"{result.task} {result.language}".strip()
    return f"| {task} | {name} | {result.metrics[name]:.3f} | {between} | {result.chance.get(name, float('nan')):.3f} |"
