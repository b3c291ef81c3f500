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
INTERNAL = {"deprecations", "proxy_caller", "tp", "annotations"}
NAMES = sorted(n for n in dir(flax_nnx) if not n.startswith("_") and n not in INTERNAL)
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


# ---------------------------------------------------------------- nnx.bridge
BRIDGE = {
    "": "AttrPriority Functional Module NNXMeta Scope ToLinen ToNNX compact current_context current_module functional "
        "lazy_init linen_in_bridge_mdl nnx_in_bridge_mdl to_linen with_partitioning",
    "variables": "NNXMeta get_col_name is_vanilla_variable linen_vars_to_nnx_attrs sort_variable_types to_linen_var "
                 "to_nnx_var with_partitioning",
    "wrappers": "Functional ToLinen ToNNX current_linen_module functional lazy_init linen_rngs_dict to_linen "
                "to_linen_class",
    "module": "AttrPriority Module ModuleContext ModuleMeta ModuleStackEntry ModuleState Scope compact "
              "current_context current_module has_setup",
    "interop": "linen_in_bridge_mdl nnx_in_bridge_mdl",
}  # fmt: skip
BRIDGE_NAMES = [(module, name) for module, names in BRIDGE.items() for name in names.split()]
BRIDGE_CLASSES = ["AttrPriority", "Functional", "Module", "NNXMeta", "Scope", "ToLinen", "ToNNX"]


def in_bridge(root, module):
    return getattr(root.bridge, module) if module else root.bridge


def public_methods(cls):
    return {n: f for n, f in vars(cls).items() if inspect.isfunction(f) and (not n.startswith("_") or n == "__call__")}


@pytest.mark.parametrize("module", BRIDGE)
def test_the_table_of_the_bridge_is_complete(module):
    home = in_bridge(flax_nnx, module)
    public = {n for n, x in vars(home).items() if not n.startswith("_") and callable(x)
              and getattr(x, "__module__", "").startswith("flax.nnx.bridge")}  # fmt: skip
    assert public - set(BRIDGE[module].split()) <= {"ModuleBase", "nnx_attrs_to_linen_vars"}


@pytest.mark.parametrize(("module", "name"), BRIDGE_NAMES)
def test_the_bridge_has_the_same_functions(module, name):
    theirs, ours = getattr(in_bridge(flax_nnx, module), name), getattr(in_bridge(nnx, module), name)
    if isinstance(theirs, types.FunctionType):
        assert arguments(ours) == arguments(theirs)
    else:
        assert isinstance(ours, type) == isinstance(theirs, type)


@pytest.mark.parametrize("name", BRIDGE_CLASSES)
def test_the_bridge_has_the_same_methods(name):
    theirs, ours = getattr(flax_nnx.bridge, name), getattr(nnx.bridge, name)
    own = lambda cls: [x for x in arguments(cls.__init__) if x[0] not in ("parent", "name")]  # those of all of Linen
    assert name == "AttrPriority" or own(ours) == own(theirs)
    for method, function in public_methods(theirs).items():
        assert arguments(getattr(ours, method)) == arguments(function), method


def test_the_bridge_orders_attributes_alike():
    assert [(x.name, int(x)) for x in nnx.bridge.AttrPriority] == [
        (x.name, int(x)) for x in flax_nnx.bridge.AttrPriority
    ]
