# SPDX-License-Identifier: Apache-2.0
"""A model of any kind as a function that writes nothing: `run(weights, inputs) -> outputs`, all by name."""

from __future__ import annotations

import fnmatch
import glob
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from batiste import linen
from batiste.debug.calls import part_types
from batiste.errors import ModifyScopeVariableError
from batiste.graph import (
    Intermediate,
    Perturbation,
    RngCount,
    RngState,
    State,
    Variable,
    from_flat_state,
    iter_graph,
    merge,
    split,
    state,
    to_flat_state,
)
from batiste.graph.errors import ArgumentError
from batiste.graph.flatten import is_graph_node
from batiste.nn import SpectralNorm, WeightNorm

from .errors import ExportError

HARMLESS = (Intermediate, Perturbation, RngCount)  # the outputs do not depend on it, or that is seen elsewhere
EVAL = "call model.eval() first; or if each call may begin with the same state, forget=['its/path']"


class Pure(NamedTuple):
    """A function of weights and inputs to outputs; the weights, types of the parts, names of random weights.

    Weights that are kept are outputs too, under the same names.
    """

    run: Callable[[dict[str, Any], dict[str, Any]], dict[str, Any]]
    weights: dict[str, Any]
    parts: frozenset[type] = frozenset()
    random: frozenset[str] = frozenset()
    kept: frozenset[str] = frozenset()

    def only(self, names: Sequence[str]) -> Pure:
        """With those weights as its argument; the others, which the outputs do not depend on, stay behind."""
        rest = {name: x for name, x in self.weights.items() if name not in names}
        kept = {name: self.weights[name] for name in names}
        return self._replace(run=lambda weights, inputs: self.run({**rest, **weights}, inputs), weights=kept)

    @property
    def shapes(self) -> dict[str, jax.ShapeDtypeStruct]:
        """The weights without their values; those that are spread over devices stay so."""
        return {
            name: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding if spread(x) else None)
            for name, x in self.weights.items()
        }


def spread(x: Any) -> bool:
    """Whether an array lies on a mesh of several devices."""
    return isinstance(x, jax.Array) and isinstance(x.sharding, jax.NamedSharding) and x.sharding.num_devices > 1


def method_of(model: Any, method: str | None) -> str | None:
    """The name of the method that is exported: that of a bound method, if no other is asked for."""
    return model.__name__ if inspect.ismethod(model) and is_graph_node(model.__self__) else method


def pure(
    model: Any, weights: Any, names: Sequence[str], *, method: str | None, fixed: Mapping[str, Any],
    outputs: Sequence[str] | None, forget: Sequence[str] = (), keep: Sequence[str] = (),
) -> Pure:  # fmt: skip
    """The function of a live object, of a Linen module with variables, or of a function with a tree of weights.

    Args:
        names: of the inputs, in order.
        forget: patterns of state that the call may write in vain.
        keep: patterns of state that an object's call gives back as it leaves it.

    Raises:
        ArgumentError: the model is none of them.
    """
    method = method_of(model, method)
    model = model.__self__ if inspect.ismethod(model) and is_graph_node(model.__self__) else model
    if isinstance(model, linen.Module):
        found = _of_linen(model, weights, method, Call(getattr(model, method or "__call__"), names, fixed))
    elif _is_object(model):
        if weights is not None:
            raise ArgumentError("An object holds its weights itself", got="weights=", fix="leave weights out")
        call = Call(getattr(model, method or "__call__"), names, fixed)
        found = _of_object(model, lambda live, inputs: call(getattr(live, method or "__call__"), inputs), forget, keep)
    elif not callable(model):
        raise ArgumentError("This is no model", got=type(model).__name__,
                            expected="a module, a Linen module with weights=, or a function")  # fmt: skip
    elif _is_object(weights):
        call = Call(model, names, fixed)
        found = _of_object(weights, lambda live, inputs: call(model, inputs, live), forget, keep)
    else:
        found = _of_function(model, weights, Call(model, names, fixed))
    if not found.kept:
        if keep:
            raise ArgumentError("There is no such state to keep", got=", ".join(keep), expected="paths in an object")
        return found._replace(run=lambda weights, inputs: named(found.run(weights, inputs), outputs))

    def run(weights: dict[str, Any], inputs: dict[str, Any]) -> dict[str, Any]:
        called: Any = found.run(weights, inputs)
        output, after = named(called[0], outputs), called[1]
        if both := sorted(set(output) & set(after)):
            raise ArgumentError("An output has the name of state", got=", ".join(both), fix="name it: outputs=[…]")
        return {**output, **after}

    return found._replace(run=run)


def _is_object(x: Any) -> bool:
    return is_graph_node(x) and not isinstance(x, State)


class Call:
    """Hands inputs over by name; where a function has no arguments of these names, by position, in their order."""

    def __init__(self, function: Callable[..., Any], names: Sequence[str], fixed: Mapping[str, Any]):
        try:
            known = inspect.signature(function).parameters
        except (TypeError, ValueError):  # of a builtin
            known = {}
        kinds = {p.kind for p in known.values()}
        takes_any = inspect.Parameter.VAR_KEYWORD in kinds and inspect.Parameter.VAR_POSITIONAL not in kinds
        self.positions = () if takes_any or set(known) & set(names) else names
        self.fixed = fixed

    def __call__(self, function: Callable[..., Any], inputs: Mapping[str, Any], *first: Any, **more: Any) -> Any:
        if self.positions:
            return function(*first, *(inputs[name] for name in self.positions), **self.fixed, **more)
        return function(*first, **inputs, **self.fixed, **more)


def _of_object(
    model: Any, call: Callable[[Any, dict[str, Any]], Any], forget: Sequence[str], keep: Sequence[str] = ()
) -> Pure:
    graph, values = split(model)
    flat: list[tuple[Any, Any]] = list(to_flat_state(values))
    weights, rebuild = named_leaves({_joined(path): _value(leaf) for path, leaf in flat})
    random = {_joined(path) for path, leaf in flat if isinstance(leaf, RngState)}
    kept = frozenset(name for name in weights if _fits(name, keep))
    forget = [*forget, *keep, *_projected(model)]

    def run(weights: dict[str, Any], inputs: dict[str, Any]) -> Any:
        new = rebuild(weights)
        pairs = []
        for path, leaf in flat:
            x = new[_joined(path)]
            pairs.append((path, leaf.replace(x) if isinstance(leaf, Variable) else x))
        live = merge(graph, from_flat_state(pairs))
        output = call(live, inputs)
        _refuse_writes(new, live, forget)
        if not kept:
            return output
        after: Any = state(live)
        values = {_joined(path): _value(leaf) for path, leaf in to_flat_state(after)}
        return output, {name: values[name] for name in sorted(kept)}

    return Pure(run, weights, frozenset(part_types(model)), frozenset(random), kept)


def _fits(name: str, patterns: Sequence[str]) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


def _projected(model: Any) -> list[str]:
    """Patterns of weights that a call replaces, and that a second call would leave as they then are."""
    found = []
    for path, part in iter_graph(model):
        if isinstance(part, (SpectralNorm, WeightNorm)):
            found.append(_joined((*map(glob.escape, map(str, path)), "layer_instance", "*")))
    return found


def _joined(path: Sequence[Any]) -> str:
    return "/".join(map(str, path))


def _value(leaf: Any) -> Any:
    return leaf.get_value() if isinstance(leaf, Variable) else leaf


def _refuse_writes(before: Mapping[str, Any], live: Any, forget: Sequence[str]) -> None:
    """Raises ExportError if a call changed values of an object, or gave it new ones.

    Counts of random numbers may move: whether a number has to do with the outputs is seen in the program.
    """
    after: Any = state(live)
    written = {}
    for path, leaf in to_flat_state(after):
        name = _joined(path)
        if isinstance(leaf, HARMLESS) or _fits(name, forget):
            continue
        old, new = (jax.tree.leaves(tree) for tree in (before.get(name), _value(leaf)))
        if len(old) != len(new) or any(a is not b for a, b in zip(old, new)):
            written[name] = type(leaf).__name__
    if written:
        said = ", ".join(f"{kind} {name}" for name, kind in list(written.items())[:8])
        raise ExportError("The call writes state, which would be lost", got=said, expected="nothing", fix=EVAL)


def _of_linen(module: Any, variables: Any, method: str | None, call: Call) -> Pure:
    if variables is None:
        raise ArgumentError("A Linen module needs its variables", fix="export(module, …, weights=variables)")
    weights, rebuild = named_leaves(linen.unbox(variables))

    def run(weights: dict[str, Any], inputs: dict[str, Any]) -> Any:
        try:
            return call(module.apply, inputs, rebuild(weights), method=method)
        except ModifyScopeVariableError as error:
            raise ExportError(f"The call writes state, which would be lost ({error.problem})",
                              fix="turn training off, such as fixed={'train': False}") from error  # fmt: skip

    return Pure(run, weights)


def _of_function(function: Callable[..., Any], tree: Any, call: Call) -> Pure:
    if tree is None:
        return Pure(lambda weights, inputs: call(function, inputs), {})
    weights, rebuild = named_leaves(tree)
    return Pure(lambda weights, inputs: call(function, inputs, rebuild(weights)), weights)


def named_leaves(tree: Any) -> tuple[dict[str, Any], Callable[[Mapping[str, Any]], Any]]:
    """The leaves of a tree by their paths, such as `layers/0/kernel`, and the way back.

    Raises:
        ExportError: a leaf is no array and no number, or two have one name.
    """
    found, treedef = jax.tree_util.tree_flatten_with_path(tree)
    leaves: dict[str, Any] = {}
    for path, leaf in found:
        name = jax.tree_util.keystr(path, simple=True, separator="/") or "weights"
        if name in leaves:
            raise ExportError("Two weights have the same name", at=name, fix="rename one of the keys")
        if not isinstance(leaf, (jax.Array, np.ndarray, np.generic, bool, int, float, complex)):
            raise ExportError("A weight is no array", at=name, got=type(leaf).__name__)
        leaves[name] = jnp.asarray(leaf) if isinstance(leaf, (bool, int, float, complex)) else leaf
    return leaves, lambda new: jax.tree.unflatten(treedef, [new[name] for name in leaves])


def named(output: Any, names: Sequence[str] | None) -> dict[str, Any]:
    """Outputs by name: of a dict its keys, of a tuple `output_0` …, of one array `output`; or the names that are given.

    >>> named({"a": 1, "b": [2, 3]}, None)
    {'a': 1, 'b/0': 2, 'b/1': 3}
    """
    found = jax.tree_util.tree_flatten_with_path(output)[0]
    if names is None:
        alone = isinstance(output, (tuple, list))
        keys = [jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in found]
        names = [f"output_{key}" if alone else key or "output" for key in keys]
    if len(names) != len(found) or len(set(names)) != len(names):
        raise ArgumentError("The outputs need one name each", got=", ".join(names), expected=f"{len(found)} names")
    return {name: x for name, (_, x) in zip(names, found)}
