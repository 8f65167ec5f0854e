"""``clasp eval RUN retention``: how much of each tower's pre-trained features survives alignment.

Input: the ``TaskContext`` of a run. Output: rows of results of three kinds: probes (``before``, ``after``, ``change``),
the drift of each part of a tower (``weights``, ``new``, ``cka``), and interpolation between base and tuned weights
(``retention/interpolation``). Note: each tower is run on the probe data once for each set of weights, and everything
else is computed from those features; a probe that the pairs do not allow is left out, and a status line names it.
"""

from __future__ import annotations

import math
import time
from dataclasses import replace

from clasp.analysis.similarity import linear_cka
from clasp.analysis.tower_features import TowerFeatures
from clasp.analysis.weight_drift import ALL_PARTS, OUTPUT_PART, PartDrift, measure_drift, merge_drift
from clasp.config.build import build_model
from clasp.config.recipe import Recipe
from clasp.evaluation.paired import PairedScores, paired_results
from clasp.evaluation.results import EvaluationResult
from clasp.evaluation.retention.features import ModelFeatures, ProbeFeatureExtractor
from clasp.evaluation.retention.interpolation import PROMPT_TEMPLATE, interpolation_results
from clasp.evaluation.retention.plan import RetentionPlan, plan_probes
from clasp.evaluation.retention.probes import IMAGE_PROBES, TEXT_RECALL_KS, ProbeScores
from clasp.evaluation.task_context import TaskContext
from clasp.models.dual_encoder import DualEncoder
from clasp.models.tower import Tower
from clasp.types import UserError


def evaluate_retention(context: TaskContext) -> list[EvaluationResult]:
    """All rows of the probes, of drift and of interpolation.

    Options: ``fit`` (pairs to fit the image probes on; half of ``data`` if left out), ``label`` (column of the class),
    ``anchor`` (the language that captions are compared with), ``languages`` (some of them). Raises ``UserError`` before
    anything is computed.
    """
    assert context.run is not None, "its TaskEntry needs a run"
    run = context.run.folder
    if (run / "imported.json").exists():
        raise UserError(
            f"{run.name} was imported, and a checkpoint has its towers only as they became: there are no features "
            "before alignment to compare with; evaluate retention of a run that clasp trained"
        )
    plan, towers = plan_probes(context), context.towers
    model = towers.model
    base = _build_base_model(context.run.recipe, model)
    extractor = ProbeFeatureExtractor(
        model=model,
        base=base,
        inputs=towers.inputs,
        pairs=plan.pairs,
        fit=plan.fit,
        captions=plan.captions,
        prompts=[PROMPT_TEMPLATE.replace("{}", name) for name in plan.classes],
        bar=context.bar,
    )
    start = time.perf_counter()
    before = extractor.before()
    after = extractor.after(before)
    seconds = time.perf_counter() - start
    rows = [*_image_results(plan, before, after, seconds), *_text_results(plan, before, after, seconds)]
    rows += _drift_results(plan.data, model.image, base.image, before.image, after.image, seconds)
    rows += _drift_results(plan.data, model.text, base.text, before.text, after.text, seconds)
    rows += interpolation_results(plan, extractor, before, after, context.say)
    return rows


def _build_base_model(recipe: Recipe, model: DualEncoder) -> DualEncoder:
    """The towers of a recipe with base weights, on the device of ``model``."""
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
        comparisons.append(_paired_scores(f"retention/{name}", then, now, seconds + time.perf_counter() - start))
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
            scores = _paired_scores(
                f"retention/{probe.kind}_recall@{k}", then, now, seconds + time.perf_counter() - start
            )
            comparisons.append(replace(scores, language=probe.language, language_set=probe.language_set))
    return paired_results(plan.data, comparisons) if comparisons else []


def _paired_scores(probe: str, before: ProbeScores, after: ProbeScores, seconds: float) -> PairedScores:
    return PairedScores(
        probe=probe,
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
    """A row for each part of a tower, then one for all of it; metrics that are undefined for a part are left out.

    ``weights``: relative norm of the change of the base's weights. ``new``: fraction of the part's parameters that the
    base does not have. ``cka``: linear CKA of the part's mean states before and after; of the output, of the pooled
    vectors.
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
    # no states: the part is in the frozen prefix, which is the same before and after
    return 1.0 if part.block else math.nan
