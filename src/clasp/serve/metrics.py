"""Counters of the server in Prometheus' text format.

Input: one call for each answered request. Output: the text of ``/metrics`` (exposition format 0.0.4). Note: written by
hand, since it is a screen of code; paths outside of the API are counted as one, so that nobody can make many series.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable

LATENCY_BUCKETS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
"""Upper bounds of the latency histogram, seconds"""
METRICS_MEDIA_TYPE = "text/plain; version=0.0.4; charset=utf-8"


class ServerMetrics:
    """Counts requests by path and status, and latencies by path; safe to be used by many threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._requests: Counter[tuple[str, int]] = Counter()
        self._seconds: Counter[str] = Counter()
        self._buckets: Counter[tuple[str, float]] = Counter()
        self._model_calls: Counter[str] = Counter()
        self._gauges: dict[str, Callable[[], float]] = {}

    def gauge(self, name: str, read: Callable[[], float]) -> None:
        """A value that is read when the metrics are."""
        self._gauges[name] = read

    def count_request(self, path: str, status: int, seconds: float) -> None:
        """One answered request."""
        with self._lock:
            self._requests[path, status] += 1
            self._seconds[path] += seconds  # type: ignore[assignment]  # a Counter adds up floats too
            for bound in LATENCY_BUCKETS:
                self._buckets[path, bound] += seconds <= bound

    def count_model_call(self, kind: str, inputs: int) -> None:
        """One call of a tower with this many inputs."""
        with self._lock:
            self._model_calls[f'clasp_model_calls_total{{kind="{kind}"}}'] += 1
            self._model_calls[f'clasp_model_inputs_total{{kind="{kind}"}}'] += inputs

    def render(self) -> str:
        """All metrics as text."""
        with self._lock:
            requests, seconds, buckets = dict(self._requests), dict(self._seconds), dict(self._buckets)
            calls = dict(self._model_calls)
        lines = ["# HELP clasp_requests_total Answered requests.", "# TYPE clasp_requests_total counter"]
        lines += [
            f'clasp_requests_total{{path="{path}",status="{status}"}} {count}'
            for (path, status), count in sorted(requests.items())
        ]
        lines += ["# HELP clasp_request_seconds Latency of requests.", "# TYPE clasp_request_seconds histogram"]
        for path in sorted(seconds):
            total = sum(count for (name, _), count in requests.items() if name == path)
            lines += [
                f'clasp_request_seconds_bucket{{path="{path}",le="{bound:g}"}} {buckets[path, bound]}'
                for bound in LATENCY_BUCKETS
            ]
            lines.append(f'clasp_request_seconds_bucket{{path="{path}",le="+Inf"}} {total}')
            lines.append(f'clasp_request_seconds_sum{{path="{path}"}} {seconds[path]:.6f}')
            lines.append(f'clasp_request_seconds_count{{path="{path}"}} {total}')
        for name in ("clasp_model_calls_total", "clasp_model_inputs_total"):
            lines.append(f"# TYPE {name} counter")
            lines += [f"{series} {count}" for series, count in sorted(calls.items()) if series.startswith(name)]
        for name, read in self._gauges.items():
            lines += [f"# TYPE {name} gauge", f"{name} {read():g}"]
        return "\n".join(lines) + "\n"
