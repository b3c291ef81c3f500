# SPDX-License-Identifier: Apache-2.0
"""Spans: of a request, its wait, its batch and its program; who called is continued, and the access log names it."""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Iterator

import pytest
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import StatusCode
from starlette.testclient import TestClient

from batiste.serve import Server
from batiste.serve.tracing import Tracing

from .stub import POISON, model

CALLER = "4bf92f3577b34da6a3ce929d0e0e4736"
PARENT = {"traceparent": f"00-{CALLER}-00f067aa0ba902b7-01", "x-request-id": "mine"}


@pytest.fixture(scope="module")
def spans() -> InMemorySpanExporter:
    return InMemorySpanExporter()


@pytest.fixture(scope="module")
def client(spans: InMemorySpanExporter) -> Iterator[TestClient]:
    provider = TracerProvider(shutdown_on_exit=False)
    provider.add_span_processor(SimpleSpanProcessor(spans))
    server = Server([model()], tracing=Tracing(provider)).warm()
    yield TestClient(server.app())
    server.close(1)
    provider.shutdown()


def ask(client: TestClient, first: float, **headers: str):
    entry = {"name": "x", "shape": [1, 4], "datatype": "FP32", "data": [first] * 4}
    return client.post("/v2/models/double/infer", json={"inputs": [entry]}, headers=headers)


def test_the_parts_of_a_request_stand_one_after_another(
    client: TestClient, spans: InMemorySpanExporter, caplog: pytest.LogCaptureFixture
) -> None:
    spans.clear()
    with caplog.at_level(logging.INFO, "batiste.serve.access"):
        answer = ask(client, 1.0, **PARENT)
    found = {span.name: span for span in spans.get_finished_spans()}
    assert set(found) == {"POST infer", "queue", "batch", "program"}
    request, queue, batch, program = (found[name] for name in ("POST infer", "queue", "batch", "program"))
    assert request.parent.span_id == 0x00F067AA0BA902B7 and f"{request.context.trace_id:032x}" == CALLER
    assert queue.parent == batch.parent == request.context and program.parent == batch.context
    assert request.start_time <= queue.start_time <= queue.end_time == batch.start_time <= program.start_time
    assert program.start_time <= program.end_time == batch.end_time <= request.end_time
    assert request.attributes["batiste.request.id"] == "mine"
    assert (request.attributes["http.response.status_code"], batch.attributes["batiste.batch.rows"]) == (200, 1)
    assert answer.headers["traceparent"] == f"00-{CALLER}-{request.context.span_id:016x}-01"
    (line,) = [json.loads(record.getMessage()) for record in caplog.records]
    assert (line["id"], line["trace"]) == ("mine", CALLER)


def test_what_fails_says_so_and_what_is_no_request_is_not_traced(
    client: TestClient, spans: InMemorySpanExporter
) -> None:
    spans.clear()
    assert ask(client, POISON).status_code == 500
    assert [client.get(path).status_code for path in ("/readyz", "/metrics", "/v2/none")] == [200, 200, 404]
    queue, batch, request, other = spans.get_finished_spans()
    assert (queue.name, batch.name, request.status.status_code) == ("queue", "batch", StatusCode.ERROR)
    assert other.name == "GET other" and other.status.status_code is StatusCode.UNSET
    assert not request.events, "no trace of the stack leaves the process here either"


@pytest.mark.parametrize("header", ["", "00-zz-1-01", "00-" + "0" * 32 + "-" + "0" * 16 + "-01", "x" * 3000])
def test_a_traceparent_that_is_none_begins_a_trace(client: TestClient, header: str) -> None:
    answer = ask(client, 1.0, traceparent=header)
    assert answer.status_code == 200 and answer.headers["traceparent"].split("-")[1] not in ("0" * 32, CALLER)


def test_without_opentelemetry_there_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "opentelemetry.trace", None)
    assert Tracing.found() is None
    server = Server([model()]).warm()
    answer = ask(TestClient(server.app()), 1.0, **PARENT)
    server.close(1)
    assert answer.status_code == 200 and "traceparent" not in answer.headers
