"""Run folders as files alone, without training: what a report reads, with round numbers."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

from clasp.analysis.attention_roles import AttentionAgreement
from clasp.analysis.embedding_geometry import EmbeddingGeometry
from clasp.analysis.layer_similarity import LayerSimilarity
from clasp.analysis.modality_clusters import ModalityClusters
from clasp.analysis.record import AnalysisRecord
from clasp.evaluation.results import EvaluationResult
from clasp.training.cost.ledger import CostSession, FrozenFlops, RunCost, StepFlops
from toyresults import result

HOSTILE = '"><script>alert(1)</script>&<b>\u202e\x1b[2J'


def toy_cost(trained: int = 50) -> RunCost:
    machine = {"cpu": "toy", "gpu": None, "threads": 1, "cores": 2, "torch": "2"}
    stages = {"training": 3.0, "evaluation": 1.5}
    session = CostSession(0, 4, 64, 10.0, 3.0, stages, 2_000_000, "resident", None, "no meter here", machine)
    parts = {"model": {"total": 1000, "trained": trained}, "heads": {"total": trained, "trained": trained}}
    return RunCost(
        parts, StepFlops(3200, 6400, 16, 16, ()), {"image": FrozenFlops(10**9, "all of it")}, 400, (session,)
    )


def toy_analysis(**changes: object) -> AnalysisRecord:
    geometry = EmbeddingGeometry(
        modality_gap=0.5, pair_cosine=0.6, non_pair_cosine=0.1, alignment=0.8, image_uniformity=-2.5,
        text_uniformity=-2.0, image_effective_rank=30.25, text_effective_rank=20.0,
    )  # fmt: skip
    layers = [
        LayerSimilarity(
            image_block=i, text_block=t, cka=0.3, cka_shuffled=0.1, mutual_knn=0.1 * t, mutual_knn_shuffled=0.0
        )
        for i, t in ((0, 0), (1, 1), (1, 2))
    ]
    clusters = tuple(ModalityClusters(block=block, nmi=0.875, nmi_shuffled=0.125) for block in (0, 1))
    attention = AttentionAgreement(
        heads=24, entropy=0.5, entropy_shuffled=[-0.25, 0.25], own_token=0.75, own_token_shuffled=[-0.5, 0.5]
    )
    given = {"data": "pairs.csv", "language": "", "pairs": 39, "neighbours": 5, "logit_scale": 10.0, "seconds": 2.0}
    given |= {"geometry": geometry, "layers": layers, "clusters": clusters, "attention": attention}
    return AnalysisRecord(**{**given, **changes})  # type: ignore[arg-type]


def write_run(folder: Path, results: list[EvaluationResult], *, batch_size: int = 16, trained: int = 50) -> Path:
    """A finished run, as files."""
    folder.mkdir(parents=True)
    recipe = (
        f'[image]\ntower = "file:towers"\n[data]\ntrain = "pairs.csv"\n[train]\nbatch_size = {batch_size}\nseed = 1\n'
    )
    (folder / "recipe.toml").write_text(recipe)
    tower = {"tower": "file:towers", "version": "1", "fingerprint": "abcdef0123456789"}
    (folder / "base.json").write_text(json.dumps({"image": tower, "text": tower}))
    events = [
        {"event": "start", "step": 0, "precision": "float32"},
        {"event": "evaluation", "step": 0, "metrics": {"mean_recall": 0.125}},
        {"event": "step", "step": 2, "loss": 3.5},
        {"event": "step", "step": 4, "loss": 2.25},
        {"event": "evaluation", "step": 4, "metrics": {"mean_recall": 0.5}},
    ]
    (folder / "log.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))
    (folder / "results.jsonl").write_text("".join(json.dumps(asdict(row)) + "\n" for row in results))
    (folder / "cost.json").write_text(toy_cost(trained).to_json())
    (folder / "delta.safetensors").write_bytes(b"")
    return folder


def retrieval_rows(value: float = 0.5) -> list[EvaluationResult]:
    return [result(f"retrieval{direction}", value=value) for direction in ("/image_to_text", "/text_to_image", "")]
