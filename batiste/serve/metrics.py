# SPDX-License-Identifier: Apache-2.0
"""Figures for Prometheus, of one server."""

from __future__ import annotations

from typing import Any

from batiste.graph.optional import need

SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)
ROWS = (1, 2, 4, 8, 16, 32, 64, 128)


class Metrics:
    """Counters, and what is looked up when they are read."""

    def __init__(self):
        p = need("prometheus_client", extra="serve")
        self._text, self.registry = p.generate_latest, p.CollectorRegistry()
        make = {"registry": self.registry}
        self.requests = p.Counter("batiste_requests", "answers by status", ["route", "status"], **make)
        self.latency = p.Histogram("batiste_request_seconds", "until the answer was sent", ["route", "status"],
                                   buckets=SECONDS, **make)  # fmt: skip
        self.rows = p.Histogram("batiste_batch_rows", "rows computed together", ["model"], buckets=ROWS, **make)
        self.busy = p.Histogram("batiste_batch_seconds", "that a batch took", ["model"], buckets=SECONDS, **make)
        self.queued = p.Gauge("batiste_queued_rows", "rows that wait", ["model"], **make)
        self.programs = p.Gauge("batiste_programs", "compiled programs", ["model"], **make)
        self.late = p.Gauge("batiste_programs_after_warming", "compiled while serving: 0, or sizes are wrong",
                            ["model"], **make)  # fmt: skip
        self.up = p.Gauge("batiste_engine_up", "whether it computes", ["model"], **make)
        self.deaths = p.Counter("batiste_engine_deaths", "of engines in processes of their own, each started again",
                                ["model", "why"], **make)  # fmt: skip
        self.refused = p.Gauge("batiste_rows_refused", "rows that are known to kill the engine", ["model"], **make)
        self.reloads = p.Counter("batiste_reloads", "of models", ["outcome"], **make)
        self.drift = p.Gauge("batiste_drift", "population stability index against the reference",
                             ["model", "tensor"], **make)  # fmt: skip

    def answered(self, path: str, status: int, seconds: float) -> None:
        """Counts an answer. Only kinds of paths are told apart: a client cannot make new series."""
        route = next((kind for kind in ("infer", "chat/completions", "completions", "embeddings")
                      if path.endswith(f"/{kind}")), "other")  # fmt: skip
        self.requests.labels(route, str(status)).inc()
        self.latency.labels(route, str(status)).observe(seconds)

    def batch(self, model: str, rows: int, seconds: float) -> None:
        self.rows.labels(model).observe(rows)
        self.busy.labels(model).observe(seconds)

    def look(self, model: str, batcher: Any) -> None:
        programs = batcher.servable.programs()
        self.queued.labels(model).set(batcher.queued)
        self.up.labels(model).set(batcher.up)
        self.refused.labels(model).set(batcher.suspects.convicted)
        self.programs.labels(model).set(programs)
        self.late.labels(model).set(programs - batcher.compiled)

    def text(self) -> bytes:
        return self._text(self.registry)
