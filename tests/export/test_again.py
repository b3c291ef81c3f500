# SPDX-License-Identifier: Apache-2.0
"""A bundle is exported anew from its weights and the code of its model, whatever became of its program."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from batiste.export import ExpiredError, ExportError, GoldenError, export, load_bundle, reexport
from batiste.export.sealed import write_folder
from batiste.export.writing import FS
from batiste.graph.errors import ArgumentError
from tests.export import builders

KEY = b"a secret of 16 bytes"
NAME = "tests.export.builders:classifier"
TOKENS = np.array([[1, 2, 0], [3, 0, 0]], np.int32)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("again")
    (place / "words.json").write_text("{}")
    export(
        builders.classifier(classes=2, seed=7).logits, {"tokens": "int32[batch, length] < 8"}, place / "bundle",
        limits={"length": 16}, buckets={"batch": (2, 4)}, fixed={"scale": 2.0}, labels=["no", "yes"], key=KEY,
        tokenizer=place / "words.json", builder=NAME, config={"classes": 2},
    )  # fmt: skip
    return place / "bundle"


def test_all_is_as_before_but_the_program(folder: Path, tmp_path: Path) -> None:
    new, old = reexport(folder, tmp_path / "new", key=KEY), load_bundle(folder, KEY)
    same = {**vars(old.described), "environment": 0, "calling_convention": 0}
    assert {**vars(new.described), "environment": 0, "calling_convention": 0} == same
    np.testing.assert_array_equal(new(tokens=TOKENS)["logits"], old(tokens=TOKENS)["logits"])
    assert (tmp_path / "new" / "tokenizer.json").read_text() == "{}"
    load_bundle(tmp_path / "new", KEY).verify()


def test_linen_modules_and_functions(tmp_path: Path) -> None:
    x = np.ones((2, 4), np.float32)
    dense = builders.functional()
    variables = dense.init(jax.random.key(0), x)
    cases: list[tuple[Any, Any, str]] = [(dense, variables, "inputs"), (builders.scale, {"by": jnp.float32(3)}, "x")]
    for n, ((model, weights, name), builder) in enumerate(zip(cases, (builders.functional, builders.function))):
        old = export(model, {name: "float32[batch, 4]"}, tmp_path / f"old{n}", weights=weights)
        new = reexport(tmp_path / f"old{n}", tmp_path / f"new{n}", builder)
        np.testing.assert_array_equal(new(**{name: x})["output"], old(**{name: x})["output"])


def test_a_program_of_another_time_names_the_command(folder: Path, tmp_path: Path) -> None:
    files = {path.name: [path.read_bytes()] for path in folder.iterdir() if not path.name.startswith("manifest")}
    said = json.loads(files["bundle.json"][0])
    aged = {"convention": {**said, "calling_convention": 5}, "blob": said}
    for name, about in aged.items():
        files["bundle.json"] = [json.dumps(about).encode()]
        if name == "blob":
            files["program.bin"] = [b"what no JAX reads"]
        write_folder(FS, tmp_path / name, files, KEY, lambda part: None)
        with pytest.raises(ExpiredError, match=f"batiste reexport .*{name} --out"):
            load_bundle(tmp_path / name, KEY)(tokens=TOKENS)
        reexport(tmp_path / name, tmp_path / f"new-{name}", key=KEY).verify()


def test_code_that_a_bundle_names_is_not_run_for_nobody(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ArgumentError, match=r"names code to run.*\n.*builder='tests.export.builders:classifier'"):
        reexport(folder, tmp_path / "new")
    with pytest.raises(ArgumentError, match="names code"):
        reexport(folder, tmp_path / "new", key=KEY, allow_unsigned=True)
    assert reexport(folder, tmp_path / "new", NAME)


def test_a_builder_that_is_missing_or_of_another_model(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ArgumentError, match="cannot be imported"):
        reexport(folder, tmp_path / "new", "tests.export.builders:nothing")
    with pytest.raises(ArgumentError, match="no function"):
        reexport(folder, tmp_path / "new", "tests.export.builders:__doc__")
    with pytest.raises(ExportError, match=r"head/bias: float32\[2\] in the bundle, float32\[3\] in the model"):
        reexport(folder, tmp_path / "new", lambda classes: builders.classifier(3))
    export(lambda x: x, {"x": "float32[n]"}, tmp_path / "nameless")
    with pytest.raises(ArgumentError, match="does not name"):
        reexport(tmp_path / "nameless", tmp_path / "new")
    with pytest.raises(GoldenError, match="output output"):
        reexport(tmp_path / "nameless", tmp_path / "new", lambda: lambda x: x + 1)
    assert not (tmp_path / "new").exists()
