# SPDX-License-Identifier: Apache-2.0
"""Figures for Prometheus, of one server."""

from __future__ import annotations

from typing import Any

from batiste.graph.optional import need

SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)
ROWS = (1, 2, 4, 8, 16, 32, 64, 128)


ROUTES = ("infer", "chat/completions", "completions", "embeddings")


def route(path: str) -> str:
    """The kind of a path: there are few, whatever a client asks for."""
    return next((kind for kind in ROUTES if path.endswith(f"/{kind}")), "other")


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
        self.slots = p.Gauge("batiste_slots", "answers that can be written at a time", ["model"], **make)
        self.busy_slots = p.Gauge("batiste_slots_busy", "of them", ["model"], **make)
        self.jobs = p.Gauge("batiste_jobs_waiting", "for a slot", ["model"], **make)
        self.tokens = p.Counter("batiste_tokens", "read of prompts, and written", ["model", "kind"], **make)
        self.first = p.Histogram("batiste_first_token_seconds", "from the request to its first token", ["model"],
                                 buckets=SECONDS, **make)  # fmt: skip
        self.rounds = p.Histogram("batiste_round_seconds", "of reading prompts (prefill), of a step (decode)",
                                  ["model", "kind"], buckets=SECONDS, **make)  # fmt: skip
        self.reloads = p.Counter("batiste_reloads", "of models", ["outcome"], **make)
        self.drift = p.Gauge("batiste_drift", "population stability index against the reference",
                             ["model", "tensor"], **make)  # fmt: skip

    def answered(self, path: str, status: int, seconds: float) -> None:
        """Counts an answer. Only kinds of paths are told apart: a client cannot make new series."""
        self.requests.labels(route(path), str(status)).inc()
        self.latency.labels(route(path), str(status)).observe(seconds)

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

    def look_into(self, model: str, figures: Any) -> None:
        """What an engine of language does now."""
        self.slots.labels(model).set(figures.slots)
        self.busy_slots.labels(model).set(figures.live)
        self.jobs.labels(model).set(figures.waiting)

    def watcher(self, model: str) -> Watcher:
        """What such an engine tells of each round."""
        return Watcher(self, model)

    def text(self) -> bytes:
        return self._text(self.registry)


class Watcher:
    """Counts what the engine of one language model does."""

    def __init__(self, metrics: Metrics, model: str):
        sides = "prefill", "decode"
        self.first = metrics.first.labels(model).observe
        self._tokens = [metrics.tokens.labels(model, side) for side in sides]
        self._seconds = [metrics.rounds.labels(model, side) for side in sides]

    def read(self, tokens: int, seconds: float) -> None:
        """Pieces of prompts."""
        self._tokens[0].inc(tokens)
        self._seconds[0].observe(seconds)

    def wrote(self, tokens: int, seconds: float) -> None:
        """A step."""
        self._tokens[1].inc(tokens)
        self._seconds[1].observe(seconds)
