# SPDX-License-Identifier: Apache-2.0
"""Programs under `jax.pmap` (replicas, prefetching, uneven batches), scans over any axes, partial evaluation."""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.api_util import debug_info
from jax.core import ShapedArray
from jax.extend.linear_util import wrap_init
from jax.interpreters.partial_eval import PartialVal, trace_to_jaxpr_nounits
from jax.sharding import Mesh, NamedSharding, PartitionSpec

AXIS = "_device_put_sharded"


def _over_devices(devices: Sequence[Any] | None, axis_name: str) -> NamedSharding:
    """The first axis of an array over the devices; the local ones unless given."""
    mesh = Mesh(np.array(jax.local_devices() if devices is None else devices), (axis_name,))
    return NamedSharding(mesh, PartitionSpec(axis_name))


def replicate(tree: Any, devices: Sequence[Any] | None = None, axis_name: str = AXIS) -> Any:
    """x[...] -> x[devices, ...], a copy on each device."""
    sharding = _over_devices(devices, axis_name)

    def copies(x):
        x = jnp.asarray(x if isinstance(x, jax.Array) else np.asarray(x))
        return jax.device_put(jnp.broadcast_to(x[None], (sharding.mesh.size, *x.shape)), sharding)

    return jax.tree.map(copies, tree)


def unreplicate(tree: Any) -> Any:
    """x[devices, ...] -> x[...], the copy of the first device of this process.

    >>> unreplicate(replicate({"w": 2.0}))["w"].item()
    2.0
    """
    return jax.tree.map(lambda x: x.addressable_shards[0].data[0] if isinstance(x, jax.Array) else x[0], tree)


def pmean(xs: Any, axis_name: str) -> Any:
    """The mean over a mapped axis, of every array of a pytree."""
    return jax.tree.map(lambda x: lax.pmean(x, axis_name), xs)


def prefetch_to_device(
    iterator: Iterable[Any], size: int, devices: Sequence[Any] | None = None, axis_name: str = AXIS
) -> Iterator[Any]:
    """Yields batches x[devices, ...] that are put on the devices up to `size` ahead of their use."""
    sharding = _over_devices(devices, axis_name)
    batches = (jax.device_put(batch, sharding) for batch in iterator)
    ahead = deque(itertools.islice(batches, size))
    while ahead:
        yield ahead.popleft()
        ahead.extend(itertools.islice(batches, 1))


def partial_eval_by_shape(fn: Callable[..., Any], input_spec: Sequence[Any], *args: Any, **kwargs: Any) -> Any:
    """`fn(*inputs, *args, **kwargs)` of inputs of which only shapes are known.

    What does not depend on the inputs is computed; of the rest, shape and dtype are given.

    Args:
        input_spec: for each input a shape, a pair `(shape, dtype)`, or a `jax.ShapeDtypeStruct`; float32 unless given.

    >>> partial_eval_by_shape(lambda x: (x.shape[0], 2 * x), [(3, 4)])
    (3, ShapeDtypeStruct(shape=(3, 4), dtype=float32))
    """
    structures = []

    def flat(*inputs):
        leaves, structure = jax.tree.flatten(fn(*inputs, *args, **kwargs))
        structures.append(structure)
        return leaves

    specs = [_spec(spec) for spec in input_spec]
    unknown = [PartialVal.unknown(ShapedArray(spec.shape, spec.dtype)) for spec in specs]
    wrapped = wrap_init(flat, debug_info=debug_info("partial_eval_by_shape", fn, specs, {}))
    _, values, _ = trace_to_jaxpr_nounits(wrapped, unknown)

    def known(value):
        aval, constant = value
        return constant if aval is None else jax.ShapeDtypeStruct(aval.shape, aval.dtype)

    return jax.tree.unflatten(structures[0], [known(value) for value in values])


def _spec(spec: Any) -> jax.ShapeDtypeStruct:
    if hasattr(spec, "shape"):
        return jax.ShapeDtypeStruct(spec.shape, spec.dtype)
    shape, dtype = spec if len(spec) == 2 and isinstance(spec[0], Iterable) else (spec, jnp.float32)
    return jax.ShapeDtypeStruct(tuple(shape), dtype)


def scan_in_dim(
    body_fn: Callable[[Any, Any], tuple[Any, Any]],
    init: Any,
    xs: Any,
    axis: int | Sequence[int] = (0,),
    unroll: int | Sequence[int] = (1,),
    keepdims: bool = False,
) -> tuple[Any, Any]:
    """`(carry, ys)` of a scan over one or more axes of `xs`, the first of `axis` outermost.

    Args:
        unroll: how many steps are unrolled, for all axes or for each.
        keepdims: the slices keep the scanned axes, with size 1.

    >>> total, sums = scan_in_dim(lambda total, x: (total + x, total + x), 0, jnp.ones((2, 3), int), axis=(1, 0))
    >>> total.item(), sums.tolist()
    (6, [[1, 3, 5], [2, 4, 6]])
    """
    axes = (axis,) if isinstance(axis, int) else tuple(axis)
    unrolls = (unroll,) if isinstance(unroll, int) else tuple(unroll)
    unrolls = unrolls * len(axes) if len(unrolls) == 1 else unrolls
    front = tuple(range(len(axes)))

    def nested(carry, x, depth):
        if depth < len(axes):
            return lax.scan(lambda c, x: nested(c, x, depth + 1), carry, x, unroll=unrolls[depth])
        x = jax.tree.map(lambda leaf: jnp.expand_dims(leaf, axes), x) if keepdims else x
        carry, y = body_fn(carry, x)
        return carry, jax.tree.map(lambda leaf: jnp.squeeze(leaf, axes), y) if keepdims else y

    carry, ys = nested(init, jax.tree.map(lambda x: jnp.moveaxis(x, axes, front), xs), 0)
    return carry, jax.tree.map(lambda y: jnp.moveaxis(y, front, axes), ys)


def pad_shard_unpad(
    wrapped: Callable[..., Any],
    static_argnums: int | Sequence[int] = (0,),
    static_argnames: str | Sequence[str] = (),
    static_return: bool = False,
) -> Callable[..., Any]:
    """Gives a function of x[devices, batch, ...], such as a pmapped one, any x[batch, ...].

    The batch is filled up with zeros, shared among the local devices, and cut back in the result, which is of NumPy.
    The function made takes `min_device_batch=`, the least batch of one device, so that small batches compile once.

    Args:
        static_argnums, static_argnames: arguments that are passed as they are, such as the parameters.
        static_return: the result is returned as it is.
    """
    positions = (static_argnums,) if isinstance(static_argnums, int) else tuple(static_argnums)
    names = (static_argnames,) if isinstance(static_argnames, str) else tuple(static_argnames)

    def padded(*args, min_device_batch: int | None = None, **kwargs):
        batched = [arg for i, arg in enumerate(args) if i not in positions]
        batched += [arg for name, arg in kwargs.items() if name not in names]
        sizes = {np.shape(x)[0] for x in jax.tree.leaves(batched)}
        assert len(sizes) == 1, f"Inconsistent batch-sizes: {sizes}"
        (size,) = sizes
        devices = jax.local_device_count()
        each = max(-(-size // devices), min_device_batch or 0)

        def shared(x):
            filler = np.zeros((devices * each - size, *x.shape[1:]), x.dtype)
            return np.concatenate([x, filler]).reshape((devices, each, *x.shape[1:]))

        def whole(x):
            return x.reshape((-1, *x.shape[2:]))[:size]

        def share(arg, static):
            return arg if static else jax.tree.map(shared, arg)

        out = wrapped(
            *(share(arg, i in positions) for i, arg in enumerate(args)),
            **{name: share(arg, name in names) for name, arg in kwargs.items()},
        )
        return out if static_return else jax.tree.map(whole, jax.device_get(out))

    return padded
