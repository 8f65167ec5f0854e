"""The overhead of one more call of a text tower, in tokens: ``TOKENS_PER_CALL`` of ``clasp.models.length_buckets``.

A batch of captions of equal length is run in 1, 2, 4 ... calls, so that the number of tokens is constant and the number
of calls is not. Time is modelled as linear in both; the ratio of the slopes by calls and by tokens is the answer.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from benchmarks import harness, sample_data
from benchmarks.harness import Measured, Row, sized
from clasp.models.length_buckets import TOKENS_PER_CALL
from clasp.types import Tokens

ROWS = sized(128, 16)
LENGTHS = (8, 16)
CALLS = (1, 2, 4, 8, 16)


def rows() -> Sequence[Row]:
    return [measure("forward", train=False), measure("forward and backward", train=True)]


def measure(what: str, *, train: bool) -> Row:
    recipe = sample_data.recipe('tune.text=["full"]')
    tower = sample_data.parts(recipe).model.text

    def run(length: int, calls: int) -> None:
        with torch.set_grad_enabled(train):
            parts = [_tokens(ROWS // calls, length) for _ in range(calls)]
            vectors = torch.cat([tower.pooled(part) for part in parts])
            if train:
                vectors.sum().backward()

    points = [(length, calls) for length in LENGTHS for calls in CALLS]
    taken = [harness.seconds(lambda point=point: run(*point)).median for point in points]
    columns = np.array([[1.0, ROWS * length, calls] for length, calls in points])
    _, token, call = np.linalg.lstsq(columns, np.array(taken), rcond=None)[0]
    answer = Measured("tokens", (float(call / token),))
    set_to = Measured("constant", (float(TOKENS_PER_CALL["cpu"]),))
    note = f"{1e6 * token:.3g} µs a token, {1e3 * call:.3g} ms a call, {ROWS} captions of {LENGTHS} tokens"
    return Row(f"a call of MiniLM-L6, {what}", "tokens", answer, "TOKENS_PER_CALL['cpu']", set_to, None, "lower", note)


def _tokens(rows: int, length: int) -> Tokens:
    ids = torch.full((rows, length), 2000)
    return Tokens(ids, torch.ones_like(ids, dtype=torch.bool))


if __name__ == "__main__":
    harness.main(rows)
