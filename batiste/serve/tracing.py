# SPDX-License-Identifier: Apache-2.0
"""Spans of OpenTelemetry: of each request, of its wait in the line, of its batch, and of the program in it.

request ── queue        a traceparent (W3C) that comes in is continued, and goes out with the answer
        └─ batch ── program
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from batiste.graph.optional import need
from batiste.version import __version__

from .metrics import route

if TYPE_CHECKING:
    from .batcher import Item


class Tracing:
    """What makes the spans; by the provider that the program has set, if none is given.

    Raises:
        ImportError: OpenTelemetry is not installed.
    """

    def __init__(self, provider: Any = None):
        self.trace = need("opentelemetry.trace", extra="tracing")
        self.tracer = self.trace.get_tracer("batiste.serve", __version__, tracer_provider=provider)
        found = need("opentelemetry.trace.propagation.tracecontext", extra="tracing")
        self.propagator = found.TraceContextTextMapPropagator()
        self.context_of = self.propagator.extract

    @classmethod
    def found(cls) -> Tracing | None:
        """None where OpenTelemetry is not installed: then tracing costs nothing."""
        with contextlib.suppress(ImportError):
            return cls()
        return None

    @contextlib.contextmanager
    def request(self, method: str, path: str, headers: Mapping[str, str], own: str) -> Iterator[Span]:
        """Around a request of the id `own`."""
        about = {"http.request.method": method, "url.path": path[:256], "batiste.request.id": own}
        with self.tracer.start_as_current_span(
            f"{method} {route(path)}", context=self.context_of(headers), kind=self.trace.SpanKind.SERVER,
            attributes=about,
        ) as span:  # fmt: skip
            yield Span(self, span)

    def computed(self, item: Item) -> None:
        """The spans of an item of the line that has been answered, or refused, inside of the request's."""
        offset = time.time_ns() - time.monotonic_ns()
        when = lambda seconds: round(1e9 * seconds) + offset
        end = when(time.monotonic())
        begun = when(item.begun)
        queue = self.tracer.start_span("queue", start_time=begun, attributes={"batiste.rows": item.rows})
        queue.end(when(item.taken) if item.taken else end)
        if not item.taken:
            return
        about = {"batiste.batch.id": item.batch[0], "batiste.batch.rows": item.batch[1]}
        batch = self.tracer.start_span("batch", start_time=when(item.taken), attributes=about)
        if item.ran:
            inside = self.trace.set_span_in_context(batch)
            program = self.tracer.start_span("program", context=inside, start_time=when(item.ran[0]))
            program.end(when(item.ran[1]))
        batch.end(when(item.ran[1]) if item.ran else end)


class Span:
    """The span of a request."""

    def __init__(self, tracing: Tracing, span: Any):
        self.tracing, self.span = tracing, span

    @property
    def id(self) -> str:
        """Of the trace, 32 digits."""
        return self.tracing.trace.format_trace_id(self.span.get_span_context().trace_id)

    def headers(self) -> dict[bytes, bytes]:
        """What goes out with the answer."""
        carrier: dict[str, str] = {}
        self.tracing.propagator.inject(carrier, self.tracing.trace.set_span_in_context(self.span))
        return {name.encode(): value.encode() for name, value in carrier.items()}

    def answered(self, status: int) -> None:
        self.span.set_attribute("http.response.status_code", status)
        if status >= 500:
            self.span.set_status(self.tracing.trace.StatusCode.ERROR)
