# SPDX-License-Identifier: Apache-2.0
"""`export_onnx`: a model as an ONNX file, of the operations that its program consists of."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from batiste.checkpoint.files import Fs, write_all, write_sealed
from batiste.debug.calls import Places
from batiste.graph.jaxcompat import without_idle
from batiste.graph.optional import need
from batiste.version import __version__

from ..errors import ExportError
from ..lowering import symbols
from ..pure import pure
from ..signature import ShapeDtype, open_sizes
from . import composed, elementwise, keys, products, scattered, shapes  # noqa: F401  (they fill the table of rules)
from .graph import Graph, lying
from .keys import is_key, refuse_others

OPSET, IR = 18, 10
LIMIT = 2_000_000_000


def export_onnx(
    model: Any, signature: Mapping[str, Any], path: str | os.PathLike[str], *, weights: Any = None,
    method: str | None = None, fixed: Mapping[str, Any] | None = None, outputs: Sequence[str] | None = None,
    limits: Mapping[str, int] | None = None, forget: Sequence[str] = (), keep: Sequence[str] = (),
    fs: Fs | None = None,
) -> None:  # fmt: skip
    """Writes `model(**inputs)` as an ONNX file that ONNX Runtime and others run; the arguments are those of `export`.

    >>> import tempfile; from batiste import nnx
    >>> model = nnx.Linear(4, 2, rngs=nnx.Rngs(0))
    >>> export_onnx(model, {"inputs": "float32[batch, 4]"}, tempfile.mkdtemp() + "/linear.onnx")

    Open sizes stay open. bfloat16 is computed as float32 that is rounded after each operation, and goes in and comes
    out as float32.

    Args:
        keep: patterns of state that the call reads and writes, such as `["*/cached_*", "rngs/*"]`: it goes in under its
            path, and comes out as `PATH_output`. Where none is given, it is what the model holds now.

    Raises:
        ExportError: an operation has no translation; the message names it, and the part of the model.
    """
    inputs = {name: ShapeDtype.of(given, f"input {name}") for name, given in signature.items()}
    made = pure(model, weights, tuple(inputs), method=method, fixed=fixed or {}, outputs=outputs, forget=forget,
                keep=keep)  # fmt: skip
    sizes = symbols(open_sizes(inputs), limits or {})
    args = {name: spec.at(sizes) for name, spec in inputs.items()}
    places = Places()
    with places.noted(set(made.parts)):
        closed, shape = jax.make_jaxpr(lambda weights, inputs: made.run(weights, inputs), return_shape=True)(
            made.shapes, args
        )
    jaxpr, used = without_idle(closed.jaxpr)
    needed = [name for name, is_used in zip(sorted(made.weights), used) if is_used]
    if drawn := sorted(made.random.intersection(needed) - made.kept):
        raise ExportError("The call draws random numbers, the same ones each time", got=", ".join(drawn),
                          fix="call model.eval() first; or keep=['rngs/*']")  # fmt: skip
    graph = Graph(places)
    _name_sizes(graph, inputs)
    names: list[str] = []
    for name in needed:
        names.append(name if name in made.kept else f"weights/{name}")
        _initial(graph, names[-1], made.weights[name])
    given = [name for name, is_used in zip(sorted(inputs), used[len(made.weights) :]) if is_used]
    found = graph.run(jaxpr, [graph.const(np.asarray(x)) for x in closed.consts], [*names, *given])
    ins = {name: args[name] for name in inputs} | {name: made.weights[name] for name in needed if name in made.kept}
    outs = {name: (found[i], jaxpr.outvars[i].aval) for i, name in enumerate(sorted(shape))}
    order = [*(outputs or [name for name in shape if name not in made.kept]), *sorted(made.kept)]
    content = _model(graph, ins, {name: outs[name] for name in order}).SerializeToString()
    fs = fs or Fs()
    write_sealed(fs, Path(path), lambda file: write_all(fs, file, memoryview(content)))


def _model(graph: Graph, inputs: Mapping[str, Any], outputs: Mapping[str, tuple[str, Any]]) -> Any:
    """The ONNX model of a finished graph: inputs by name with their shapes, outputs with the tensors that they are."""
    names = {name: f"{name}_output" if name in inputs else name for name in outputs}
    for name, (tensor, _) in outputs.items():  # an output must be a node's, under its own name
        graph.nodes.append(graph.helper.make_node("Identity", [tensor], [names[name]]))
    made = graph.helper.make_graph(
        graph.nodes, "model", [graph.info(name, aval) for name, aval in inputs.items()],
        [graph.info(names[name], aval) for name, (_, aval) in outputs.items()], graph.initializers,
    )  # fmt: skip
    model = graph.helper.make_model(
        made, opset_imports=[graph.helper.make_opsetid("", OPSET)], ir_version=IR, producer_name="batiste",
        producer_version=__version__,
    )  # fmt: skip
    if model.ByteSize() > LIMIT:
        raise ExportError("An ONNX file holds 2 GB", got=f"{model.ByteSize()} bytes", fix="export a bundle")
    need("onnx.checker", extra="onnx").check_model(model)
    return model


def _name_sizes(graph: Graph, inputs: Mapping[str, ShapeDtype]) -> None:
    """Each open size is the size of a dim of an input."""
    for name, spec in inputs.items():
        if spec.is_key:
            refuse_others(spec.at({}).dtype)
        for axis, n in enumerate(spec.shape):
            if isinstance(n, str) and n not in graph.sizes:
                graph.sizes[n] = graph.op("Shape", name, start=axis, end=axis + 1)


def _initial(graph: Graph, name: str, x: Any) -> None:
    """The value that a tensor has, or that an input has if none is given."""
    if is_key(x.dtype):
        refuse_others(x.dtype)
        x = jax.random.key_data(x)
    graph.initializers.append(
        need("onnx.numpy_helper", extra="onnx").from_array(np.asarray(x).astype(lying(x.dtype)), name)
    )
