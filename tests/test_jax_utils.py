# SPDX-License-Identifier: Apache-2.0
"""Replicas, prefetching, uneven batches, scans over any axes, partial evaluation."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from batiste import jax_utils


def test_a_replica_on_each_device_and_back() -> None:
    tree = {"w": jnp.arange(3), "b": 1.0, "key": jax.random.key(0)}
    replicas = jax_utils.replicate(tree)
    devices = jax.local_device_count()
    assert replicas["w"].shape == (devices, 3) and replicas["b"].dtype == jnp.float32
    assert len(replicas["w"].devices()) == devices
    back = jax_utils.unreplicate(replicas)
    assert back["w"].tolist() == [0, 1, 2] and back["b"] == 1.0 and (back["key"] == tree["key"])
    assert jax_utils.unreplicate(np.arange(6).reshape(2, 3)).tolist() == [0, 1, 2]


def test_replicas_on_chosen_devices_under_a_chosen_name() -> None:
    sharding = jax_utils.replicate(jnp.ones(2), jax.devices()[:2], axis_name="copies").sharding
    assert sharding.spec == PartitionSpec("copies") and len(sharding.device_set) == 2


def test_prefetching_stays_ahead_and_shards() -> None:
    pulled = []
    devices = jax.local_device_count()

    def batches():
        for i in range(4):
            pulled.append(i)
            yield {"x": np.full((devices, 2), i)}

    ahead = jax_utils.prefetch_to_device(batches(), 2)
    assert pulled == []
    first = next(ahead)
    assert pulled == [0, 1] and len(first["x"].devices()) == devices
    next(ahead)
    assert pulled == [0, 1, 2]
    assert [int(batch["x"][0, 0]) for batch in ahead] == [2, 3]
    assert list(jax_utils.prefetch_to_device(batches(), 0)) == []


def test_the_mean_over_a_mapped_axis() -> None:
    mean = jax.vmap(lambda x: jax_utils.pmean({"x": x}, "batch"), axis_name="batch")(jnp.arange(4.0))
    assert mean["x"].tolist() == [1.5] * 4


def test_partial_evaluation_knows_what_depends_on_shapes_only() -> None:
    def fn(x, y, scale=1):
        return {"zeros": jnp.zeros(x.shape[0], x.dtype), "rank": x.ndim, "product": x * y, "known": scale * y}

    out = jax_utils.partial_eval_by_shape(fn, [((3, 4), jnp.bfloat16)], jnp.bfloat16(2), scale=3)
    assert out["zeros"].tolist() == [0, 0, 0] and out["zeros"].dtype == jnp.bfloat16
    assert (out["rank"], out["known"]) == (2, 6)
    assert out["product"] == jax.ShapeDtypeStruct((3, 4), jnp.bfloat16)
    assert jax_utils.partial_eval_by_shape(jnp.sin, [jax.ShapeDtypeStruct((2,), jnp.float16)]).dtype == jnp.float16


@pytest.mark.parametrize("keepdims", [False, True])
@pytest.mark.parametrize(("axis", "unroll"), [(1, 1), ((0, 2), 1), ((2, 0), (2, 1)), (-1, 2), ((1, 0, 2), 1)])
def test_scans_over_axes_are_loops(axis, unroll, keepdims) -> None:
    xs = jnp.arange(24.0).reshape(2, 3, 4)

    def body(carry, x):
        return carry + x.sum(), x * carry

    carry, ys = jax_utils.scan_in_dim(body, 0.0, xs, axis, unroll, keepdims)
    axes = (axis,) if isinstance(axis, int) else axis
    expected, total = np.zeros(xs.shape), 0.0
    for position in np.ndindex(*(xs.shape[a] for a in axes)):
        place = [slice(None)] * 3
        for a, i in zip(axes, position):
            place[a] = i
        expected[tuple(place)] = xs[tuple(place)] * total
        total += float(xs[tuple(place)].sum())
    np.testing.assert_allclose(ys, expected)
    np.testing.assert_allclose(carry, total)


def test_what_the_body_of_a_scan_sees() -> None:
    shapes = []

    def body(carry, x):
        shapes.append(x.shape)
        return carry, None

    for keepdims in (False, True):
        assert jax_utils.scan_in_dim(body, 0.0, jnp.ones((2, 3, 4)), (0, 2), keepdims=keepdims)[1] is None
    assert set(shapes) == {(3,), (1, 3, 1)}


def test_any_batch_is_padded_shared_and_cut_back() -> None:
    shapes = []
    devices = jax.local_device_count()

    def double(scale, x, *, y):
        shapes.append(x.shape)
        return {"x": scale * x, "y": y["a"]}

    padded = jax_utils.pad_shard_unpad(double)
    x = np.arange(devices + 1, dtype=np.int8)
    out = padded(2, x, y={"a": jnp.ones((devices + 1, 3))})
    assert out["x"].tolist() == (2 * x).tolist() and out["x"].dtype == np.int8
    assert isinstance(out["y"], np.ndarray) and out["y"].shape == (devices + 1, 3)
    padded(2, x, y={"a": x}, min_device_batch=5)
    assert shapes == [(devices, 2), (devices, 5)]
    with pytest.raises(AssertionError, match="Inconsistent batch-sizes"):
        padded(2, x, y={"a": x[1:]})


def test_static_arguments_and_results_stay_as_they_are() -> None:
    padded = jax_utils.pad_shard_unpad(
        lambda x, *, mode: (x.shape, mode), static_argnums=(), static_argnames="mode", static_return=True
    )
    assert padded(np.ones(3), mode="train") == ((jax.local_device_count(), 1), "train")
