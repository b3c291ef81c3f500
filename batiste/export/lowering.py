# SPDX-License-Identifier: Apache-2.0
"""From a function to portable programs: one with open sizes, or where JAX cannot do that, one for each bucket."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.extend.core as jex
from jax import export as jax_export

from batiste.debug.calls import Around, Places
from batiste.graph.errors import ArgumentError
from batiste.graph.jaxcompat import inputs_used

from .errors import ExportError
from .pure import Pure, spread
from .signature import ShapeDtype, open_sizes, uncut

PLATFORMS = ("cpu", "cuda", "tpu")
CALLBACKS = ("debug_callback", "pure_callback", "io_callback", "debug_print", "outside_call")
CONSTANT_BYTES = 1 << 20
FIXED_SIZE = "give that input a fixed size: what was padded cannot be cut off"
BUCKETS, MOST = (1, 4, 16, 64), 64


class Lowered(NamedTuple):
    """A program for sizes; the sizes that are not here are open."""

    sizes: dict[str, int]
    exported: jax_export.Exported


class Programs(NamedTuple):
    """The programs of a model, the buckets of its sizes, its outputs, and why no size could stay open, if so."""

    lowered: list[Lowered]
    buckets: dict[str, tuple[int, ...]]
    outputs: dict[str, ShapeDtype]
    fallback: str | None


def programs(
    model: Pure,
    inputs: Mapping[str, ShapeDtype],
    *,
    limits: Mapping[str, int],
    buckets: Mapping[str, Sequence[int]],
    platforms: Sequence[str],
) -> tuple[Pure, Programs]:
    """The model with those weights only that the program uses, and its portable programs.

    Raises:
        ExportError: the program calls Python, holds large constants, spans devices, or JAX cannot export it.
    """
    names = open_sizes(inputs)
    plan = {name: tuple(sorted(set(sizes))) for name, sizes in buckets.items() if sizes}
    for kind, given in (("limits", limits), ("buckets", plan)):
        if unknown := sorted(set(given) - set(names)):
            raise ArgumentError(
                f"{kind} are of open sizes", got=", ".join(unknown), expected=", ".join(names) or "none"
            )
    try:
        found = symbols(names, {**limits, **{name: sizes[-1] for name, sizes in plan.items()}})
        model, whole = lowered(model, inputs, found, platforms)
    except ExportError:
        raise
    except Exception as error:
        if not names:
            raise
        reason = f"{type(error).__name__}: {(str(error).strip() or 'no message').splitlines()[0]:.300}"
    else:
        outputs = {name: _open(aval) for name, aval in _outputs(whole).items()}
        for name in plan:
            if uneven := uncut(outputs, name, names):
                raise ExportError("A dim of an output depends on a size with buckets, and is not that size",
                                  at=f"size {name}", got=uneven, fix=FIXED_SIZE)  # fmt: skip
        return model, Programs([Lowered({}, whole)], plan, outputs, None)
    plan = {name: plan.get(name) or _plan(limits.get(name)) for name in names}
    made = []
    for chosen in itertools.product(*plan.values()):
        sizes = dict(zip(names, chosen))
        model, exported = lowered(model, inputs, sizes, platforms)
        made.append(Lowered(sizes, exported))
    return model, Programs(made, plan, _joined(model, inputs, plan, made), reason)


def symbols(names: Sequence[str], most: Mapping[str, int]) -> dict[str, Any]:
    if not names:
        return {}
    scope = jax_export.SymbolicScope([f"{name} <= {n}" for name, n in most.items()])
    return dict(zip(names, jax_export.symbolic_shape(", ".join(names), scope=scope)))


def _plan(most: int | None) -> tuple[int, ...]:
    """1, 4, 16, … up to the largest size that is allowed."""
    if most is None or most == MOST:
        return BUCKETS
    found = [1]
    while found[-1] < most:
        found.append(min(4 * found[-1], most))
    return tuple(found)


def lowered(
    model: Pure, inputs: Mapping[str, ShapeDtype], sizes: Mapping[str, Any], platforms: Sequence[str]
) -> tuple[Pure, jax_export.Exported]:
    """The model with the weights that it uses, and the portable program for these sizes, numbers or symbols."""
    args = {name: spec.at(sizes) for name, spec in inputs.items()}
    function = jax.jit(model.run)
    jaxpr = function.trace(model.shapes, args).jaxpr
    refuse_callbacks(model, args, jaxpr)
    constants = sum(getattr(x, "nbytes", 0) for x in jaxpr.consts)
    if constants > CONSTANT_BYTES:
        raise ExportError("Large constants would become a part of the program", got=f"{constants} bytes",
                          expected=f"at most {CONSTANT_BYTES}",
                          fix="export the module itself, or hand arrays over as weights=")  # fmt: skip
    used = used_weights(model, jaxpr.jaxpr)
    if drawn := sorted(model.random.intersection(used)):
        raise ExportError("The call draws random numbers, the same ones each time", got=", ".join(drawn),
                          fix="call model.eval() first; or export a function that takes a key")  # fmt: skip
    if len(used) < len(model.weights):
        model = model.only(used)
        function = jax.jit(model.run)
    try:
        with _nameless():
            exported = jax_export.export(function, platforms=platforms)(model.shapes, args)
    except (NotImplementedError, ValueError) as error:
        if any(not isinstance(n, int) for n in sizes.values()):
            raise  # perhaps it is the open sizes
        raise ExportError(f"JAX cannot export the program: {str(error).strip()[:500]}") from error
    if exported.nr_devices != 1 and not any(map(spread, model.weights.values())):
        raise ExportError("The program spans devices, and its weights do not", got=exported.nr_devices, expected=1,
                          fix="export outside the mesh, or with weights that are spread over it")  # fmt: skip
    return model, exported


@contextlib.contextmanager
def _nameless() -> Iterator[None]:
    """In the meantime, programs do not hold the paths of the files that they came from."""
    name = "jax_hlo_source_file_canonicalization_regex"
    before = getattr(jax.config, name)
    jax.config.update(name, ".*/")
    try:
        yield
    finally:
        jax.config.update(name, before)


def used_weights(model: Pure, jaxpr: Any) -> list[str]:
    """The names of the weights that the outputs depend on; a program's first arguments are the weights, by name."""
    return [name for name, is_used in zip(sorted(model.weights), inputs_used(jaxpr)) if is_used]


def refuse_callbacks(model: Pure, inputs: Any, jaxpr: Any) -> None:
    """Raises ExportError if a program calls Python on the host, and says in which part."""
    if not any(True for _ in _callbacks(jaxpr.jaxpr, Around(), Places())):
        return
    places = Places()
    with places.noted(set(model.parts)):
        jaxpr = jax.make_jaxpr(lambda weights, inputs: model.run(weights, inputs))(model.shapes, inputs)
    name, around = next(_callbacks(jaxpr.jaxpr, Around(), places))
    line = f" ({around.source})" if around.source else ""
    raise ExportError(f"The program calls Python on the host: {name}{line}", at=around.module,
                      fix="leave jax.debug.print and callbacks out of what is exported")  # fmt: skip


def _callbacks(jaxpr: Any, around: Around, places: Places) -> Any:
    for eqn in jaxpr.eqns:
        here = around.at(eqn, places)
        if eqn.primitive.name in CALLBACKS:
            yield eqn.primitive.name, here
        for inner in jex.jaxprs_in_params(eqn.params):
            yield from _callbacks(inner, here, places)


def _outputs(exported: jax_export.Exported) -> dict[str, Any]:
    return jax.tree.unflatten(exported.out_tree, exported.out_avals)


def _open(aval: Any) -> ShapeDtype:
    return ShapeDtype(tuple(n if isinstance(n, int) else str(n) for n in aval.shape), aval.dtype.name)


def _joined(
    model: Pure, inputs: Mapping[str, ShapeDtype], plan: Mapping[str, Sequence[int]], made: Sequence[Lowered]
) -> dict[str, ShapeDtype]:
    """The outputs of programs that differ in sizes: a dim that always is one of the sizes has its name."""
    found = [(program.sizes, _outputs(program.exported)) for program in made]
    largest = {name: sizes[-1] for name, sizes in plan.items()}
    for (
        name,
        n,
    ) in largest.items():  # with one bucket, only a size between tells a dim that follows from one that is fixed
        sizes = {**largest, name: max(1, n - 1)}
        args = {key: spec.at(sizes) for key, spec in inputs.items()}
        found.append((sizes, jax.eval_shape(model.run, model.shapes, args)))
    outputs = {}
    for name, aval in found[0][1].items():
        shape: list[int | str] = []
        for axis in range(len(aval.shape)):
            dims = [outs[name].shape[axis] for _, outs in found]
            same = [size for size in plan if all(dim == sizes[size] for dim, (sizes, _) in zip(dims, found))]
            if len(set(dims)) > 1 and not same:
                raise ExportError("A dim of an output depends on sizes, and is none of them", at=f"output {name}",
                                  got=sorted(set(dims)), fix=FIXED_SIZE)  # fmt: skip
            shape.append(dims[0] if len(set(dims)) == 1 else same[0])
        outputs[name] = ShapeDtype(tuple(shape), aval.dtype.name)
    return outputs
