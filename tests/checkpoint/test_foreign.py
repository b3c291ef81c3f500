# SPDX-License-Identifier: Apache-2.0
"""Checkpoints that Orbax and Flax programs wrote load; what is none of these is refused with one sort of error."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import flax.linen
import flax.nnx
import flax.serialization
import flax.training.train_state
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from batiste import checkpoint, linen, nnx
from batiste.training.train_state import TrainState
from tests.checkpoint.models import bits


def flax_state(seed: int) -> Any:
    dense = flax.linen.Dense(3)
    params = dense.init(jax.random.key(seed), jnp.ones((1, 2)))["params"]
    state = flax.training.train_state.TrainState.create(apply_fn=dense.apply, params=params, tx=optax.adam(1e-3))
    return state.apply_gradients(grads=jax.tree.map(jnp.ones_like, params))


def our_state(seed: int) -> TrainState:
    dense = linen.Dense(3)
    params = dense.init(jax.random.key(seed), jnp.ones((1, 2)))["params"]
    return TrainState.create(apply_fn=dense.apply, params=params, tx=optax.adam(1e-3))


def write_msgpack(path: Path, tree: Any) -> None:
    path.write_bytes(flax.serialization.to_bytes(tree))


def write_orbax(path: Path, tree: Any) -> None:
    orbax.checkpoint.v1.save(str(path), tree)


def write_orbax_before_v1(path: Path, tree: Any) -> None:
    with orbax.checkpoint.PyTreeCheckpointer() as writer:
        writer.save(path, tree)


@pytest.mark.parametrize("write", [write_msgpack, write_orbax, write_orbax_before_v1])
def test_a_train_state_of_flax_goes_on_in_ours(write: Any, tmp_path: Path) -> None:
    theirs = flax_state(0)
    write(tmp_path / "state", theirs)
    ours = checkpoint.load(tmp_path / "state", into=our_state(1))
    assert (ours.step, int(ours.opt_state[0].count)) == (1, 1)
    for one, other in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs)):
        np.testing.assert_array_equal(one, other)
    with pytest.raises(checkpoint.MismatchError, match=r"params/kernel +shape +float32.2,3. +float32.4,4"):
        checkpoint.load(tmp_path / "state", into={"params": {"kernel": jnp.ones((4, 4))}}, ignore=True)


def test_a_module_that_flax_and_orbax_saved_goes_into_ours(tmp_path: Path) -> None:
    def net(face: Any, seed: int) -> Any:
        rngs = face.Rngs(seed)
        return face.Sequential(face.Linear(2, 3, rngs=rngs), face.BatchNorm(3, rngs=rngs), face.Dropout(0.5, rngs=rngs))

    theirs, ours = net(flax.nnx, 0), net(nnx, 1)
    write_orbax(tmp_path / "state", flax.nnx.state(theirs))
    write_orbax(tmp_path / "pure", flax.nnx.to_pure_dict(flax.nnx.state(theirs)))
    for folder in ("state", "pure"):
        checkpoint.load(tmp_path / folder, into=ours)
        np.testing.assert_array_equal(ours.layers[0].kernel[...], theirs.layers[0].kernel[...])
        assert ours.layers[2].rngs.key[...] == theirs.layers[2].rngs.key[...]
        ours = net(nnx, 2)


def test_what_orbax_spread_over_devices_comes_to_any_number_of_them(tmp_path: Path) -> None:
    x = jnp.arange(16.0).reshape(8, 2)
    mesh = Mesh(np.array(jax.devices()[:4]), ("d",))
    write_orbax(tmp_path / "x", {"x": jax.device_put(x, NamedSharding(mesh, PartitionSpec("d")))})
    np.testing.assert_array_equal(checkpoint.load(tmp_path / "x", into={"x": x * 0})["x"], x)
    assert isinstance(checkpoint.load(tmp_path / "x")["x"], np.ndarray)


def test_keys_numbers_and_narrow_floats_of_orbax(tmp_path: Path) -> None:
    tree = {"key": jax.random.key(3), "n": 4, "f": 0.5, "name": "text", "b": jnp.ones(2, jnp.bfloat16)}
    zero = {"key": jax.random.key(0), "n": 0, "f": 0.0, "name": "", "b": jnp.zeros(2, jnp.bfloat16)}
    write_orbax(tmp_path / "x", tree)
    assert bits(checkpoint.load(tmp_path / "x", into=zero)) == bits(tree)
    assert checkpoint.peek(tmp_path / "x")["entries"]["key"] == "key<threefry2x32>[]"


def test_a_limit_holds_for_foreign_checkpoints(tmp_path: Path) -> None:
    write_orbax(tmp_path / "o", {"x": jnp.zeros(1000)})
    write_msgpack(tmp_path / "m", {"x": jnp.zeros(1000)})
    for path in (tmp_path / "o", tmp_path / "m"):
        with pytest.raises(checkpoint.CorruptError, match="more than max_bytes"):
            checkpoint.load(path, max_bytes=3999)


def test_what_nobody_wrote_is_refused(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "text").write_text("text")
    (tmp_path / "nothing").write_bytes(b"")
    (tmp_path / "pickle").write_bytes(b"\x80\x04\x95(cos\nsystem\n")
    write_orbax(tmp_path / "broken", {"x": jnp.zeros(10)})
    for file in (tmp_path / "broken").rglob("_METADATA"):
        file.write_bytes(b"")
    for name in ("empty", "text", "nothing", "pickle", "broken"):
        with pytest.raises(checkpoint.CorruptError, match="no checkpoint that can be read"):
            checkpoint.load(tmp_path / name)
