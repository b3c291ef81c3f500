# SPDX-License-Identifier: Apache-2.0
"""Bundles that earlier releases wrote load and agree with their golden outputs.

`BATISTE_ACCEPT_BUNDLES=1 pytest tests/export/test_golden.py` writes those of this release, if there are none.
"""

from __future__ import annotations

import os
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from batiste.export import export, load_bundle, reexport
from batiste.version import __version__
from tests.export import builders

GOLDEN = Path(__file__).with_name("golden")
KEY = b"this key is no secret"
RELEASE = GOLDEN / __version__
CLASSIFIER = "tests.export.builders:classifier"

if os.environ.get("BATISTE_ACCEPT_BUNDLES") and not RELEASE.exists():
    export(builders.classifier(seed=1), {"tokens": "int32[batch, length] < 8"}, RELEASE / "classifier", key=KEY,
           limits={"length": 16}, labels=["a", "b", "c"], builder=CLASSIFIER)  # fmt: skip
    export(lambda weights, x, key: {"y": x * weights["w"].astype("float32") + jax.random.normal(key),
                                    "b": x.astype("bfloat16")},
           {"x": "float32[batch, 4]", "key": jax.random.key(0)}, RELEASE / "dtypes", buckets={"batch": (2, 4)},
           weights={"w": jnp.arange(-2, 2).astype(jnp.int4)[None]})  # fmt: skip
    export(lambda x: x + 0 * len(range(x.shape[0])), {"x": "float32[batch]"}, RELEASE / "fallback", limits={"batch": 4})

BUNDLES = sorted(path.parent for path in GOLDEN.glob("*/*/manifest.json"))


def test_there_is_one_of_this_release_and_they_are_small() -> None:
    assert {"classifier", "dtypes", "fallback"} <= {path.name for path in RELEASE.iterdir()}
    assert sum(path.stat().st_size for path in RELEASE.rglob("*.*")) < 50_000


@pytest.mark.parametrize("path", BUNDLES, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_a_bundle_of_a_release_gives_its_golden_outputs(path: Path) -> None:
    assert load_bundle(path).verify(tolerance=1e-5) <= 1e-5


CLASSIFIERS = [path for path in BUNDLES if path.name == "classifier"]


@pytest.mark.parametrize("path", CLASSIFIERS, ids=lambda path: path.parent.name)
def test_the_classifier_of_a_release_is_exported_anew(path: Path, tmp_path: Path) -> None:
    tokens = np.array([[1, 2, 3]], np.int32)
    new, old = reexport(path, tmp_path / "new", key=KEY), load_bundle(path, KEY)
    np.testing.assert_allclose(new(tokens=tokens)["logits"], old(tokens=tokens)["logits"], atol=1e-6)
