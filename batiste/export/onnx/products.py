# SPDX-License-Identifier: Apache-2.0
"""Products of matrices, convolutions, windows and loops, in ONNX."""

from __future__ import annotations

import string
from functools import partial
from typing import Any

import numpy as np

from batiste.graph.jaxcompat import scan_inputs

from ..errors import ExportError
from .graph import BOOL, Graph, dtypes, lying, rule
from .shapes import padded


@rule("dot_general")
def dot_general(graph: Graph, eqn: Any, x: str, y: str) -> str:
    (over_x, over_y), (batch_x, batch_y) = eqn.params["dimension_numbers"]
    (a, b), out = (v.aval for v in eqn.invars), eqn.outvars[0].aval
    x, y = (graph.cast(v, out.dtype) if lying(w.dtype) != lying(out.dtype) else v for v, w in ((x, a), (y, b)))
    if not batch_x and b.ndim == 2 and tuple(over_x) == (a.ndim - 1,) and tuple(over_y) == (0,) and a.ndim >= 2:
        return graph.op("MatMul", x, y)
    letters = iter(string.ascii_lowercase)
    of_x = [next(letters) for _ in range(a.ndim)]
    of_y = [next(letters) for _ in range(b.ndim)]
    for i, j in [*zip(over_x, over_y), *zip(batch_x, batch_y)]:
        of_y[j] = of_x[i]
    result = [of_x[i] for i in batch_x]
    result += [c for i, c in enumerate(of_x) if i not in over_x and i not in batch_x]
    result += [c for i, c in enumerate(of_y) if i not in over_y and i not in batch_y]
    return graph.op("Einsum", x, y, equation=f"{''.join(of_x)},{''.join(of_y)}->{''.join(result)}")


@rule("conv_general_dilated")
def conv(graph: Graph, eqn: Any, x: str, kernel: str) -> str:
    p, (a, _), out = eqn.params, (v.aval for v in eqn.invars), eqn.outvars[0].aval
    dims = p["dimension_numbers"]
    if p["batch_group_count"] != 1 or np.issubdtype(dtypes(eqn)[1], np.complexfloating):
        raise ExportError(
            "ONNX has no such convolution", got=f"batch_group_count {p['batch_group_count']}, {out.dtype}"
        )
    x, kernel = graph.transpose(x, dims.lhs_spec), graph.transpose(kernel, dims.rhs_spec)
    x, kernel = (graph.cast(v, out.dtype) if lying(w.aval.dtype) != lying(out.dtype) else v
                 for v, w in ((x, eqn.invars[0]), (kernel, eqn.invars[1])))  # fmt: skip
    spatial, padding = out.ndim - 2, list(p["padding"])
    shape = [a.shape[i] for i in dims.lhs_spec]
    if any(n != 1 for n in p["lhs_dilation"]) or any(n < 0 for pair in padding for n in pair):
        config = [(0, 0, 0)] * 2 + [(low, high, n - 1) for (low, high), n in zip(padding, p["lhs_dilation"])]
        x = padded(graph, x, graph.const(np.zeros((), lying(out.dtype))), config, shape, out.dtype)
        padding = [(0, 0)] * spatial
    if not spatial:  # one position
        x = graph.op("Unsqueeze", x, graph.ints(2))
        kernel = graph.op("Unsqueeze", kernel, graph.ints(2))
    y = graph.op(
        "Conv", x, kernel, strides=list(p["window_strides"]) or [1], dilations=list(p["rhs_dilation"]) or [1],
        pads=[low for low, _ in padding] + [high for _, high in padding] or [0, 0], group=p["feature_group_count"],
    )  # fmt: skip
    if not spatial:
        y = graph.op("Squeeze", y, graph.ints(2))
    return graph.transpose(y, [list(dims.out_spec).index(i) for i in range(out.ndim)])


@rule("reduce_window_max")
def reduce_window_max(graph: Graph, eqn: Any, x: str) -> str:
    """MaxPool of all dims: [1, 1, …] in front, as many spatial dims as there are."""
    p = eqn.params
    if any(n != 1 for n in p["base_dilation"]) or any(n != 1 for n in p["window_dilation"]):
        raise ExportError("ONNX has no such window", got="dilation")
    x = graph.op("Unsqueeze", x, graph.ints(0, 1))
    kept = [i for i, n in enumerate(p["window_dimensions"]) if n != 1 or p["window_strides"][i] != 1]
    order = [i for i in range(len(p["window_dimensions"])) if i not in kept] + kept
    if len(kept) not in (1, 2, 3) or len(order) - len(kept) > 2:
        raise ExportError("ONNX has no window of these dims", got=p["window_dimensions"])
    lead = 2 - (len(order) - len(kept))
    y = graph.transpose(x, [*range(2), *(i + 2 for i in order)])
    y = graph.op("Squeeze", y, graph.ints(*range(2 - lead))) if lead < 2 else y
    pads = [p["padding"][i] for i in kept]
    y = graph.op("MaxPool", y, kernel_shape=[p["window_dimensions"][i] for i in kept],
                 strides=[p["window_strides"][i] for i in kept],
                 pads=[low for low, _ in pads] + [high for _, high in pads])  # fmt: skip
    y = graph.op("Squeeze", y, graph.ints(*range(lead))) if lead else y
    return graph.transpose(y, [order.index(i) for i in range(len(order))])


@rule("scan")
def scan(graph: Graph, eqn: Any, *inputs: str) -> list[str]:
    """Scan: the body sees what goes in once (the constants) as tensors of the graph around it."""
    p = eqn.params
    consts, carried = scan_inputs(p)
    closed = p["jaxpr"]
    body = Graph(graph.places, graph)
    variables = closed.jaxpr.invars[consts:]
    names = [body.name("in") for _ in variables]
    found = body.run(closed.jaxpr, [graph.const(np.asarray(x)) for x in closed.consts], [*inputs[:consts], *names])
    results = [body.op("Identity", name) for name in found]  # an output must be a node's, and only once
    described = [body.info(name, v.aval) for name, v in zip(names, variables)]
    outputs = [body.info(name, v.aval) for name, v in zip(results, closed.jaxpr.outvars)]
    ins, outs = len(variables) - carried, len(results) - carried
    given = list(inputs[consts:])
    if ins == 0:  # Scan goes over something: over nothing, so many times
        given.append(graph.op("ConstantOfShape", graph.dim(p["length"])))
        described.append(graph.helper.make_tensor_value_info(body.name("in"), graph.type(np.float32), []))
        ins = 1
    direction = int(p["reverse"])
    made = graph.op(
        "Scan", *given, outputs=len(results), num_scan_inputs=ins,
        body=graph.helper.make_graph(body.nodes, body.name("body"), described, outputs),
        scan_input_directions=[direction] * ins, **({"scan_output_directions": [direction] * outs} if outs else {}),
    )  # fmt: skip
    return [made] if isinstance(made, str) else made


@rule("cond")
def cond(graph: Graph, eqn: Any, which: str, *inputs: str) -> list[str]:
    """If: the branches see their inputs as tensors of the graph around them."""
    branches = [partial(translated, closed, inputs) for closed in eqn.params["branches"]]
    if dtypes(eqn)[0] == BOOL:
        return chosen(graph, eqn, which, branches[1], branches[0])
    return numbered(graph, eqn, which, branches, 0)


def translated(closed: Any, inputs: Any, graph: Graph) -> list[str]:
    return graph.run(closed.jaxpr, [graph.const(np.asarray(x)) for x in closed.consts], inputs)


def numbered(graph: Graph, eqn: Any, which: str, branches: list[Any], n: int) -> list[str]:
    """The branch number `which`, of those from `n` on; a number outside counts as the next one inside."""
    if len(branches) == 1:
        return branches[0](graph)
    first = graph.op("LessOrEqual", which, graph.const(np.asarray(n, dtypes(eqn)[0])))
    return chosen(graph, eqn, first, branches[0], lambda body: numbered(body, eqn, which, branches[1:], n + 1))


def chosen(graph: Graph, eqn: Any, truth: str, *branches: Any) -> list[str]:
    """What the first branch gives, or else the second; each is translated in a graph of its own."""
    made = []
    for branch in branches:
        body = Graph(graph.places, graph)
        results = [body.op("Identity", name) for name in branch(body)]
        outputs = [body.info(name, v.aval) for name, v in zip(results, eqn.outvars)]
        made.append(graph.helper.make_graph(body.nodes, body.name("branch"), [], outputs))
    found = graph.op("If", truth, outputs=len(eqn.outvars), then_branch=made[0], else_branch=made[1])
    return [found] if isinstance(found, str) else found


@rule("while")
def while_(graph: Graph, eqn: Any, *inputs: str) -> list[str]:
    """Loop without a bound: its condition is computed before it, and at the end of each round."""
    p = eqn.params
    test_consts, body_consts = p["cond_nconsts"], p["body_nconsts"]
    tests, consts = inputs[:test_consts], inputs[test_consts : test_consts + body_consts]
    carried = inputs[test_consts + body_consts :]
    test, step = p["cond_jaxpr"], p["body_jaxpr"]

    def run(inside: Graph, closed: Any, given: Any) -> list[str]:
        return inside.run(closed.jaxpr, [graph.const(np.asarray(x)) for x in closed.consts], given)

    (first,) = run(graph, test, [*tests, *carried])
    body = Graph(graph.places, graph)
    round_, goes, names = body.name("round"), body.name("goes"), [body.name("in") for _ in carried]
    after = [body.op("Identity", name) for name in run(body, step, [*consts, *names])]
    (again,) = run(body, test, [*tests, *after])
    again = body.op("Identity", again)
    scalar = graph.helper.make_tensor_value_info
    variables = step.jaxpr.invars[body_consts:]
    made = graph.helper.make_graph(
        body.nodes, body.name("body"),
        [scalar(round_, graph.type(np.int64), []), scalar(goes, graph.type(bool), []),
         *(body.info(name, v.aval) for name, v in zip(names, variables))],
        [scalar(again, graph.type(bool), []), *(body.info(name, v.aval) for name, v in zip(after, variables))],
    )  # fmt: skip
    found = graph.op("Loop", "", first, *carried, outputs=len(carried), body=made)
    return [found] if isinstance(found, str) else found
