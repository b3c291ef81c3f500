# SPDX-License-Identifier: Apache-2.0
"""The application of Ray Serve, all but Ray: what it is asked to deploy, and a replica that answers."""

from __future__ import annotations

import asyncio
import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from starlette.requests import Request

from batiste import export
from batiste.export import BundleError
from batiste.graph.errors import ArgumentError
from batiste.serve.ray import Replica, application

KEY = b"a secret of 16 bytes"


@pytest.fixture(scope="module")
def options(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    place = tmp_path_factory.mktemp("ray")
    export.export(lambda x: {"y": 2 * x}, {"x": "float32[batch, 2]"}, place / "b", key=KEY)
    (place / "key").write_bytes(KEY + b"\n")
    return {"path": str(place / "b"), "name": "double", "buckets": "1,4", "key_file": str(place / "key")}


def answer(replica: Replica, method: str, path: str, body: bytes = b"") -> tuple[int, dict[str, str], Any]:
    """As a proxy of Ray's asks."""

    async def asked() -> tuple[int, dict[str, str], Any]:
        parts = [{"type": "http.request", "body": body[:10], "more_body": True},
                 {"type": "http.request", "body": body[10:]}]  # fmt: skip

        async def receive() -> Any:
            if parts:
                return parts.pop(0)
            await asyncio.Event().wait()

        scope = {"type": "http", "method": method, "path": path, "headers": [], "query_string": b""}
        response = await replica(Request(scope, receive))
        content = b"".join([part async for part in response.body_iterator])
        headers = {key.decode(): value.decode() for key, value in response.raw_headers}
        return response.status_code, headers, json.loads(content)

    return asyncio.run(asked())


def test_a_replica_answers_and_refuses_as_the_server_does(options: dict[str, str]) -> None:
    replica = Replica(options)
    entry = {"name": "x", "shape": [3, 2], "datatype": "FP32", "data": list(range(6))}
    body = json.dumps({"inputs": [entry]}).encode()
    status, headers, found = answer(replica, "POST", "/v2/models/double/infer", body)
    assert status == 200 and headers["content-type"] == "application/json" and headers["x-request-id"]
    np.testing.assert_array_equal(found["outputs"][0]["data"], 2 * np.arange(6))
    assert answer(replica, "POST", "/v2/models/double/infer", b"{}" * 9)[0] == 400
    assert answer(replica, "GET", "/readyz")[::2] == (200, {"ready": True})
    replica.check_health()
    server = replica.server
    replica.__del__()
    assert server.gate.draining and answer(replica, "GET", "/v2/models")[0] == 503


def test_an_application_that_fails_keeps_nobody_waiting(options: dict[str, str]) -> None:
    replica = Replica(options)

    async def fails(scope: Any, receive: Any, send: Any) -> None:
        if scope["path"] == "/late":
            await send({"type": "http.response.start", "status": 200, "headers": []})
        raise OSError("no more")

    replica.app = fails
    for path in ("/early", "/late"):
        with pytest.raises(OSError, match="no more"):
            answer(replica, "GET", path)


def test_bundles_want_their_key(options: dict[str, str]) -> None:
    unsigned = {name: x for name, x in options.items() if name != "key_file"}
    with pytest.raises(ArgumentError, match="key_file=FILE"):
        Replica(unsigned)
    other = Path(options["path"]).parent / "other"
    other.write_bytes(b"another secret of more bytes")
    with pytest.raises(BundleError, match="signed"):
        Replica({**options, "key_file": str(other)})


def test_what_ray_is_asked_to_deploy(options: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[str, Any] = {}

    def deployment(kind: Any, **given: Any) -> Any:
        asked.update(given, kind=kind)
        return SimpleNamespace(bind=lambda *args: asked.update(args=args) or "bound")

    monkeypatch.setitem(sys.modules, "ray", SimpleNamespace())
    monkeypatch.setitem(sys.modules, "ray.serve", SimpleNamespace(deployment=deployment))
    assert application({**options, "replicas": "2", "grace": "5"}) == "bound"
    assert (asked["kind"], asked["name"], asked["num_replicas"]) == (Replica, "double", 2)
    assert asked["graceful_shutdown_timeout_s"] == 5.0 and asked["args"][0]["path"] == options["path"]
    with pytest.raises(ArgumentError, match=r"unknown options: got port"):
        application({**options, "port": "1"})
    with pytest.raises(ArgumentError, match="nothing to serve"):
        application({})
