# SPDX-License-Identifier: Apache-2.0
"""Objects of every shape that a graph can have, built with either library: the laws are tested over all of them."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp


def zoo(lib: Any) -> dict[str, Any]:
    """Fresh objects by name, made of `lib`'s classes (batiste.nnx or flax.nnx)."""

    class Layer(lib.Module):
        def __init__(self, n, m, scale=1.0):
            self.kernel = lib.Param(jnp.arange(n * m, dtype=jnp.float32).reshape(n, m) * scale)
            self.bias = lib.Param(jnp.zeros(m), note="b")
            self.n, self.m, self.f = n, m, jnp.tanh

        def __call__(self, x):
            return self.f(x @ self.kernel + self.bias)

    class Nothing(lib.Module):
        def __init__(self):
            self.size = 3

    class Stack(lib.Module):
        def __init__(self):
            self.layers = lib.List([Layer(2, 2, 0.1 * i) for i in range(12)])
            self.named = lib.Dict(first=Layer(2, 3), last=lib.BatchStat(jnp.ones(2)))

        def __call__(self, x):
            for layer in self.layers:
                x = layer(x)
            return x

    class Shared(lib.Module):
        def __init__(self):
            self.a = Layer(2, 2)
            self.b = self.a
            self.c = lib.List([self.a, Layer(2, 2, 0.5)])
            self.p = self.a.kernel

    class Cycle(lib.Module):
        def __init__(self):
            self.p = lib.Param(jnp.ones(2))
            self.me = lib.List([self])

    class Mixed(lib.Module):
        def __init__(self):
            self.array = jnp.arange(3.0)
            self.tree = lib.data({"a": (jnp.ones(1), lib.Param(jnp.zeros(2))), "n": None, "i": 4})
            self.settings = [1, 2, {"x": (3, "y")}]
            self.nothing = lib.data(None)
            self.rngs = lib.Rngs(0, params=1)

    class Plain(lib.Module, pytree=False):
        def __init__(self):
            self.parts = [lib.Param(jnp.ones(1)), {"x": lib.BatchStat(jnp.zeros(2))}]
            self.words = ("a", 1)

    return {
        "layer": Layer(2, 3),
        "nothing": Nothing(),
        "stack": Stack(),
        "shared": Shared(),
        "cycle": Cycle(),
        "mixed": Mixed(),
        "plain": Plain(),
        "variable": lib.Param(jnp.ones(2)),
        "tree": {"a": [Layer(2, 2)], "b": (jnp.ones(3),)},
        "rngs": lib.Rngs(3, dropout=4),
    }


NAMES = ("layer", "nothing", "stack", "shared", "cycle", "mixed", "plain", "variable", "tree", "rngs")
TREES = ("layer", "nothing", "stack", "mixed", "variable", "tree", "rngs")
