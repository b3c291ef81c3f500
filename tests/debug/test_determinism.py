# SPDX-License-Identifier: Apache-2.0
"""Fingerprints of values, the switch for reproducible runs, and the operations that have no order."""

from __future__ import annotations

import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from batiste import nnx
from batiste.debug import fingerprint, nondeterministic, reproducible
from batiste.graph.errors import ArgumentError


def test_a_fingerprint_changes_with_any_bit_and_says_where() -> None:
    a, b = (nnx.Sequential(nnx.Linear(2, 2, rngs=nnx.Rngs(0)), nnx.Dropout(0.5, rngs=nnx.Rngs(1))) for _ in range(2))
    assert str(fingerprint(a)) == str(fingerprint(b)) and not fingerprint(a).diff(fingerprint(b))
    assert set(fingerprint(a)) == {
        "layers/0/kernel", "layers/0/bias", "layers/1/rngs/key", "layers/1/rngs/count",
    }  # fmt: skip
    b.layers[0].bias[...] = b.layers[0].bias[...].at[1].set(np.float32(1e-45))
    assert list(fingerprint(a).diff(fingerprint(b))) == ["layers/0/bias"]
    assert str(fingerprint(a)) != str(fingerprint(b))
    assert fingerprint(a).table().splitlines()[-1].split() == ["all", str(fingerprint(a))]


@pytest.mark.parametrize(
    ("x", "y"),
    [
        (0.0, -0.0),
        (np.float32(1), np.float64(1)),
        (np.zeros(2), np.zeros((2, 1))),
        (jax.random.key(0), jax.random.key(1)),
    ],
)
def test_values_that_compare_equal_may_differ(x, y) -> None:
    assert fingerprint([x]).diff(fingerprint([y])) != {}
    assert fingerprint([x]) == fingerprint([x])


def test_a_fingerprint_is_the_same_in_another_process() -> None:
    program = (
        "import jax, numpy; from batiste.debug import fingerprint; print(fingerprint({'a': numpy.arange(5.), 'b': 1}))"
    )
    seen = {
        subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True,
                       env={**os.environ, "PYTHONHASHSEED": seed}).stdout for seed in "12"
    }  # fmt: skip
    assert seen == {f"{fingerprint({'a': np.arange(5.0), 'b': 1})}\n"}


def test_what_is_no_value_has_no_fingerprint() -> None:
    with pytest.raises(ArgumentError, match="at 0/a: got str"):
        fingerprint([{"a": "text"}])


def test_operations_without_an_order_are_named_with_their_part_and_line() -> None:
    class Net(nnx.Module):
        def __init__(self):
            self.embed = nnx.Embed(5, 3, rngs=nnx.Rngs(0))

        def __call__(self, ids):
            return jnp.sum(self.embed(ids))

    found = nondeterministic(nnx.jit(nnx.grad(lambda model, ids: model(ids))), Net(), jnp.array([1, 1]))
    assert [(x.operation, x.module) for x in found] == [("scatter-add", "embed (Embed)")]
    assert "test_determinism.py" in found[0].source and "atomics" in str(found[0])
    assert nondeterministic(Net(), jnp.array([1])) == []
    counted = lambda x, i: x.at[i].add(1)
    assert nondeterministic(counted, jnp.zeros(3, int), jnp.array([0])) == []
    assert nondeterministic(lambda x, i: x.at[i].add(1, unique_indices=True), jnp.zeros(3), jnp.array([0])) == []
    called = lambda x: jax.pure_callback(np.sin, x, x)
    assert "host" in nondeterministic(called, jnp.ones(2))[0].why


def test_the_switch_sets_and_restores() -> None:
    jax.devices()
    before = jax.config.jax_default_prng_impl, os.environ.get("XLA_FLAGS")
    jax.config.update("jax_default_prng_impl", "rbg")
    try:
        with reproducible() as notes:
            assert jax.config.jax_default_prng_impl == "threefry2x32" and jax.config.jax_threefry_partitionable
            assert isinstance(notes, list)
        assert jax.config.jax_default_prng_impl == "rbg"
    finally:
        jax.config.update("jax_default_prng_impl", before[0])
    assert os.environ.get("XLA_FLAGS") == before[1]


def test_the_flags_are_set_before_the_first_device_is_used() -> None:
    program = """
import os
from batiste.debug import reproducible
with reproducible() as notes:
    print(os.environ["XLA_FLAGS"], notes)
"""
    env = {**os.environ, "XLA_FLAGS": "--xla_cpu_enable_fast_math=false"}
    said = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=env)
    assert said.stdout.split("[")[0].split() == ["--xla_cpu_enable_fast_math=false", "--xla_gpu_deterministic_ops=true",
                                                 "--xla_gpu_autotune_level=0"], said.stderr  # fmt: skip
