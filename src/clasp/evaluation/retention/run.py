"""``clasp eval RUN retention``: how much of each tower's pre-trained features survives alignment.

In go a run, its model and some pairs; out come rows of results and the figure ``RUN/retention.png``. Rows are of three
kinds: probes (``before``, ``after``, ``change``), the drift of each part of a tower (``weights``, ``new``, ``cka``),
and points on the way from the base to the tuned weights (``retention/interpolation``). Unusual: each tower is run over
the probes once for each state it is put in, and everything else is read off what it said then; what cannot be asked is
left out, and one line says so.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from pathlib import Path

from clasp.analysis.similarity import linear_cka
from clasp.analysis.tower_features import TowerFeatures
from clasp.analysis.weight_drift import ALL_PARTS, OUTPUT_PART, PartDrift, measure_drift, merge_drift
from clasp.config.build import build_model
from clasp.config.recipe import Recipe
from clasp.data.pairs import Pairs
from clasp.evaluation.paired import PairedScores, paired_results
from clasp.evaluation.retention.features import ModelFeatures, ProbeFeatureExtractor
from clasp.evaluation.retention.interpolation import PROMPT_TEMPLATE, interpolation_results
from clasp.evaluation.retention.plan import RetentionPlan, plan_probes
from clasp.evaluation.retention.probes import IMAGE_PROBES, TEXT_RECALL_KS, ProbeScores
from clasp.evaluation.tasks import EvaluationResult
from clasp.models.dual_encoder import DualEncoder
from clasp.models.features import FeatureSource
from clasp.models.tower import Tower
from clasp.types import MessageCallback, ProgressFactory, UserError

RETENTION_OPTIONS = ("data", "fit", "label", "anchor", "languages", "image", "caption", "image_root")


def evaluate_retention(
    run: Path,
    recipe: Recipe,
    model: DualEncoder,
    pairs: Pairs,
    inputs: FeatureSource,
    options: Mapping[str, str],
    *,
    say: MessageCallback,
    bar: ProgressFactory,
) -> list[EvaluationResult]:
    """All rows, and the figure in ``run``.

    ``options``: ``data`` (as it was named), ``fit`` (pairs to fit the image probes on; half of ``data`` if left out),
    ``label`` (column of the class), ``anchor`` (the language that captions are asked for in), ``languages`` (some of
    them). Raises ``UserError`` before anything is computed.
    """
    if (run / "imported.json").exists():
        raise UserError(
            f"{run.name} was imported, and a checkpoint has its towers only as they became: there is no before that "
            "kept could compare with; ask it of a run that clasp trained"
        )
    asked = plan_probes(run.name, recipe, pairs, options, say)
    base = _build_base_model(recipe, model)
    hearing = ProbeFeatureExtractor(
        model=model,
        base=base,
        inputs=inputs,
        pairs=asked.pairs,
        fit=asked.fit,
        captions=asked.captions,
        prompts=[PROMPT_TEMPLATE.replace("{}", name) for name in asked.classes],
        bar=bar,
    )
    start = time.perf_counter()
    before = hearing.before()
    after = hearing.after(before)
    seconds = time.perf_counter() - start
    rows = [*_image_results(asked, before, after, seconds), *_text_results(asked, before, after, seconds)]
    rows += _drift_results(asked.data, model.image, base.image, before.image, after.image, seconds)
    rows += _drift_results(asked.data, model.text, base.text, before.text, after.text, seconds)
    rows += interpolation_results(asked, hearing, before, after, say)
    return rows


def _build_base_model(recipe: Recipe, model: DualEncoder) -> DualEncoder:
    """The towers of a recipe as they came, on the device of ``model``."""
    tune = recipe.tune.model_copy(update={"image": ["none"], "text": ["none"], "head": "full"})
    return build_model(recipe.model_copy(update={"tune": tune})).to(next(model.parameters()).device).eval()


# --- the probes ------------------------------------------------------------------------------------------------------


def _image_results(
    plan: RetentionPlan, before: ModelFeatures, after: ModelFeatures, seconds: float
) -> list[EvaluationResult]:
    if plan.image is None:
        return []
    comparisons = []
    for name in IMAGE_PROBES:
        start = time.perf_counter()
        then = plan.image.score(name, before.fit_features, before.image)
        now = then if after.image is before.image else plan.image.score(name, after.fit_features, after.image)
        comparisons.append(_paired_scores(f"retention/{name}", "", then, now, seconds + time.perf_counter() - start))
    return paired_results(plan.data, comparisons)


def _text_results(
    plan: RetentionPlan, before: ModelFeatures, after: ModelFeatures, seconds: float
) -> list[EvaluationResult]:
    comparisons = []
    for k in TEXT_RECALL_KS:
        for probe in plan.text:
            start = time.perf_counter()
            then = probe.score(before.text, k)
            now = then if after.text is before.text else probe.score(after.text, k)
            task = f"retention/{probe.kind}_recall@{k}" + (f"/{probe.language_set}" if probe.language_set else "")
            comparisons.append(_paired_scores(task, probe.language, then, now, seconds + time.perf_counter() - start))
    return paired_results(plan.data, comparisons) if comparisons else []


def _paired_scores(task: str, language: str, before: ProbeScores, after: ProbeScores, seconds: float) -> PairedScores:
    return PairedScores(
        task=task,
        language=language,
        groups=before.groups,
        before=before.values,
        after=after.values,
        chance=before.chance,
        seconds=seconds,
    )


# --- drift -----------------------------------------------------------------------------------------------------------


def _drift_results(
    data: str, tower: Tower, base: Tower, before: TowerFeatures, after: TowerFeatures, seconds: float
) -> list[EvaluationResult]:
    """A row for each part of a tower, then one for all of it; what a part cannot have is not in its metrics.

    ``weights``: relative norm of the change of the base's weights. ``new``: share of the part's parameters that the
    base has not. ``cka``: linear CKA of the part's mean states before and after; of the output, of the pooled vectors.
    """
    parts = measure_drift(tower, base)
    rows = []
    for part in (*parts, merge_drift(parts)):
        cka = _cka(part, tower, before, after)
        measured = {"weights": part.change, "new": part.new_fraction, "cka": cka}
        rows.append(
            EvaluationResult(
                task=f"retention/{tower.modality}_drift/{part.title}",
                data=data,
                language="",
                metrics={name: value for name, value in measured.items() if math.isfinite(value)},
                chance={},
                n=len(after.block_ids),
                interval={},
                seconds=seconds,
            )
        )
    return rows


def _cka(part: PartDrift, tower: Tower, before: TowerFeatures, after: TowerFeatures) -> float:
    """NaN where a part has no states of its own, or the base has none to compare them with."""
    assert before.block_ids == after.block_ids
    if part.title in (OUTPUT_PART, ALL_PARTS):
        return 1.0 if after is before else linear_cka(before.rows_of(before.block_ids), after.rows_of(after.block_ids))
    if part.block in after.block_means:
        there = part.block in before.block_means
        return linear_cka(before.block_means[part.block], after.block_means[part.block]) if there else math.nan
    # not heard: it lies below the block at which both states of the tower went on from the same trunk
    return 1.0 if part.block else math.nan
