# SPDX-License-Identifier: Apache-2.0
"""Tables between our values and the tensors of published files: checked, loaded, written.

A table says names alone; how a value lies in memory is said by the layer that holds it. PyTorch's layers keep theirs
so, and everybody else followed:

    Linear          kernel [in, out]            [out, in]
    LinearGeneral   kernel [*in, *out]          [out, in], with all dims of either side as one; biases too
    Conv            kernel [*window, in, out]   [out, in, *window]
    others          as it is

`{}` in a name stands for a number. Those of our name (the layers of a List) come first in theirs; what theirs has more
are the first dims of our array (the layers of a Stack), or stand behind `layers/` where a stack's layers stand apart. A
tensor that is laid out otherwise, or that holds several of our values, is written `As(name, ...)`.
"""

from __future__ import annotations

import dataclasses
import fnmatch
import math
import re
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jax.typing import DTypeLike

from batiste.graph import BatchStat, Module, Param, Rngs, RngState, Variable, iter_graph
from batiste.nn import Conv, Linear, LinearGeneral
from batiste.sharding import current_plan

from .safetensors import SHARD_BYTES, STEMS, Spec, write_safetensors
from .tensors import Weights, WeightsError, room


class As(NamedTuple):
    """A tensor that the layer of our value does not describe.

    Args:
        name: of the tensor.
        order: for each of their dims, which of ours it is (of a LinearGeneral, two dims are its joined sides); as the
            layer says, if left out.
        part, of, dim: it holds `of` values of ours, joined along their `dim`, and this is number `part`.
    """

    name: str
    order: tuple[int, ...] | None = None
    part: int = 0
    of: int = 1
    dim: int = 0


@dataclasses.dataclass(frozen=True)
class Table:
    """Our path -> their name, in both directions.

    Args:
        names: an entry for each value of the model, or each of many (`{}`); more are no harm.
        ignored: patterns of tensors that no value of ours needs.
        prefixes: what files may have in front of every name.
    """

    names: Mapping[str, str | As]
    ignored: tuple[str, ...] = ()
    prefixes: tuple[str, ...] = ()


class Entry(NamedTuple):
    """A value of the model and the tensors it is made of; `flat` and `order` are their layout, of a part of it."""

    path: str
    variable: Variable
    names: As
    stacked: tuple[int, ...]
    flat: tuple[int, ...]
    order: tuple[int, ...]

    def parts(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        """The name of each tensor, and where in our value it goes."""
        return ((numbered(self.names.name, at), at) for at in np.ndindex(*self.stacked))

    @property
    def theirs(self) -> tuple[int, ...]:
        """The shape of a tensor."""
        shape = [self.flat[dim] for dim in self.order]
        if self.names.of > 1:
            shape[self.names.dim] *= self.names.of
        return tuple(shape)

    def to_ours(self, tensor: np.ndarray) -> np.ndarray:
        if self.names.of > 1:
            tensor = np.split(tensor, self.names.of, axis=self.names.dim)[self.names.part]
        return tensor.transpose(np.argsort(self.order)).reshape(self.variable.shape[len(self.stacked) :])

    def to_theirs(self, part: np.ndarray) -> np.ndarray:
        return part.reshape(self.flat).transpose(self.order)


def entries(model: Module, table: Table) -> list[Entry]:
    """What a table says of each parameter and statistic of a model.

    Raises:
        WeightsError: it says nothing of one.
    """
    patterns = [(_pattern(ours), names) for ours, names in table.names.items()]
    found = []
    for place, variable, layer in _values(model):
        matches = ((pattern.fullmatch(place), names) for pattern, names in patterns)
        match, names = next(((match, names) for match, names in matches if match), (None, ""))
        if match is None:
            raise WeightsError("the table says nothing of a value of the model", at=place, fix="add a line to it")
        names = names if isinstance(names, As) else As(names)
        names = names._replace(name=numbered(names.name, filter(None, match.groups())))
        stacked = variable.shape[: names.name.count("{}")]
        flat, order = _layout(layer, place, variable.shape[len(stacked) :])
        if names.order is not None:
            flat = flat if len(flat) == len(names.order) else variable.shape[len(stacked) :]
            order = names.order
        found.append(Entry(place, variable, names, stacked, flat, order))
    return found


def _pattern(ours: str) -> re.Pattern[str]:
    """What our path looks like: with numbers for `{}`, and, where the layers of a stack stand apart, that of each."""
    apart = re.escape(ours).replace("layers/", r"layers/(?:(\d+)/)?")
    return re.compile(apart.replace(r"\{\}", r"(\d+)"))


def bare_entries(model: Module, stacked: Callable[[str], int]) -> list[Entry]:
    """The parameters and statistics of a model without names; `stacked` says how many first dims are layers."""
    found = []
    for place, variable, layer in _values(model):
        shape = variable.shape[stacked(place) :]
        first = variable.shape[: stacked(place)]
        found.append(Entry(place, variable, As(place + "{}" * len(first)), first, *_layout(layer, place, shape)))
    return found


def _values(model: Module) -> Iterator[tuple[str, Variable, Any]]:
    """Path, Variable and layer of each parameter and statistic."""
    parts = dict(iter_graph(model))
    for path, x in parts.items():
        if isinstance(x, (Param, BatchStat)):
            yield "/".join(map(str, path)), x, parts[path[:-1]]


def _layout(layer: Any, path: str, shape: tuple[int, ...]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Our dims, some joined, and for each of theirs which of them it is."""
    name = path.rpartition("/")[2]
    if isinstance(layer, Linear) and name == "kernel":
        return shape, (1, 0)
    if isinstance(layer, Conv) and name == "kernel":
        return shape, (len(shape) - 1, len(shape) - 2, *range(len(shape) - 2))
    if isinstance(layer, LinearGeneral) and name in ("kernel", "bias"):
        inputs = len(layer.in_features) if name == "kernel" else 0
        joined = (math.prod(shape[:inputs]), math.prod(shape[inputs:])) if inputs else (math.prod(shape),)
        return joined, tuple(range(len(joined)))[::-1]
    return shape, tuple(range(len(shape)))


def numbered(name: str, numbers: Iterable[Any]) -> str:
    """The first `{}` of the name as these numbers."""
    for number in numbers:
        name = name.replace("{}", str(number), 1)
    return name


# ---------------------------------------------------------------- reading
Turn = Callable[[str, np.ndarray], np.ndarray]


def load(build: Callable[[Rngs], Any], weights: Weights, table: Table, at: str | Path, *,
         dtype: DTypeLike = jnp.float32,
         turn: Turn | None = None) -> Any:  # fmt: skip
    """The model that `build` makes, with the values of a file; it is never made with others.

    Each value goes to its device as soon as it is read: the host holds one of them, and one tensor, at a time. Where a
    plan is in use (`sharding.use`), each is sent to its place.

    Args:
        at: what errors call the file.
        dtype: of the parameters.
        turn: changes a tensor of our path before it is taken apart.

    Raises:
        WeightsError: the file is incomplete, or of another model; before memory is taken.
    """
    model = jax.eval_shape(lambda: build(Rngs(0)))
    names = {entry.path: entry for entry in check(model, weights, table, at)}
    for path, variable in iter_graph(model):
        if not isinstance(variable, Variable):
            continue
        entry = names.get("/".join(map(str, path)))
        value = _begun(path, variable) if entry is None else _read(entry, weights, dtype, turn)
        variable.set_value(_placed(path, variable, value))
    return model


def check(model: Module, weights: Weights, table: Table, at: str | Path) -> list[Entry]:
    """The entries of a model whose values all have a tensor of the right size, and which needs every tensor.

    Raises:
        WeightsError: names the first of which that is not so.
    """
    found = entries(model, table)
    prefix = _prefix(found, weights, table)
    found = [entry._replace(names=entry.names._replace(name=prefix + entry.names.name)) for entry in found]
    left = {name for name in weights.tensors if not any(fnmatch.fnmatch(name, p) for p in table.ignored)}
    for entry in found:
        for name, _ in entry.parts():
            tensor = weights.tensors.get(name)
            if tensor is None:
                raise WeightsError("the files lack a tensor of the model", at=f"{at}: {name}",
                                   got=f"nothing for {entry.path}",
                                   fix="check the configuration, and that all files are there")  # fmt: skip
            left.discard(name)
            if tensor.shape != entry.theirs:
                raise WeightsError("a tensor is of another model", at=f"{at}: {name}", got=tensor.shape,
                                   expected=f"{entry.theirs} for {entry.path}",
                                   fix="check the configuration")  # fmt: skip
    if left:
        raise WeightsError("the files hold what the model has not", at=f"{at}: {min(left)}",
                           got=f"{len(left)} tensors more", fix="check the configuration")  # fmt: skip
    return found


def _prefix(found: list[Entry], weights: Weights, table: Table) -> str:
    first = next(found[0].parts())[0]
    return next((prefix for prefix in table.prefixes if prefix + first in weights.tensors), "")


def _read(entry: Entry, weights: Weights, dtype: DTypeLike, turn: Turn | None) -> np.ndarray:
    is_float = jnp.issubdtype(entry.variable.dtype, jnp.floating)
    wanted, shape = np.dtype(dtype if is_float else entry.variable.dtype), entry.variable.shape
    parts = ((weights.tensors[name], at) for name, at in entry.parts())
    as_it_is = turn is None and entry.names.of == 1
    if not as_it_is:
        turn = turn or (lambda path, tensor: tensor)
        tensors = ((entry.to_ours(turn(entry.path, tensor.read())), at) for tensor, at in parts)
        if not entry.stacked:
            value, at = next(tensors)
            if value.dtype == wanted and value.flags.c_contiguous:
                return value
            tensors = iter([(value, at)])
    value = room(math.prod(shape) * wanted.itemsize).view(wanted).reshape(shape)
    if as_it_is:
        for tensor, at in parts:
            tensor.read_into(entry.to_theirs(value[(*at, ...)]))
    else:
        for tensor, at in tensors:
            value[at] = tensor
    return value


def _begun(path: tuple, variable: Variable) -> Any:
    """What no file holds: keys that follow from the path, counts and caches of zeros."""
    if isinstance(variable, RngState) and jnp.issubdtype(variable.dtype, jax.dtypes.prng_key):
        key = jax.random.key(zlib.crc32("/".join(map(str, path)).encode()))
        return jax.random.split(key, variable.shape) if variable.shape else key
    return jnp.zeros(variable.shape, variable.dtype)


def _placed(path: tuple, variable: Variable, value: Any) -> jax.Array:
    plan = current_plan()
    if plan is None:
        return jax.device_put(value)
    return jax.device_put(value, NamedSharding(plan.mesh, plan.place_of(path, variable).spec))


# ---------------------------------------------------------------- writing
def save(model: Module, table: Table, folder: str | Path, *, dtype: DTypeLike | None = None,
         shard_bytes: int = SHARD_BYTES, stem: str = STEMS[0],
         again: Sequence[str] = ()) -> list[Path]:  # fmt: skip
    """Writes safetensors with a table's names into a folder, one tensor in memory at a time; says which files.

    Args:
        dtype: of the values in the files; that of each parameter if left out.
        shard_bytes: a larger model is written to several files, with an index.
        stem: of the names of the files.
        again: starts of names; what begins with the first is written once more for each of the others.
    """
    tensors: dict[str, list[tuple[Entry, tuple[int, ...]]]] = {}
    for entry in entries(model, table):
        for name, at in entry.parts():
            tensors.setdefault(name, []).append((entry, at))
    firsts = [name for name in tensors if again and name.startswith(again[0])]
    tensors |= {start + name.removeprefix(again[0]): tensors[name] for start in again[1:] for name in firsts}
    specs = [Spec(name, parts[0][0].theirs, np.dtype(dtype or parts[0][0].variable.dtype))
             for name, parts in tensors.items()]  # fmt: skip
    return write_safetensors(folder, specs, map(_joined, tensors.values()), shard_bytes, stem)


def _joined(parts: list[tuple[Entry, tuple[int, ...]]]) -> np.ndarray:
    parts = sorted(parts, key=lambda part: part[0].names.part)
    values = [entry.to_theirs(np.asarray(entry.variable[...][at])) for entry, at in parts]
    return values[0] if len(values) == 1 else np.concatenate(values, axis=parts[0][0].names.dim)
