# SPDX-License-Identifier: Apache-2.0
"""State under threads, under pickling and copying, and in shapes that nobody expects."""

from __future__ import annotations

import copy
import functools
import os
import pickle
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import cloudpickle
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from batiste import checkpoint, nnx
from batiste.graph.errors import BatisteError
from tests.parity.layers import CASES

LONG = os.environ.get("BATISTE_FAULTS") == "long"
THREADS, OPERATIONS = 16, 10_000 if LONG else 160

# ---------------------------------------------------------------- threads


class Net(nnx.Module):
    def __init__(self, seed: int):
        rngs = nnx.Rngs(seed)
        self.layer, self.dropout = nnx.Linear(3, 2, rngs=rngs), nnx.Dropout(0.5, rngs=rngs)
        self.calls = nnx.Variable(jnp.array(0))

    def __call__(self, x: jax.Array) -> jax.Array:
        if not self.dropout.deterministic:
            self.calls[...] += 1
        return self.dropout(self.layer(x))


@nnx.jit
def called(model: Net, x: jax.Array) -> jax.Array:
    return model(x)


@jax.jit
def inferred(state: Any, x: jax.Array) -> jax.Array:
    return nnx.merge(DEFINITION, state)(x)


SHARED = Net(0)
SHARED.eval()
DEFINITION, SNAPSHOT = nnx.split(SHARED)
X = jnp.ones((4, 3))


def as_bytes(tree: Any) -> bytes:
    return b"".join(
        np.asarray(jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x).tobytes()
        for x in jax.tree.leaves(nnx.as_pure(tree))
    )


def test_threads_get_what_one_thread_gets(tmp_path: Path) -> None:
    """Init, calls under jit, inference of a snapshot, saving, mode flips of a shared model, in 16 threads."""
    expected = as_bytes(inferred(SNAPSHOT, X)), [as_bytes(nnx.state(Net(seed))) for seed in range(4)]

    def work(thread: int) -> int:
        mine, calls = Net(thread), 0
        for number in range(OPERATIONS):
            kind = number % 5 if number % 250 < 5 else (0, 2, 4)[number % 3]  # mostly what is fast
            if kind == 0:
                assert as_bytes(inferred(SNAPSHOT, X)) == expected[0]
            elif kind == 1:
                assert as_bytes(nnx.state(Net(number % 4))) == expected[1][number % 4]
            elif kind == 2:
                called(mine, X)
                calls += 1
            elif kind == 3:
                path = tmp_path / f"{thread}.ckpt"
                checkpoint.save(path, SNAPSHOT)
                assert as_bytes(checkpoint.load(path, into=SNAPSHOT)) == as_bytes(SNAPSHOT)
            else:
                (SHARED.train if number % 2 else SHARED.eval)()
        assert mine.calls[...] == calls
        return calls

    called(Net(0), X)
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        with ThreadPoolExecutor(THREADS) as pool:
            assert sum(pool.map(work, range(THREADS))) >= THREADS * OPERATIONS / 4
    finally:
        sys.setswitchinterval(interval)
        SHARED.eval()


class Counts(nnx.Module):
    def __init__(self):
        self.a, self.b = nnx.Variable(jnp.array(0)), nnx.Variable(jnp.array(0))


@pytest.mark.parametrize("donate", [None, 0])
def test_threads_that_update_one_object_follow_each_other(donate: int | None) -> None:
    """Through two functions, one of which may take its buffers; a third that only reads sees whole updates."""

    def count(by: int) -> Any:
        def counted(counts: Counts) -> None:
            counts.a[...] += by
            counts.b[...] += by

        return nnx.jit(counted, donate_argnums=donate)

    one, ten, counts = count(1), count(10), Counts()
    both = nnx.jit(lambda counts: jnp.stack([counts.a[...], counts.b[...]]))

    def work(thread: int) -> None:
        for number in range(OPERATIONS // 4):
            (one if (thread + number) % 2 else ten)(counts)
            if donate is None:
                a, b = both(counts)
                assert a == b

    for f in (one, ten, both):
        f(counts)
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        with ThreadPoolExecutor(4) as pool:
            list(pool.map(work, range(4)))
    finally:
        sys.setswitchinterval(interval)
    assert counts.a[...] == counts.b[...] == 11 + 4 * (OPERATIONS // 8) * 11


# ---------------------------------------------------------------- copies

WAYS: dict[str, Callable[[Any], Any]] = {
    "pickle": lambda x: pickle.loads(pickle.dumps(x)),
    "cloudpickle": lambda x: cloudpickle.loads(cloudpickle.dumps(x)),
    "copy": copy.copy,
    "deepcopy": copy.deepcopy,
    "clone": nnx.clone,
}


@functools.cache
def layers() -> dict[str, Any]:
    """One layer of each class of the parity table."""
    found: dict[str, Any] = {}
    for case in CASES:
        layer = case.build(nnx)
        if isinstance(layer, nnx.Module) and "pool" not in case.name:  # pooling is a function
            found.setdefault(type(layer).__name__, layer)
    return found


def restored(way: Callable[[Any], Any], x: Any) -> None:
    other = way(x)
    assert type(other) is type(x)
    assert as_bytes(nnx.state(other)) == as_bytes(nnx.state(x))
    assert jax.tree.structure(nnx.state(other)) == jax.tree.structure(nnx.state(x))


@pytest.mark.parametrize("way", WAYS)
def test_every_layer_survives_a_copy(way: str) -> None:
    table = layers()
    assert len(table) > 20
    for layer in table.values():
        restored(WAYS[way], layer)
    cell = WAYS[way](table["LSTMCell"])
    assert cell.gate_fn is jax.nn.sigmoid, "a compiled function goes by its name"


@pytest.mark.parametrize("way", WAYS)
def test_states_optimizers_and_ties_survive_a_copy(way: str) -> None:
    model = Net(3)
    model.tied = model.layer.kernel
    optimizer = nnx.Optimizer(Net(3), optax.sgd(0.1), wrt=nnx.Param) if way != "pickle" else nnx.Rngs(3)
    for x in (model, optimizer, nnx.Rngs(1, dropout=2)):
        restored(WAYS[way], x)
    other = WAYS[way](model)
    assert other.tied is other.layer.kernel
    state = WAYS[way](nnx.state(model))
    assert as_bytes(state) == as_bytes(nnx.state(model))


# ---------------------------------------------------------------- shapes that nobody expects


class Link(nnx.Module):
    def __init__(self, child: Any):
        self.child, self.w = nnx.data(child), nnx.Param(jnp.ones(2))


def uses(path: Path) -> dict[str, Callable[[Any], Any]]:
    return {
        "split and merge": lambda m: nnx.merge(*nnx.split(m)),
        "clone": nnx.clone,
        "deepcopy": copy.deepcopy,
        "pickle": lambda m: pickle.loads(pickle.dumps(m)),
        "jit": lambda m: nnx.jit(lambda m: m.w[...].sum())(m),
        "save": lambda m: (checkpoint.save(path / "x.ckpt", m), checkpoint.load(path / "x.ckpt", into=m)),
        "update": lambda m: nnx.update(m, nnx.state(m)),
    }


@pytest.mark.parametrize("use", list(uses(Path())))
def test_a_deep_model_and_a_model_that_holds_itself(use: str, tmp_path: Path) -> None:
    deep = None
    for _ in range(200):
        deep = Link(deep)
    cycle = Link(None)
    cycle.child = cycle
    for model in (deep, cycle):
        uses(tmp_path)[use](model)


def test_a_model_1000_levels_deep_is_walked_or_refused_with_one_error(tmp_path: Path) -> None:
    deep = None
    for _ in range(1000):
        deep = Link(deep)
    assert deep is not None
    assert sum(isinstance(x, nnx.Param) for _, x in nnx.iter_graph(deep)) == 1000
    assert "Link" in repr(deep) and len(list(nnx.iter_modules(deep))) == 1000
    deep.eval()
    for name, use in uses(tmp_path).items():
        if name in ("deepcopy", "pickle"):  # Python's own, of which the library knows nothing
            continue
        with pytest.raises(BatisteError, match="nested too deep"):
            use(deep)


@pytest.mark.parametrize("use", [jax.jit(lambda m: m.w[...].sum()), lambda m: jax.tree.map(jnp.negative, m)])
def test_a_model_that_holds_itself_is_no_tree(use: Any) -> None:
    cycle = Link(None)
    cycle.child = cycle
    with pytest.raises(BatisteError, match="holds itself, and so is no tree"):
        use(cycle)


def test_a_tree_of_many_leaves(tmp_path: Path) -> None:
    count = 10_000 if LONG else 2_000

    class Wide(nnx.Module):
        def __init__(self) -> None:
            self.parts = nnx.List(nnx.Param(np.full(1, i, np.float32)) for i in range(count))

    model = Wide()
    checkpoint.save(tmp_path / "x.ckpt", model)
    other = nnx.clone(model)
    for part in other.parts:
        part.set_value(np.zeros(1, np.float32))
    checkpoint.load(tmp_path / "x.ckpt", into=other)
    assert [float(part.get_value()[0]) for part in other.parts] == list(range(count))
    assert len(jax.tree.leaves(nnx.state(nnx.merge(*nnx.split(model))))) == count
