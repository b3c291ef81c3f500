# SPDX-License-Identifier: Apache-2.0
"""The bridge: what stays the same object, what is refused, and how metadata travel."""

import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest

from batiste import linen, nnx
from batiste.errors import InvalidRngError, ModifyScopeVariableError, ScopeCollectionNotFound
from batiste.graph.errors import ArgumentError, CallError, RngError, StructureError
from batiste.linen.boxes import AxisMetadata, Partitioned, unbox
from batiste.nnx import bridge
from batiste.nnx.bridge.variables import (
    get_col_name,
    is_vanilla_variable,
    linen_vars_to_nnx_attrs,
    nnx_attrs_to_linen_vars,
    to_linen_var,
    to_nnx_var,
)

KEY = jax.random.key(0)
X = jnp.ones((2, 3))


class Named(AxisMetadata):
    """A box as a user may write it."""

    def __init__(self, value, names):
        self.value, self.names = value, names

    def unbox(self):
        return self.value

    def replace_boxed(self, val):
        return Named(val, self.names)

    def add_axis(self, index, params):
        return self

    def remove_axis(self, index, params):
        return self

    def to_nnx_metadata(self):
        return {"value": self.value, "out_sharding": self.names, "eager_sharding": False}

    @classmethod
    def from_nnx_metadata(cls, metadata):
        return cls(metadata["value"], metadata["out_sharding"])


class Normed(linen.Module):
    @linen.compact
    def __call__(self, x):
        return linen.BatchNorm(use_running_average=False, name="norm")(x)


class Dense(bridge.Module):
    features: int

    @bridge.compact
    def __call__(self, x):
        return x @ self.param("w", jax.nn.initializers.ones, (x.shape[-1], self.features))[...]


class Counting(nnx.Module):
    def __init__(self):
        self.count = nnx.BatchStat(jnp.zeros(()))

    def __call__(self, x):
        self.count[...] += 1
        return x * self.count


def test_the_functional_face_is_loaded_with_the_bridge_alone():
    program = "import sys, batiste.nnx as nnx; assert 'batiste.linen' not in sys.modules; nnx.bridge; "
    subprocess.run([sys.executable, "-c", program + "assert 'batiste.linen' in sys.modules"], check=True)


# ---------------------------------------------------------------- variables
def test_a_variable_without_metadata_is_its_value():
    assert is_vanilla_variable(nnx.Param(X)) and to_linen_var(nnx.Param(X)) is X
    assert to_nnx_var("params", X).type is nnx.Param


def test_metadata_travel_in_a_box_and_back():
    box = to_linen_var(nnx.Param(X, unit="m"))
    assert isinstance(box, bridge.NNXMeta) and box.unbox() is X and box.metadata["unit"] == "m"
    again = to_nnx_var("params", box)
    assert again.type is nnx.Param and again.unit == "m" and again.get_value() is X


def test_a_box_of_axis_names_comes_back_as_it_went():
    variable = to_nnx_var("params", Named(X, ("a", None)))
    assert variable.out_sharding == ("a", None) and variable.get_value() is X
    box = to_linen_var(variable)
    assert isinstance(box, Named) and box.names == ("a", None) and box.value is X


def test_a_box_of_another_type_of_variable_is_refused():
    with pytest.raises(StructureError, match=r"BatchStat.*Param"):
        to_nnx_var("params", bridge.NNXMeta(nnx.BatchStat, X, {}))


def test_a_box_without_metadata_for_variables_is_refused():
    class Closed(Named):
        to_nnx_metadata = property()

    with pytest.raises(ArgumentError, match="to_nnx_metadata"):
        to_nnx_var("params", Closed(X, ()))


def test_boxes_cross_jit_and_transforms():
    box = bridge.NNXMeta(nnx.Param, X, {"out_sharding": ("a", "b"), "unit": {"m": 1}})
    assert jax.jit(lambda box: jax.tree.map(lambda x: 2 * x, box))(box).metadata == box.metadata
    added = box.add_axis(0, {nnx.PARTITION_NAME: "layers"})
    assert added.get_partition_spec() == jax.P("layers", "a", "b")
    assert added.remove_axis(0, {nnx.PARTITION_NAME: "layers"}).metadata == box.metadata
    assert box.add_axis(0, {}).metadata == box.metadata
    assert bridge.NNXMeta(nnx.Param, X, {"sharding": ("a",)}).get_partition_spec() == jax.P("a")
    assert unbox({"w": box})["w"] is X and box.replace_boxed(3).value == 3


def test_trees_there_and_back():
    given = {"params": {"d": {"w": X}, "b": X}, "cache": {"d": {"k": X}}}
    attributes = linen_vars_to_nnx_attrs(given)
    assert attributes["d"]["k"].type is nnx.Cache
    assert jax.tree.all(jax.tree.map(lambda a, b: a is b, nnx_attrs_to_linen_vars(attributes), given))


@pytest.mark.parametrize("second", [{"d": {"w": X}}, {"d": X}, {"d": {"w": {"below": X}}}])
def test_one_path_in_two_collections_is_refused(second):
    with pytest.raises(StructureError, match="duplicate variable path"):
        linen_vars_to_nnx_attrs({"cache": second, "params": {"d": {"w": X}}})


def test_what_is_no_variable_is_refused():
    with pytest.raises(StructureError, match="Cannot infer collection name"):
        nnx_attrs_to_linen_vars({"d": {"w": X}})


def test_the_collection_is_the_first_key_of_a_path():
    ((path, _),) = jax.tree_util.tree_flatten_with_path({"params": {"w": 1}})[0]
    assert get_col_name(path) == "params"


# ---------------------------------------------------------------- ToNNX
def test_variables_stay_the_same_objects():
    m = bridge.ToNNX(Normed(), rngs=nnx.Rngs(0)).lazy_init(X)
    mean, norm = m.norm["mean"], m.norm
    m(X, mutable=["batch_stats"])
    assert m.norm is norm and m.norm["mean"] is mean and float(mean[0]) != 0
    assert bridge.lazy_init(m, X) is m and m.norm["mean"] is mean


def test_metadata_set_on_a_variable_outlast_a_call():
    m = bridge.ToNNX(Normed(), rngs=nnx.Rngs(0)).lazy_init(X)
    m.norm["mean"].set_metadata(unit="m")
    m(X, mutable=True)
    assert m.norm["mean"].unit == "m"


def test_collections_are_written_under_jit_and_grad():
    m = bridge.ToNNX(Normed(), rngs=nnx.Rngs(0)).lazy_init(X)

    @nnx.jit
    def step(m):
        return nnx.grad(lambda m: m(X, mutable=["batch_stats"]).sum())(m)

    grads = step(m)
    assert set(grads["norm"]) == {"bias", "scale"} and float(m.norm["mean"][0]) != 0


def test_new_collections_become_attributes():
    class Sows(linen.Module):
        def __call__(self, x):
            self.sow("intermediates", "seen", x)
            return x

    m = bridge.ToNNX(Sows())
    m(X)
    assert "seen" not in vars(m)
    m(X, mutable=["intermediates"])
    m(X, mutable=["intermediates"])
    assert isinstance(m.seen, nnx.Intermediate) and len(m.seen.get_value()) == 2


def test_variables_are_made_inside_a_transform():
    m = bridge.ToNNX(linen.Dense(2), rngs=nnx.Rngs(0))

    class Wrap(nnx.Module):
        def __init__(self):
            self.inner = m

        def __call__(self, x):
            return nnx.jit(lambda m, x: m(x))(self.inner, x)

    wrap = bridge.lazy_init(Wrap(), X)
    assert wrap.inner.kernel.shape == (3, 2) and wrap(X).shape == (2, 2)


def test_a_module_without_variables_says_what_is_missing():
    m = bridge.ToNNX(linen.Dense(2))
    with pytest.raises(ScopeCollectionNotFound):
        m(X)
    with pytest.raises(InvalidRngError, match="params"):
        m.lazy_init(X)
    m.lazy_init(X, rngs={"params": KEY})
    with pytest.raises(ModifyScopeVariableError):
        bridge.ToNNX(Normed(), rngs=nnx.Rngs(0)).lazy_init(X)(X)


def test_methods_are_found_and_other_names_are_not():
    m = bridge.ToNNX(linen.Embed(3, 2), rngs=nnx.Rngs(0)).lazy_init(jnp.array([0]))
    assert bridge.lazy_init(m.attend, jnp.ones((1, 2))).func.__self__ is m
    assert m.attend(jnp.ones((1, 2))).shape == (1, 3)
    with pytest.raises(AttributeError, match="'ToNNX' object has no attribute 'features'"):
        _ = m.features


def test_lazy_init_wants_a_module():
    with pytest.raises(ArgumentError, match="method of an NNX Module"):
        bridge.lazy_init(lambda x: x, X)


def test_objects_among_the_attributes_are_given_as_their_state():
    m = bridge.ToNNX(linen.Dense(2), rngs=nnx.Rngs(0)).lazy_init(X)
    m.extra = nnx.Linear(3, 2, rngs=nnx.Rngs(0))
    assert m(X).shape == (2, 2)
    m.setting = 3
    with pytest.raises(StructureError, match="Cannot infer collection name"):
        m(X)


def test_update_makes_what_is_not_there_yet():
    m = bridge.ToNNX(Normed())
    state = nnx.state(bridge.ToNNX(Normed(), rngs=nnx.Rngs(0)).lazy_init(X), nnx.Not(nnx.RngState))
    nnx.update(m, state)
    assert m.norm["scale"].shape == (3,)


# ---------------------------------------------------------------- ToLinen
def test_init_keeps_statistics_as_they_were():
    m = bridge.to_linen(Counting, skip_rng=True)
    variables = m.init(KEY, X)
    assert float(variables["batch_stats"]["count"]) == 0
    _, updates = m.apply(variables, X, mutable=["batch_stats"])
    assert float(updates["batch_stats"]["count"]) == 1


def test_what_has_no_place_in_the_object_is_named():
    m = bridge.to_linen(nnx.Linear, 3, 2)
    variables = m.init(KEY, X)
    with pytest.warns(UserWarning, match="unknown module paths in incoming state:\n  - below\n  - extra"):
        m.apply({"params": {**variables["params"], "extra": X, "below": {"w": X}}}, X)


def test_a_list_of_parts_is_found_again():
    class Parts(nnx.Module):
        def __init__(self, rngs):
            self.parts = nnx.List([nnx.Linear(3, 3, rngs=rngs), nnx.Linear(3, 3, rngs=rngs)])
            self.pair = nnx.data((nnx.Param(jnp.ones(3)), {"w": nnx.Param(jnp.ones(3))}))

        def __call__(self, x):
            return self.parts[1](self.parts[0](x)) * self.pair[0][None] * self.pair[1]["w"][None]

    m = bridge.to_linen(Parts)
    y, variables = m.init_with_output(KEY, X)
    assert jnp.array_equal(m.apply(variables, X), y)
    zeros = jax.tree.map(jnp.zeros_like, variables)
    assert not m.apply(zeros, X).any()


def test_metadata_function_makes_what_is_stored():
    m = bridge.to_linen(nnx.Linear, 3, 2, metadata_fn=lambda v: v.get_value() + 1)
    assert float(m.init(KEY, X)["params"]["bias"][0]) == 1


def test_methods_that_are_not_there():
    m = bridge.to_linen(nnx.Linear, 3, 2)
    variables = m.init(KEY, X)
    with pytest.raises(CallError, match="'3' must be a callable"):
        m.apply(variables, X, nnx_method=3)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = m.nothing
    with pytest.raises(AttributeError, match="no attribute 'kernel'"):
        _ = m.kernel


def test_a_class_takes_the_arguments_of_the_object():
    Linear = bridge.wrappers.to_linen_class(nnx.Linear, in_features=3)
    module = Linear(out_features=2, name="head")
    assert module.name == "head" and module.init(KEY, X)["params"]["kernel"].shape == (3, 2)

    class Plain(bridge.wrappers.to_linen_class(Counting, base_skip_rng=True)):
        """Needs no streams."""

    assert set(Plain().init(KEY, X)) == {"batch_stats"}


def test_functional_needs_init_first():
    with pytest.raises(StructureError, match="no structure yet"):
        bridge.functional(nnx.Linear)(3, 2).apply(nnx.State({}))


# ---------------------------------------------------------------- bridge modules
def test_parts_in_containers_are_bound():
    class Stack(bridge.Module):
        def setup(self):
            self.layers = nnx.List([Dense(3), Dense(3)])
            self.table = {"a": Dense(2)}

        def __call__(self, x):
            for layer in self.layers:
                x = layer(x)
            return self.table["a"](x)

    y, variables = Stack().init_with_output(0, X)
    assert set(variables["params"]) == {"layers", "table"} and set(variables["params"]["layers"]) == {0, 1}
    assert jnp.array_equal(Stack().apply(variables, X), y)


def test_fields_are_parts_and_shared_ones_stay_shared():
    class Twice(bridge.Module):
        a: Dense
        b: Dense

        def __call__(self, x):
            return self.b(self.a(x))

    shared = Dense(3)
    variables = Twice(shared, shared).init(0, X)
    assert set(variables["params"]) == {"a"} and shared.scope is None
    assert set(Twice(Dense(3), Dense(3)).init(0, X)["params"]) == {"a", "b"}


def test_a_part_called_twice_keeps_its_parameters():
    class Twice(bridge.Module):
        def setup(self):
            self.part = Wrap()

        def __call__(self, x):
            return self.part(x) - self.part(x)

    class Wrap(bridge.Module):
        @bridge.compact
        def __call__(self, x):
            return Dense(3)(x)

    y, variables = Twice().init_with_output(0, X)
    assert not y.any() and set(variables["params"]["part"]) == {"Dense_0"}


def test_priority_decides_under_which_name_a_shared_part_stands():
    class Alias(bridge.Module):
        @bridge.compact
        def __call__(self, x):
            self.A = Dense(3)
            return self.A(x)

    class Late(bridge.Module):
        def setup(self):
            self.a = Dense(3)
            self.b = self.a
            self.set_attr_priority("b", bridge.AttrPriority.HIGH)

        def __call__(self, x):
            return self.a(x)

    assert set(Alias().init(0, X)["params"]) == {"Dense_0"} and set(Late().init(0, X)["params"]) == {"b"}


def test_a_module_without_a_parent_is_not_a_part_until_it_is_assigned():
    class Free(bridge.Module):
        @bridge.compact
        def __call__(self, x):
            part = Dense(3, parent=None)
            assert part.scope is None
            self.mine = part
            return self.mine(x)

    assert set(Free().init(0, X)["params"]) == {"mine"}
    with pytest.raises(ArgumentError, match="'parent' can only be set to None, got int"):
        Dense(3, parent=3)


def test_what_is_running_is_known():
    seen = []

    class Outer(bridge.Module):
        @bridge.compact
        def __call__(self, x):
            seen.append((bridge.current_module() is self, bridge.current_context().in_compact, self.is_initializing()))
            Dense(3).init(0, x)
            assert isinstance(bridge.current_module(), Outer)
            return x

    Outer().apply({}, X)
    Outer().init(0, X)
    assert seen == [(True, True, False), (True, True, True)]
    assert bridge.current_module() is None and bridge.current_context() is None


def test_a_box_from_an_initialiser_becomes_metadata_and_a_box_again():
    class Boxed(bridge.Module):
        @bridge.compact
        def __call__(self):
            w = self.param("w", lambda key: Named(jnp.ones(3), ("a",)))
            v = self.variable("cache", "v", lambda: nnx.Cache(jnp.zeros(2), unit="m"))
            assert w.out_sharding == ("a",) and set(self.variables) == {"params", "cache"}
            return w[...].sum() + v[...].sum()

    y, variables = Boxed().init_with_output(0)
    assert isinstance(variables["params"]["w"], Named) and variables["cache"]["v"].metadata["unit"] == "m"
    assert float(Boxed().apply(variables)) == float(y) == 3


def test_given_variables_that_no_part_asks_for_are_kept():
    variables = Dense(2).init(0, X)
    given = {"params": {**variables["params"], "later": {"w": X}}}
    assert set(Dense(2).apply(given, X, mutable=True)[1]["params"]) == {"w", "later"}


@pytest.mark.parametrize(("call", "error", "message"), [
    (lambda: Dense(2)(X), ArgumentError, "Parameters must be initialized in `setup\\(\\)`"),
    (lambda: Dense(2).make_rng(), ArgumentError, "unbound"),
    (lambda: Dense(2).apply({}, X), RngError, "params"),
    (lambda: Dense(2).apply({}, method=lambda m: m.variable("cache", "v")), ArgumentError, "must be initialized"),
    (lambda: Asks().apply({}), ArgumentError, "does not exist"),
    (lambda: bridge.linen_in_bridge_mdl(linen.Dense(2)), ArgumentError, "only needed inside bridge Module"),
    (lambda: bridge.nnx_in_bridge_mdl(lambda rngs: nnx.Linear(2, 2, rngs=rngs)), ArgumentError, "only needed inside"),
])  # fmt: skip
def test_mistakes_are_named(call, error, message):
    with pytest.raises(error, match=message):
        call()


class Asks(bridge.Module):
    @bridge.compact
    def __call__(self):
        return self.variable("cache", "v")


def test_a_scope_can_be_copied():
    scope = bridge.Scope(nnx.Rngs(0), ["cache"])
    scope.initializing = True
    copy = scope.copy()
    assert copy.mutable == ("cache",) and copy.initializing and copy.rngs is not scope.rngs


def test_axis_names_of_an_initialiser_come_out_in_a_box():
    with nnx.use_eager_sharding(False):
        init = bridge.with_partitioning(jax.nn.initializers.ones, ("in", "out"))
        kernel = bridge.to_linen(nnx.Linear, 3, 2, kernel_init=init).init(KEY, X)["params"]["kernel"]
        assert isinstance(kernel, Partitioned) and kernel.names == ("in", "out")
        assert bridge.ToNNX(linen.Dense(2, kernel_init=lambda *_: kernel), rngs=nnx.Rngs(0)).lazy_init(
            X
        ).kernel.out_sharding == ("in", "out")
