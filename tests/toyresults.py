"""Rows of results as evaluations leave them, with long names and in as many languages as one likes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from clasp.evaluation.bootstrap import ConfidenceInterval
from clasp.evaluation.results import EvaluationResult

RANKED = ("recall@1", "recall@5", "recall@10", "mean_recall", "median_rank")
LANGUAGES = [f"x{number:02}-Latn-variant-with-a-long-name" for number in range(78)]


def result(
    task: str, language: str = "", *, value: float = 0.5, metrics: Sequence[str] = RANKED, data: str = "pairs.csv"
) -> EvaluationResult:
    """Every metric has ``value``; ranks are long numbers."""
    return EvaluationResult(
        task=task,
        data=data,
        language=language,
        metrics={name: 12345.5 if "rank" in name else value for name in metrics},
        chance=dict.fromkeys(metrics, 0.1),
        n=390,
        interval={name: ConfidenceInterval(value - 0.1, 1.0) for name in metrics if "rank" not in name},
        seconds=1.0,
    )


def multilingual() -> list[EvaluationResult]:
    """78 languages in both directions, the later the better, and two macro means."""
    rows = []
    for number, language in enumerate([*LANGUAGES, "macro:all", "macro:low-resource, never trained on before"]):
        for direction in ("/image_to_text", "/text_to_image", ""):
            rows.append(result(f"multilingual{direction}", language, value=0.1 + 0.01 * number))
    return rows


def retention() -> list[EvaluationResult]:
    """Image probes, captions in many languages of two sets, and the drift of both towers."""
    rows = [_compared("image_knn", "", 0.0), _compared("image_linear", "", 0.01)]
    for language_set in ("trained", "never_trained"):
        task = f"captions_recall@1/{language_set}"
        rows += [_compared(task, language, -0.01 * place) for place, language in enumerate(LANGUAGES[:30])]
        rows.append(_compared(task, f"macro:{language_set}", -0.15))
    for side in ("image", "text"):
        for part, weights in (("block 1", 0.1), ("all", 0.05)):
            drift = {"weights": weights, "new": 0.05, "cka": 0.9}
            rows.append(replace(result(f"retention/{side}_drift/{part}", metrics=()), metrics=drift))
    return rows


def _compared(probe: str, language: str, change: float) -> EvaluationResult:
    metrics = {"before": 0.6, "after": 0.6 + change, "change": change}
    interval = {name: ConfidenceInterval(value - 0.1, value + 0.1) for name, value in metrics.items()}
    chance = {"before": 0.1, "after": 0.1, "change": 0.0}
    return EvaluationResult(f"retention/{probe}", "pairs.csv", language, metrics, chance, 390, interval, 1.0)
