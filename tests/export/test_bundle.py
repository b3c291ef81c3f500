# SPDX-License-Identifier: Apache-2.0
"""Bundles: written and read, of any batch size; damaged, forged and misused ones are refused by name."""

from __future__ import annotations

import hashlib
import json
import random
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from batiste import nnx
from batiste.export import BundleError, export, load_bundle
from batiste.graph.errors import ArgumentError, DtypeError, ShapeError


class Model(nnx.Module):
    def __init__(self) -> None:
        self.linear = nnx.Linear(4, 2, rngs=nnx.Rngs(0))

    def __call__(self, x):
        return self.linear(x)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("export") / "bundle"
    export(Model(), {"x": ("batch, 4", "float32")}, path, key=b"secret")
    return path


def test_a_bundle_agrees_with_its_model_at_any_batch_size(folder: Path) -> None:
    bundle = load_bundle(folder, key=b"secret")
    bundle.verify()
    for batch in (1, 5):
        x = jnp.ones((batch, 4))
        np.testing.assert_allclose(bundle(x=x), Model()(x), atol=1e-5)


def test_a_plain_function(tmp_path: Path) -> None:
    export(lambda x: jnp.sin(x), {"x": ("n", "float32")}, tmp_path / "b")
    load_bundle(tmp_path / "b").verify()


def test_misuse_is_named(folder: Path) -> None:
    bundle = load_bundle(folder)
    with pytest.raises(ArgumentError, match="names"):
        bundle(y=jnp.ones((1, 4)))
    with pytest.raises(ShapeError, match="input x"):
        bundle(x=jnp.ones((1, 5)))
    with pytest.raises(DtypeError, match="input x"):
        bundle(x=jnp.ones((1, 4), jnp.int32))


def test_300_mutations_are_refused_by_their_digest(folder: Path) -> None:
    draw = random.Random(0)
    for _ in range(300):
        file = folder / draw.choice(["program.bin", "weights.safetensors", "golden.safetensors", "signature.json"])
        whole = file.read_bytes()
        at = draw.randrange(len(whole))
        file.write_bytes(whole[:at] + bytes([whole[at] ^ draw.randrange(1, 256)]) + whole[at + 1 :])
        with pytest.raises(BundleError, match="changed"):
            load_bundle(folder)
        file.write_bytes(whole)


def test_forged_and_linked_bundles_are_refused(folder: Path, tmp_path: Path) -> None:
    forged = tmp_path / "forged"
    forged.mkdir()
    for file in folder.iterdir():
        (forged / file.name).write_bytes(file.read_bytes())
    (forged / "program.bin").write_bytes(b"evil")
    digests = json.loads((forged / "manifest.json").read_text())
    digests["program.bin"] = hashlib.sha256(b"evil").hexdigest()
    (forged / "manifest.json").write_text(json.dumps(digests))
    with pytest.raises(BundleError, match="signed"):
        load_bundle(forged, key=b"secret")
    (forged / "program.bin").unlink()
    (forged / "program.bin").symlink_to(folder / "program.bin")
    with pytest.raises(BundleError, match=r"program\.bin"):
        load_bundle(forged)
