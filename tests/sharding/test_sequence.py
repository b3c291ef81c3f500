# SPDX-License-Identifier: Apache-2.0
"""Attention over divided positions: the numbers of undivided attention, and what travels for them."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from batiste import linen, nn
from batiste.graph.errors import ArgumentError, ShapeError
from batiste.sharding import count_collectives, gather_attention, ready_plan, ring_attention, use
from tests.sharding.decoder import assert_near, decoder, loss_and_grads, tokens

B, T, H, K, D = 4, 16, 4, 2, 8
keys = jax.random.split(jax.random.key(0), 5)
INPUTS = tuple(jax.random.normal(key, (B, T, heads, D)) for key, heads in zip(keys, (H, K, K)))
BIAS = jax.random.normal(keys[3], (H, T, T))
MASK = jax.random.bernoulli(keys[4], 0.6, (B, 1, T, T)) | jnp.eye(T, dtype=bool)[None, None]

CASES = {
    "plain": {},
    "causal": {"is_causal": True},
    "mask": {"mask": MASK},
    "keys": {"mask": MASK[:, :, :1]},
    "bias, causal": {"bias": BIAS, "is_causal": True},
}
MESHES = {"sequence": dict(sequence=8), "all": dict(data=2, sequence=2, tensor=2)}
FORWARD = {ring_attention: {"collective-permute": 2}, gather_attention: {"all-gather": 2}}
BACKWARD = {ring_attention: {"collective-permute": 4}, gather_attention: {"all-gather": 2, "reduce-scatter": 2}}


def outputs(attend, **options):
    """The result and its gradients, weighted so that they are not alike."""

    def f(*inputs):
        y, pull = jax.vjp(lambda *x: attend(*x, **options), *inputs)
        return y, pull(jnp.cos(jnp.arange(y.size, dtype=jnp.float32).reshape(y.shape)))

    return jax.jit(f)


@functools.cache
def whole(case):
    return outputs(nn.dot_product_attention, **CASES[case])(*INPUTS)


@pytest.mark.parametrize("attend", FORWARD)
@pytest.mark.parametrize(("axes", "case"), [("sequence", "plain"), ("sequence", "causal"), ("sequence", "keys"),
                                            ("all", "mask"), ("all", "bias, causal")])  # fmt: skip
def test_divided_attention_is_attention(attend, axes, case):
    plan = ready_plan(**MESHES[axes])
    place = NamedSharding(plan.mesh, P(plan.names["batch"], "sequence", plan.names["heads"]))
    with use(plan):
        f = outputs(attend, **CASES[case])
        inputs = jax.device_put(INPUTS, place)
        compiled = f.lower(*inputs).compile()
    assert_near(compiled(*inputs), whole(case), 2e-5)
    assert count_collectives(compiled) == BACKWARD[attend]
    assert all(x.sharding.spec[1] == "sequence" for x in jax.tree.leaves(compiled(*inputs)))


@pytest.mark.parametrize("attend", FORWARD)
def test_what_travels_forward(attend):
    plan = ready_plan(**MESHES["all"])
    with use(plan):
        inputs = jax.device_put(INPUTS, NamedSharding(plan.mesh, P("data", "sequence", "tensor")))
        assert count_collectives(jax.jit(attend).lower(*inputs).compile()) == FORWARD[attend]


def test_on_one_device_it_is_computed_in_one_block():
    assert_near(outputs(ring_attention, **CASES["causal"])(*INPUTS), whole("causal"), 2e-5)


def test_a_decoder_with_divided_positions():
    plan = ready_plan(data=2, sequence=4)
    with use(plan):
        model, batch = decoder(attention_fn=ring_attention), plan.shard_batch(tokens())
        compiled = loss_and_grads.lower(model, batch).compile()
    assert_near(compiled(model, batch), loss_and_grads(decoder(), tokens()))
    counts = count_collectives(compiled)
    assert counts.pop("collective-permute") == 4  # keys and values, forward and backward
    assert set(counts) == {"all-reduce"}  # no positions are gathered


def test_attention_of_the_functional_face():
    x = jax.random.normal(keys[0], (B, T, 16))
    whole = linen.MultiHeadDotProductAttention(num_heads=H)
    divided = linen.MultiHeadDotProductAttention(num_heads=H, attention_fn=ring_attention)
    variables, mask = whole.init(keys[1], x), linen.make_causal_mask(x[..., 0])
    plan = ready_plan(data=2, sequence=4)
    with use(plan):
        y = jax.jit(lambda v, x: divided.apply(v, x, mask=mask))(variables, plan.shard_batch(x))
    assert y.sharding.spec[:2] == ("data", "sequence")
    assert_near(y, whole.apply(variables, x, mask=mask))


def test_what_divided_attention_refuses():
    with pytest.raises(ArgumentError, match="has no weights to drop or to record"):
        ring_attention(*INPUTS, dropout_rate=0.5)
    with (
        use(ready_plan(sequence=8)),
        pytest.raises(ShapeError, match="positions of query cannot be divided"),
    ):
        ring_attention(*(x[:, :12] for x in INPUTS))
