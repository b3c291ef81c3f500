# SPDX-License-Identifier: Apache-2.0
"""The pipeline: the numbers of one device, from stage to stage."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec as P

from batiste.graph import Rngs
from batiste.graph.errors import ShapeError
from batiste.sharding import count_collectives, pipeline, pipelined, ready_plan, use
from tests.sharding.decoder import Stacked, assert_near, loss_and_grads, tokens

LAYERS = {"kernel": jax.random.normal(jax.random.key(0), (8, 6, 6)) / 3, "bias": jnp.ones((8, 6)) / 5}
X = jax.random.normal(jax.random.key(1), (12, 6))


def block(p, x):
    return x + jnp.tanh(x @ p["kernel"] + p["bias"][None])


def one_by_one(layers, x):
    return functools.reduce(lambda x, i: block(jax.tree.map(lambda p: p[i], layers), x), range(8), x)


def outputs(run):
    return jax.jit(jax.value_and_grad(lambda layers, x: jnp.mean(jnp.square(run(layers, x))), (0, 1)))


@pytest.mark.parametrize("sizes", [dict(pipeline=8), dict(data=2, pipeline=4)], ids=["8", "data x 4"])
@pytest.mark.parametrize("microbatches", [1, 3])
def test_a_pipeline_is_its_layers_one_by_one(sizes, microbatches):
    plan = ready_plan(rules=(("**", ("layers", ...)),), **sizes)
    with use(plan):
        layers = plan.create(lambda: LAYERS)
        assert layers["kernel"].sharding.spec == P("pipeline")
        f = outputs(pipeline(block, microbatches=microbatches))
        x = plan.shard_batch(X)
        compiled = f.lower(layers, x).compile()
    assert_near(compiled(layers, x), outputs(one_by_one)(LAYERS, X))
    counts = count_collectives(compiled)
    # activations forward, cotangents backward; the last stage's results to all, and the gradient of x to all
    assert counts.pop("collective-permute") == 2
    assert set(counts) == {"all-reduce"}  # no layer's parameters leave their stage


def test_without_a_pipeline_axis_it_scans():
    f = outputs(pipeline(block, microbatches=3, remat=False))
    assert_near(f(LAYERS, X), outputs(one_by_one)(LAYERS, X))


class Piped(Stacked):
    def __call__(self, tokens):
        return self.head(pipelined(self.blocks.layers, self.embed(tokens), microbatches=2))


def test_the_layers_of_a_stack_go_through_a_pipeline():
    plan = ready_plan(data=2, pipeline=4, rules=(("blocks/layers/**", ("layers", ...)),))
    whole = loss_and_grads(Stacked(Rngs(0)), tokens())
    with use(plan):
        model, batch = Piped(Rngs(0)), plan.shard_batch(tokens())
        assert model.blocks.layers.up.kernel[...].sharding.spec == P("pipeline")
        assert_near(loss_and_grads(model, batch), whole)


def test_what_a_pipeline_refuses():
    with use(ready_plan(pipeline=8)):
        with pytest.raises(ShapeError, match="7 layers cannot be divided over the 8 stages"):
            pipeline(block, microbatches=2)(jax.tree.map(lambda p: p[:7], LAYERS), X)
        with pytest.raises(ShapeError, match="the batch cannot be cut into microbatches"):
            pipeline(block, microbatches=5)(LAYERS, X)
