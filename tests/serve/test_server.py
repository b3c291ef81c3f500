# SPDX-License-Identifier: Apache-2.0
"""The routes: metadata, answers, keys, limits, reloading, metrics, the page."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from starlette.testclient import TestClient

from batiste import export, nnx
from batiste.graph.errors import ArgumentError
from batiste.serve import Recorder, Servable, Server, samples, write_reference

from .stub import NAN, POISON, model


def asked(rows: list[list[float]]) -> dict[str, Any]:
    data = [n for row in rows for n in row]
    return {"inputs": [{"name": "x", "shape": [len(rows), 4], "datatype": "FP32", "data": data}]}


@pytest.fixture(scope="module")
def client() -> Iterator[TestClient]:
    server = Server([model()], most_bytes=4096).warm()
    yield TestClient(server.app())
    server.close(1)


def bundle(path: Path, seed: int) -> Path:
    linear = nnx.Linear(4, 3, rngs=nnx.Rngs(seed))
    export.export(linear, {"x": "float32[batch, 4]"}, path)
    return path


def test_metadata_in_the_words_of_the_protocol(client: TestClient) -> None:
    about = client.get("/v2/models/double").json()
    assert about["inputs"] == [{"name": "x", "datatype": "FP32", "shape": [-1, 4]}]
    assert client.get("/v2/models/double/versions/1").json() == about
    assert client.get("/v2").json()["extensions"] == ["binary_tensor_data"]
    for path in ("/livez", "/readyz", "/v2/health/live", "/v2/health/ready", "/v2/models/double/ready"):
        assert client.get(path).status_code == 200
    for path in ("/v2/models/none", "/v2/models/double/versions/2", "/v2/models/none/infer", "/../etc/passwd", "/v3"):
        assert client.get(path).status_code in (404, 405), path


def test_answers_and_refusals(client: TestClient) -> None:
    answer = client.post("/v2/models/double/infer", json=asked([[1, 2, 3, 4]]), headers={"x-request-id": "mine"})
    assert answer.status_code == 200 and answer.headers["x-request-id"] == "mine"
    assert answer.json()["outputs"][0]["data"] == [2, 4, 6, 8]
    for rows, status in (([[POISON] * 4], 500), ([[NAN] * 4], 500), ([[1.0] * 4] * 5, 422)):
        refused = client.post("/v2/models/double/infer", json=asked(rows))
        assert refused.status_code == status
        assert set(refused.json()) == {"error"} and not re.search(
            r"secret|Traceback|/|batiste", refused.json()["error"]
        )
    assert client.post("/v2/models/double/infer", content=b"x" * 5000).status_code == 413
    assert client.post("/v2/models/double/infer", content=iter([b"x" * 3000] * 2)).status_code == 413
    late = client.post("/v2/models/double/infer", json=asked([[1.0] * 4]), headers={"x-request-timeout": "x"})
    assert late.status_code == 400
    assert client.post("/v2/repository/models/double/load").status_code == 403


def test_keys_are_asked_for_everywhere_but_at_the_door() -> None:
    client = TestClient(Server([model()], keys=["one", "two"]).app())
    assert client.get("/livez").status_code == 200 and client.get("/readyz").status_code == 503, "not warm yet"
    for headers in ({}, {"x-api-key": "three"}, {"authorization": "Bearer "}, {"authorization": "Basic one"}):
        for path in ("/v2", "/metrics", "/"):
            assert client.get(path, headers=headers).status_code == 401
    assert client.get("/v2", headers={"authorization": "Bearer two"}).status_code == 200
    assert client.get("/v2", headers={"x-api-key": "one"}).status_code == 200
    with pytest.raises(ArgumentError, match="shows a key"):
        Server([model()], admin=True)
    with pytest.raises(ArgumentError, match="one name and version"):
        Server([model(), model()])


def test_metrics_count_and_nothing_compiles_while_serving(tmp_path: Path) -> None:
    served = Servable.of_bundle(bundle(tmp_path / "b", 0), "net", buckets={"batch": (1, 4)}, allow_unsigned=True)
    server = Server([served]).warm()
    client = TestClient(server.app())
    random = np.random.default_rng(0)
    for _ in range(30):
        n = int(random.integers(1, 7))
        assert client.post("/v2/models/net/infer", json=asked([[0.5] * 4] * n)).status_code == (200 if n <= 4 else 422)
    figures = client.get("/metrics").text
    assert 'batiste_programs{model="net"} 2.0' in figures
    assert 'batiste_programs_after_warming{model="net"} 0.0' in figures
    assert 'route="infer",status="200"' in figures
    server.close(1)


def test_samples_are_kept_and_drift_is_measured(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    reference = tmp_path / "reference.json"
    write_reference(reference, "double", {"inputs/x": random.normal(size=(1000, 4)), "outputs/y": np.zeros(9)})
    recorder = Recorder(tmp_path / "kept", share=1.0, reference=reference)
    server = Server([model()], recorder=recorder).warm()
    client = TestClient(server.app())
    for shift in (0.0, 3.0):
        for _ in range(30):
            rows = (random.normal(size=(4, 4)) + shift).tolist()
            assert client.post("/v2/models/double/infer", json=asked(rows)).status_code == 200
        recorder.flush()
        drift = {tensor: index for _, tensor, index in recorder.drift()}
        assert (drift["inputs/x"] > 0.25) == bool(shift)
    assert 'batiste_drift{model="double",tensor="inputs/x"}' in client.get("/metrics").text
    server.close(5)
    kept = list(samples(tmp_path / "kept"))
    assert len(kept) == 60
    for _, about, inputs, outputs in kept:
        assert about["model"] == "double"
        np.testing.assert_array_equal(outputs["y"], 2 * inputs["x"])
    assert drift["outputs/y"] > 0.25


def test_the_page_needs_nothing_from_elsewhere(client: TestClient) -> None:
    page = client.get("/").text
    assert "<title>" in page and not re.search(r"https?://|src=", page)


def test_a_server_says_what_it_is_not_ready_for() -> None:
    server = Server([model()])
    client = TestClient(server.app())
    assert client.get("/readyz").status_code == 503 and client.get("/livez").status_code == 200
    server.warm()
    assert client.get("/readyz").status_code == 200
    server.gate.draining = True
    assert client.get("/readyz").status_code == 503 and client.get("/livez").status_code == 200
    refused = client.post("/v2/models/double/infer", json=asked([[1.0] * 4]))
    assert refused.status_code == 503 and refused.headers["retry-after"] and refused.headers["connection"] == "close"
    server.close(1)


def test_a_model_of_jax_is_served_as_it_computes(tmp_path: Path) -> None:
    linear = nnx.Linear(4, 3, rngs=nnx.Rngs(0))
    server = Server([Servable.of_bundle(bundle(tmp_path / "b", 0), "net", allow_unsigned=True)]).warm()
    x = np.asarray(jax.random.normal(jax.random.key(1), (2, 4)))
    answer = TestClient(server.app()).post("/v2/models/net/infer", content=json.dumps(asked(x.tolist())))
    found = np.array(answer.json()["outputs"][0]["data"]).reshape(2, 3)
    np.testing.assert_allclose(found, linear(x), atol=1e-5)
    server.close(1)
