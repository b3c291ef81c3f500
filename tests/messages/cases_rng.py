# SPDX-License-Identifier: Apache-2.0
"""Wrong uses of random streams: `(name, function that provokes the error)`."""

from __future__ import annotations

from collections.abc import Callable

import jax
import numpy as np

from batiste import nnx


def split_streams() -> nnx.Rngs:
    return nnx.Rngs(params=0, dropout=1).split(4)


def draw_inside_from_outside() -> object:
    rngs = nnx.Rngs(0)
    return jax.jit(lambda: rngs.params())()


CASES: list[tuple[str, Callable[[], object]]] = [
    ("rngs-missing-stream", lambda: nnx.Rngs(params=0, noise=1).dropout()),
    ("rngs-missing-item", lambda: nnx.Rngs(params=0)["dropout"]),
    ("rngs-no-default", lambda: nnx.Rngs(params=0)()),
    ("rngs-of-nothing", lambda: nnx.Rngs().params()),
    ("rngs-seed-is-a-float", lambda: nnx.Rngs(0.5)),
    ("rngs-seed-is-a-numpy-int", lambda: nnx.Rngs(params=np.int32(3))),
    ("rngs-of-rngs", lambda: nnx.Rngs(nnx.Rngs(0))),
    ("rngs-of-a-variable", lambda: nnx.Rngs(nnx.Variable(jax.random.key(0)))),
    ("stream-drawn-after-split", lambda: split_streams().dropout()),
    ("stream-split-twice", lambda: nnx.split_rngs(split_streams(), splits=2)),
    ("stream-drawn-in-another-trace", draw_inside_from_outside),
    ("split-rngs-squeeze", lambda: nnx.split_rngs(nnx.Rngs(0), splits=2, squeeze=True)),
    ("with-rngs-two-rules", lambda: nnx.with_rngs(nnx.Rngs(a=0), split={"a": 2}, fork="a", graph_updates=False)),
    ("with-rngs-in-place", lambda: nnx.with_rngs(nnx.Rngs(0), split=2, graph=True, graph_updates=True)),
    ("reseed-a-split-stream", lambda: nnx.reseed(split_streams(), dropout=1)),
    ("reseed-unknown-policy", lambda: nnx.reseed(nnx.Rngs(0), policy="all", default=1)),
]
