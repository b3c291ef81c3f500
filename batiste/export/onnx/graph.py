# SPDX-License-Identifier: Apache-2.0
"""An ONNX graph while it is made: nodes, constants, and shapes whose sizes are known only when it runs.

A value of JAX is the name of a tensor. What ONNX runtimes do not compute with lies in another dtype: bfloat16 as
float32, rounded after each operation; whole numbers of 4 bits as such of 8; a random key as its two words.
"""

from __future__ import annotations

import ast
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.extend.core as jex
import jax.numpy as jnp
import numpy as np

from batiste.debug.calls import Around, Places
from batiste.graph.optional import need

from ..errors import ExportError

LYING = {"bfloat16": "float32", "int4": "int8", "uint4": "uint8", "float8_e4m3fn": "float32", "float8_e5m2": "float32"}
BOOL = np.dtype(bool)
Rule = Callable[..., Any]
RULES: dict[str, Rule] = {}
"""By the name of a JAX primitive: `rule(graph, eqn, *names) -> name or names`."""


def rule(*names: str) -> Callable[[Rule], Rule]:
    """Says that a function translates these primitives."""

    def note(function: Rule) -> Rule:
        RULES.update(dict.fromkeys(names, function))
        return function

    return note


def lying(dtype: Any) -> np.dtype:
    """The dtype that a value of JAX has in the graph."""
    if jnp.issubdtype(dtype, jax.dtypes.prng_key):
        return np.dtype(np.uint32)
    return np.dtype(LYING.get(np.dtype(dtype).name, dtype))


class Graph:
    """Nodes in order; a graph inside another one sees the tensors of that one."""

    def __init__(self, places: Places, outer: Graph | None = None):
        self.places, self.outer = places, outer
        self.nodes: list[Any] = []
        self.initializers: list[Any] = [] if outer is None else outer.initializers
        self.sizes: dict[str, str] = {} if outer is None else outer.sizes
        self._counter: Any = itertools.count() if outer is None else outer._counter
        self._constants: dict[Any, str] = {} if outer is None else outer._constants
        self._known: dict[Any, str] = {}  # tensors of sizes that have been computed
        self.helper = need("onnx.helper", extra="onnx")

    # ---------------------------------------------------------------- nodes and constants

    def name(self, kind: str) -> str:
        return f"{kind}_{next(self._counter)}"

    def op(self, kind: str, *inputs: str, outputs: int = 1, **attributes: Any) -> Any:
        """The name of a node's output, or their names if there are more."""
        names = [self.name(kind.lower()) for _ in range(outputs)]
        self.nodes.append(self.helper.make_node(kind, list(inputs), names, **attributes))
        return names[0] if outputs == 1 else names

    def const(self, x: Any, dtype: Any = None) -> str:
        """The name of a constant; equal small ones are one."""
        x = np.ascontiguousarray(x, dtype).reshape(np.shape(x))
        x = x.astype(lying(x.dtype))
        key = (x.dtype.str, x.shape, x.tobytes()) if x.size <= 64 else None
        if key not in self._constants:
            name = self.name("const")
            self.initializers.append(need("onnx.numpy_helper", extra="onnx").from_array(x, name))
            if key is None:
                return name
            self._constants[key] = name
        return self._constants[key]

    def ints(self, *x: int) -> str:
        return self.const(np.array(x, np.int64))

    def cast(self, x: str, dtype: Any) -> str:
        return self.op("Cast", x, to=self.type(dtype))

    def type(self, dtype: Any) -> int:
        return self.helper.np_dtype_to_tensor_dtype(lying(dtype))

    def info(self, name: str, aval: Any) -> Any:
        """The description of an input or output."""
        dims = [n if isinstance(n, int) else str(n) for n in drawn(aval)]
        return self.helper.make_tensor_value_info(name, self.type(aval.dtype), dims)

    # ---------------------------------------------------------------- shapes

    def dim(self, n: Any) -> str:
        """A size as a tensor of one int64; of an expression of sizes, what computes it."""
        if isinstance(n, (int, np.integer)):
            return self.ints(int(n))
        if self.outer is not None:
            return self.outer.dim(n)
        if str(n) not in self._known:
            self._known[str(n)] = self._computed(ast.parse(str(n).replace("^", "**"), mode="eval").body, str(n))
        return self._known[str(n)]

    def _computed(self, node: Any, text: str) -> str:
        if isinstance(node, ast.Name):
            return self.sizes[node.id]
        if isinstance(node, ast.Constant):
            return self.ints(int(node.value))  # type: ignore[arg-type]
        if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
            return self.op("Neg", self._computed(node.operand, text))
        if isinstance(node, ast.BinOp):
            kind = {ast.Add: "Add", ast.Sub: "Sub", ast.Mult: "Mul", ast.Pow: "Pow"}.get(type(node.op))
            if kind:
                return self.op(kind, self._computed(node.left, text), self._computed(node.right, text))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            kind = {"floordiv": "Div", "mod": "Mod", "max": "Max", "min": "Min"}.get(node.func.id)
            if kind:  # sizes are not negative: to divide is to round down
                return self.op(kind, *(self._computed(x, text) for x in node.args))
        raise ExportError("ONNX cannot compute this size", got=text, fix="give the input a fixed size")

    def shape(self, shape: Sequence[Any]) -> str:
        """A shape as a tensor of int64."""
        if all(isinstance(n, (int, np.integer)) for n in shape):
            return self.ints(*map(int, shape))
        return self.op("Concat", *map(self.dim, shape), axis=0)

    def reshape(self, x: str, shape: Sequence[Any]) -> str:
        return self.op("Reshape", x, self.shape(shape), allowzero=1)

    def transpose(self, x: str, order: Sequence[int]) -> str:
        return x if list(order) == sorted(order) else self.op("Transpose", x, perm=list(order))

    def expand(self, x: str, shape: Sequence[Any]) -> str:
        return self.op("Expand", x, self.shape(shape))

    def cut(self, x: str, axis: int, start: Any, stop: Any, step: int = 1) -> str:
        """x[start:stop:step] of one axis; numbers or sizes."""
        return self.op("Slice", x, self.dim(start), self.dim(stop), self.ints(axis), self.ints(step))

    # ---------------------------------------------------------------- programs

    def traced(self, function: Callable[..., Any], avals: Sequence[Any], inputs: Sequence[str]) -> list[str]:
        """The outputs of a function of JAX, whose program is translated."""
        closed = jax.make_jaxpr(function)(*(jax.ShapeDtypeStruct(x.shape, x.dtype) for x in avals))
        return self.run(closed.jaxpr, [self.const(np.asarray(x)) for x in closed.consts], inputs)

    def run(self, jaxpr: Any, consts: Sequence[str], inputs: Sequence[str], around: Around | None = None) -> list[str]:
        """Translates the equations of a jaxpr; the names of its outputs."""
        names: dict[Any, str] = dict(zip([*jaxpr.constvars, *jaxpr.invars], [*consts, *inputs]))

        def read(x: Any) -> str:
            return names[x] if isinstance(x, jex.Var) else self.const(np.asarray(x.val), x.aval.dtype)

        for eqn in live(jaxpr):
            here = (around or Around()).at(eqn, self.places)
            found = self._translated(eqn, [read(x) for x in eqn.invars], here)
            found = [found] if isinstance(found, str) else list(found)
            names.update(zip(eqn.outvars, map(self._rounded, found, eqn.outvars, [eqn.primitive.name] * len(found))))
        return [read(x) for x in jaxpr.outvars]

    def _translated(self, eqn: Any, inputs: list[str], here: Around) -> Any:
        name, inner = eqn.primitive.name, _inlined(eqn)
        if inner is not None:
            consts = [self.const(np.asarray(x)) for x in inner.consts]
            return self.run(inner.jaxpr, consts, inputs, here)
        if name not in RULES:
            raise ExportError(f"The operation {name} of JAX has no translation to ONNX", at=here.module,
                              got=f"{here.source or here.inside}",
                              fix="export a bundle, or compute this part with other operations")  # fmt: skip
        try:
            return RULES[name](self, eqn, *inputs)
        except ExportError as error:
            if not error.path and here.module:
                raise type(error)(error.problem, at=here.module, got=error.got, fix=error.fix) from error
            raise

    def _rounded(self, name: str, var: Any, primitive: str) -> str:
        """A result that is bfloat16 for JAX has no more digits than that."""
        if primitive in EXACT or getattr(var.aval, "dtype", None) != jnp.bfloat16:
            return name
        narrow = self.op("Cast", name, to=need("onnx", extra="onnx").TensorProto.BFLOAT16)
        return self.cast(narrow, np.float32)


EXACT = {"reshape", "broadcast_in_dim", "transpose", "slice", "concatenate", "split", "squeeze", "rev", "gather", "pad",
         "select_n", "max", "min", "neg", "stop_gradient", "copy", "reduce_max", "reduce_min", "scan"}  # fmt: skip
INLINED = ("jit", "pjit", "closed_call", "core_call", "remat", "remat2", "checkpoint", "custom_jvp_call",
           "custom_vjp_call", "custom_vjp_call_jaxpr", "custom_lin")  # fmt: skip


def _inlined(eqn: Any) -> Any:
    """The closed jaxpr that an equation only calls."""
    if eqn.primitive.name not in INLINED:
        return None
    found = next(eqn.params[key] for key in ("jaxpr", "call_jaxpr", "fun_jaxpr") if key in eqn.params)
    return found if isinstance(found, jex.ClosedJaxpr) else jex.ClosedJaxpr(found, ())


def live(jaxpr: Any) -> list[Any]:
    """The equations that the outputs depend on, in order."""
    wanted = {v for v in jaxpr.outvars if isinstance(v, jex.Var)}
    found = []
    for eqn in reversed(jaxpr.eqns):
        if not wanted.isdisjoint(eqn.outvars):
            found.append(eqn)
            wanted.update(v for v in eqn.invars if isinstance(v, jex.Var))
    return found[::-1]


def drawn(aval: Any) -> tuple[Any, ...]:
    """The shape that a value has in the graph."""
    return (*aval.shape, 2) if jnp.issubdtype(aval.dtype, jax.dtypes.prng_key) else tuple(aval.shape)


def dtypes(eqn: Any) -> tuple[np.dtype, np.dtype]:
    """Of the first input and the first output, as JAX has them."""
    return eqn.invars[0].aval.dtype, eqn.outvars[0].aval.dtype
