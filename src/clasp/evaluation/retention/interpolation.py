"""Linear interpolation between base and tuned weights: alignment against retention.

Input: features before and after, and the probes. Output: rows with alignment and probe scores, from the base weights
(``alpha`` 0) to the tuned weights (1), with the heads of the run. WiSE-FT (Wortsman et al., CVPR 2022) plots such a
curve of accuracy on the target distribution and under distribution shift; here retention takes the place of the latter.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from clasp.analysis.weight_interpolation import WeightInterpolation, interpolation_obstacles
from clasp.data.device import to_device
from clasp.evaluation.embedding_table import TextBatches
from clasp.evaluation.from_pairs import language_queries
from clasp.evaluation.language_sets import ALL_LANGUAGES, macro_language
from clasp.evaluation.paired import bootstrap_mean
from clasp.evaluation.results import EvaluationResult
from clasp.evaluation.retention.features import ModelFeatures, ProbeFeatureExtractor
from clasp.evaluation.retention.plan import RetentionPlan
from clasp.evaluation.tasks import MultilingualTask, RetrievalTask, ZeroShotTask
from clasp.evaluation.zeroshot import ZeroShotQueries
from clasp.models.dual_encoder import DualEncoder
from clasp.types import MessageCallback, PooledFeatures

_ALPHAS = (0.0, 0.25, 0.5, 0.75, 1.0)
PROMPT_TEMPLATE = "a photo of a {}."
_MACRO_ALL = macro_language(ALL_LANGUAGES)


class _AlignmentScore(NamedTuple):
    """A measure of alignment: its name here, the name of its metric in the result, and the result."""

    name: str
    metric: str
    result: EvaluationResult


def interpolation_results(
    plan: RetentionPlan,
    extractor: ProbeFeatureExtractor,
    before: ModelFeatures,
    after: ModelFeatures,
    say: MessageCallback,
) -> list[EvaluationResult]:
    """A row for each of ``_ALPHAS``; none where weights cannot be interpolated, with a status line why."""
    model, base = extractor.model, extractor.base
    towers = ((model.image, base.image), (model.text, base.text))
    if reasons := [
        f"{tower.modality}: {reason}"
        for tower, base_tower in towers
        for reason in interpolation_obstacles(tower, base_tower)
    ]:
        say(f"no way between base and tuned weights is drawn, since it is not straight: {', '.join(reasons)}")
        return []
    pairs = [WeightInterpolation(tower, base_tower) for tower, base_tower in towers]
    interpolations = [interpolation for interpolation in pairs if not interpolation.is_identity]
    if not interpolations:
        say("no way between base and tuned weights is drawn: nothing inside the towers was tuned")
        return []
    ends = {0.0: before, 1.0: after}
    rows = []
    for alpha in _ALPHAS:
        start = time.perf_counter()
        features = ends[alpha] if alpha in ends else extractor.interpolated(interpolations, alpha, before)
        rows.append(_result_at(plan, model, features, alpha, start))
    return rows


def _result_at(
    plan: RetentionPlan, model: DualEncoder, features: ModelFeatures, alpha: float, start: float
) -> EvaluationResult:
    name, metric, aligned = _alignment_score(plan, model, features)
    metrics, chance = {"alpha": alpha, name: aligned.metrics[metric]}, {name: aligned.chance[metric]}
    interval = {name: aligned.interval[metric]}
    if plan.image is not None:
        scores = plan.image.score("image_knn", features.fit_features, features.image)
        metrics["image_knn"], interval["image_knn"] = bootstrap_mean([(scores.values, scores.groups)])
        chance["image_knn"] = scores.chance
    if plan.text:
        chosen = [probe for probe in plan.text if probe.kind == plan.text[0].kind]  # across languages, where possible
        each = [probe.score(features.text, 1) for probe in chosen]
        what = f"{chosen[0].kind}_recall@1"
        metrics[what], interval[what] = bootstrap_mean([(scores.values, scores.groups) for scores in each])
        chance[what] = sum(scores.chance for scores in each) / len(each)
    return EvaluationResult(
        task="retention/interpolation",
        data=plan.data,
        language="",
        metrics=metrics,
        chance=chance,
        n=aligned.n,
        interval=interval,
        seconds=time.perf_counter() - start,
    )


def _alignment_score(plan: RetentionPlan, model: DualEncoder, features: ModelFeatures) -> _AlignmentScore:
    """Alignment with the run's heads: zero-shot accuracy where there are classes, else mean recall over languages."""
    device = next(model.parameters()).device
    row = {text: place for place, text in enumerate(features.text.ids)}

    def images() -> list[tuple[Sequence[str], PooledFeatures]]:
        return [(features.image.ids, to_device(PooledFeatures(features.image.pooled), device))]

    def texts(by_id: Mapping[str, str]) -> TextBatches:
        pooled = PooledFeatures(features.text.pooled[[row[text] for text in by_id.values()]])
        return lambda: [(list(by_id), to_device(pooled, device))]

    if plan.label:
        classes = ZeroShotQueries(
            labels={pair.id: str(pair.meta[plan.label]) for pair in plan.pairs},
            classes=plan.classes,
            templates=[PROMPT_TEMPLATE],
            read=lambda prompts: texts({prompt: prompt for prompt in prompts})(),
            groups={pair.id: pair.group for pair in plan.pairs},
        )
        results = ZeroShotTask(data=plan.data, images=images, queries=classes).results(model)
        return _AlignmentScore("zeroshot_top1", "top1", results[0])
    queries = language_queries(list(plan.pairs), plan.languages or [""], texts)
    task = MultilingualTask(
        data=plan.data,
        images=images,
        queries=queries,
        primary=f"{_MACRO_ALL}/{RetrievalTask.primary}",
        sets={ALL_LANGUAGES: list(queries)},
    )
    both_ways = (each for each in task.results(model) if each.language == _MACRO_ALL and "/" not in each.task)
    return _AlignmentScore("retrieval_mean_recall", "mean_recall", next(both_ways))
