# SPDX-License-Identifier: Apache-2.0
"""Every public name of `flax.nnx` is there, and its functions and classes take the same arguments."""

import inspect
import types
import typing

import pytest
from flax import nnx as flax_nnx

from batiste import nnx

OTHER = {
    "GraphDef": "made by split alone",
    "UpdateContext": "it needs no cache of static parts",
    "Data": "a marker",
    "Static": "a marker",
    "Initializer": "a type alias",
}
LATER = {"bridge", "wrappers"}  # they come with the functional face
INTERNAL = {"deprecations", "proxy_caller", "tp", "annotations", "wrappers"}
NAMES = sorted(n for n in dir(flax_nnx) if not n.startswith("_") and n not in LATER | INTERNAL)
CALLABLES = [n for n in NAMES if n not in OTHER and callable(getattr(flax_nnx, n))
             and not isinstance(getattr(flax_nnx, n), (types.ModuleType, typing.TypeVar))]  # fmt: skip


def arguments(function):
    """`(name, kind, has a default)` of every argument; None where it has no signature."""
    try:
        parameters = inspect.signature(function).parameters.values()
    except (ValueError, TypeError):
        return None
    return [(p.name, p.kind.name, p.default is not p.empty) for p in parameters]


def simple_defaults(function):
    """The defaults that are plain values; classes count by their names."""
    plain = lambda x: tuple(map(plain, x)) if isinstance(x, tuple) else x.__name__ if isinstance(x, type) else x
    return {p.name: plain(p.default) for p in inspect.signature(function).parameters.values()
            if isinstance(p.default, (bool, int, float, str, tuple, type(None)))}  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_the_name_is_there(name):
    assert getattr(nnx, name) is not None


@pytest.mark.parametrize("name", CALLABLES)
def test_the_arguments_are_the_same(name):
    theirs, ours = arguments(getattr(flax_nnx, name)), arguments(getattr(nnx, name))
    if theirs is None:
        assert callable(getattr(nnx, name))
        return
    assert ours == theirs
    assert simple_defaults(getattr(nnx, name)) == simple_defaults(getattr(flax_nnx, name))
