"""The record of an analysis of a run: what ``clasp analyze`` measured, and ``analysis.json`` that keeps it.

Input: measures of one set of pairs. Output: the file, one entry for each set. Note: analysing the same pairs in the
same way again replaces their entry.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from clasp.analysis.attention_roles import AttentionAgreement
from clasp.analysis.embedding_geometry import EmbeddingGeometry
from clasp.analysis.gradient_agreement import GradientAgreement
from clasp.analysis.layer_similarity import LayerSimilarity
from clasp.analysis.modality_clusters import ModalityClusters
from clasp.types import UserError

ANALYSIS_FILE, _FORMAT = "analysis.json", 1


@dataclass(frozen=True, slots=True, kw_only=True)
class AnalysisRecord:
    """The measures of a run on ``pairs`` pairs of ``data``, whose captions are in ``language`` (empty: as they come).

    ``reading``: the columns and the folder of images that were named. ``neighbours``: K of the mutual k-nearest
    neighbours. ``logit_scale``: inverse temperature; ``margin``: logit scale times the difference of the mean cosines
    of pairs and non-pairs, in logits. ``attention``: ``None`` where the towers are not native or have other numbers of
    heads. ``gradients``: of towers that share layers. ``seconds``: wall time.
    """

    data: str
    language: str
    reading: Mapping[str, str] = field(default_factory=dict)
    pairs: int
    neighbours: int
    logit_scale: float
    geometry: EmbeddingGeometry
    layers: Sequence[LayerSimilarity]
    clusters: Sequence[ModalityClusters] = ()
    attention: AttentionAgreement | None = None
    gradients: Sequence[GradientAgreement] = ()
    seconds: float

    @property
    def margin(self) -> float:
        return self.logit_scale * (self.geometry.pair_cosine - self.geometry.non_pair_cosine)

    @property
    def kind(self) -> tuple[object, ...]:
        """What distinguishes the entries of a file."""
        return self.data, self.language, *sorted(self.reading.items()), self.pairs, self.neighbours

    def to_dict(self) -> dict[str, Any]:
        """The entry of ``analysis.json``."""
        return {**asdict(self), "margin": self.margin}

    @classmethod
    def from_dict(cls, facts: Mapping[str, Any]) -> AnalysisRecord:
        """The inverse of ``to_dict``, by way of JSON."""
        given = {name: value for name, value in facts.items() if name != "margin"}
        attention = given.get("attention")  # this, the clusters and the gradients are not in files of earlier versions
        read = {
            "reading": dict(given.get("reading", {})),
            "geometry": EmbeddingGeometry(**given["geometry"]),
            "layers": [LayerSimilarity(**row) for row in given["layers"]],
            "clusters": tuple(ModalityClusters(**row) for row in given.get("clusters", ())),
            "gradients": tuple(GradientAgreement(**row) for row in given.get("gradients", ())),
            "attention": None if attention is None else AttentionAgreement(**attention),
        }
        return cls(**{**given, **read})


def read_analyses(run: Path) -> list[AnalysisRecord]:
    """The entries of ``analysis.json``, empty where there is none. Raises ``UserError`` where it is damaged."""
    file = run / ANALYSIS_FILE
    if not file.exists():
        return []
    try:
        return [AnalysisRecord.from_dict(entry) for entry in json.loads(file.read_text(encoding="utf-8"))["analyses"]]
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise UserError(f"{file} is damaged ({error!r}); delete it: nothing else of the run depends on it") from None


def analyses_json(entries: Sequence[AnalysisRecord]) -> str:
    """The text of ``analysis.json``; of entries of one kind the last."""
    latest = {entry.kind: entry for entry in entries}
    return json.dumps({"format": _FORMAT, "analyses": [entry.to_dict() for entry in latest.values()]}, indent=1)
