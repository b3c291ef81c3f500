# SPDX-License-Identifier: Apache-2.0
"""Lifted transforms: the same key gives the same variables; results, changed collections and gradients agree."""

from __future__ import annotations

import functools
import inspect
from typing import Any

import flax.linen
import jax
import jax.numpy as jnp
import pytest
from jax.nn import initializers

import batiste.linen
from tests.parity.case import Case, normal
from tests.parity.test_linen import assert_close, run

X, X_BTD = (normal(4, 3),), (normal(2, 5, 3),)
PARAMS = {"variable_axes": {"params": 0}, "split_rngs": {"params": True}}
draws = initializers.normal(1.0)


def block(lib: Any) -> Any:
    """A layer with parameters, statistics, randomness and something sown."""

    class Block(lib.Module):
        width: int = 3

        @lib.compact
        def __call__(self, x):
            x = lib.Dense(self.width)(x)
            x = lib.BatchNorm(use_running_average=False)(x)
            self.sow("seen", "mean", x.mean())
            return lib.Dropout(0.5, deterministic=False)(jnp.sin(x))

    return Block


def whole(make: Any) -> Any:
    """A model whose compact call is `make(lib)(self, x)`."""

    def build(lib: Any) -> Any:
        body = make(lib)

        class Model(lib.Module):
            @lib.compact
            def __call__(self, x):
                return body(self, x)

        return Model()

    return build


# ---------------------------------------------------------------- classes

LIFTS = {
    "vmap": dict(
        variable_axes={"params": 0, "batch_stats": 0, "seen": 0}, split_rngs={"params": True, "dropout": True}
    ),
    "remat": {},
    "jit": {},
    "fold_rngs": {},
}


def of_class(name: str, options: dict[str, Any]) -> Any:
    def make(lib: Any) -> Any:
        lifted = getattr(lib, name)(block(lib), **options)
        return lambda self, x: lifted(4)(x) + lifted(4, name="named")(x) if name == "vmap" else lifted(4)(x)

    return whole(make)


def of_method(name: str, options: dict[str, Any]) -> Any:
    def build(lib: Any) -> Any:
        class Model(lib.Module):
            @functools.partial(getattr(lib, name), **options)
            @lib.compact
            def __call__(self, x):
                return lib.Dense(2)(block(lib)()(x))

        return Model()

    return build


def of_function(name: str, options: dict[str, Any]) -> Any:
    def make(lib: Any) -> Any:
        def body(self, x):
            return lib.Dense(3)(block(lib)()(x))

        lifted = getattr(lib, name)(body, **options)

        def model(self, x):
            if name == "vmap":  # its module holds mapped variables only
                return lifted(self, x)
            return lib.Dense(2)(lifted(self, lib.Dense(3)(x)))

        return model

    return whole(make)


def of_setup(name: str, options: dict[str, Any]) -> Any:
    def build(lib: Any) -> Any:
        class Inner(lib.Module):
            def setup(self):
                self.first, self.second = lib.Dense(3), block(lib)()
                self.scale = self.param("scale", draws, (3,))

            def __call__(self, x):
                return self.second(self.first(x)) * self.scale[None]

        lifted = getattr(lib, name)(Inner, **options)

        class Model(lib.Module):
            def setup(self):
                self.inner = lifted()
                self.many = [lifted()]

            def __call__(self, x):
                return self.many[0](self.inner(x))

        return Model()

    return build


# ---------------------------------------------------------------- one model for each kind


def vmap_axes(lib: Any) -> Any:
    lifted = lib.vmap(lib.Dense, variable_axes={"params": 1}, split_rngs={"params": True}, in_axes=1, out_axes=2)
    return lambda self, x: lifted(4)(x)


def vmap_shared(lib: Any) -> Any:
    lifted = lib.vmap(lib.Dense, variable_axes={"params": None}, split_rngs={"params": False}, in_axes=(0,), out_axes=0)
    return lambda self, x: lifted(4)(x)


def vmap_two_arguments(lib: Any) -> Any:
    class Pair(lib.Module):
        @lib.compact
        def __call__(self, x, y):
            return {"out": lib.Dense(3)(x) + y, "y": y}

    lifted = lib.vmap(Pair, in_axes=(0, None), out_axes={"out": 0, "y": None}, **PARAMS)
    return lambda self, x: lifted()(x, x[0])["out"]


def vmap_methods(lib: Any) -> Any:
    class Coder(lib.Module):
        def setup(self):
            self.up, self.down = lib.Dense(6), lib.Dense(3)

        def encode(self, x):
            return self.up(x)

        def decode(self, x):
            return self.down(x)

        def __call__(self, x):
            return self.decode(self.encode(x))

    lifted = lib.vmap(Coder, methods=("encode", "decode"), **PARAMS)

    def model(self, x):
        coder = lifted()
        return coder.decode(jnp.sin(coder.encode(x)))

    return model


def vmap_methods_with_options(lib: Any) -> Any:
    class Coder(lib.Module):
        @lib.compact
        def encode(self, x):
            return lib.Dense(6)(x)

    own = {"in_axes": 1, **PARAMS}
    lifted = lib.vmap(Coder, methods={"encode": own})
    return lambda self, x: lifted().encode(x)


def vmap_of_vmap(lib: Any) -> Any:
    lifted = lib.vmap(
        lib.vmap(lib.Dense, **PARAMS), variable_axes={"params": 0}, split_rngs={"params": True}, in_axes=1
    )
    return lambda self, x: lifted(4)(x)


def remat_of_vmap(lib: Any) -> Any:
    return lambda self, x: lib.remat(lib.vmap(lib.Dense, **PARAMS))(4)(x)


def shared_field(lib: Any) -> Any:
    class User(lib.Module):
        table: Any

        @lib.compact
        def __call__(self, x):
            return lib.Dense(3)(self.table(x))

    def model(self, x):
        table = lib.Dense(3)
        return lib.jit(User)(table)(lib.remat(User)(table)(x)) + table(x)

    return model


def own_field(lib: Any) -> Any:
    class User(lib.Module):
        parts: Any

        @lib.compact
        def __call__(self, x):
            for part in self.parts["all"]:
                x = part(x)
            return x

    def model(self, x):
        return lib.remat(User)({"all": [lib.Dense(3), lib.relu, lib.Dense(2)]})(x)

    return model


def module_as_argument(lib: Any) -> Any:
    def apply_both(self, first, others, x):
        return lib.Dense(2)(first(x)) + others["b"](x)

    return lambda self, x: lib.remat(apply_both)(self, lib.Dense(3), {"b": lib.Dense(2)}, x)


def module_of_another_as_argument(lib: Any) -> Any:
    def call(dense, x, y):
        return dense(x) * y

    def model(self, x):
        dense = lib.Dense(3)
        return lib.vmap(call, variable_axes={"params": None}, split_rngs={"params": False})(dense, x, x)

    return model


def static_argument(lib: Any) -> Any:
    class Switched(lib.Module):
        @functools.partial(lib.remat, static_argnums=(2,))
        @lib.compact
        def __call__(self, x, twice):
            return 2 * lib.Dense(3)(x) if twice else lib.Dense(3)(x)

    return lambda self, x: Switched()(Switched()(x, True), False)


def keyword_argument(lib: Any) -> Any:
    class Switched(lib.Module):
        @lib.compact
        def __call__(self, x, scale):
            return lib.Dense(3)(x) * scale

    return lambda self, x: lib.jit(Switched)()(lib.remat(Switched)()(x, scale=2.0), scale=x)


# ---------------------------------------------------------------- loops


def scan_cell(lib: Any) -> Any:
    class Cell(lib.Module):
        @lib.compact
        def __call__(self, carry, x):
            carry = jnp.tanh(lib.Dense(3)(carry) + lib.Dense(3, use_bias=False)(x))
            return carry, lib.Dense(2)(carry)

    return Cell


def scan_broadcast(lib: Any) -> Any:
    lifted = lib.scan(scan_cell(lib), variable_broadcast="params", split_rngs={"params": False}, in_axes=1, out_axes=1)
    return lambda self, x: lifted()(x[:, 0], x)[1]


def scan_reverse(lib: Any) -> Any:
    lifted = lib.scan(scan_cell(lib), variable_broadcast="params", split_rngs={"params": False}, in_axes=1, out_axes=1,
                      reverse=True, unroll=2)  # fmt: skip
    return lambda self, x: lifted()(x[:, 0], x)[1]


def scan_layers(lib: Any) -> Any:
    class Layer(lib.Module):
        @lib.compact
        def __call__(self, x, _):
            return x + block(lib)()(x), None

    lifted = lib.scan(Layer, variable_axes={"params": 0, "batch_stats": 0, "seen": 0}, length=3,
                      split_rngs={"params": True, "dropout": True})  # fmt: skip
    return lambda self, x: lib.Dense(2)(lifted()(x, None)[0])


def scan_dropout(lib: Any) -> Any:
    class Layer(lib.Module):
        @lib.compact
        def __call__(self, x, y):
            x = lib.Dropout(0.5, deterministic=False)(lib.Dense(3)(x)) + y
            return x, x.sum()

    lifted = lib.scan(Layer, variable_axes={"params": 1}, split_rngs={"params": True, "dropout": True})
    return lambda self, x: lifted()(x[0], x)[1]


def scan_same_dropout(lib: Any) -> Any:
    class Layer(lib.Module):
        @lib.compact
        def __call__(self, x, y):
            x = lib.Dropout(0.5, deterministic=False)(lib.Dense(3)(x)) + y
            return x, x

    lifted = lib.scan(Layer, variable_broadcast="params", split_rngs={"params": False, "dropout": False})
    return lambda self, x: lifted()(x[0], x)[1]


def scan_carried_variables(lib: Any) -> Any:
    def body(self, x, y):
        count = self.variable("count", "n", jnp.zeros, ())
        count.value += y.sum()
        return x * count.value, lib.Dense(3)(y) * count.value

    lifted = lib.scan(body, variable_carry="count", variable_broadcast="params", split_rngs={"params": False})

    def model(self, x):
        self.variable("count", "n", jnp.zeros, ())  # what is carried is there before
        return lifted(self, x[0], x)[1]

    return model


def scan_function(lib: Any) -> Any:
    def body(self, carry, x):
        carry = lib.Dense(3)(carry) + x
        return carry, carry

    def model(self, x):
        x = lib.Dense(3)(x)
        lifted = lib.scan(body, variable_broadcast="params", split_rngs={"params": False}, in_axes=1, out_axes=1)
        return lib.Dense(2)(lifted(self, x[:, 0], x)[1])

    return model


def scan_method(lib: Any) -> Any:
    class Layer(lib.Module):
        @functools.partial(lib.scan, **PARAMS)
        @lib.compact
        def __call__(self, carry, x):
            carry = lib.Dense(3)(carry) + x
            return carry, carry

    return lambda self, x: Layer()(x[0], x)[1]


def scan_of_remat(lib: Any) -> Any:
    class Layer(lib.Module):
        @lib.compact
        def __call__(self, x, _):
            return jnp.sin(lib.Dense(3)(x)), None

    return lambda self, x: lib.scan(lib.remat(Layer), length=3, **PARAMS)(name="layers")(x, None)[0]


def remat_scan_class(lib: Any) -> Any:
    return lambda self, x: lib.remat_scan(lib.Dense, lengths=(2, 3))(3)(x)


def remat_scan_with_dropout(lib: Any) -> Any:
    class Layer(lib.Module):
        @lib.compact
        def __call__(self, x):
            return lib.Dropout(0.3, deterministic=False)(jnp.sin(lib.Dense(3)(x)))

    return lambda self, x: lib.remat_scan(Layer, lengths=(3, 2))(name="stack")(x)


def while_counts(lib: Any) -> Any:
    def body(self, x):
        count = self.variable("state", "count", lambda: jnp.array(0))
        count.value += 1
        return lib.Dropout(0.5, deterministic=False)(jnp.sin(x)) + count.value

    def model(self, x):
        if self.is_initializing():
            return body(self, x)
        below = lambda self, x: self.variables["state"]["count"] < 5
        return lib.while_loop(below, body, self, jax.lax.stop_gradient(x), carry_variables="state",
                              split_rngs={"dropout": True})  # fmt: skip

    return model


# ---------------------------------------------------------------- branches


def cond_two_ways(lib: Any) -> Any:
    def yes(self, x):
        self.variable("state", "yes", lambda: jnp.array(0)).value += 1
        return lib.Dense(2)(x)

    def no(self, x):
        self.variable("state", "yes", lambda: jnp.array(0)).value -= 2
        return -lib.Dense(2)(x)

    def model(self, x):
        x = lib.cond(x.sum() > 100, yes, no, self, x)
        return lib.Dense(2)(lib.cond(x.sum() < 1e6, yes, no, self, x))

    return model


def switch_heads(lib: Any) -> Any:
    class Heads(lib.Module):
        def setup(self):
            self.heads = [lib.Dense(2), lib.Dense(2), lib.Dense(2)]

        def __call__(self, x):
            branches = [lambda self, x, i=i: self.heads[i](x) for i in range(3)]
            if self.is_initializing():
                for branch in branches:
                    branch(self, x)
            return lib.switch((x.sum() > 1e6).astype(int) + 1, branches, self, x)

    return lambda self, x: Heads()(x)


# ---------------------------------------------------------------- variables in another form


def transposed(lib: Any) -> Any:
    turn = lambda variables: jax.tree.map(lambda x: x.T, variables)

    lifted = lib.map_variables(lib.Dense, "params", turn, turn, mutable=True)
    return lambda self, x: lifted(4, use_bias=False)(x)


def causal(lib: Any) -> Any:
    class Causal(lib.Module):
        def mask(self, variables):
            return variables if self.is_initializing() else jax.tree.map(jnp.triu, variables)

        def setup(self):
            dense = lib.map_variables(lib.Dense, "params", self.mask, init=self.is_initializing())
            self.dense = dense(3, use_bias=False)

        def __call__(self, x):
            return self.dense(x)

    return lambda self, x: Causal()(x)


def tied_autoencoder(lib: Any) -> Any:
    class Tied(lib.Module):
        @lib.compact
        def call(self, x, decode):
            def f(self):
                return lib.Dense(3 if decode else 4, use_bias=False)(x)

            turn = lambda variables: jax.tree.map(lambda x: x.T, variables) if decode else variables
            return lib.map_variables(f, "params", turn, turn, mutable=True)(self)

        def __call__(self, x):
            return self.call(self.call(x, False), True)

    return lambda self, x: Tied()(x)


# ---------------------------------------------------------------- derivatives


def derivatives(lib: Any) -> Any:
    class Scale(lib.Module):
        @lib.compact
        def __call__(self, x, y):
            return self.param("scale", draws, ()) * x * y

    def model(self, x):
        scale = Scale()
        scale(x, x)
        call = lambda scale, x, y: scale(x, y)
        z, pull = lib.vjp(call, scale, x, jnp.cos(x))
        variables, *inputs = pull(jnp.ones_like(z))
        total = lambda scale, x, y: scale(x, y).sum()
        value, grads = lib.value_and_grad(total, scale, x, x)
        with_aux = lib.grad(lambda scale, x: (scale(x, x).sum(), x + 1), scale, x, has_aux=True)
        again = lib.grad(total, scale, x, x)
        return z + sum(inputs) + variables["params"]["scale"] + value + sum(grads) + sum(again) + sum(with_aux[0]) + (
            with_aux[1])  # fmt: skip

    return model


def vjp_of_several(lib: Any) -> Any:
    class User(lib.Module):
        other: Any

        @lib.compact
        def __call__(self, x):
            return self.other(x) * lib.Dense(3)(x)

    def model(self, x):
        other = lib.Dense(3)
        user = User(other)
        user(x)
        y, pull = lib.vjp(lambda user, x: user(x), user, x, multi_scope=True)
        of_variables, of_x = pull(y)
        return y + of_x + sum(a.sum() for a in jax.tree.leaves(of_variables))

    return model


def jvp_by_variables(lib: Any) -> Any:
    def model(self, x):
        dense = lib.Dense(3)
        dense(x)
        tangents = jax.tree.map(jnp.ones_like, dense.variables["params"])
        call = lambda dense, x: jnp.sin(dense(x))
        y, y_t = lib.jvp(call, dense, (x,), (jnp.cos(x),), {"params": tangents})
        return y + y_t

    return model


def signs_of_gradients(lib: Any) -> Any:
    def forward(module, x):
        return lib.vjp(lambda module, x: module(x), module, x)

    def backward(pull, cotangent):
        params, x = pull(cotangent)
        return jax.tree.map(jnp.sign, params), x

    call = lib.custom_vjp(lambda module, x: module(x), forward_fn=forward, backward_fn=backward)
    return lambda self, x: call(lib.Dense(2), x) + lib.Dense(2)(x)


def inputs_of(name: str) -> Any:
    return X_BTD if name == "vmap" else X  # one dim is mapped, two are left for the layers


MODELS = {
    **{f"{name} of a class": (of_class(name, options), inputs_of(name)) for name, options in LIFTS.items()},
    **{f"{name} of a method": (of_method(name, options), inputs_of(name)) for name, options in LIFTS.items()},
    **{f"{name} of a function": (of_function(name, options), inputs_of(name)) for name, options in LIFTS.items()},
    **{f"{name} of a class with setup": (of_setup(name, LIFTS[name]), inputs_of(name)) for name in ("vmap", "jit")},
    "vmap along other axes": (whole(vmap_axes), X_BTD),
    "vmap with shared parameters": (whole(vmap_shared), X_BTD),
    "vmap of two arguments": (whole(vmap_two_arguments), X_BTD),
    "vmap of two methods": (whole(vmap_methods), X_BTD),
    "vmap of a method with options of its own": (whole(vmap_methods_with_options), X_BTD),
    "vmap of vmap": (whole(vmap_of_vmap), X_BTD),
    "remat of vmap": (whole(remat_of_vmap), X_BTD),
    "a module in fields of several": (whole(shared_field), X),
    "modules in containers of a field": (whole(own_field), X),
    "modules as arguments": (whole(module_as_argument), X),
    "a function of another module": (whole(module_of_another_as_argument), X_BTD),
    "static arguments of remat": (whole(static_argument), X),
    "keyword arguments": (whole(keyword_argument), X),
    "scan with shared parameters": (whole(scan_broadcast), X_BTD),
    "scan in reverse": (whole(scan_reverse), X_BTD),
    "scan over layers": (whole(scan_layers), X),
    "scan with dropout": (whole(scan_dropout), X_BTD),
    "scan with the same dropout": (whole(scan_same_dropout), X_BTD),
    "scan with carried variables": (whole(scan_carried_variables), X_BTD),
    "scan of a function": (whole(scan_function), X_BTD),
    "scan of a method": (whole(scan_method), X_BTD),
    "scan of remat": (whole(scan_of_remat), X),
    "remat_scan": (whole(remat_scan_class), X),
    "remat_scan with dropout": (whole(remat_scan_with_dropout), X),
    "while_loop with carried variables": (whole(while_counts), X),
    "cond": (whole(cond_two_ways), X),
    "switch": (whole(switch_heads), X),
    "map_variables that transposes": (whole(transposed), X),
    "map_variables that masks": (whole(causal), X),
    "map_variables that ties": (whole(tied_autoencoder), X),
    "vjp grad value_and_grad": (whole(derivatives), X),
    "vjp of several modules": (whole(vjp_of_several), X),
    "jvp": (whole(jvp_by_variables), X),
    "custom_vjp": (whole(signs_of_gradients), X),
}  # fmt: skip
CASES = [Case(name, build, inputs) for name, (build, inputs) in MODELS.items()]
every_model = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)


@every_model
def test_the_same_key_gives_the_same_variables_bit_for_bit(case):
    assert_close(run(batiste.linen, case)[0], run(flax.linen, case)[0], 0)


@every_model
def test_results_changed_collections_and_gradients_agree(case):
    assert_close(run(batiste.linen, case)[1:], run(flax.linen, case)[1:], case.tolerance)


NAMES = [*batiste.linen.transforms.__all__]


@pytest.mark.parametrize("name", NAMES)
def test_the_arguments_are_the_same(name):
    ours, theirs = (inspect.signature(getattr(lib, name)).parameters.values() for lib in (batiste.linen, flax.linen))
    facts = lambda parameters: [(p.name, p.kind, _plain(p.default)) for p in parameters]
    assert facts(ours) == facts(theirs)


def _plain(default: Any) -> Any:
    """A default in a form that both libraries share."""
    if callable(default):
        return default(1) if default is not inspect.Parameter.empty else "none"
    return dict(default) if hasattr(default, "items") else default


@pytest.mark.parametrize("name", ["vmap", "scan", "remat", "checkpoint", "jit", "map_variables", "remat_scan",
                                  "fold_rngs", "add_metadata_axis"])  # fmt: skip
def test_lifted_classes_have_the_same_names(name):
    options = {"lengths": (2,)} if name == "remat_scan" else {}
    ours, theirs = (getattr(lib, name)(lib.Dense, **options) for lib in (batiste.linen, flax.linen))
    assert ours.__name__ == theirs.__name__
    assert issubclass(ours, batiste.linen.Dense)
