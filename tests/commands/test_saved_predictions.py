"""Kept predictions of a task from outside, whose texts are its own and which may predict nothing."""

from __future__ import annotations

from pathlib import Path

import pytest

from clasp.commands.saved_predictions import save_predictions
from clasp.data.atomic_files import read_json_lines
from clasp.data.formats.sources import FileSource
from clasp.evaluation.identity import EvaluationIdentity
from clasp.evaluation.query_scores import QueryScores
from clasp.evaluation.tasks import ScoredQueries, SingleTask
from clasp.types import Caption, Pair

PAIRS = [Pair(name, FileSource(f"{name}.png"), (Caption(f"a {name}", "en"),), name) for name in ("cat", "dog")]
FOUND = {
    "image_to_text": (["own text", "dog#0"], [None, "a dog"]),
    "text_to_image": (["own image", "dog"], [None, "a dog"]),
    "": (["cat", "dog"], [None, None]),
}


class Asked:
    """Queries whose scores are given; nothing is embedded."""

    directions, metric_names = tuple(FOUND), ("right",)

    def score(self, encoder, images):
        raise NotImplementedError


@pytest.mark.parametrize("direction", FOUND)
@pytest.mark.parametrize("predicts", [True, False])
def test_a_caption_is_named_where_there_is_one(direction: str, predicts: bool, tmp_path: Path):
    task = SingleTask(data="zoo", images=lambda: [], queries=Asked(), name="toy", primary="right")
    ids, (answers, captions) = ("q0", "q1"), FOUND[direction]
    one = QueryScores(direction, ids, ids, {}, {}, {}, ids, (lambda: answers) if predicts else None)
    scored, identity = [ScoredQueries("en", [one], 0.0, 0.0)], EvaluationIdentity({}, "0" * 64)
    rows = read_json_lines(save_predictions(tmp_path, task, scored, PAIRS, identity))
    assert [row["predicted"] for row in rows] == (answers if predicts else [None, None])
    assert [row.get("predicted_caption") for row in rows] == (captions if predicts else [None, None])
