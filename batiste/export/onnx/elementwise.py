# SPDX-License-Identifier: Apache-2.0
"""Operations of JAX that compute each element by itself, and sums over dims, in ONNX."""

from __future__ import annotations

import math
from typing import Any

import jax.numpy as jnp
import numpy as np

from ..errors import ExportError
from .graph import BOOL, Graph, dtypes, lying, rule

SAME = {
    "add": "Add", "sub": "Sub", "mul": "Mul", "div": "Div", "neg": "Neg", "exp": "Exp", "log": "Log", "tanh": "Tanh",
    "logistic": "Sigmoid", "sqrt": "Sqrt", "sin": "Sin", "cos": "Cos", "tan": "Tan", "asin": "Asin", "acos": "Acos",
    "atan": "Atan", "sinh": "Sinh", "cosh": "Cosh", "asinh": "Asinh", "acosh": "Acosh", "atanh": "Atanh", "abs": "Abs",
    "sign": "Sign", "floor": "Floor", "ceil": "Ceil", "erf": "Erf", "pow": "Pow", "max": "Max", "min": "Min",
    "stop_gradient": "Identity", "copy": "Identity", "copy_p": "Identity", "name": "Identity",
    "sharding_constraint": "Identity", "optimization_barrier": "Identity",
}  # fmt: skip
COMPARED = {"eq": "Equal", "lt": "Less", "gt": "Greater", "le": "LessOrEqual", "ge": "GreaterOrEqual"}
LOGIC = {"and": "And", "or": "Or", "xor": "Xor"}
BITS = {"and": "BitwiseAnd", "or": "BitwiseOr", "xor": "BitwiseXor"}
REDUCED = {"reduce_sum": "ReduceSum", "reduce_max": "ReduceMax", "reduce_min": "ReduceMin", "reduce_prod": "ReduceProd",
           "reduce_or": "ReduceMax", "reduce_and": "ReduceMin"}  # fmt: skip
SHIFTED = {"shift_left": "LEFT", "shift_right_logical": "RIGHT"}
NARROW = (np.dtype(bool), np.dtype(np.int8), np.dtype(np.uint8), np.dtype(np.int16), np.dtype(np.uint16))


@rule(*SAME)
def same(graph: Graph, eqn: Any, *inputs: str) -> Any:
    kind, dtype = SAME[eqn.primitive.name], lying(eqn.outvars[0].aval.dtype)
    if kind == "Identity":
        return inputs
    if dtype == BOOL:  # or and and, of numbers
        return graph.op({"Add": "Or", "Max": "Or", "Mul": "And", "Min": "And"}[kind], *inputs)
    if dtype in NARROW:  # runtimes compute with 32 bits
        wide = graph.op(kind, *(graph.cast(x, np.int32) for x in inputs))
        return graph.cast(wide, dtype)
    if dtype == np.uint32:  # and with no such ones; a cast keeps the last 32 bits
        return graph.cast(graph.op(kind, *(graph.cast(x, np.int64) for x in inputs)), dtype)
    if kind == "Pow" and not jnp.issubdtype(eqn.invars[1].aval.dtype, jnp.inexact):
        inputs = (inputs[0], graph.cast(inputs[1], dtype))
    return graph.op(kind, *inputs)


@rule("ne", *COMPARED)
def compared(graph: Graph, eqn: Any, x: str, y: str) -> str:
    dtype, name = lying(eqn.invars[0].aval.dtype), eqn.primitive.name
    if dtype in NARROW and (dtype != BOOL or name not in ("eq", "ne")):
        x, y = graph.cast(x, np.int32), graph.cast(y, np.int32)
    if dtype == np.uint32:
        x, y = graph.cast(x, np.int64), graph.cast(y, np.int64)
    return graph.op("Not", graph.op("Equal", x, y)) if name == "ne" else graph.op(COMPARED[name], x, y)


@rule(*LOGIC)
def logic(graph: Graph, eqn: Any, x: str, y: str) -> str:
    return graph.op((LOGIC if dtypes(eqn)[0] == BOOL else BITS)[eqn.primitive.name], x, y)


@rule("not")
def negated(graph: Graph, eqn: Any, x: str) -> str:
    return graph.op("Not" if dtypes(eqn)[0] == BOOL else "BitwiseNot", x)


@rule(*SHIFTED, "shift_right_arithmetic")
def shifted(graph: Graph, eqn: Any, x: str, by: str) -> str:
    """Of words: a signed number is its word, and by 32 or more there is nothing left."""
    name, dtype = eqn.primitive.name, dtypes(eqn)[0]
    if dtype.itemsize != 4:
        raise ExportError("ONNX shifts words of 32 bits", got=dtype, fix="use int32 or uint32")
    if name == "shift_right_arithmetic" and dtype == np.int32:
        wide, by = graph.cast(x, np.float64), graph.cast(by, np.float64)  # exact, and rounds down
        return graph.cast(graph.op("Floor", graph.op("Div", wide, graph.op("Pow", graph.const(2.0), by))), dtype)
    word, by = (graph.cast(v, np.uint32) if dtype != np.uint32 else v for v in (x, by))
    moved = graph.op("BitShift", word, by, direction=SHIFTED.get(name, "RIGHT"))
    outside = graph.op("GreaterOrEqual", graph.cast(by, np.int64), graph.const(np.int64(32)))
    found = graph.op("Where", outside, graph.const(np.int64(0)), graph.cast(moved, np.int64))
    return graph.cast(found, dtype)


@rule("convert_element_type")
def converted(graph: Graph, eqn: Any, x: str) -> str:
    old, new = (lying(dtype) for dtype in dtypes(eqn))
    if jnp.dtype(dtypes(eqn)[1]).name.startswith("float8"):
        raise ExportError("ONNX runtimes do not compute with float8", got=dtypes(eqn)[1])
    if new == BOOL and old != BOOL:
        return graph.op("Not", graph.op("Equal", x, graph.const(np.zeros((), old))))
    return graph.cast(x, new) if old != new else x


@rule("select_n")
def selected(graph: Graph, eqn: Any, which: str, *cases: str) -> str:
    """Of two cases the first one where `which` is False; of more, the one of that number."""
    dtype = lying(eqn.outvars[0].aval.dtype)
    if dtype == BOOL:
        cases = tuple(graph.cast(x, np.int32) for x in cases)
    if dtypes(eqn)[0] == BOOL:
        result = graph.op("Where", which, cases[1], cases[0]) if len(cases) == 2 else cases[0]
    else:
        result = cases[0]
        for n, case in enumerate(cases[1:], 1):
            chosen = graph.op("Equal", which, graph.const(np.full((), n, dtypes(eqn)[0])))
            result = graph.op("Where", chosen, case, result)
    return graph.cast(result, bool) if dtype == BOOL else result


@rule("clamp")
def clamped(graph: Graph, eqn: Any, low: str, x: str, high: str) -> str:
    return graph.op("Min", graph.op("Max", x, low), high)


@rule("square")
def square(graph: Graph, eqn: Any, x: str) -> str:
    return graph.op("Mul", x, x)


@rule("integer_pow")
def integer_pow(graph: Graph, eqn: Any, x: str) -> str:
    n, dtype = eqn.params["y"], lying(dtypes(eqn)[0])
    if n in (2, 3):
        return graph.op("Mul", graph.op("Mul", x, x), x) if n == 3 else graph.op("Mul", x, x)
    return graph.op("Pow", x, graph.const(np.asarray(n, dtype)))


@rule("rsqrt")
def rsqrt(graph: Graph, eqn: Any, x: str) -> str:
    return graph.op("Reciprocal", graph.op("Sqrt", x))


@rule("cbrt")
def cbrt(graph: Graph, eqn: Any, x: str) -> str:
    third = graph.const(np.asarray(1 / 3, lying(dtypes(eqn)[0])))
    return graph.op("Mul", graph.op("Sign", x), graph.op("Pow", graph.op("Abs", x), third))


@rule("exp2")
def exp2(graph: Graph, eqn: Any, x: str) -> str:
    return graph.op("Exp", graph.op("Mul", x, graph.const(np.asarray(math.log(2), lying(dtypes(eqn)[0])))))


@rule("expm1")
def expm1(graph: Graph, eqn: Any, x: str) -> str:
    """tanh(x / 2) (exp(x) + 1), which is exact near 0; x where exp overflows"""
    one, half = (graph.const(np.asarray(n, lying(dtypes(eqn)[0]))) for n in (1, 0.5))
    power = graph.op("Exp", x)
    return graph.op("Mul", graph.op("Tanh", graph.op("Mul", x, half)), graph.op("Add", power, one))


@rule("log1p")
def log1p(graph: Graph, eqn: Any, x: str) -> str:
    """log(u) x / (u - 1) with u = 1 + x; x itself where u is 1, and log(u) where x is too large for the quotient

    Source: Goldberg 1991, "What every computer scientist should know about floating-point arithmetic", theorem 4.
    """
    one = graph.const(np.ones((), lying(dtypes(eqn)[0])))
    u = graph.op("Add", one, x)
    rest = graph.op("Sub", u, one)
    exact = graph.op("Mul", graph.op("Log", u), graph.op("Div", x, rest))
    small = graph.op("Where", graph.op("Equal", u, one), x, exact)
    large = graph.op("IsInf", u)
    return graph.op("Where", large, u, small)


@rule("erfc")
def erfc(graph: Graph, eqn: Any, x: str) -> str:
    return graph.op("Sub", graph.const(np.ones((), lying(dtypes(eqn)[0]))), graph.op("Erf", x))


@rule("rem")
def rem(graph: Graph, eqn: Any, x: str, y: str) -> str:
    return graph.op("Mod", x, y, fmod=1)


@rule("round")
def rounded(graph: Graph, eqn: Any, x: str) -> str:
    if int(eqn.params["rounding_method"]) == 1:
        return graph.op("Round", x)
    half = graph.const(np.asarray(0.5, lying(dtypes(eqn)[0])))
    return graph.op("Mul", graph.op("Sign", x), graph.op("Floor", graph.op("Add", graph.op("Abs", x), half)))


@rule("is_finite")
def is_finite(graph: Graph, eqn: Any, x: str) -> str:
    return graph.op("Not", graph.op("Or", graph.op("IsInf", x), graph.op("IsNaN", x)))


@rule(*REDUCED)
def reduced(graph: Graph, eqn: Any, x: str) -> str:
    kind, axes, dtype = REDUCED[eqn.primitive.name], eqn.params["axes"], lying(dtypes(eqn)[0])
    if not axes:
        return x
    wide = np.int32 if dtype in NARROW else np.int64 if jnp.issubdtype(dtype, jnp.unsignedinteger) else None
    found = graph.op(kind, graph.cast(x, wide) if wide else x, graph.ints(*axes), keepdims=0)
    return graph.cast(found, dtype) if wide else found


@rule("argmax", "argmin")
def arg(graph: Graph, eqn: Any, x: str) -> str:
    kind, (axis,) = ("ArgMax" if eqn.primitive.name == "argmax" else "ArgMin"), eqn.params["axes"]
    return graph.cast(graph.op(kind, x, axis=axis, keepdims=0), dtypes(eqn)[1])


@rule("cumsum")
def cumsum(graph: Graph, eqn: Any, x: str) -> str:
    return graph.op(
        "CumSum", x, graph.const(np.asarray(eqn.params["axis"], np.int64)), reverse=int(eqn.params["reverse"])
    )


@rule("top_k")
def top_k(graph: Graph, eqn: Any, x: str) -> Any:
    values, indices = graph.op("TopK", x, graph.dim(eqn.params["k"]), outputs=2, axis=-1)
    return values, graph.cast(indices, eqn.outvars[1].aval.dtype)


@rule("sort")
def sort(graph: Graph, eqn: Any, *xs: str) -> Any:
    """By the first operand; the others follow it. TopK of all is stable in the runtimes' order of equal elements."""
    if eqn.params["num_keys"] != 1:
        raise ExportError("ONNX sorts by one operand", got=f"{eqn.params['num_keys']} keys")
    axis, size = eqn.params["dimension"], eqn.invars[0].aval.shape[eqn.params["dimension"]]
    values, indices = graph.op("TopK", xs[0], graph.dim(size), outputs=2, axis=axis, largest=0)
    return [values, *(graph.op("GatherElements", x, indices, axis=axis) for x in xs[1:])]
