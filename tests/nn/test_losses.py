# SPDX-License-Identifier: Apache-2.0
"""chunked_cross_entropy: the same numbers as the formula over all logits, in less memory."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from batiste.graph.errors import ArgumentError, ShapeError
from batiste.nn.losses import chunked_cross_entropy

X = jax.random.normal(jax.random.key(0), (2, 7, 8))
HEAD = jax.random.normal(jax.random.key(1), (8, 11))
LABELS = jax.random.randint(jax.random.key(2), (2, 7), 0, 11)
WEIGHTS = (jax.random.uniform(jax.random.key(3), (2, 7)) > 0.3).astype(jnp.float32)


def whole(x: jax.Array, head: jax.Array, z_loss: float) -> jax.Array:
    logits = x @ head
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, LABELS)
    return ((losses + z_loss * jax.nn.logsumexp(logits, -1) ** 2) * WEIGHTS).sum()


@pytest.mark.parametrize("chunks", [1, 4, 14, 20])
def test_loss_and_gradients_are_those_of_all_logits(chunks: int) -> None:
    def loss(x, head):
        return chunked_cross_entropy(x, head, LABELS, WEIGHTS, chunks=chunks, z_loss=1e-2).loss

    np.testing.assert_allclose(loss(X, HEAD), whole(X, HEAD, 1e-2), rtol=1e-5)
    for got, expected in zip(jax.grad(loss, (0, 1))(X, HEAD), jax.grad(whole, (0, 1))(X, HEAD, 1e-2)):
        np.testing.assert_allclose(got, expected, atol=1e-5)


def test_counts() -> None:
    sums = chunked_cross_entropy(X, HEAD, LABELS, WEIGHTS, chunks=3)
    assert sums.weight == WEIGHTS.sum()
    assert sums.correct == (((X @ HEAD).argmax(-1) == LABELS) * WEIGHTS).sum()


def test_the_logits_of_the_batch_never_exist() -> None:
    x, head, labels = jnp.zeros((1024, 16)), jnp.zeros((16, 4096)), jnp.zeros(1024, jnp.int32)

    def temporary(chunks: int) -> int:
        step = jax.jit(jax.grad(lambda x, head: chunked_cross_entropy(x, head, labels, chunks=chunks).loss, (0, 1)))
        return step.lower(x, head).compile().memory_analysis().temp_size_in_bytes

    assert temporary(16) < temporary(1) / 8


def test_tokens_stay_where_they_are_divided_among_devices() -> None:
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    divided = jax.NamedSharding(mesh, jax.P("data"))
    x, labels = jax.device_put((jnp.ones((8, 16, 4)), jnp.zeros((8, 16), jnp.int32)), divided)
    step = jax.jit(jax.value_and_grad(lambda x, head: chunked_cross_entropy(x, head, labels, chunks=4).loss, (0, 1)))
    text = step.lower(x, jnp.ones((4, 11))).compile().as_text()
    assert "all-reduce" in text, "of the sums, and of the head's gradient"
    assert not {name for name in ("all-gather", "all-to-all", "collective-permute") if name in text}


def test_bad_input() -> None:
    with pytest.raises(ShapeError, match=r"one label and one weight per token.*\(3,\)"):
        chunked_cross_entropy(X, HEAD, jnp.zeros(3, jnp.int32))
    with pytest.raises(ShapeError, match=r"head does not fit.*\(11, 8\).*\(8, vocabulary\)"):
        chunked_cross_entropy(X, HEAD.T, LABELS)
    with pytest.raises(ArgumentError, match="chunks"):
        chunked_cross_entropy(X, HEAD, LABELS, chunks=0)
