# SPDX-License-Identifier: Apache-2.0
"""Everything the library takes from JAX that is not public or has moved between versions."""

from __future__ import annotations

import functools
from typing import Any

import jax
import numpy as np
from jax._src import core as _core
from jax._src import hijax as _hijax
from jax._src.core import (
    EvalTrace,
    get_opaque_trace_state,  # public in jax.extend.core, which takes 20 ms to import
)
from jax._src.distributed import global_state as processes_state  # noqa: F401  (waiting with a time-out has no public name)
from jax._src.effects import Effect, custom_derivatives_allowed_effects  # noqa: F401
from jax._src.interpreters import ad as _ad
from jax._src.interpreters.partial_eval import DynamicJaxprTracer, dce_jaxpr
from jax._src.source_info_util import user_frames as _user_frames
from jax._src.state.types import AbstractRef
from jax._src.traceback_util import _exclude_paths as hidden_paths  # noqa: F401
from jax._src.traceback_util import api_boundary  # noqa: F401
from jax._src.xla_bridge import backends_are_initialized as backends_started  # noqa: F401
from jax.tree_util import default_registry

current_trace = functools.partial(get_opaque_trace_state, convention="flax")
"""The trace level the caller stands in; two results compare equal inside one level."""


def is_inside(trace, outer) -> bool:
    """Whether one trace level stands inside another; what has ended surrounds nothing, what is at rest all else."""
    wanted, level = outer._trace_ref(), trace._trace_ref()
    while level is not wanted and (parent := getattr(level, "parent_trace", None)) is not None:
        level = parent
    known = level is wanted or isinstance(level, EvalTrace)  # some levels do not say in which they stand
    return wanted is not None and trace != outer and (isinstance(wanted, EvalTrace) or not known or level is wanted)


# Types whose content changes, and the content of their values: JAX 0.11.2 has them no more.
AvalQDD: Any = getattr(_core, "AvalQDD", None)
MutableHiType: Any = getattr(_hijax, "MutableHiType", _hijax.HiType)
cur_qdd: Any = getattr(_core, "cur_qdd", None)


class HiPrimitive(_core.Primitive):
    """A primitive that hijax types may go into and come out of; `to_lojax` says it by JAX's lower level.

    A subclass has `abstract_eval` and `to_lojax`, and for derivatives `jvp` and `transpose`.
    """

    def __init__(self, name: str):
        super().__init__(name)
        for rule, rules in (("jvp", _ad.primitive_jvps), ("transpose", _ad.primitive_transposes)):
            if hasattr(self, rule):
                rules[self] = getattr(self, rule)

    def is_high(self, *avals: Any, **params: Any) -> bool:
        return True


Ref = jax.Ref
ShapedArray = jax.core.ShapedArray  # type: ignore[attr-defined]
Tracer = jax.core.Tracer  # type: ignore[attr-defined]


def inputs_used(jaxpr) -> list[bool]:
    """Of each input of a jaxpr, whether its outputs or effects depend on it; loops and calls are looked into."""
    return without_idle(jaxpr)[1]


def without_idle(jaxpr):
    """A jaxpr without what its outputs do not depend on, and of each input whether it is left."""
    return dce_jaxpr(jaxpr, [True] * len(jaxpr.outvars))


def scan_inputs(params) -> tuple[int, int]:
    """How many inputs of a scan are constants, and how many are carried."""
    if "num_consts" in params:
        return params["num_consts"], params["num_carry"]
    consts, carry, _ = params["ft_in"].unpack()  # since JAX 0.11.2
    return len(list(consts)), len(list(carry))


def mesh_of(exported):
    """The mesh that an exported program was made for, of the first devices that are here."""
    mesh = next(place.mesh for place in exported._in_named_shardings if place is not None)
    devices = np.array(jax.devices()[: mesh.size]).reshape(mesh.axis_sizes)
    return jax.sharding.Mesh(devices, mesh.axis_names, axis_types=mesh.axis_types)


def is_ref(x) -> bool:
    """Whether `x` is a mutable array (`jax.Ref`), or a tracer of one."""
    if isinstance(x, Tracer):
        return isinstance(x.aval, AbstractRef)
    return isinstance(x, Ref)


def is_staged(x) -> bool:
    """Whether what is done with `x` is written into a program, and nothing computed yet: under `jit`, say."""
    return isinstance(x, DynamicJaxprTracer)


def one_level(x):
    """`(children with keys, PyTreeDef of one level)` of a registered pytree node, or None for a leaf."""
    if default_registry.flatten_one_level(x) is None:
        return None
    first = True

    def stop(_):
        nonlocal first
        if first:  # the first node that is asked about is `x` itself
            first = False
            return False
        return True

    return jax.tree_util.tree_flatten_with_path(x, is_leaf=stop)


def key_name(entry):
    """The plain key (attribute name, dict key, index) of one entry of a JAX key path."""
    for name in ("key", "idx", "name"):
        if hasattr(entry, name):
            return getattr(entry, name)
    return str(entry)


def user_frames(source_info):
    """The frames outside of JAX that an equation comes from, innermost first."""
    return list(_user_frames(source_info.traceback))


def static_arguments(jitted):
    """The numbers and the names of the static arguments of a function that `jax.jit` made; empty for others."""
    info = getattr(jitted, "_jit_info", None)
    return (frozenset(info.static_argnums), frozenset(info.static_argnames)) if info else (frozenset(), frozenset())
