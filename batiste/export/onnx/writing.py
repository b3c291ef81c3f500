# SPDX-License-Identifier: Apache-2.0
"""`export_onnx`: a model as an ONNX file, of the operations that its program consists of."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.extend.core as jex
import jax.numpy as jnp
import numpy as np

from batiste.checkpoint.files import Fs, write_all, write_sealed
from batiste.debug.calls import Places
from batiste.graph.errors import ArgumentError
from batiste.graph.optional import need
from batiste.version import __version__

from ..errors import ExportError
from ..lowering import symbols, used_weights
from ..pure import pure
from ..signature import ShapeDtype, open_sizes
from . import elementwise, products, shapes  # noqa: F401  (they fill the table of rules)
from .graph import Graph, lying

OPSET, IR = 18, 10
LIMIT = 2_000_000_000


def export_onnx(
    model: Any, signature: Mapping[str, Any], path: str | os.PathLike[str], *, weights: Any = None,
    method: str | None = None, fixed: Mapping[str, Any] | None = None, outputs: Sequence[str] | None = None,
    limits: Mapping[str, int] | None = None, forget: Sequence[str] = (), fs: Fs | None = None,
) -> None:  # fmt: skip
    """Writes `model(**inputs)` as an ONNX file that ONNX Runtime and others run; the arguments are those of `export`.

    >>> import tempfile; from batiste import nnx
    >>> model = nnx.Linear(4, 2, rngs=nnx.Rngs(0))
    >>> export_onnx(model, {"inputs": "float32[batch, 4]"}, tempfile.mkdtemp() + "/linear.onnx")

    Open sizes stay open. bfloat16 is computed as float32 that is rounded after each operation, and goes in and comes
    out as float32.

    Raises:
        ExportError: an operation has no translation; the message names it, and the part of the model.
    """
    inputs = {name: ShapeDtype.of(given, f"input {name}") for name, given in signature.items()}
    made = pure(model, weights, tuple(inputs), method=method, fixed=fixed or {}, outputs=outputs, forget=forget)
    sizes = symbols(open_sizes(inputs), limits or {})
    args = {name: spec.at(sizes) for name, spec in inputs.items()}
    places = Places()
    with places.noted(set(made.parts)):
        closed, shape = jax.make_jaxpr(lambda weights, inputs: made.run(weights, inputs), return_shape=True)(
            made.shapes, args
        )
    used = used_weights(made, closed.jaxpr)
    if drawn := sorted(made.random.intersection(used)):
        raise ExportError("The call draws random numbers", got=", ".join(drawn), fix="call model.eval() first")
    needed = {name: x if name in used else None for name, x in made.weights.items()}
    content = _model(Graph(places), closed, needed, inputs, tuple(outputs or shape), list(shape)).SerializeToString()
    fs = fs or Fs()
    write_sealed(fs, Path(path), lambda file: write_all(fs, file, memoryview(content)))


def _model(
    graph: Graph, closed: jex.ClosedJaxpr, weights: Mapping[str, Any], inputs: Mapping[str, ShapeDtype],
    order: Sequence[str], names: Sequence[str],
) -> Any:  # fmt: skip
    """The ONNX model of a jaxpr of the weights and then the inputs, each by name; weights of None are not needed."""
    jaxpr = closed.jaxpr
    arguments = dict(zip(sorted(inputs), jaxpr.invars[len(weights) :]))
    _name_sizes(graph, inputs)
    tensors = ["" if weights[name] is None else _tensor(graph, name, weights[name]) for name in sorted(weights)]
    consts = [graph.const(np.asarray(x)) for x in closed.consts]
    found = dict(zip(sorted(names), graph.run(jaxpr, consts, [*tensors, *arguments])))
    avals = dict(zip(sorted(names), (v.aval for v in jaxpr.outvars)))
    for name in order:  # an output must be a node's, under its own name
        graph.nodes.append(graph.helper.make_node("Identity", [found[name]], [_apart(name, arguments)]))
    made = graph.helper.make_graph(
        graph.nodes, "model", [graph.info(name, arguments[name].aval) for name in inputs],
        [graph.info(_apart(name, arguments), avals[name]) for name in order], graph.initializers,
    )  # fmt: skip
    imports = [graph.helper.make_opsetid("", OPSET)]
    model = graph.helper.make_model(
        made, opset_imports=imports, ir_version=IR, producer_name="batiste", producer_version=__version__
    )
    if model.ByteSize() > LIMIT:
        raise ExportError("An ONNX file holds 2 GB", got=f"{model.ByteSize()} bytes", fix="export a bundle")
    need("onnx.checker", extra="onnx").check_model(model)
    return model


def _apart(name: str, inputs: Mapping[str, Any]) -> str:
    """An output that has the name of an input gets another one."""
    return f"{name}_output" if name in inputs else name


def _name_sizes(graph: Graph, inputs: Mapping[str, ShapeDtype]) -> None:
    """Each open size is the size of a dim of an input."""
    for name, spec in inputs.items():
        if spec.is_key:
            raise ArgumentError("ONNX knows no random keys", at=f"input {name}", fix="draw outside")
        for axis, n in enumerate(spec.shape):
            if isinstance(n, str) and n not in graph.sizes:
                graph.sizes[n] = graph.op("Shape", name, start=axis, end=axis + 1)


def _tensor(graph: Graph, name: str, x: Any) -> str:
    """A weight, as weights/… and its path."""
    if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
        raise ExportError("ONNX knows no random keys", at=name, fix="call model.eval() first")
    tensor = need("onnx.numpy_helper", extra="onnx").from_array(np.asarray(x).astype(lying(x.dtype)), f"weights/{name}")
    graph.initializers.append(tensor)
    return f"weights/{name}"
