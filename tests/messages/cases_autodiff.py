# SPDX-License-Identifier: Apache-2.0
"""Wrong uses of derivatives, custom rules, remat and tracing: `(name, function that provokes the error)`."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from batiste import nnx


class Layer(nnx.Module):
    def __init__(self):
        self.kernel = nnx.Param(jnp.ones((2, 2)))
        self.bias = nnx.Param(jnp.ones(2))

    def __call__(self, x):
        return x @ self.kernel


class Model(nnx.Module):
    def __init__(self):
        self.blocks = nnx.List([Layer(), Layer()])


def total(model):
    return model.blocks[0].kernel.sum()


def ruled(bwd, **options):
    """A gradient that uses the rule `bwd`."""
    f = nnx.custom_vjp(total, **options)
    f.defvjp(lambda model: (total(model), model), bwd)
    return nnx.grad(f)(Model())


def tied():
    model = Model()
    return nnx.grad(lambda a, b: total(a) + b.sum())(model, model.blocks[0].kernel)


def with_itself(model):
    return total(model), model


def twice(transform):
    model = Model()
    return transform(lambda a, b: total(a), model, model)


def unequal_rules():
    f = nnx.custom_vjp(total, graph=False)

    def fwd(model):
        model.blocks[0].bias[...] += 1
        return total(model), model

    f.defvjp(fwd, lambda model, g: (model,))
    return nnx.grad(nnx.jit(f, graph=False), graph=False)(Model())


only_bias = nnx.DiffState(0, nnx.PathContains("bias"))

CASES = [
    ("grad of an argument that is not there", lambda: nnx.grad(total, argnums=2)(Model())),
    ("grad of an argument twice", lambda: nnx.grad(total, argnums=(0, only_bias))(Model())),
    ("grad of no argument", lambda: nnx.grad(total, argnums=())(Model())),
    ("a variable that is differentiated at one place only", tied),
    ("has_aux without a pair", lambda: nnx.grad(total, has_aux=True)(Model())),
    ("grad of a function that returns a Variable", lambda: nnx.grad(lambda v: v)(nnx.Param(jnp.ones(())))),
    ("DiffState without live objects", lambda: nnx.grad(total, argnums=only_bias, graph=False)),
    ("grad of a bound method", lambda: nnx.grad(Layer().__call__)),
    ("grad that hands out its argument", lambda: nnx.grad(with_itself, has_aux=True, graph_updates=False)(Model())),
    ("grad of what is behind a Ref", lambda: nnx.grad(lambda v: v[...])(nnx.Param(jnp.ones(()), ref=True))),
    ("tangents of another number", lambda: nnx.jvp(total, (Model(),), ())),
    ("a tangent with a wrong name", lambda: nnx.jvp(total, (Model(),), (nnx.State({"block": jnp.ones(2)}),))),
    ("a cotangent of another structure", lambda: nnx.vjp(lambda m: {"a": total(m)}, Model())[1]({"b": 1.0})),
    ("custom_vjp without a rule", lambda: nnx.custom_vjp(total)(Model())),
    ("a rule that returns no tuple", lambda: ruled(lambda model, g: g[0][0])),
    ("a rule that returns too little", lambda: ruled(lambda model, g: (nnx.State({}),))),
    ("a rule that returns a number for a module", lambda: ruled(lambda model, g: (1.0,))),
    ("a rule that returns another shape", lambda: ruled(lambda model, g: jax.tree.map(lambda x: jnp.ones(3), g[0]))),
    ("a rule that returns too much", lambda: ruled(lambda model, g: g[0], nondiff_argnums=(only_bias,))),
    ("a rule that changes other Variables", unequal_rules),
    ("a module as a static argument", lambda: ruled(lambda model, g: g, nondiff_argnums=(0,))),
    ("an unknown policy", lambda: nnx.remat(total, policy="some")),
    ("make_jaxpr of live objects", lambda: nnx.make_jaxpr(total)),
    ("eval_shape of one module twice", lambda: twice(lambda f, *args: nnx.eval_shape(f, *args, graph_updates=False))),
]  # fmt: skip
