"""The queue before the model: shared calls, refusals when it is full, and time limits."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
from fastapi.testclient import TestClient
from torch import Tensor

from clasp.models.inference import EmbeddingModel
from clasp.serve.limits import ServeLimits
from clasp.serve.model_queue import ModelQueue, ModelTimeoutError, QueueFullError
from clasp.types import UserError
from toydata import COLOURS
from toysearch import model
from toyserver import toy_app, toy_service


class SlowModel(EmbeddingModel):
    """The toy model, which starts a call only when told to; remembers the sizes of its calls."""

    def __init__(self) -> None:
        toy = model()
        super().__init__(toy.encoder, toy.transform, toy.tokenizer)
        self.may_start, self.calls = threading.Event(), []

    def encode_text(self, texts: Sequence[str] | Any, **options: Any) -> Tensor:
        self.may_start.wait(10)
        self.calls.append(len(texts))
        if "broken" in texts:
            raise UserError("broken")
        return super().encode_text(texts, **options)


def wait_for(queue: ModelQueue, depth: int) -> None:
    deadline = time.monotonic() + 10
    while queue.depth < depth:
        assert time.monotonic() < deadline
        time.sleep(0.001)


def test_those_that_wait_share_a_call():
    slow, counted = SlowModel(), []
    queue = ModelQueue(slow, waiting=10, seconds=10.0, on_call=lambda kind, rows: counted.append((kind, rows)))
    with ThreadPoolExecutor(8) as pool:
        first = pool.submit(queue.encode_texts, ["red"])
        time.sleep(0.05)
        rest = [pool.submit(queue.encode_texts, [name]) for name in ("green", "blue", "black", "green")]
        wait_for(queue, 4)
        slow.may_start.set()
        alone = model().encode_text(["red", "green", "blue", "black", "green"])
        together = np.concatenate([first.result(), *(each.result() for each in rest)])
    np.testing.assert_allclose(together, alone, rtol=1e-5)
    assert slow.calls == [1, 4] and counted == [("text", 1), ("text", 4)]
    queue.encode_texts(["red", "blue"])
    assert slow.calls == [1, 4], "recent texts are not encoded again"
    pixels = np.random.default_rng(0).random((2, 3, 8, 8), np.float32)
    np.testing.assert_allclose(queue.encode_pixels(pixels), model().encode_pixels(pixels), rtol=1e-5)
    queue.close()
    with pytest.raises(QueueFullError):
        queue.encode_texts(["yellow"])


def test_one_bad_text_fails_its_request_only():
    slow = SlowModel()
    queue = ModelQueue(slow, waiting=10, seconds=10.0)
    with ThreadPoolExecutor(8) as pool:
        first = pool.submit(queue.encode_texts, ["red"])
        time.sleep(0.05)
        bad = pool.submit(queue.encode_texts, ["broken"])
        good = pool.submit(queue.encode_texts, ["blue"])
        wait_for(queue, 2)
        slow.may_start.set()
        first.result()
        with pytest.raises(UserError, match="broken"):
            bad.result()
        np.testing.assert_allclose(good.result(), model().encode_text(["blue"]), rtol=1e-5)
    queue.close()


def test_a_full_queue_refuses_and_a_slow_model_is_given_up():
    slow = SlowModel()
    queue = ModelQueue(slow, waiting=2, seconds=0.3)
    with ThreadPoolExecutor(8) as pool:
        running = pool.submit(queue.encode_texts, ["red"])
        time.sleep(0.05)
        waiting = [pool.submit(queue.encode_texts, [name]) for name in ("green", "blue")]
        wait_for(queue, 2)
        with pytest.raises(QueueFullError):
            queue.encode_texts(["black"])
        for each in (running, *waiting):
            with pytest.raises(ModelTimeoutError):
                each.result()
    slow.may_start.set()
    queue.close()
    assert slow.calls == [1], "what nobody waits for is not computed"


def test_a_busy_server_answers_429_and_503(tmp_path, monkeypatch: pytest.MonkeyPatch):
    service = toy_service(tmp_path / "x", ServeLimits(waiting=3, seconds=0.4))
    slow = SlowModel()
    monkeypatch.setattr(service._queue, "_model", slow)
    api = TestClient(toy_app(service), "http://127.0.0.1")
    with ThreadPoolExecutor(8) as pool:
        replies = list(pool.map(lambda name: api.get("/api/search", params={"q": name}), [*COLOURS, "red", "green"]))
    statuses = sorted(reply.status_code for reply in replies)
    assert set(statuses) == {429, 503} and statuses.count(503) == 3
    assert {reply.headers["retry-after"] for reply in replies} == {"1", "5"}
    slow.may_start.set()
    assert api.get("/api/search", params={"q": "red"}).status_code == 200
    service.close()
