# SPDX-License-Identifier: Apache-2.0
"""The ready plans: the numbers of one device, and nothing sent that need not be."""

from __future__ import annotations

import functools

import jax
import optax
import pytest
from jax.sharding import PartitionSpec as P

from batiste.graph import Param, Rngs, state
from batiste.graph.errors import ArgumentError
from batiste.sharding import (
    collectives,
    count_collectives,
    data_parallel,
    fsdp,
    fsdp_tensor,
    make_mesh,
    ready_plan,
    tensor_parallel,
    use,
)
from batiste.training.optimizer import Optimizer
from batiste.transforms.compile import jit
from tests.sharding.decoder import (
    LENGTH,
    WIDTH,
    Stacked,
    assert_near,
    decoder,
    loss_and_grads,
    tokens,
    train_step,
)

# In a block: the kernels of query, key, value, out, up, down, and the bias of up; besides, the table and the head.
MATRICES = 9
# Activations of the table, attention and MLP, and of their cotangents; three statistics of the divided logits; and the
# gradients, all in one.
TENSOR = 3 + 3 + 3 + 1
PLANS = {
    "data": (functools.partial(data_parallel), {"all-reduce": 1}),
    "fsdp": (functools.partial(fsdp, least=64), {"all-gather": MATRICES, "all-reduce": 1}),
    "data x fsdp": (functools.partial(fsdp, data=2, least=64), {"all-gather": MATRICES, "all-reduce": 1}),
    "tensor": (functools.partial(tensor_parallel, 4, data=-1), {"all-reduce": TENSOR}),
    # The table is looked up in divided columns, which then change places with the batch: two small ones more.
    "fsdp x tensor": (
        functools.partial(fsdp_tensor, 4, least=64),
        {"all-gather": MATRICES + 1, "all-reduce": TENSOR, "collective-permute": 1},
    ),
}


@functools.cache
def on_one_device():
    return loss_and_grads(decoder(), tokens())


@functools.cache
def program(name):
    plan, _ = PLANS[name]
    plan = plan()
    with use(plan):
        model, batch = decoder(), plan.shard_batch(tokens())
        return plan, model, batch, loss_and_grads.lower(model, batch).compile()


@pytest.mark.parametrize("name", PLANS)
def test_loss_and_gradients_are_those_of_one_device(name):
    _, model, batch, compiled = program(name)
    assert_near(compiled(model, batch), on_one_device())


@pytest.mark.parametrize("name", PLANS)
def test_what_travels(name):
    assert count_collectives(program(name)[-1]) == PLANS[name][1]


def test_no_parameter_is_gathered_where_its_parts_are_multiplied():
    shapes = {shape for c in collectives(program("tensor")[-1]) for shape in c.shapes}
    assert {(WIDTH, 4 * WIDTH), (4 * WIDTH, WIDTH)}.isdisjoint(shapes)


def test_the_layers_of_a_scan_are_gathered_one_by_one():
    whole = loss_and_grads(Stacked(Rngs(0), layers=5), tokens())
    plan = fsdp(least=128)
    with use(plan):
        model, batch = Stacked(Rngs(0), layers=5), plan.shard_batch(tokens())
        assert model.blocks.layers.up.kernel[...].sharding.spec == P(None, None, "fsdp")
        compiled = loss_and_grads.lower(model, batch).compile()
    assert_near(compiled(model, batch), whole)
    gathered = [shape for c in collectives(compiled) if c.kind == "all-gather" for shape in c.shapes]
    assert (WIDTH, 4 * WIDTH) in gathered
    assert not [shape for shape in gathered if shape[0] == len(model.blocks)]
    assert (tokens().shape[0], LENGTH, WIDTH) not in gathered  # the batch stays divided


def train(plan, steps=3):
    tx = optax.adam(1e-3, eps=1e-3)  # with a small eps its first steps are signs of gradients, and rounding shows
    if plan is None:
        model = decoder()
        optimizer, step, batch = Optimizer(model, tx, wrt=Param), jit(train_step), tokens()
        losses = [step(model, optimizer, batch) for _ in range(steps)]
        return model, optimizer, losses, step
    with use(plan):
        model = decoder()
        optimizer = Optimizer(model, tx, wrt=Param)
        step, batch = jit(plan.keep(train_step)), plan.shard_batch(tokens())
        losses = [step(model, optimizer, batch) for _ in range(steps)]
        return model, optimizer, losses, step


@pytest.mark.parametrize("name", ["fsdp x tensor"])
def test_training_is_that_of_one_device(name):
    plan = PLANS[name][0]()
    model, optimizer, losses, step = train(plan)
    one, its_optimizer, its_losses, _ = train(None)
    assert_near(losses, its_losses)
    assert_near(state(model, Param), state(one, Param))
    assert_near(state(optimizer), state(its_optimizer))
    for moment in (optimizer.opt_state[0].mu, optimizer.opt_state[0].nu):
        assert (
            moment["head"]["kernel"][...].sharding.spec == model.head.kernel[...].sharding.spec == P("fsdp", "tensor")
        )
    (program,) = step.programs.values()
    assert program._cache_size() == 1  # what came back stood where it came from


# ---------------------------------------------------------------- what the plans are made of
def test_axes_of_a_mesh_stand_in_the_order_of_what_they_send():
    mesh = make_mesh(tensor=2, pipeline=2, data=-1)
    assert dict(mesh.shape) == {"pipeline": 2, "data": 2, "tensor": 2}
    with pytest.raises(ArgumentError, match="does not hold 8 devices"):
        make_mesh(data=3)
    assert make_mesh(data=2, devices=jax.devices()[:2]).size == 2


def test_a_ready_plan_knows_its_axes():
    plan = ready_plan(data=2, expert=2, sequence=2)
    assert (plan.batch, plan.sequence, plan.fill) == (("data", "expert"), ("sequence",), ())
    with pytest.raises(ArgumentError, match="no ready plan knows what to do with the axis 'rows'"):
        ready_plan(rows=8)


def test_rules_and_names_of_ones_own_come_first():
    plan = fsdp_tensor(4, rules=(("up/kernel", ()),), names={"mine": "tensor"})
    assert plan.decide("0/up/kernel", (8, 8)).spec == P()
    assert plan.decide("0/gate/kernel", (8, 8)).spec == P(None, "tensor")
    assert plan.decide("x", (8, 8), {"out_sharding": ("mine", None)}).spec == P("tensor")


def test_attention_that_is_written_with_plain_linear_layers():
    plan = tensor_parallel(4, data=-1)
    assert plan.decide("blocks/layers/norm/scale", (3, 16)).spec == P()
    assert plan.decide("attn/q_proj/kernel", (16, 16)).spec == P(None, "tensor")
    assert plan.decide("attn/o_proj/kernel", (16, 16)).spec == P("tensor")
    assert plan.decide("attn/query/kernel", (16, 4, 4)).spec == P(None, "tensor")
    assert plan.decide("attn/out/kernel", (4, 4, 16)).spec == P("tensor")
    assert plan.decide("layers/attn/query/kernel", (3, 16, 4, 4)).spec == P(None, None, "tensor")


def test_counting():
    text = """
      %a = (f32[2,3]{1,0}, f32[4]{0}) all-reduce(%x, %y), channel_id=1
      %b = f32[8]{0} all-gather-start(%z), channel_id=2
      %c = f32[8]{0} all-gather-done(%b)
      ROOT %d = f32[] add(%all-reduce.1, %all-gather)
    """
    assert [(c.kind, c.shapes, c.elements) for c in collectives(text)] == [
        ("all-reduce", ((2, 3), (4,)), 10),
        ("all-gather", ((8,),), 8),
    ]
