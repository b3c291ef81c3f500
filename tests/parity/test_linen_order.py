# SPDX-License-Identifier: Apache-2.0
"""Nested dicts of variables have their names in the order in which Flax has them: files of bytes depend on it."""

from __future__ import annotations

from importlib import import_module
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

FACES = ("batiste", "flax")
X = jnp.ones((2, 3))


def models(face: str) -> dict[str, type]:
    nn = import_module(f"{face}.linen")

    class Setup(nn.Module):  # the order of use is not that of the attributes
        def setup(self):
            self.b, self.a = nn.Dense(3), nn.Dense(3)
            self.z = nn.BatchNorm(use_running_average=False)
            self.p = self.param("p", nn.initializers.ones, (1, 3))

        def __call__(self, x):
            return self.b(self.z(self.a(x))) + self.p

    class Compact(nn.Module):  # variables come between the submodules
        @nn.compact
        def __call__(self, x):
            x = nn.Dense(3, name="z")(x) + self.param("b", nn.initializers.ones, (1, 3))
            x = nn.BatchNorm(use_running_average=False)(Setup(name="q")(x))
            count = self.variable("batch_stats", "count", lambda: jnp.zeros(()))
            count.value += 1
            return nn.remat(Setup)(name="g")(x)

    class Layer(nn.Module):
        @nn.compact
        def __call__(self, x, _):
            return Compact(name="m")(Setup()(x)), None

    class Lifted(nn.Module):
        @nn.compact
        def __call__(self, x):
            axes = {"variable_axes": {"params": 0, "batch_stats": 0}, "split_rngs": {"params": True}}
            x, _ = nn.scan(Layer, length=2, **axes)(name="layers")(nn.Dense(3)(x), None)
            x = nn.jit(Compact)(name="j")(nn.Dense(3, name="zz")(x))
            return nn.vmap(Setup, in_axes=None, axis_size=2, **axes)(name="v")(x)

    return {"setup": Setup, "compact": Compact, "lifted": Lifted}


def backwards(tree: Any) -> Any:
    return {name: backwards(tree[name]) for name in reversed(tree)} if isinstance(tree, dict) else tree


def names(tree: Any, path: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    return [p for n in tree for p in names(tree[n], (*path, n))] if isinstance(tree, dict) else [path]


@pytest.mark.parametrize("name", ["setup", "compact", "lifted"])
def test_names_come_as_they_are_first_written_or_given(name) -> None:
    ours, theirs = ([], [])
    for face, found in zip(FACES, (ours, theirs)):
        model = models(face)[name]()
        variables = model.init(jax.random.key(0), X)
        found.append(names(variables))
        for given in (variables, backwards(variables)):
            for mutable in (["batch_stats"], True):
                found.append(names(model.apply(given, X, mutable=mutable)[1]))
    assert ours == theirs


def test_a_table_may_be_made_by_a_subclass() -> None:
    def made(face: str) -> tuple[Any, Any]:
        nn = import_module(f"{face}.linen")

        class Shifted(nn.Embed):
            def setup(self):
                self.embedding = self.param("embedding", self.embedding_init, (self.num_embeddings + 2, self.features))

            def __call__(self, ids):
                return super().__call__(ids + 2)

        return Shifted(4, 3).init_with_output(jax.random.key(0), jnp.arange(4))

    jax.tree.map(np.testing.assert_array_equal, made("batiste"), made("flax"))
