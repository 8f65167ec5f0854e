"""The model card of a run: its towers, parameters, training data, results, cost and usage, in Markdown.

Input: the recipe, model, fit result, results and cost of a run. Output: the text of its ``README.md``, to which later
evaluations are added. Every number is one of the run's results, and of those on its validation pairs none is left out.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from clasp.config.recipe import Recipe
from clasp.errors import counted, printable
from clasp.evaluation.identity import is_own_validation
from clasp.evaluation.results import EvaluationResult
from clasp.models.dual_encoder import DualEncoder
from clasp.report.evaluation_labels import evaluation_key, evaluation_labels, latest_results
from clasp.report.run_record import RESULTS_FILE
from clasp.report.tables import AnnotatedTable, result_tables, retention_table, selection_note, summary_tables
from clasp.training.class_pairs import WeightedClassPairs
from clasp.training.cost.ledger import RunCost, format_si
from clasp.training.state import FitResult

EVALUATIONS_HEADING = "Evaluations"
"""The section of a card that ``clasp eval`` writes"""


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelCard:
    """The contents of a run's model card; ``train_pairs`` and ``val_pairs`` are counts, ``candidates`` that of the
    evaluations among which the best selected the weights."""

    recipe: Recipe
    model: DualEncoder
    run: Path
    fitted: FitResult
    results: Sequence[EvaluationResult]
    cost: RunCost
    train_pairs: int
    val_pairs: int
    classes: WeightedClassPairs | None = None
    candidates: int = 1

    def render(self) -> str:
        """The text of the run's ``README.md``."""
        recipe, fitted, sharing = self.recipe, self.fitted, self.model.sharing
        state = "Stopped before its end; `clasp resume` goes on." if fitted.interrupted else "Trained to its end."
        if fitted.weights_position.step != fitted.position.step:
            state += f" The weights are those of step {fitted.weights_position.step:,}, the best on validation."
        counts = self.model.parameter_counts()
        parts = [[name, f"{c.total:,}", f"{c.trained:,}", f"{c.percent:.2f}"] for name, c in counts.items()]
        tables = result_tables(self.results)
        shown = [markdown_table(table.columns, table.rows) for table in tables]
        notes = dict.fromkeys(note for table in tables for note in table.notes)
        notes |= dict.fromkeys(selection_note(self.candidates) if shown else [])
        answers = "".join(
            f"\n{block}\n" for block in (*(["On the validation pairs:"] if shown else []), *shown, *notes)
        )
        shared = "" if sharing is None else f"\nWhat the two nets share:\n\n```\n{sharing}\n```\n"
        classes = "" if self.classes is None else f"The heads' closed form also has {self.classes}.\n"
        seen = f"{counted(fitted.pairs, 'pair')} seen in {fitted.seconds:.0f} s, in {fitted.precision}"
        seen = seen if fitted.pairs else "no gradient step was taken"
        skipped = f"\nSkipped, since unreadable: {counted(len(fitted.skipped), 'sample')}, in `log.jsonl`.\n"
        return f"""# {self.run.name}

An image–text model aligned with clasp: `{recipe.image.tower}` and `{recipe.text.tower}` in one space of
{recipe.head.width} dimensions. {state}

{markdown_table(["part", "parameters", "trained", "%"], parts)}
{shared}
Trained on {counted(self.train_pairs, "pair")} of `{recipe.data.train}`, validated on {self.val_pairs:,} others;
{seen}, seed {recipe.train.seed}.
{classes}{skipped if fitted.skipped else ""}{answers}
{cost_section(self.cost)}

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


def with_evaluations(card: str, results: Sequence[EvaluationResult]) -> str:
    """The card with a section of the evaluations among ``results``, all but the run's own, in place of an earlier one.

    Many languages are folded, as in the terminal: ``results.jsonl`` has every row.
    """
    done = [each for each in latest_results(results) if not is_own_validation(each)]
    tables = []
    for key, label in evaluation_labels(done).items():
        rows = [each for each in done if evaluation_key(each) == key]
        found = [retention_table(rows, RESULTS_FILE)] if key.task == "retention" else summary_tables(rows, RESULTS_FILE)
        for table in found:
            cells = [[key.task if row[0] == label else row[0], *row[1:]] for row in table.rows]
            tables.append(replace(table, columns=(f"{key.task} on {label}", *table.columns[1:]), rows=cells))
    return with_section(card, EVALUATIONS_HEADING, tables)


def with_section(card: str, heading: str, tables: Sequence[AnnotatedTable]) -> str:
    """The card with a section of tables at its end, in place of one of that heading; without tables only without it."""
    kept = re.sub(rf"\n## {re.escape(heading)}\n.*?(?=\n## |\Z)", "", card, flags=re.DOTALL)
    shown = "".join(f"\n{markdown_table(table.columns, table.rows)}\n" for table in tables)
    notes = "".join(f"\n{note}\n" for note in dict.fromkeys(note for table in tables for note in table.notes))
    return f"{kept}\n## {heading}\n{shown}{notes}" if tables else kept


def results_section(heading: str, table: AnnotatedTable) -> str:
    """A section of a model card with one table of results and its notes, in Markdown."""
    notes = "".join(f"\n{note}\n" for note in table.notes)
    return f"\n## {heading}\n\n{markdown_table(table.columns, table.rows)}\n{notes}"


def cost_section(cost: RunCost) -> str:
    """The cost of a run as a table, in Markdown."""
    return markdown_table(["cost", ""], cost_rows(cost))


def stage_cost_section(whole: RunCost, kept: RunCost, name: str) -> str:
    """The cost of all stages of a run beside that of the one that was kept, ``name``."""
    of_all, of_kept = (
        {title.partition(" in ")[0] if title.startswith("seconds") else title: cell for title, cell in cost_rows(cost)}
        for cost in (whole, kept)
    )
    rows = [[title, of_all.get(title, ""), of_kept.get(title, "")] for title in of_all | of_kept]
    return markdown_table(["cost", "all stages", name], rows)


def cost_rows(cost: RunCost) -> list[list[str]]:
    """Cost of a run, one row per measure with how it was measured; ``cost.json`` has all of it."""
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
    rows.append(
        ["on", f"{at['gpu'] or at['cpu']}, {at['threads']} of {counted(at['cores'], 'core')}, torch {at['torch']}"]
    )
    return rows


def markdown_table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    cells = [[printable(cell).replace("|", "\\|") for cell in row] for row in (columns, *rows)]
    lines = [cells[0], ["---"] * len(columns), *cells[1:]]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
