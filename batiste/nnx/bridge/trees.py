# SPDX-License-Identifier: Apache-2.0
"""One parameter tree: the variables of a Linen model as the State of the same model of objects, and back.

Where both models give their parts the same names, a variable's path is the same in both:

    {collection: {part: {name: value}}}  <->  part/name, a Variable of the collection's type

What differs stands in `RULES`: a recurrent cell of objects multiplies by the kernels of all gates at once, Linen's has
a part for each gate; wrapped weights have scales under another name. Elements of lists and dicts are `part_0` and
`part_key` in Linen.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from batiste import nn
from batiste.graph import Dict, List, Pytree, RngState, State, Variable, from_flat_state, variable_name_from_type
from batiste.graph.errors import ShapeError, StructureError
from batiste.linen.boxes import unbox

Path = tuple[Any, ...]


@dataclasses.dataclass(frozen=True)
class Rule:
    """How the tree of one class of objects differs from that of the Linen module.

    Args:
        parts: the Linen name of an attribute, or the names of the pieces that it is joined of along the last axis.
        entries: for attributes that are dicts: the Linen name of an entry's Variable, from its key.
        zeros: Linen variables that the object has not, and which have to be zero: their paths, and their shapes.
    """

    parts: Mapping[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)
    entries: Mapping[str, Callable[[Path], str]] = dataclasses.field(default_factory=dict)
    zeros: Mapping[Path, Callable[[Any], tuple[int, ...]]] = dataclasses.field(default_factory=dict)


RULES: dict[type, Rule] = {
    nn.SimpleCell: Rule({"dense_i": ("i",), "dense_h": ("h",)}),
    nn.LSTMCell: Rule({"if_": ("if",)}),
    nn.OptimizedLSTMCell: Rule({"dense_i": ("ii", "if", "ig", "io"), "dense_h": ("hi", "hf", "hg", "ho")}),
    nn.GRUCell: Rule(
        {"dense_i": ("ir", "iz", "in"), "dense_h": ("hr", "hz", "hn")},
        zeros={("hn", "bias"): lambda cell: (cell.hidden_features,)},
    ),
    nn.WeightNorm: Rule(entries={"scales": lambda key: "/".join(("layer_instance", *key, "scale"))}),
    nn.SpectralNorm: Rule(entries={"batch_stats": lambda key: "/".join(("layer_instance", *key))}),
}
"""The classes whose trees differ; a class of your own can be added."""


@dataclasses.dataclass(frozen=True)
class _Place:
    """Where a Variable of the object model stands in the variables of the Linen model.

    Args:
        path: in the object; None for a Linen variable that the object has not.
        variable: the object's; its shape and dtype count.
        pieces: the Linen paths, which start with the collection.
    """

    path: Path | None
    variable: Any
    pieces: tuple[Path, ...]


def _places(node: Any, path: Path = (), pieces: tuple[Path, ...] = ((),), entries: Any = None) -> Iterator[_Place]:
    rule = next((RULES[cls] for cls in type(node).__mro__ if cls in RULES), Rule())
    for key, value in _parts_of(node):
        here = (*path, key)
        if isinstance(value, RngState):
            continue
        if entries is not None:
            below = tuple((*piece[:-1], entries(key)) for piece in pieces)
        elif _is_container(node):
            below = tuple((*piece[:-1], f"{piece[-1]}_{key}" if piece else str(key)) for piece in pieces)
        else:
            names = rule.parts.get(key, key)
            below = tuple(
                (*piece, name) for piece in pieces for name in ((names,) if isinstance(names, str) else names)
            )
        if isinstance(value, Variable):
            col = variable_name_from_type(value.type, allow_register=True)
            yield _Place(here, value, tuple((col, *piece) for piece in below))
        elif isinstance(value, (Pytree, Mapping, list, tuple)):
            yield from _places(value, here, below, rule.entries.get(key))
    for missing, shape in rule.zeros.items():
        zeros = jax.ShapeDtypeStruct(shape(node), node.param_dtype)
        yield _Place(None, zeros, tuple(("params", *piece, *missing) for piece in pieces))


def _is_container(node: Any) -> bool:
    return isinstance(node, (List, Dict)) or not isinstance(node, Pytree)


def _parts_of(node: Any) -> Iterator[tuple[Any, Any]]:
    if isinstance(node, List):
        yield from enumerate(node)
    elif isinstance(node, Pytree):
        yield from sorted(vars(node).items())
    else:
        yield from node.items() if isinstance(node, Mapping) else enumerate(node)


def to_state(model: Any, variables: Mapping[str, Any]) -> State:
    """The State of `model`, an object, with the values that a Linen model of the same parts has.

    >>> from batiste import linen, nnx
    >>> x = jnp.ones((1, 2))
    >>> variables = linen.Dense(3).init(jax.random.key(0), x)
    >>> model = nnx.Linear(2, 3, rngs=nnx.Rngs(1))
    >>> nnx.update(model, to_state(model, variables))
    >>> bool((model(x) == linen.Dense(3).apply(variables, x)).all())
    True

    Raises:
        StructureError: a variable is missing, or has no place in the object.
        ShapeError: a value has not the shape of the object's Variable.
    """
    given = dict(_leaves(unbox(variables), ()))
    found: list[tuple[Path, Variable]] = []
    missing: list[str] = []
    for place in _places(model):
        if lost := [piece for piece in place.pieces if piece not in given]:
            missing += ["/".join(piece) for piece in lost if place.path is not None]
            continue
        values = [given.pop(piece) for piece in place.pieces]
        if place.path is None:
            _check_zeros(place, values)
        else:
            found.append((place.path, place.variable.replace(_joined(place, values))))
    if missing or given:
        raise StructureError(
            "the variables are not those of this model", at=type(model).__name__,
            got=f"unknown {['/'.join(path) for path in given]}, missing {missing}",
            fix="give the parts of both models the same names, or add a Rule for the class to trees.RULES",
        )  # fmt: skip
    return from_flat_state(found)


def to_variables(model: Any, like: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """The variables of a Linen model with the parts of `model`, an object, and its values.

    Args:
        like: variables of the Linen model, or their shapes. It tells the shapes of parameters that have several axes
            in Linen and one in the object, such as those of a norm over two axes.
    """
    variables: dict[str, Any] = {}
    for place in _places(model):
        if place.path is None:
            values = [jnp.zeros(place.variable.shape, place.variable.dtype) for _ in place.pieces]
        else:
            value = place.variable.get_value()
            values = [value] if len(place.pieces) == 1 else jnp.split(value, len(place.pieces), axis=-1)
        for (*outer, name), value in zip(place.pieces, values):
            at = variables
            for key in outer:
                at = at.setdefault(key, {})
            at[name] = value
    if like is None:
        return variables
    return jax.tree.map(lambda x, shape: jnp.reshape(x, jnp.shape(shape)), variables, unbox(like))


def _leaves(tree: Any, path: Path) -> Iterator[tuple[Path, Any]]:
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, (*path, key))
        else:
            yield (*path, key), value


def _joined(place: _Place, values: list[Any]) -> Any:
    """The value of the object's Variable; Linen's parameters of several axes may be one axis there."""
    value = values[0] if len(values) == 1 else jnp.concatenate(values, axis=-1)
    shape = jnp.shape(place.variable.get_raw_value())
    if jnp.size(value) != int(np.prod(shape)):
        raise ShapeError("a variable has another shape in the object", at="/".join(map(str, place.path or ())),
                         got=jnp.shape(value), expected=shape)  # fmt: skip
    return jnp.reshape(value, shape) if jnp.shape(value) != shape else value


def _check_zeros(place: _Place, values: list[Any]) -> None:
    for piece, value in zip(place.pieces, values):
        if jnp.any(value):
            raise StructureError("the object has no such variable, and its value is not zero", at="/".join(piece),
                                 fix="keep the model in Linen, or train without this bias")  # fmt: skip
