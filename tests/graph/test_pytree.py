# SPDX-License-Identifier: Apache-2.0
"""Attributes: data or static, and what is refused."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from batiste import nnx
from batiste.graph.errors import TraceContextError


class Empty(nnx.Module):
    pass


SETTINGS = [1, None, "a", [1], lambda x: x, np.float32(1)]
ARRAYS = [np.ones(1), jnp.ones(1), jax.random.key(0)]


@pytest.mark.parametrize(("value", "expected"), [*((x, False) for x in SETTINGS), *((x, True) for x in ARRAYS)])
def test_data_is_recognised(value, expected):
    m = Empty()
    m.x = value
    assert m._pytree__nodes["x"] is expected is nnx.is_data(value)


@pytest.mark.parametrize("value", [[jnp.ones(1)], (jnp.ones(1),), {"a": [nnx.Param(1)]}])
def test_data_may_not_hide_in_plain_containers(value):
    m = Empty()
    with pytest.raises(ValueError, match="Found data"):
        m.x = value
    m.x = nnx.data(value)
    assert m._pytree__nodes["x"] and len(jax.tree.leaves(m)) == 1


def test_data_that_came_behind_the_back_is_found():
    class M(nnx.Module):
        def __init__(self):
            self.x = [1]
            self.x.append(nnx.Param(1))

    with pytest.raises(ValueError, match="Found unexpected data"):
        M()


def test_static_stays_static_and_data_stays_data():
    m = Empty()
    m.s, m.d = 1, jnp.ones(1)
    with pytest.raises(ValueError, match="static attribute 's'"):
        m.s = jnp.ones(1)
    m.d = None
    assert m._pytree__nodes == {"s": False, "d": True}
    m.s = nnx.data(jnp.ones(1))
    m.d = nnx.static(3)
    assert m._pytree__nodes == {"s": True, "d": False}
    with pytest.raises(ValueError, match="Found data in value"):
        m.e = nnx.static(jnp.ones(1))


def test_fields_say_what_they_are():
    @nnx.dataclass
    class D(nnx.Module):
        a: int = nnx.static()
        b: list = nnx.data(default_factory=list)
        c: int = 3

    d = D(1)
    assert d._pytree__nodes == {"a": False, "b": True, "c": False} and d.c == 3
    d.b.append(nnx.Param(1))
    assert len(jax.tree.leaves(d)) == 1


def test_slots_are_refused():
    with pytest.raises(TypeError, match="__slots__"):

        class S(nnx.Module):
            __slots__ = ("a",)


def test_an_object_is_no_pytree_but_a_graph():
    class Parts(nnx.Object):
        def __init__(self):
            self.parts = [nnx.Param(1), {"a": nnx.Param(2)}]

    o = Parts()
    assert jax.tree.leaves(o) == [o]
    assert nnx.to_flat_state(nnx.state(o)).paths == (("parts", 0), ("parts", 1, "a"))


@pytest.mark.parametrize(
    "change", [lambda m: setattr(m, "x", 1), lambda m: delattr(m, "y"), lambda m: m.parts.append(1)]
)
def test_a_captured_module_cannot_be_changed(change):
    class M(nnx.Module):
        def __init__(self):
            self.y, self.parts = 1, nnx.List()

    m = M()

    @jax.jit
    def f(x):
        change(m)
        return x

    with pytest.raises(TraceContextError, match="Cannot mutate"):
        f(1)
    assert m.y == 1 and not hasattr(m, "x") and len(m.parts) == 0


def test_list():
    parts = nnx.List([1, nnx.Param(2), 3])
    assert len(parts) == 3 and parts[-1] == 3 and parts[1:] == [parts[1], 3]
    parts.insert(0, "a")
    del parts[1]
    parts[1:2] = [7, 8]
    assert list(parts) == ["a", 7, 8, 3] and parts.pop() == 3 and parts.index(8) == 2
    with pytest.raises(IndexError):
        parts[9]


def test_dict():
    parts = nnx.Dict({"a": 1}, b=nnx.Param(2))
    parts["c"] = 3
    del parts["a"]
    assert list(parts) == ["b", "c"] and parts.c == 3 and "a" not in parts and dict(parts)["c"] == 3
    with pytest.raises(KeyError):
        parts["a"]
    with pytest.raises(TypeError, match="string"):
        parts[1] = 2


def test_sequential_without_callables_returns_its_arguments():
    model = nnx.Sequential()
    assert (model(1), model(1, 2), model(a=1), model()) == (1, (1, 2), {"a": 1}, None)


def test_sequential_spreads_tuples_and_dicts():
    model = nnx.Sequential(lambda x: (x, x + 1), lambda a, b: {"p": a, "q": b}, lambda p, q: p * q)
    assert model(2) == 6
    with pytest.raises(TypeError, match=r"Sequence\[1\]"):
        nnx.Sequential(lambda x: x, 3)(1)


def test_train_and_eval_reach_every_module():
    class M(nnx.Module):
        def __init__(self):
            self.deterministic, self.inner = False, nnx.List([Empty()])
            self.inner[0].use_running_average = False

    m = M()
    m.eval()
    assert m.deterministic and m.inner[0].use_running_average
    m.train()
    assert not m.deterministic and not m.inner[0].use_running_average
    with pytest.raises(ValueError, match="no_such"):
        m.set_attributes(no_such=1)


def test_an_object_takes_another_class():
    """As programs do that wrap the call of one model."""

    class Twice(nnx.Linear):
        def __call__(self, inputs, out_sharding=None):
            return 2 * super().__call__(inputs, out_sharding)

    layer = nnx.Linear(1, 1, rngs=nnx.Rngs(0))
    once = layer(jnp.ones((1, 1)))
    layer.__class__ = Twice
    assert type(layer) is Twice and "__class__" not in vars(layer)
    assert layer(jnp.ones((1, 1))) == 2 * once and type(nnx.clone(layer)) is Twice


def test_descriptors_of_a_class_set_themselves():
    class Celsius:
        def __get__(self, obj, cls=None):
            return obj.kelvin - 273

        def __set__(self, obj, value):
            obj.kelvin = value + 273

    class Room(nnx.Module):
        degrees = Celsius()
        kelvin: int

    room = Room()
    room.degrees = 20
    assert (room.kelvin, room.degrees) == (293, 20) and "degrees" not in vars(room)


def test_new_may_set_attributes():
    class Registered(nnx.Module):
        args: tuple

        def __new__(cls, *args):
            self = super().__new__(cls)
            self.args, self.scale = args, nnx.Param(2.0)
            return self

        def __init__(self, *args):
            self.count = len(args)

    made = Registered("a", "b")
    assert (made.args, made.count) == (("a", "b"), 2)
    assert list(nnx.state(made)) == ["scale"]
