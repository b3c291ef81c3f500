# SPDX-License-Identifier: Apache-2.0
"""Names of types for annotations, and the few small types that stand in public signatures."""

from __future__ import annotations

import abc
import dataclasses
import functools
from collections import deque
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from typing import Any, Protocol, TypeGuard, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from batiste.core.frozen_dict import FrozenDict
from batiste.graph.variable import MISSING, Missing
from batiste.nn.conv import PaddingLike
from batiste.nn.initializers import Initializer
from batiste.transforms.axes import In, Out

__all__ = [
    "MISSING",
    "Array",
    "ArrayPytree",
    "Axes",
    "Axis",
    "AxisName",
    "BaseConfigContext",
    "Collection",
    "ConvGeneralDilatedT",
    "DotGeneralT",
    "Dtype",
    "EinsumT",
    "FrozenVariableDict",
    "HashableMapping",
    "In",
    "InOutAxis",
    "InOutScanAxis",
    "Initializer",
    "Key",
    "LaxPadding",
    "Leaf",
    "LogicalNames",
    "LogicalPartitionSpec",
    "LogicalPartitionSpecPytree",
    "LogicalRules",
    "Missing",
    "MutableCollection",
    "MutableVariableDict",
    "Out",
    "PRNGFoldable",
    "PRNGKey",
    "PaddingLike",
    "PartitionSpecPytree",
    "Path",
    "PathParts",
    "PrecisionLike",
    "PromoteDtypeFn",
    "PytreeDeque",
    "RNGSequences",
    "ScanAxis",
    "Shape",
    "ShapeDtype",
    "Sharding",
    "SizeBytes",
    "VariableDict",
    "has_shape_dtype",
    "is_key_like",
]

T = TypeVar("T")
F = TypeVar("F", bound=Callable[..., Any])
HA = TypeVar("HA", bound=Hashable)
HB = TypeVar("HB")
TupleArg = TypeVar("TupleArg", bound=tuple)

# ---------------------------------------------------------------- arrays

Array = jax.Array | Any
ArrayPytree = Any
Dtype = str | type[Any] | np.dtype | Any
Shape = Sequence[int]
PrecisionLike = None | str | jax.lax.Precision | tuple[str, str] | tuple[jax.lax.Precision, jax.lax.Precision]
DotGeneralT = Callable[..., Array]
ConvGeneralDilatedT = Callable[..., Array]
EinsumT = Callable[..., Array]
LaxPadding = str | Sequence[tuple[int, int]]
Axes = int | Sequence[int]
PRNGKey = jax.Array
PRNGFoldable = int | str


class ShapeDtype(Protocol):
    """What has a shape and a dtype."""

    shape: Any
    dtype: Any


class PromoteDtypeFn(Protocol):
    """A function that brings arrays to one dtype."""

    def __call__(self, args: TupleArg, /, *, dtype: Any = None, inexact: bool = True) -> TupleArg: ...


def has_shape_dtype(x: Any) -> TypeGuard[ShapeDtype]:
    """Whether `x` has a shape and a dtype."""
    return hasattr(x, "shape") and hasattr(x, "dtype")


@dataclasses.dataclass(frozen=True, slots=True)
class SizeBytes:
    """A number of elements and of bytes.

    >>> SizeBytes.from_any({"w": jnp.ones((32, 32))}) + SizeBytes(1, 4)
    1,025 (4.1 KB)
    """

    size: int
    bytes: int

    @classmethod
    def from_array(cls, x: ShapeDtype) -> SizeBytes:
        size = int(np.prod(x.shape))
        return cls(size, size * jnp.dtype(x.dtype).itemsize)

    @classmethod
    def from_any(cls, x: Any) -> SizeBytes:
        """The sum over the arrays of a pytree."""
        arrays = filter(has_shape_dtype, jax.tree.leaves(x))
        return sum(map(cls.from_array, arrays), start=cls(0, 0))

    def __add__(self, other: SizeBytes) -> SizeBytes:
        return SizeBytes(self.size + other.size, self.bytes + other.bytes)

    def __bool__(self) -> bool:
        return bool(self.size)

    def __repr__(self) -> str:
        return f"{self.size:,} ({_bytes_repr(self.bytes)})"


def _bytes_repr(num_bytes: int) -> str:
    power = sum(num_bytes > 1000**power for power in (1, 2, 3))
    return f"{num_bytes / 1000**power:,.1f} {'KMG'[power - 1]}B" if power else f"{num_bytes:,} B"


# ---------------------------------------------------------------- keys, paths and collections of variables


class Key(Hashable, Protocol):
    """A key of a path: what can be hashed and ordered."""

    def __lt__(self, value: Any, /) -> bool: ...


def is_key_like(x: Any) -> TypeGuard[Key]:
    """Whether `x` has what a key needs."""
    return hasattr(x, "__hash__") and hasattr(x, "__lt__")


Path = str
PathParts = tuple[Key, ...]
Leaf = Any
Collection = Mapping[str, Any]
MutableCollection = dict[str, Any]
VariableDict = Mapping[str, Collection]
FrozenVariableDict = FrozenDict[str, Collection]
MutableVariableDict = dict[str, MutableCollection]
RNGSequences = dict[str, PRNGKey]


class HashableMapping(Mapping[HA, HB]):
    """A mapping that is hashed by its items."""

    def __init__(self, mapping: Mapping[HA, HB], copy: bool = True):
        self._mapping = dict(mapping) if copy else mapping

    def __getitem__(self, key: HA) -> HB:
        return self._mapping[key]

    def __iter__(self) -> Iterator[HA]:
        return iter(self._mapping)

    def __len__(self) -> int:
        return len(self._mapping)

    def __contains__(self, key: object) -> bool:
        return key in self._mapping

    def __hash__(self) -> int:
        return hash(frozenset(self._mapping.items()))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, HashableMapping) and self._mapping == other._mapping

    def __repr__(self) -> str:
        return repr(self._mapping)

    def update(self, other: Mapping[HA, HB]) -> HashableMapping[HA, HB]:
        """A mapping with more or other items."""
        return HashableMapping({**self._mapping, **other}, copy=False)


class PytreeDeque(deque):
    """A deque whose items are children."""


jax.tree_util.register_pytree_with_keys(
    PytreeDeque,
    lambda xs: (tuple((jax.tree_util.SequenceKey(i), x) for i, x in enumerate(xs)), ()),
    lambda _, xs: PytreeDeque(xs),
    lambda xs: (tuple(xs), ()),
)


# ---------------------------------------------------------------- axes and shardings

AxisName = str | tuple[str, ...] | None
LogicalNames = tuple[str | None, ...]
LogicalRules = Sequence[tuple[str, AxisName]]
LogicalPartitionSpec = Any
LogicalPartitionSpecPytree = Any
PartitionSpecPytree = Any
Sharding = tuple[AxisName, ...]
Axis = int | None
InOutAxis = Axis | In[Axis] | Out[Axis]
ScanAxis = int
InOutScanAxis = ScanAxis | In[ScanAxis] | Out[ScanAxis]


# ---------------------------------------------------------------- settings of a context


class BaseConfigContext(abc.ABC):
    """A value that holds inside a `with`, or in a function that it decorates."""

    def __init__(self, value: Any, /):
        self.value = value

    @classmethod
    @abc.abstractmethod
    def get_default(cls) -> Any:
        """The value outside every `with`."""

    @classmethod
    @abc.abstractmethod
    def get_stack(cls) -> list[Any]:
        """The values of the open `with`s, the innermost last."""

    @classmethod
    def current_value(cls) -> Any:
        """The value that holds here."""
        stack = cls.get_stack()
        return stack[-1] if stack else cls.get_default()

    def __enter__(self) -> None:
        self.get_stack().append(self.value)

    def __exit__(self, *_: object) -> None:
        self.get_stack().pop()

    def __call__(self, f: F) -> F:
        @functools.wraps(f)
        def inside(*args, **kwargs):
            with self:
                return f(*args, **kwargs)

        return inside  # pyright: ignore[reportReturnType]
