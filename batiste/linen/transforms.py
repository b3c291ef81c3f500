# SPDX-License-Identifier: Apache-2.0
"""Lifted transforms: those of JAX, on modules and functions of modules.

A class of modules becomes one with the same settings whose methods go through the transform; a function `f(module,
*args)` becomes one that does. What happens to variables and random streams is said by collection and by stream:

    Dense stack = nn.vmap(nn.Dense, variable_axes={"params": 0}, split_rngs={"params": True})

`cond`, `switch`, `while_loop` and the derivatives take the module among their arguments and run at once.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any, TypeVar

import jax

from batiste.core.frozen_dict import FrozenDict

from . import lift
from .boxes import map_axis_meta
from .filters import DenyList
from .lifted import Lifted, Passage, _HashableProxy, checked_module, lift_target, of_scopes, run_lifted
from .module import Module

Target = TypeVar("Target", bound=Callable[..., Any])
Filter = bool | str | Collection[str] | DenyList

__all__ = [
    "add_metadata_axis", "checkpoint", "cond", "custom_vjp", "fold_rngs", "grad", "jit", "jvp", "map_variables",
    "named_call", "remat", "remat_scan", "scan", "switch", "value_and_grad", "vjp", "vmap", "while_loop",
]  # fmt: skip


def _lifting(name: str, transform: Callable[..., Any], **options: Any) -> Callable[[Mapping[str, Any]], Lifted]:
    """Calls go through `transform(fn, **options)`, made anew for each."""

    def with_options(own: Mapping[str, Any]) -> Lifted:
        bound = functools.partial(transform, **{**options, **own})
        return lambda fn, module, args, kwargs, kind: run_lifted(name, bound, [fn], module, args, kwargs, kind)

    return with_options


# ---------------------------------------------------------------- classes and functions


def vmap(
    target: Target,
    variable_axes: Mapping[Any, Any] = FrozenDict({}),
    split_rngs: Mapping[Any, bool] = FrozenDict({}),
    in_axes: Any = 0,
    out_axes: Any = 0,
    axis_size: int | None = None,
    axis_name: str | None = None,
    spmd_axis_name: str | None = None,
    metadata_params: Mapping[Any, Any] = {},
    methods: Any = None,
) -> Target:
    """Maps over an axis of the arguments, of variables, and of keys.

    Args:
        variable_axes: the axis by collection; None shares the collection between all. Others are not passed on.
        split_rngs: whether each gets a key of its own, by stream. Others are not passed on.
        in_axes: of the arguments after the module, as in `jax.vmap`.
        out_axes: of the result.
        axis_size: where no argument tells it.
        metadata_params: what boxes around variables are told of the axis.
        methods: the methods of a class to map: names, or other options by name; by default `__call__`.
    """
    lifted = _lifting("vmap", lift.vmap, variable_axes=variable_axes, split_rngs=split_rngs, in_axes=in_axes,
                      out_axes=out_axes, axis_size=axis_size, axis_name=axis_name, spmd_axis_name=spmd_axis_name,
                      metadata_params=metadata_params)  # fmt: skip
    return lift_target("vmap", target, lifted, methods)


def scan(
    target: Target,
    variable_axes: Mapping[Any, Any] = FrozenDict({}),
    variable_broadcast: Filter = False,
    variable_carry: Filter = False,
    split_rngs: Mapping[Any, bool] = FrozenDict({}),
    in_axes: Any = 0,
    out_axes: Any = 0,
    length: int | None = None,
    reverse: bool = False,
    unroll: int = 1,
    data_transform: Callable[..., Any] | None = None,
    metadata_params: Mapping[Any, Any] = {},
    methods: Any = None,
    _split_transpose: bool = False,
    check_constancy_invariants: bool = True,
) -> Target:
    """(carry, y[t]) = target(module, carry, x[t]), one step after another

    Args:
        variable_axes: collections with one slice for each step, and the axis of the steps.
        variable_broadcast: collections that are the same in all steps; they may not depend on the carry.
        variable_carry: collections that one step hands to the next.
        split_rngs: whether each step gets a key of its own, by stream.
        in_axes: of the arguments after the carry; `broadcast` gives all of an argument to every step.
        out_axes: of `y`.
        length: the number of steps, where no argument tells it.
        data_transform: applied to the variables and keys of a step.
        metadata_params: what boxes around variables are told of the axis.
        check_constancy_invariants: trace once more, to find what is the same in all steps.
    """
    lifted = _lifting("scan", lift.scan, variable_axes=variable_axes, variable_broadcast=variable_broadcast,
                      variable_carry=variable_carry, split_rngs=split_rngs, in_axes=in_axes, out_axes=out_axes,
                      length=length, reverse=reverse, unroll=unroll, data_transform=data_transform,
                      metadata_params=metadata_params, _split_transpose=_split_transpose,
                      check_constancy_invariants=check_constancy_invariants)  # fmt: skip
    return lift_target("scan", target, lifted, methods)


def checkpoint(
    target: Target,
    variables: Filter = True,
    rngs: Filter = True,
    concrete: bool = False,
    prevent_cse: bool = True,
    static_argnums: int | tuple[int, ...] = (),
    policy: Callable[..., bool] | None = None,
    methods: Any = None,
) -> Target:
    """The same result; what the gradient needs is computed again instead of kept.

    Args:
        variables: the collections that are passed on.
        rngs: the streams that are passed on.
        static_argnums: arguments that are no arrays; the module is number 0.
        policy: what is kept all the same, as in `jax.checkpoint`.
        methods: the methods of a class: names, or other options by name; by default `__call__`.
    """
    numbers = (static_argnums,) if isinstance(static_argnums, int) else static_argnums
    static = tuple(n - 1 for n in numbers if n > 0)  # without the module
    lifted = _lifting("remat", lift.checkpoint, variables=variables, rngs=rngs, concrete=concrete,
                      prevent_cse=prevent_cse, static_argnums=static, policy=policy)  # fmt: skip
    return lift_target("checkpoint", target, lifted, methods)


remat = checkpoint


def jit(
    target: Target,
    variables: Filter = True,
    rngs: Filter = True,
    static_argnums: int | Iterable[int] = (),
    static_argnames: str | Iterable[str] = (),
    donate_argnums: int | Iterable[int] = (),
    device: Any = None,
    backend: str | None = None,
    methods: Any = None,
) -> Target:
    """The same, compiled. Modules of equal settings with variables of equal shapes share a program.

    Args:
        variables: the collections that are passed on.
        rngs: the streams that are passed on.
        static_argnums: arguments that are no arrays, which must have a hash; the module is number 0.
        donate_argnums: arguments whose memory may be used again; the module is number 0.
        methods: the methods of a class: names, or other options by name; by default `__call__`.
    """
    options = dict(variables=variables, rngs=rngs, static_argnums=static_argnums, static_argnames=static_argnames,
                   donate_argnums=donate_argnums, device=device, backend=backend)  # fmt: skip
    return lift_target("jit", target, lambda own: _Programs({**options, **own}), methods)


class _Program:
    """A compiled function of scopes, and how many names the module has given when it was traced."""

    def __init__(self, fn: Callable[..., Any], options: Mapping[str, Any]):
        self.passage: Passage | None = None
        self.names_made: dict[str, int] | None = None
        self.run = lift.jit(of_scopes(fn, lambda: self.passage), **options)  # type: ignore[arg-type, return-value]

    def __call__(self, passage: Passage) -> Any:
        outer, self.passage = self.passage, passage
        try:
            y = self.run(passage.scopes, *passage.args, **passage.kwargs)
            if passage.arrived:
                self.names_made = passage.names_made
            else:
                passage.names_made = self.names_made  # type: ignore[assignment]
            return y
        finally:
            self.passage = outer
            passage.settle()


class _Programs:
    """The programs of one function, by the modules that they were made for."""

    def __init__(self, options: Mapping[str, Any]):
        self.options = options
        self.made: dict[Any, _Program] = {}

    def __call__(self, fn: Callable[..., Any], module: Any, args: tuple, kwargs: Mapping[str, Any],
                 kind: type | None) -> Any:  # fmt: skip
        passage = Passage(checked_module(module, "jit"), args, kwargs, kind)
        key = _HashableProxy.from_module(*passage.given), passage.places
        program = self.made.get(key)
        if program is None:
            program = self.made[key] = _Program(fn, self.options)
        return program(passage)


def map_variables(
    target: Target,
    mapped_collections: Filter = True,
    trans_in_fn: Callable[..., Any] = lambda variables: variables,
    trans_out_fn: Callable[..., Any] = lambda variables: variables,
    init: bool = False,
    mutable: bool = False,
    rngs: Filter = True,
    variables: Filter = True,
    methods: Any = None,
) -> Target:
    """The target sees `trans_in_fn(variables)` in place of some collections.

    Args:
        mapped_collections: the collections that are transformed, together.
        trans_out_fn: brings what the target has made or changed into the outer form.
        init: the target may make variables while the model is initialised.
        mutable: the target may change variables.
        rngs: the streams that are passed on.
        variables: the other collections that are passed on.
    """
    lifted = _lifting("map_variables", lift.map_variables, mapped_collections=mapped_collections,
                      map_in_fn=trans_in_fn, map_out_fn=trans_out_fn, init=init, mutable=mutable, rngs=rngs,
                      variables=variables)  # fmt: skip
    return lift_target("map_variables", target, lifted, methods)


def fold_rngs(target: Target, variables: Filter = True, rngs: Filter = True) -> Target:
    """Folds the path of the module into its keys, so that inside they depend on names below it alone."""
    return lift_target("fold_rngs", target, _lifting("fold_rngs", lift.fold_rngs, variables=variables, rngs=rngs))


def remat_scan(
    target: Target,
    lengths: Sequence[int] | None = (),
    policy: Callable[..., bool] | None = None,
    variable_broadcast: Filter = False,
    variable_carry: Filter = False,
    variable_axes: Mapping[Any, Any] = FrozenDict({True: 0}),
    split_rngs: Mapping[Any, bool] = FrozenDict({True: True}),
) -> Target:
    """x = target(module, x), prod(lengths) times, in nested loops whose steps are computed again for the gradient

    Memory for the gradient grows as prod(lengths) ** (1 / len(lengths)). Other arguments as in `scan`.
    """
    lifted = _lifting("remat_scan", lift.remat_scan, lengths=lengths, policy=policy, variable_carry=variable_carry,
                      variable_broadcast=variable_broadcast, variable_axes=variable_axes,
                      split_rngs=split_rngs)  # fmt: skip
    return lift_target("remat_scan", target, lifted)


def named_call(class_fn: Callable[..., Any], force: bool = True) -> Callable[..., Any]:
    """A method whose operations carry its name in profiles. Methods do so anyway, by the names of their modules."""
    del force

    @functools.wraps(class_fn)
    def named(self: Any, *args: Any, **kwargs: Any) -> Any:
        with jax.named_scope(class_fn.__name__):
            return class_fn(self, *args, **kwargs)

    return named


# ---------------------------------------------------------------- branches and loops


def cond(pred: Any, true_fun: Callable[..., Any], false_fun: Callable[..., Any], mdl: Module, *operands: Any,
         variables: Filter = True, rngs: Filter = True) -> Any:  # fmt: skip
    """true_fun(mdl, *operands) if pred else false_fun(mdl, *operands)

    Both must make and change the same variables.
    """

    def transform(*cores: Callable[..., Any]) -> Callable[..., Any]:
        return lambda scopes, *args: lift.cond(pred, *cores, scopes, *args, variables=variables, rngs=rngs)

    return run_lifted("cond", transform, (true_fun, false_fun), mdl, operands)


def switch(index: Any, branches: Sequence[Callable[..., Any]], mdl: Module, *operands: Any, variables: Filter = True,
           rngs: Filter = True) -> Any:  # fmt: skip
    """branches[index](mdl, *operands)

    All must make and change the same variables.
    """

    def transform(*cores: Callable[..., Any]) -> Callable[..., Any]:
        return lambda scopes, *args: lift.switch(index, cores, scopes, *args, variables=variables, rngs=rngs)

    return run_lifted("switch", transform, branches, mdl, operands)


def while_loop(
    cond_fn: Callable[..., Any],
    body_fn: Callable[..., Any],
    mdl: Module,
    init: Any,
    carry_variables: Filter = False,
    broadcast_variables: Filter = True,
    split_rngs: Mapping[Any, bool] = FrozenDict({}),
) -> Any:
    """init = body_fn(mdl, init), as long as cond_fn(mdl, init)

    Args:
        carry_variables: collections that one step hands to the next.
        broadcast_variables: collections that are only read. None can be made in the loop.
        split_rngs: whether each step gets a key of its own, by stream.
    """

    def transform(cond_core: Callable[..., Any], body_core: Callable[..., Any]) -> Callable[..., Any]:
        return lambda scopes, carry: lift.while_loop(
            cond_core, body_core, scopes, carry, carry_variables, broadcast_variables, split_rngs
        )

    return run_lifted("while_loop", transform, (cond_fn, body_fn), mdl, (init,))


# ---------------------------------------------------------------- derivatives


def vjp(
    fn: Callable[..., Any],
    mdl: Module,
    *primals: Any,
    has_aux: bool = False,
    reduce_axes: Any = (),
    vjp_variables: Filter = "params",
    variables: Filter = True,
    rngs: Filter = True,
    multi_scope: bool = False,
) -> Any:
    """y = fn(mdl, *primals), and the function from its cotangent to those of the variables and of the primals.

    Args:
        vjp_variables: the collections that get a cotangent.
        variables: all collections that are passed on.
        has_aux: `fn` returns `(y, aux)`, and `aux` is returned last.
        multi_scope: allow modules that were made outside of `mdl`: cotangents of variables come as one tree for each.
    """

    def transform(core: Callable[..., Any]) -> Callable[..., Any]:
        return lambda scopes, *args: lift.vjp(
            core, scopes, *args, has_aux=has_aux, reduce_axes=reduce_axes, vjp_variables=vjp_variables,
            variables=variables, rngs=rngs,
        )  # fmt: skip

    return run_lifted("vjp", transform, (fn,), mdl, primals, one_scope=not multi_scope)


def value_and_grad(
    fn: Callable[..., Any],
    mdl: Module,
    *primals: Any,
    has_aux: bool = False,
    reduce_axes: Any = (),
    variables: Filter = True,
    rngs: Filter = True,
) -> Any:
    """fn(mdl, *primals), a number, and its gradient by the primals (by variables: `vjp`)."""

    def transform(core: Callable[..., Any]) -> Callable[..., Any]:
        return lambda scopes, *args: lift.value_and_grad(
            core, scopes, *args, has_aux=has_aux, reduce_axes=reduce_axes, variables=variables, rngs=rngs
        )

    y, *aux, grads = run_lifted("value_and_grad", transform, (fn,), mdl, primals)
    return ((y, *aux) if has_aux else y), grads


def grad(
    fn: Callable[..., Any],
    mdl: Module,
    *primals: Any,
    has_aux: bool = False,
    reduce_axes: Any = (),
    variables: Filter = True,
    rngs: Filter = True,
) -> Any:
    """The gradient of fn(mdl, *primals), a number, by the primals (by variables: `vjp`)."""
    y, grads = value_and_grad(
        fn, mdl, *primals, has_aux=has_aux, reduce_axes=reduce_axes, variables=variables, rngs=rngs
    )
    return (grads, y[1]) if has_aux else grads


def jvp(
    fn: Callable[..., Any],
    mdl: Module,
    primals: Any,
    tangents: Any,
    variable_tangents: Any,
    variables: Filter = True,
    rngs: Filter = True,
) -> tuple[Any, Any]:
    """fn(mdl, *primals), and its tangent for those of the primals and of the variables.

    Args:
        variable_tangents: trees of tangents by collection; those of others are zero.
    """

    def transform(core: Callable[..., Any]) -> Callable[..., Any]:
        return lambda scopes, *args: lift.jvp(
            core, scopes, args, tangents, variable_tangents, variables=variables, rngs=rngs
        )

    return run_lifted("jvp", transform, (fn,), mdl, tuple(primals), one_scope=True)


def custom_vjp(
    fn: Callable[..., Any],
    forward_fn: Callable[..., Any],
    backward_fn: Callable[..., Any],
    grad_vars: Filter = "params",
    nondiff_argnums: Any = (),
) -> Callable[..., Any]:
    """`fn(module, *args)` with a gradient of its own.

    Args:
        forward_fn: `forward_fn(module, *args)` returns the result and what `backward_fn` needs.
        backward_fn: `backward_fn(*nondiff, what it needs, cotangent)` returns the cotangents of variables and of
            arguments.
        grad_vars: the collections that get a cotangent.
        nondiff_argnums: arguments that are no arrays; the module is number 0.
    """

    def transform(core: Callable[..., Any], forward: Callable[..., Any]) -> Callable[..., Any]:
        return lift.custom_vjp(core, forward, backward_fn, grad_vars, nondiff_argnums)

    @functools.wraps(fn)
    def through(module: Any, *args: Any) -> Any:
        return run_lifted("custom_vjp", transform, (fn, forward_fn), module, args, one_scope=True)

    return through


# ---------------------------------------------------------------- boxes


def add_metadata_axis(
    target: Target, variable_axes: Mapping[Any, Any] = FrozenDict({}), metadata_params: Mapping[Any, Any] = {}
) -> Target:
    """Boxes around variables get an axis in their metadata, as `vmap` would do; the values stay as they are.

    Args:
        variable_axes: where the axis is, by collection; None leaves a collection as it is.
        metadata_params: what boxes are told of the axis.
    """
    params = dict(metadata_params)
    for collection, axis in variable_axes.items():
        if axis is not None:
            inside = functools.partial(map_axis_meta, lambda box, axis=axis: box.remove_axis(axis, params))
            outside = functools.partial(map_axis_meta, lambda box, axis=axis: box.add_axis(axis, params))
            target = map_variables(target, collection, inside, outside, init=True, mutable=True)
    return target
