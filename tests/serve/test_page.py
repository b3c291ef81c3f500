# SPDX-License-Identifier: Apache-2.0
"""The page without a browser: whole, alone, and in step with the server; `browse.py` uses it in a real one."""

from __future__ import annotations

import re
from collections import Counter
from html.parser import HTMLParser

from starlette.testclient import TestClient

from batiste.serve import Server
from batiste.serve.server import PAGE

from .stub import model

TEXT = PAGE.read_text()
VOID = {"meta", "link", "input", "br"}


class Read(HTMLParser):
    """Tags, ids, labels and addresses; what is open at the end, or closed in another order."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.wrong: list[str] = []
        self.attributes: list[tuple[str, dict[str, str | None]]] = []
        self.script = ""
        self.feed(TEXT)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.attributes.append((tag, {**dict(attrs), "inside": " ".join(self.open)}))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if not self.open or self.open.pop() != tag:
            self.wrong.append(f"{tag} at {self.getpos()}")

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] == "script":
            self.script += data


PARSED = Read()


def test_every_tag_is_closed_and_every_id_is_one() -> None:
    assert not PARSED.wrong and not PARSED.open
    ids = Counter(found["id"] for _, found in PARSED.attributes if "id" in found)
    assert max(ids.values()) == 1
    used = set(re.findall(r'at\("(\w+)"\)', PARSED.script))
    assert used <= set(ids), used - set(ids)


def test_nothing_comes_from_elsewhere() -> None:
    addresses = [found[name] for _, found in PARSED.attributes for name in ("src", "href", "action") if name in found]
    assert addresses == ["data:,"]
    assert not re.search(r"https?:|//[a-z]|@import|url\(|\beval\b|innerHTML", TEXT)


def test_every_field_has_a_label() -> None:
    labelled = {found.get("for") for tag, found in PARSED.attributes if tag == "label"}
    for tag, found in PARSED.attributes:
        if tag in ("input", "select", "textarea"):
            assert "label" in (found["inside"] or "") or found["id"] in labelled, found


def test_what_the_script_asks_for_is_there() -> None:
    server = Server([model()]).warm()
    client = TestClient(server.app())
    shown = client.get("/")
    paths = set(re.findall(r"""(?:asked|fetch)\(["`](/[^"`$]*)""", PARSED.script))
    assert paths == {"/v2/models", "/v2/models/", "/metrics", "/readyz"}
    for path in paths - {"/v2/models/"}:
        assert client.get(path).status_code == 200, path
    about = client.get("/v2/models/double").json()
    assert {"name", "datatype", "shape"} <= set(about["inputs"][0]) and about["outputs"]
    entry = {"name": "x", "shape": [1, 4], "datatype": "FP32", "data": [0] * 4}
    assert client.post("/v2/models/double/infer", json={"inputs": [entry]}).status_code == 200
    figures = client.get("/metrics").text
    server.close(1)
    assert shown.text == TEXT and shown.headers["content-type"].startswith("text/html")
    wanted = set(re.findall(r"batiste_\w+", PARSED.script))
    assert wanted and all(re.search(rf"^{name}[ {{]", figures, re.M) for name in wanted), wanted
