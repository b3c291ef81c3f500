# SPDX-License-Identifier: Apache-2.0
"""The table of a plan, all that is wrong with it at once, and the memory of a step before it runs."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P

from batiste import linen
from batiste.graph import Param, state
from batiste.graph.errors import ArgumentError
from batiste.sharding import Plan, data_parallel, explain_sharding, fsdp_tensor, make_mesh, memory_plan, use
from batiste.sharding.explain import device_bytes, size_text, table
from batiste.training.optimizer import Optimizer
from batiste.transforms.compile import jit
from tests.sharding.decoder import BATCH, LENGTH, decoder, tokens, train_step


def abstract():
    model = jax.eval_shape(decoder)
    return model, jax.eval_shape(lambda model: Optimizer(model, optax.adam(1e-3), wrt=Param), model)


# ---------------------------------------------------------------- explain
def test_a_table_without_a_model():
    plan = fsdp_tensor(4, least=64)
    found = explain_sharding(decoder, plan)
    row = found["blocks/0/up/kernel"]
    assert (row.shape, row.dtype, row.rule, row.spec) == ((16, 64), "float32", "path up/kernel", P("fsdp", "tensor"))
    assert row.bytes_per_device == 16 * 64 * 4 // 8
    assert found["blocks/0/before_attn/scale"].rule == "path scale"
    with use(plan):
        model = decoder()
    local = sum(x.addressable_shards[0].data.nbytes for x in jax.tree.leaves(state(model)))
    assert found.bytes_per_device == explain_sharding(model, plan).bytes_per_device == local
    text = str(found).splitlines()
    assert text[0].split() == ["parameter", "shape", "rule", "spec", "per", "device"]
    line = next(line for line in text if line.startswith("blocks/0/up/kernel"))
    assert line.split() == [
        "blocks/0/up/kernel",
        "float32[16,",
        "64]",
        "path",
        "up/kernel",
        "P('fsdp',",
        "'tensor')",
        "512",
        "B",
    ]
    assert text[-1].startswith(f"{len(found.rows)} values on fsdp=2 x tensor=4")


def test_the_table_of_optimizer_state_and_of_the_functional_face():
    plan = fsdp_tensor(4, least=64)
    _, optimizer = abstract()
    moment = explain_sharding(optimizer, plan)["opt_state/0/mu/blocks/0/up/kernel"]
    assert moment.spec == P("fsdp", "tensor")
    model = linen.Dense(64, name="up")
    found = explain_sharding(lambda: {"up": model.init(jax.random.key(0), jnp.ones((2, 16)))["params"]}, plan)
    assert found["up/kernel"].spec == P("fsdp", "tensor")


def test_all_problems_are_told_at_once_with_parameter_and_rule():
    plan = Plan(
        make_mesh(tensor=8),
        paths=(
            ("query/kernel", (None, "tensor", None)),
            ("embedding", ("tensor", "tensor")),
            ("{key,value,out}/kernel", ()),
            ("up/kernel", (None, "tensor")),
            ("down/kernel", ("tensor", None)),
        ),
    )
    with pytest.raises(ArgumentError, match="the plan does not fit the model, in 4 places") as error:
        explain_sharding(lambda: decoder(layers=2), plan)
    text = str(error.value)
    assert (
        "path embedding puts the mesh axis 'tensor' on dims 0 and 1, which cannot share it at embed/embedding" in text
    )
    assert "(2 times) path query/kernel spreads dim 1 over the 8 devices of tensor" in text
    assert "at blocks/*/attn/query/kernel: got shape (16, 4, 4), expected a multiple of 8" in text
    assert "no rule of the plan speaks of this parameter at head/kernel: got shape (16, 32)" in text
    assert "down" not in text


# ---------------------------------------------------------------- memory
@pytest.mark.parametrize("make_plan", [data_parallel, lambda: fsdp_tensor(4, least=64)], ids=["data", "fsdp x tensor"])
def test_the_memory_of_a_step_is_known_before_it_runs(make_plan):
    plan = make_plan()
    step = jit(plan.keep(train_step), donate_argnums=(0, 1))
    memory = memory_plan(step, plan, *abstract(), jax.ShapeDtypeStruct((BATCH, LENGTH), jnp.int32), limit=1 << 20)
    with use(plan):
        model = decoder()
        optimizer = Optimizer(model, optax.adam(1e-3), wrt=Param)
        said = step.lower(model, optimizer, plan.shard_batch(tokens())).compile().memory_analysis()
    needed = (said.argument_size_in_bytes + said.output_size_in_bytes - said.alias_size_in_bytes
              + said.temp_size_in_bytes)  # fmt: skip
    np.testing.assert_allclose(memory.total, needed, rtol=0.1)
    local = sum(x.addressable_shards[0].data.nbytes for x in jax.tree.leaves(state(model)))
    assert memory.parameters == memory.gradients == local
    assert 2 * local <= memory.optimizer <= 2 * local + 16
    assert memory.batch == BATCH * LENGTH * 4 // plan.sizes[plan.batch[0]]
    assert memory.fits
    assert "fits 1 MiB" in str(memory)


def test_a_step_that_does_not_fit():
    plan = data_parallel()
    memory = memory_plan(
        jit(train_step), plan, *abstract(), jax.ShapeDtypeStruct((BATCH, LENGTH), jnp.int32), limit=1000
    )
    assert not memory.fits
    assert memory.results > 0  # nothing is donated: old and new parameters stand side by side
    assert "does not fit 1e+03 B" in str(memory)
    with pytest.raises(ArgumentError, match="needs a compiled step"):
        memory_plan(train_step, plan, *abstract())


def test_the_memory_of_a_step_of_the_functional_face():
    model, tx, plan = linen.Dense(64, name="up"), optax.sgd(0.1, momentum=0.9), fsdp_tensor(4, least=64)

    def initial():
        params = {"up": model.init(jax.random.key(0), jnp.ones((2, 16)))["params"]}
        return {"params": params, "opt_state": tx.init(params)}

    @jax.jit
    def step(before, x):
        grads = jax.grad(lambda p: jnp.sum(model.apply({"params": p["up"]}, x) ** 2))(before["params"])
        updates, opt_state = tx.update(grads, before["opt_state"])
        return {"params": optax.apply_updates(before["params"], updates), "opt_state": opt_state}

    memory = memory_plan(step, plan, jax.eval_shape(initial), jax.ShapeDtypeStruct((8, 16), jnp.float32))
    assert memory.parameters == memory.optimizer == (16 * 64 + 64) * 4 // 8
    assert memory.batch == 8 * 16 * 4 // 2
    assert memory.limit == device_bytes(jax.devices()[0])


def test_sizes_are_written_for_people():
    assert [size_text(n) for n in (0, 1, 1023, 1024, 5 * 2**30)] == ["0 B", "1 B", "1.02e+03 B", "1 KiB", "5 GiB"]
    assert table([("a", "bb"), ("ccc", "d")]) == "a    bb\n-------\nccc  d"
