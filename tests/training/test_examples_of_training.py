# SPDX-License-Identifier: Apache-2.0
"""The examples with several models or without data learn something within a few steps."""

from __future__ import annotations

import importlib
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"


def test_the_policy_learns_to_keep_the_pole_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(EXAMPLES)
    steps = importlib.import_module("reinforce").train(60)
    assert steps[-1] > 1.5 * steps[0]


def test_the_generator_comes_to_the_circle(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(EXAMPLES)
    gan = importlib.import_module("gan")
    noise = jnp.asarray(np.random.default_rng(1).normal(size=(500, gan.NOISE)), jnp.float32)
    before, _ = gan.train(0)
    after, losses = gan.train(400)
    far = [np.abs(np.linalg.norm(np.asarray(made(noise)), axis=-1) - 2).mean() for made in (before, after)]
    assert far[1] < 0.6 * far[0]
    assert set(losses) == {"critic", "generator"}
