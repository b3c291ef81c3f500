# SPDX-License-Identifier: Apache-2.0
"""A plan in use: where values are born, where they end up, what it refuses."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from batiste import linen, nn
from batiste.graph import List, Module, Param, Rngs, Sequential, VariableMetadata, graphdef, make, state
from batiste.graph.errors import ArgumentError, ShapeError
from batiste.sharding import (
    Plan,
    constrain,
    constrain_batch,
    current_plan,
    fsdp,
    fsdp_tensor,
    get_partition_spec,
    make_mesh,
    ready_plan,
    tensor_parallel,
    use,
    with_partitioning,
)
from batiste.sharding.nursery import birth_program, computed
from batiste.training.optimizer import Optimizer
from batiste.transforms.batching import vmap
from batiste.transforms.compile import jit
from tests.sharding.decoder import assert_near, decoder

normal = jax.nn.initializers.normal()


def mesh(explicit=False):
    return make_mesh(data=2, tensor=4, explicit=explicit)


class Mlp(Module):
    def __init__(self, rngs, wide=64):
        self.up = nn.Linear(16, wide, rngs=rngs)
        self.drop = nn.Dropout(0.5, rngs=rngs)
        self.down = nn.Linear(wide, 16, rngs=rngs)

    def __call__(self, x):
        return self.down(nn.relu(self.up(x)))


MLP = (("up/kernel", (None, "tensor")), ("up/bias", ("tensor",)), ("down/kernel", ("tensor", None)))


def spec(x):
    return x[...].sharding.spec


# ---------------------------------------------------------------- birth
def test_a_model_is_made_where_it_will_live_with_the_numbers_of_one_device():
    one = Mlp(Rngs(0))
    with use(Plan(mesh(), paths=MLP)) as plan:
        model = Mlp(Rngs(0))
    assert (spec(model.up.kernel), spec(model.up.bias), spec(model.down.kernel)) == (P(None, "tensor"), P("tensor"),
                                                                                     P("tensor"))  # fmt: skip
    assert spec(model.down.bias) == spec(model.drop.rngs.key) == P()
    for x in jax.tree.leaves(state(model)):
        assert (x.sharding.mesh, x.committed) == (plan.mesh, True)
    jax.tree.map(np.testing.assert_array_equal, state(model, Param), state(one, Param))
    assert graphdef(model) == graphdef(one)  # and so is a checkpoint of it
    assert current_plan() is None


def program_of(init, shape, sharding):
    closed, out = jax.make_jaxpr(lambda key: init(key, shape, jnp.float32), return_shape=True)(jax.random.key(0))
    return birth_program(closed.jaxpr, jax.tree.structure(out), sharding)


def test_a_kernel_is_never_whole_on_a_device():
    plan = fsdp()
    shape, share = (1024, 512), 1024 * 512 * 4 // 8
    program = program_of(normal, shape, plan.birthplace(shape))
    memory = program.lower([], [jax.random.key(0)]).compile().memory_analysis()
    assert memory.output_size_in_bytes == share
    assert memory.temp_size_in_bytes <= 4 * share
    made = computed(normal, jax.random.key(0), shape, jnp.float32, plan.birthplace(shape))
    assert {s.data.nbytes for s in made.addressable_shards} == {share}


def test_the_bytes_of_a_model_are_divided():
    with use(fsdp(least=64)):
        model = nn.Linear(512, 256, rngs=Rngs(0))
    held = {}
    for leaf in jax.tree.leaves(state(model, Param)):
        for shard in leaf.addressable_shards:
            held[shard.device] = held.get(shard.device, 0) + shard.data.nbytes
    assert set(held.values()) == {(512 * 256 + 256) * 4 // 8}


def test_initialisers_that_do_the_same_share_a_program():
    place = fsdp().birthplace((8, 8))
    one, same, other = (program_of(jax.nn.initializers.normal(scale), (8, 8), place) for scale in (0.5, 0.5, 0.25))
    assert one is same
    assert one is not other


def test_initialisers_run_once_whatever_else_they_do():
    calls = []

    def counting(key, shape, dtype):
        calls.append(shape)
        return jnp.full(shape, len(calls), dtype)

    def looking(key, shape, dtype):
        return jnp.full(shape, float(jax.random.uniform(key)), dtype)

    def build():
        rngs = Rngs(0)

        def drawing(key, shape, dtype):
            return rngs.params.normal(shape, dtype)

        return [nn.Linear(8, 8, kernel_init=init, rngs=rngs) for init in (counting, counting, looking, drawing)]

    one, calls[:] = build(), []
    with use(fsdp(least=64)):
        model = build()
    assert calls == [(8, 8), (8, 8)]
    for a, b in zip(model, one):
        np.testing.assert_array_equal(a.kernel[...], b.kernel[...])
        assert spec(a.kernel) == P("fsdp")


def test_an_initialiser_that_hands_out_an_array_and_one_that_brings_metadata():
    table = np.arange(64.0, dtype=np.float32).reshape(8, 8)

    def given(key, shape, dtype):
        return VariableMetadata(jnp.asarray(table, dtype), metadata={"note": 3})

    class Given(Module):
        def __init__(self):
            self.table = make(Param, given, (8, 8), jnp.float32)
            self.direct = Param(jnp.ones((8, 8)))

    with use(fsdp(least=8)):
        model = Given()
    assert (spec(model.table), spec(model.direct), model.table.note) == (P("fsdp"), P("fsdp"), 3)
    np.testing.assert_array_equal(model.table[...], table)


def test_layers_made_by_vmap_and_in_a_compiled_function():
    with use(Plan(mesh(), paths=(("up/kernel", (..., None, "tensor")),), strict=False)):
        stacked = vmap(lambda key: Mlp(Rngs(key)))(jax.random.split(jax.random.key(0), 3))
        inside = jit(lambda: Mlp(Rngs(0)))()
    assert stacked.up.kernel.shape == (3, 16, 64)
    assert spec(stacked.up.kernel)[-1] == "tensor"
    assert spec(inside.up.kernel) == P(None, "tensor")
    assert_near(state(inside, Param), state(Mlp(Rngs(0)), Param))


def test_parts_that_are_made_before_the_whole_find_their_place_with_it():
    plan = tensor_parallel(
        4, data=-1, rules=(("layers/0/kernel", (None, "tensor")), ("layers/1/kernel", ("tensor", None)))
    )
    with use(plan):
        model = Sequential(nn.Linear(16, 64, rngs=Rngs(0)), nn.Linear(64, 16, rngs=Rngs(1)))
    assert (spec(model.layers[0].kernel), spec(model.layers[1].kernel)) == (P(None, "tensor"), P("tensor"))


def make_odd():
    with use(tensor_parallel(4, data=-1)):
        nn.Linear(16, 64, rngs=Rngs(0))  # is dropped, and needs no place
        return Odd(Rngs(0))


class Odd(Module):
    def __init__(self, rngs):
        self.layers = List([nn.Linear(16, 64, rngs=rngs)])


def test_a_parameter_without_a_place_is_an_error_at_the_end():
    with pytest.raises(ArgumentError, match="no rule of the plan speaks of this parameter at layers/0/kernel"):
        make_odd()


def test_optimizer_state_lives_where_its_parameters_do():
    with use(Plan(mesh(), paths=MLP, strict=False)):
        model = Mlp(Rngs(0))
        optimizer = Optimizer(model, optax.chain(optax.clip(1.0), optax.adam(1e-3)), wrt=Param)
        factored = Optimizer(model, optax.adafactor(1e-3, min_dim_size_to_factor=4), wrt=Param)
    adam = optimizer.opt_state[1][0]
    for moment in (adam.mu, adam.nu):
        assert spec(moment["up"]["kernel"]) == P(None, "tensor")
        assert spec(moment["down"]["kernel"]) == P("tensor")
    assert adam.count[...].committed
    assert all(leaf.sharding.mesh == mesh() for leaf in jax.tree.leaves(state(factored)))


def test_a_step_leaves_everything_where_it_found_it():
    plan = Plan(mesh(), paths=MLP, batch=("data",))

    class Noisy(Mlp):
        def __call__(self, x):
            return self.down(self.drop(nn.relu(self.up(x))))

    @jit
    @plan.keep
    def step(parts, x):
        y = parts["model"](x)
        parts["model"].up.kernel[...] += jnp.mean(y)
        return y

    with use(plan):
        model = Noisy(Rngs(0))
    before = [x.sharding for x in jax.tree.leaves(state(model))]
    one = Noisy(Rngs(0))
    x = jnp.ones((4, 16))
    np.testing.assert_allclose(step({"model": model}, plan.shard_batch(x)), one.down(one.drop(nn.relu(one.up(x)))),
                               atol=1e-5)  # fmt: skip
    assert [x.sharding for x in jax.tree.leaves(state(model))] == before
    assert int(model.drop.rngs.count[...]) == 1


# ---------------------------------------------------------------- axis names
class Named(Module):
    def __init__(self, rngs):
        self.kernel = Param(with_partitioning(normal, ("embed", "mlp"))(rngs.params(), (16, 64), jnp.float32))


@pytest.mark.parametrize("explicit", [False, True])
def test_axis_names_of_the_model_mean_what_the_plan_says(explicit):
    with use(Plan(mesh(explicit), names={"mlp": "tensor"}, paths=(("kernel", ("data", None)),))):
        model = Named(Rngs(0))
        assert spec(model.kernel) == P(None, "tensor")
        assert get_partition_spec(model).kernel.get_value() == P(None, "tensor")


def test_axis_names_of_the_layers_of_a_stack():
    def layer(rngs):
        return nn.Linear(16, 64, kernel_init=with_partitioning(normal, ("embed", "mlp")), rngs=rngs)

    with use(ready_plan(fsdp=2, pipeline=2, tensor=2, least=64)):
        stack = nn.Stack(layer, 4, rngs=Rngs(0))
    assert stack.layers.kernel.out_sharding == ("layers", "embed", "mlp")
    assert spec(stack.layers.kernel) == P("pipeline", "fsdp", "tensor")


def test_names_and_fill_go_together():
    plan = fsdp_tensor(4, least=64)
    assert plan.decide("kernel", (16, 64), {"out_sharding": ("embed", "mlp")}).spec == P("fsdp", "tensor")
    own = NamedSharding(plan.mesh, P("tensor"))
    assert plan.decide("kernel", (16, 64), {"out_sharding": own}) == (P("tensor"), "its own sharding")


def test_rules_that_a_parameter_brings_must_not_contradict_the_plan():
    plan = Plan(mesh(), names={"mlp": "tensor"})
    named = {"out_sharding": ("mine", None), "sharding_rules": (("mine", "data"),)}
    assert plan.decide("kernel", (16, 64), named).spec == P("data")
    with pytest.raises(ArgumentError, match=r"'mlp' means 'data' in the parameter's own sharding_rules"):
        plan.decide("kernel", (16, 64), {"out_sharding": ("mlp",), "sharding_rules": (("mlp", "data"),)})


def test_a_plan_uses_axes_of_its_mesh():
    with pytest.raises(ShapeError, match="a rule that fits has 1 entries, the value has 2 dims at a/kernel"):
        Plan(mesh(), paths=(("kernel", ("data",)),)).decide("a/kernel", (2, 2))
    for options in ({"fill": ("fsdp",)}, {"names": {"mlp": "model"}}, {"batch": ("rows",)}):
        with pytest.raises(ArgumentError, match="which the mesh has not"):
            Plan(mesh(), **options)
    with pytest.raises(ArgumentError, match="'model' in the rule for 'kernel' is no axis name"):
        Plan(mesh(), paths=(("kernel", ("model",)),))


# ---------------------------------------------------------------- batches and activations
def test_a_batch_is_divided_over_its_first_dims():
    plan = Plan(make_mesh(data=2, sequence=4), batch=("data",), sequence=("sequence",))
    batch = plan.shard_batch({"tokens": np.ones((4, 8)), "label": np.ones(4), "step": np.float32(1)})
    assert [x.sharding.spec for x in jax.tree.leaves(batch)] == [P("data"), P(), P("data", "sequence")]
    with pytest.raises(ShapeError, match="not divisible by the 2 devices"):
        plan.shard_batch(np.ones((3, 8)))


@pytest.mark.parametrize("explicit", [False, True])
def test_activations_are_constrained(explicit):
    plan = Plan(mesh(explicit), names={"mlp": "tensor"}, batch=("data",))

    @jax.jit
    def f(x):
        return constrain(2 * x, ("batch", ..., "mlp"))

    x = jnp.ones((4, 3, 8))
    with use(plan):
        assert f(x).sharding.spec == constrain(x, ("batch", ..., "mlp")).sharding.spec == P("data", None, "tensor")
        with pytest.raises(ArgumentError, match=r"'mpl' in constrain\('batch', 'mpl'\) is no axis name"):
            constrain(x, ("batch", "mpl"))
    assert constrain(x, ("anything",)) is x


def test_the_batch_alone_can_be_constrained():
    plan = Plan(mesh(), batch=("data",))
    with use(plan):
        y = jax.jit(constrain_batch)(jnp.ones((4, 8)))
        odd = jax.jit(constrain_batch)(jnp.ones((3, 8)))
    assert (y.sharding.spec[0], odd.shape) == ("data", (3, 8))
    assert constrain_batch(odd) is odd


@pytest.mark.parametrize("explicit", [False, True])
def test_axes_that_a_shard_map_handles_are_left_out(explicit):
    plan = Plan(mesh(explicit), names={"mlp": "tensor"}, batch=("data",))
    with use(plan):
        whole = jax.shard_map(lambda x: constrain(x, ("batch", "mlp")), in_specs=P("data"), out_specs=P("data"),
                              axis_names={"data"})  # fmt: skip
        x = plan.shard_batch(jnp.arange(32.0).reshape(4, 8))
        np.testing.assert_array_equal(jax.jit(whole)(x), x)


def test_explicit_axes_are_in_the_types_of_arrays():
    plan = Plan(mesh(explicit=True), paths=MLP, batch=("data",))
    with use(plan):
        model, x = Mlp(Rngs(0)), plan.shard_batch(jnp.ones((4, 16)))
        assert str(jax.typeof(model.up.kernel[...])) == "float32[16,64@tensor]"

        @jit
        def f(model, x):
            h = nn.relu(model.up(x))
            assert str(jax.typeof(h)) == "float32[4@data,64@tensor]"
            return model.down(h, out_sharding=P("data"))

        y = f(model, x)
    assert y.sharding.spec == P("data", None)
    np.testing.assert_allclose(y, Mlp(Rngs(0))(jnp.ones((4, 16))), atol=1e-6)


# ---------------------------------------------------------------- the functional face
class LinenMlp(linen.Module):
    @linen.compact
    def __call__(self, x):
        return linen.Dense(16, name="down")(linen.relu(linen.Dense(64, name="up")(x)))


def test_variables_of_the_functional_face_are_made_by_the_same_rules():
    plan, x, model = fsdp_tensor(4, least=64), jnp.ones((8, 16)), LinenMlp()
    variables = plan.create(model.init, jax.random.key(0), x)
    assert variables["params"]["up"]["kernel"].sharding.spec == P("fsdp", "tensor")
    assert variables["params"]["down"]["kernel"].sharding.spec == P("tensor", "fsdp")
    assert_near(variables, model.init(jax.random.key(0), x))
    opt_state = plan.create(optax.adam(1e-3).init, variables["params"])
    assert opt_state[0].mu["up"]["kernel"].sharding.spec == P("fsdp", "tensor")
    with use(plan):
        grads = jax.jit(jax.grad(lambda v, x: jnp.sum(model.apply(v, x) ** 2)))
        sharded = grads(variables, plan.shard_batch(x))
    assert_near(sharded, grads(model.init(jax.random.key(0), x), x))


class LinenNamed(linen.Module):
    @linen.compact
    def __call__(self, x):
        logical = linen.with_logical_partitioning(normal, ("embed", "mlp"))
        x = linen.Dense(64, kernel_init=logical, use_bias=False, name="a")(x)
        x = linen.with_logical_constraint(x, ("batch", "mlp"))
        direct = linen.with_partitioning(normal, ("tensor", None))
        return linen.Dense(16, kernel_init=direct, use_bias=False, name="b")(x)


def test_boxes_with_axis_names():
    plan, x, model = fsdp_tensor(4, least=64), jnp.ones((8, 16)), LinenNamed()
    variables = plan.create(model.init, jax.random.key(0), x)
    assert variables["params"]["a"]["kernel"].value.sharding.spec == P("fsdp", "tensor")
    assert variables["params"]["b"]["kernel"].value.sharding.spec == P("tensor", "fsdp")
    with use(plan):
        y = jax.jit(model.apply)(variables, plan.shard_batch(x))
    np.testing.assert_allclose(y, model.apply(model.init(jax.random.key(0), x), x), atol=1e-6)


def test_a_whole_model_in_one_program():
    plan = fsdp(least=64)
    model = plan.create(decoder)
    assert spec(model.head.kernel) == P(None, "fsdp")
    assert_near(state(model, Param), state(decoder(), Param))
