# SPDX-License-Identifier: Apache-2.0
"""Two models compared layer by layer: where does the first difference come in?

found = verify(model, torch_activations(reference, torch_tokens), (tokens,), table=BERT)
print(found)  # a line per layer
found.first  # the first that departs, or None

What each layer gives is kept while the model runs, layer after layer and without compilation. A table of weights says
which layer of theirs is which of ours; of a second model of batiste's they have the same paths.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from batiste.graph import Module, iter_graph, merge, split
from batiste.graph.errors import ArgumentError
from batiste.graph.text import table as text_table
from batiste.graph.watch import watching
from batiste.nn.stack import Stack

from .mapping import As, Table, numbered

Activations = Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Difference:
    """What one layer gives, and what theirs gives.

    Args:
        layer, theirs: their names.
        largest: the largest difference of two numbers, as a part of the largest number of theirs.
        why: what keeps the two from being compared.
    """

    layer: str
    theirs: str
    largest: float
    why: str = ""


@dataclasses.dataclass(frozen=True)
class Verification:
    """The differences of all layers that have a partner, in the order of their calls."""

    differences: tuple[Difference, ...]
    tolerance: float

    @property
    def first(self) -> Difference | None:
        """The first that departs."""
        return next((d for d in self.differences if d.why or not d.largest <= self.tolerance), None)

    def __bool__(self) -> bool:
        return self.first is None

    def __str__(self) -> str:
        rows = [(d.layer, d.theirs, d.why or f"{d.largest:.1e}", "<- departs" if d is self.first else "")
                for d in self.differences]  # fmt: skip
        verdict = "all agree" if self else f"{self.first.layer} is the first that departs"  # type: ignore[union-attr]
        return f"{text_table([('layer', 'theirs', 'difference', ''), *rows])}\n{verdict} (tolerance {self.tolerance:g})"


def verify(model: Module, reference: Activations | Module, inputs: Sequence[Any], *, table: Table | None = None,
           names: Mapping[str, str] | None = None, tolerance: float = 1e-4) -> Verification:  # fmt: skip
    """Compares what each layer of a model gives with what its partner gives.

    Args:
        reference: what theirs gives by name (`torch_activations`), or a second model, called with the same inputs.
        inputs: the arguments of a call of the model.
        table: of weights; says which layer is which.
        names: our path -> their name, of more layers; `{}` stands for a number.
        tolerance: the largest difference, as a part of the largest number, that is none.

    Raises:
        ArgumentError: no layer has a partner.

    >>> from batiste import nn
    >>> from batiste.graph import Rngs
    >>> a, b = nn.Linear(2, 3, rngs=Rngs(0)), nn.Linear(2, 3, rngs=Rngs(1))
    >>> bool(verify(a, a, (jnp.ones((1, 2)),))), bool(verify(a, b, (jnp.ones((1, 2)),)))
    (True, False)
    """
    ours = activations(model, *inputs)
    if isinstance(reference, Module):
        reference, partner = activations(reference, *inputs), {name: name for name in ours}
    else:
        partner = _partners(ours, {**(_layers(table) if table else {}), **(names or {})})
    found = [_difference(name, ours[name], partner[name], reference[partner[name]])
             for name in ours if partner.get(name) in reference]  # fmt: skip
    if not found:
        raise ArgumentError("no layer of the model has a partner", got=f"ours {list(ours)[:3]}, theirs "
                            f"{list(reference)[:3]}", fix="pass table= or names=")  # fmt: skip
    return Verification(tuple(found), tolerance)


def activations(model: Module, *args: Any) -> dict[str, np.ndarray]:
    """What each part of a model gives when the model is called, by its path, in the order in which they end.

    The layers of a Stack have numbers in place of `layers`; a part that is called again gets `#1`, `#2`, … .
    """
    graphdef, state = split(model)
    copy = merge(graphdef, state)
    paths = {id(x): path for path, x in iter_graph(copy) if isinstance(x, Module)}
    found: dict[str, np.ndarray] = {}
    running: set[int] = set()
    kept = []  # the layers of stacks, so that no other part gets the id of one

    def report(part: Any, name: str, function: Callable, args: tuple, kwargs: dict[str, Any]) -> Any:
        path = paths.get(id(part))
        if name != "__call__" or path is None or id(part) in running:  # the call of a class below
            return function(part, *args, **kwargs)
        running.add(id(part))
        out = unrolled(part, path, *args, **kwargs) if isinstance(part, Stack) else function(part, *args, **kwargs)
        running.discard(id(part))
        _keep(found, "/".join(map(str, path)), out)
        return out

    def unrolled(stack: Stack, path: tuple, x: Any, *args: Any, each: Any = None, **kwargs: Any) -> Any:
        more = []
        for i in range(len(stack)):
            layer = stack[i]
            kept.append(layer)
            paths.update(
                {id(part): (*path, i, *below) for below, part in iter_graph(layer) if isinstance(part, Module)}
            )
            own = {} if each is None else {"each": jax.tree.map(lambda leaf, i=i: leaf[i], each)}
            x = layer(x, *args, **own, **kwargs)
            if stack.has_aux:
                x, aux = x
                more.append(aux)
        return (x, jax.tree.map(lambda *parts: jnp.stack(parts), *more)) if stack.has_aux else x

    with watching({type(x) for _, x in iter_graph(copy) if isinstance(x, Module)}, report):
        copy(*args)
    return found


def torch_activations(module: Any, *args: Any, **kwargs: Any) -> dict[str, np.ndarray]:
    """What each part of a module of PyTorch's gives when the module is called, by its name."""
    found: dict[str, np.ndarray] = {}

    def hook(name: str) -> Callable[[Any, Any, Any], None]:
        return lambda part, inputs, out: _keep(found, name, out)

    handles = [part.register_forward_hook(hook(name)) for name, part in module.named_modules()]
    try:
        module(*args, **kwargs)
    finally:
        for handle in handles:
            handle.remove()
    return found


def _keep(found: dict[str, np.ndarray], name: str, out: Any) -> None:
    """The array that a part gives: the first of several."""
    while isinstance(out, (tuple, list)) and out:
        out = out[0]
    if (detach := getattr(out, "detach", None)) is not None:
        out = detach().cpu().float().numpy()
    if isinstance(out, (jax.Array, np.ndarray)) and not isinstance(out, Tracer):
        again = sum(key == name or key.startswith(f"{name}#") for key in found)
        found[f"{name}#{again}" if again else name] = np.asarray(out)


def _layers(table: Table) -> dict[str, str]:
    """Our layer -> theirs, with `{}` for numbers: those that hold values, and the blocks around them."""
    found = {}
    for ours, entry in table.names.items():
        theirs = entry.name if isinstance(entry, As) else entry
        if isinstance(entry, As) and entry.of > 1:
            continue
        ours = re.sub(r"(^|/)layers/", r"\1{}/", ours) if theirs.count("{}") > ours.count("{}") else ours
        found[ours.rpartition("/")[0]] = theirs.rpartition(".")[0]
        if "{}" in ours and "{}" in theirs:
            found[ours[: ours.index("{}") + 2]] = theirs[: theirs.index("{}") + 2]
    return found


def _partners(ours: Activations, names: Mapping[str, str]) -> dict[str, str]:
    """Their name of each of our layers."""
    found = {}
    for pattern, theirs in names.items():
        expression = re.compile(re.escape(pattern).replace(r"\{\}", r"(\d+)"))
        for name in ours:
            if match := expression.fullmatch(name):
                found[name] = numbered(theirs, match.groups())
    return found


def _difference(layer: str, ours: np.ndarray, theirs_name: str, theirs: Any) -> Difference:
    theirs = np.asarray(theirs)
    ours, theirs = ours.astype(np.float64), theirs.astype(np.float64)
    if ours.shape != theirs.shape and theirs.ndim == ours.ndim > 2 and np.moveaxis(theirs, 1, -1).shape == ours.shape:
        theirs = np.moveaxis(theirs, 1, -1)  # channels last
    if ours.shape != theirs.shape and theirs.ndim == ours.ndim == 4 and theirs.swapaxes(1, 2).shape == ours.shape:
        theirs = theirs.swapaxes(1, 2)  # positions before heads
    if ours.size != theirs.size:
        return Difference(layer, theirs_name, np.inf, f"{ours.shape}, theirs {theirs.shape}")
    largest = np.abs(ours - theirs.reshape(ours.shape)).max(initial=0.0)
    return Difference(layer, theirs_name, float(largest / max(np.abs(theirs).max(initial=0.0), 1e-30)))
