# SPDX-License-Identifier: Apache-2.0
"""Nested dicts as flat ones and back, and traversals: which parts of a structure to read or replace."""

from __future__ import annotations

import abc
import copy
import dataclasses
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax

from batiste import struct
from batiste.core.frozen_dict import FrozenDict

PathParts = tuple[Any, ...]
VariableDict = Mapping[str, Any]


@struct.dataclass
class _EmptyNode:
    pass


empty_node = _EmptyNode()  # stands for an empty dict among the values of a flat one


def flatten_dict(
    xs: Mapping[Any, Any],
    keep_empty_nodes: bool = False,
    is_leaf: Callable[[PathParts, Any], bool] | None = None,
    sep: str | None = None,
) -> dict[Any, Any]:
    """The leaves of a nested dict by path.

    Args:
        keep_empty_nodes: an empty dict becomes `empty_node`; else it is left out.
        is_leaf: `(path, dict) -> bool`, true for dicts that are kept whole.
        sep: the paths are strings, joined by it; else tuples.

    >>> flatten_dict({"mlp": {"up": 1, "down": 2}, "none": {}})
    {('mlp', 'up'): 1, ('mlp', 'down'): 2}
    >>> flatten_dict({"mlp": {"up": 1}, "none": {}}, keep_empty_nodes=True, sep="/")
    {'mlp/up': 1, 'none': _EmptyNode()}
    """
    assert isinstance(xs, FrozenDict | dict), f"expected (frozen)dict; got {type(xs)}"

    def leaves(x: Any, path: PathParts) -> Iterator[tuple[Any, Any]]:
        key = path if sep is None else sep.join(path)
        if not isinstance(x, FrozenDict | dict) or (is_leaf is not None and is_leaf(path, x)):
            yield key, x
        elif keep_empty_nodes and not x and path:
            yield key, empty_node
        else:
            for name, value in x.items():
                yield from leaves(value, (*path, name))

    return dict(leaves(xs, ()))


def unflatten_dict(xs: Mapping[Any, Any], sep: str | None = None) -> dict[Any, Any]:
    """The nested dict of a flat one, the inverse of `flatten_dict`.

    >>> unflatten_dict({"mlp/up": 1, "none": empty_node}, sep="/")
    {'mlp': {'up': 1}, 'none': {}}
    """
    assert isinstance(xs, dict), f"input is not a dict; it is a {type(xs)}"
    result: dict[Any, Any] = {}
    for path, value in xs.items():
        if sep is not None:
            path = path.split(sep)
        place = result
        for key in path[:-1]:
            place = place.setdefault(key, {})
        place[path[-1]] = {} if value is empty_node else value
    return result


def path_aware_map(f: Callable[[PathParts, Any], Any], nested_dict: VariableDict) -> dict[Any, Any]:
    """A nested dict of `f(path, leaf)`; empty dicts stay.

    >>> path_aware_map(lambda path, x: x if "bias" in path else 10 * x, {"up": {"kernel": 1, "bias": 2}})
    {'up': {'kernel': 10, 'bias': 2}}
    """
    flat = flatten_dict(nested_dict, keep_empty_nodes=True)
    return unflatten_dict({path: x if x is empty_node else f(path, x) for path, x in flat.items()})


# ---------------------------------------------------------------- traversals


class Traversal(abc.ABC):
    """Chooses parts of a structure. Every traversal is deprecated: `optax` and `path_aware_map` do its work."""

    def __new__(cls, *args: Any, **kwargs: Any):
        warnings.warn(
            "`flax.traverse_util.Traversal` will be deprecated: use optax for optimizers of parts of a model, and "
            "path_aware_map for other changes.",
            DeprecationWarning,
            stacklevel=2,
        )
        return super().__new__(cls)

    @abc.abstractmethod
    def update(self, fn: Callable[[Any], Any], inputs: Any) -> Any:
        """A copy of `inputs` with `fn` applied to the chosen parts."""

    @abc.abstractmethod
    def iterate(self, inputs: Any) -> Iterator[Any]:
        """The chosen parts of `inputs`."""

    def set(self, values: Any, inputs: Any) -> Any:
        """A copy of `inputs` with the chosen parts replaced by `values`, in order.

        Raises:
            ValueError: there are not as many values as parts.
        """
        rest = list(values)

        def following(_: Any) -> Any:
            if not rest:
                raise ValueError("Not enough values provided")
            return rest.pop(0)

        result = self.update(following, inputs)
        if rest:
            raise ValueError("Too many values provided")
        return result

    def compose(self, other: Traversal) -> Traversal:
        """The parts that `other` chooses in those that `self` chooses."""
        return TraverseCompose(self, other)

    def merge(self, *traversals: Traversal) -> Traversal:
        """In the chosen parts, what each of `traversals` chooses."""
        return self.compose(TraverseMerge(*traversals))

    def each(self) -> Traversal:
        """Every item of the chosen containers."""
        return self.compose(TraverseEach())

    def tree(self) -> Traversal:
        """Every leaf of the chosen pytrees."""
        return self.compose(TraverseTree())

    def filter(self, fn: Callable[[Any], bool]) -> Traversal:
        """Those chosen parts for which `fn` is true."""
        return self.compose(TraverseFilter(fn))

    def __getattr__(self, attr: str) -> Traversal:
        if attr.startswith("__"):
            raise AttributeError(attr)
        return self.compose(TraverseAttr(attr))

    def __getitem__(self, key: Any) -> Traversal:
        return self.compose(TraverseItem(key))


class TraverseId(Traversal):
    """The whole."""

    def update(self, fn, inputs):
        return fn(inputs)

    def iterate(self, inputs):
        yield inputs


t_identity: Traversal = object.__new__(TraverseId)


class TraverseMerge(Traversal):
    """What any of several traversals chooses."""

    def __init__(self, *traversals: Traversal):
        self._traversals = traversals

    def update(self, fn, inputs):
        for traversal in self._traversals:
            inputs = traversal.update(fn, inputs)
        return inputs

    def iterate(self, inputs):
        for traversal in self._traversals:
            yield from traversal.iterate(inputs)


class TraverseCompose(Traversal):
    """What `y` chooses in what `x` chooses."""

    def __init__(self, x: Traversal, y: Traversal):
        self._x, self._y = x, y

    def update(self, fn, inputs):
        return self._x.update(lambda part: self._y.update(fn, part), inputs)

    def iterate(self, inputs):
        for part in self._x.iterate(inputs):
            yield from self._y.iterate(part)


class TraverseFilter(Traversal):
    """The whole, if `fn` is true for it."""

    def __init__(self, fn: Callable[[Any], bool]):
        self._fn = fn

    def update(self, fn, inputs):
        return fn(inputs) if self._fn(inputs) else inputs

    def iterate(self, inputs):
        if self._fn(inputs):
            yield inputs


class TraverseAttr(Traversal):
    """An attribute of a dataclass, a named tuple or another object."""

    def __init__(self, attr: str):
        self._attr = attr

    def update(self, fn, inputs):
        value = fn(getattr(inputs, self._attr))
        if hasattr(inputs, "_replace"):
            return inputs._replace(**{self._attr: value})
        if dataclasses.is_dataclass(inputs):
            return dataclasses.replace(inputs, **{self._attr: value})  # pyright: ignore[reportArgumentType]
        inputs = copy.copy(inputs)
        setattr(inputs, self._attr, value)
        return inputs

    def iterate(self, inputs):
        yield getattr(inputs, self._attr)


class TraverseItem(Traversal):
    """The item at a key or index, or each of a slice."""

    def __init__(self, key: Any):
        self._key = key

    def update(self, fn, inputs):
        items = list(inputs) if isinstance(inputs, tuple) else copy.copy(inputs)
        chosen = items[self._key]
        items[self._key] = [fn(x) for x in chosen] if isinstance(self._key, slice) else fn(chosen)
        if isinstance(inputs, tuple):
            return type(inputs)(*items) if hasattr(inputs, "_fields") else tuple(items)
        return items

    def iterate(self, inputs):
        yield from inputs[self._key] if isinstance(self._key, slice) else (inputs[self._key],)


class TraverseEach(Traversal):
    """Every item of a list or tuple, every value of a dict."""

    def update(self, fn, inputs):
        if isinstance(inputs, dict):
            return {key: fn(value) for key, value in inputs.items()}
        if type(inputs) not in (list, tuple):
            raise ValueError(f"Only the entries of a list or tuple can be traversed, not those of {type(inputs)}.")
        return type(inputs)(map(fn, inputs))

    def iterate(self, inputs):
        yield from inputs.values() if isinstance(inputs, dict) else inputs


class TraverseTree(Traversal):
    """Every leaf of a pytree."""

    def update(self, fn, inputs):
        return jax.tree.map(fn, inputs)

    def iterate(self, inputs):
        yield from jax.tree.leaves(inputs)


class ModelParamTraversal(Traversal):
    """The leaves of a nested dict for which `filter_fn("/path/of/leaf", leaf)` is true."""

    def __init__(self, filter_fn: Callable[[str, Any], bool]):
        self._filter_fn = filter_fn

    def _sorted(self, inputs: Any) -> dict[PathParts, Any]:
        if not isinstance(inputs, FrozenDict | dict):
            raise ValueError(f"Can only traverse a nested dict of parameters, not {type(inputs)}")
        flat = flatten_dict(inputs, keep_empty_nodes=True)
        return {path: flat[path] for path in sorted(flat)}

    def _chosen(self, path: PathParts, x: Any) -> bool:
        return x is not empty_node and self._filter_fn("/" + "/".join(path), x)

    def update(self, fn, inputs):
        flat = self._sorted(inputs)
        changed = unflatten_dict({path: fn(x) if self._chosen(path, x) else x for path, x in flat.items()})
        return FrozenDict(changed) if isinstance(inputs, FrozenDict) else changed

    def iterate(self, inputs):
        return (x for path, x in self._sorted(inputs).items() if self._chosen(path, x))
