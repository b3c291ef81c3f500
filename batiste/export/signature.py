# SPDX-License-Identifier: Apache-2.0
"""What goes into a program and comes out of it: names, shapes with open sizes, dtypes; and checking arrays by them."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from batiste.graph.errors import ArgumentError, DtypeError, ShapeError

TEXT = re.compile(r"\s*([\w<>]+)\s*\[([^\]]*)\]\s*(?:<\s*(\d+)\s*)?")
KEYS = {"key<fry>": ("threefry2x32", 2), "key<rbg>": ("rbg", 4), "key<urbg>": ("unsafe_rbg", 4)}  # and words of each


@dataclasses.dataclass(frozen=True)
class ShapeDtype:
    """The shape, with names for open sizes, and dtype of an array; `below` bounds whole numbers, such as tokens.

    >>> print(ShapeDtype(("batch", 4), "float32"))
    float32[batch, 4]
    >>> ShapeDtype.of("int32[batch, length] < 256")
    ShapeDtype(shape=('batch', 'length'), dtype='int32', below=256)
    """

    shape: tuple[int | str, ...]
    dtype: str
    below: int | None = None

    @classmethod
    def of(cls, given: Any, at: str = "") -> ShapeDtype:
        """What a text, an array or a `jax.ShapeDtypeStruct` says.

        Raises:
            ArgumentError: it says nothing that can be understood.
        """
        if isinstance(given, ShapeDtype):
            return given
        if not isinstance(given, str):
            if not (hasattr(given, "shape") and hasattr(given, "dtype")):
                raise _unclear(given, at)
            return cls(tuple(int(n) for n in given.shape), given.dtype.name)
        match = TEXT.fullmatch(given)
        if match is None:
            raise _unclear(given, at)
        sizes = [size.strip() for size in match[2].split(",") if size.strip()]
        if not all(size.isdigit() or size.isidentifier() for size in sizes):
            raise _unclear(given, at)
        spec = cls(tuple(int(n) if n.isdigit() else n for n in sizes), match[1], int(match[3]) if match[3] else None)
        spec.numpy_dtype(at)
        return spec

    def __str__(self) -> str:
        text = f"{self.dtype}[{', '.join(map(str, self.shape))}]"
        return text if self.below is None else f"{text} < {self.below}"

    @property
    def is_key(self) -> bool:
        """Whether it stands for typed random keys."""
        return self.dtype in KEYS

    def numpy_dtype(self, at: str = "") -> np.dtype:
        """The dtype of an array; of random keys, JAX's own.

        Raises:
            ArgumentError: there is no such dtype.
        """
        if self.is_key:
            return jax.eval_shape(lambda: jax.random.key(0, impl=KEYS[self.dtype][0])).dtype
        try:
            return np.dtype(getattr(jnp, self.dtype, self.dtype))
        except TypeError as error:
            raise ArgumentError("There is no such dtype", at=at, got=self.dtype) from error

    def at(self, sizes: Mapping[str, Any]) -> jax.ShapeDtypeStruct:
        """With numbers (or symbols of JAX) in the place of names."""
        return jax.ShapeDtypeStruct(tuple(sizes.get(n, n) if isinstance(n, str) else n for n in self.shape),
                                    self.numpy_dtype())  # fmt: skip


def _unclear(given: Any, at: str) -> ArgumentError:
    return ArgumentError("This is no shape and dtype", at=at, got=repr(given)[:80],
                         expected="such as 'float32[batch, 4]', or an array")  # fmt: skip


class Signature(NamedTuple):
    """The inputs and outputs of a program by name."""

    inputs: dict[str, ShapeDtype]
    outputs: dict[str, ShapeDtype]

    def __str__(self) -> str:
        inputs, outputs = (", ".join(f"{name}: {spec}" for name, spec in side.items()) for side in self)
        return f"({inputs}) -> ({outputs})"

    @property
    def sizes(self) -> tuple[str, ...]:
        """The names of the open sizes, in the order in which the inputs name them."""
        return open_sizes(self.inputs)

    def check(self, arrays: Mapping[str, Any]) -> dict[str, int]:
        """The open sizes that these inputs have.

        Raises:
            ArgumentError: other names, or a whole number outside its range.
            ShapeError, DtypeError: an input does not fit.
        """
        if set(arrays) != set(self.inputs):
            raise ArgumentError("The inputs have other names", got=", ".join(sorted(arrays)) or "none",
                                expected=", ".join(self.inputs))  # fmt: skip
        sizes: dict[str, int] = {}
        for name, spec in self.inputs.items():
            check_input(name, spec, arrays[name], sizes)
        return sizes


def open_sizes(inputs: Mapping[str, ShapeDtype]) -> tuple[str, ...]:
    """The names of sizes, in the order in which they are met."""
    return tuple(dict.fromkeys(n for spec in inputs.values() for n in spec.shape if isinstance(n, str)))


def uncut(outputs: Mapping[str, ShapeDtype], size: str, sizes: Sequence[str]) -> str | None:
    """A dim of the outputs like `2*length`, which could not be cut if `length` were padded; None if there is none."""
    dims = (n for spec in outputs.values() for n in spec.shape if isinstance(n, str) and n not in sizes)
    return next((n for n in dims if re.search(rf"\b{size}\b", n)), None)


def check_input(name: str, spec: ShapeDtype, x: Any, sizes: dict[str, int]) -> None:
    """Checks one array, and takes its open sizes into `sizes`.

    Raises:
        ArgumentError, ShapeError, DtypeError: it does not fit; nothing was computed.
    """
    if not (hasattr(x, "shape") and hasattr(x, "dtype")):
        raise DtypeError("An input is no array", at=f"input {name}", got=type(x).__name__, expected=spec,
                         fix=f"{name}=np.asarray({name}, {spec.dtype!r})")  # fmt: skip
    if x.dtype != spec.numpy_dtype():
        raise DtypeError("An input has another dtype", at=f"input {name}", got=x.dtype, expected=spec.dtype,
                         fix=f"{name}.astype({spec.dtype!r})")  # fmt: skip
    if len(x.shape) != len(spec.shape):
        raise ShapeError("An input has another number of dims", at=f"input {name}", got=x.shape, expected=spec)
    for size, wanted in zip(x.shape, spec.shape):
        expected = wanted if isinstance(wanted, int) else sizes.setdefault(wanted, size)
        if size != expected:
            said = f"{spec}" if isinstance(wanted, int) else f"{spec}, where {wanted} is {expected}"
            raise ShapeError("An input has another shape", at=f"input {name}", got=x.shape, expected=said)
    if spec.below is not None and isinstance(x, np.ndarray) and x.size:
        low, high = int(x.min()), int(x.max())
        if low < 0 or high >= spec.below:
            raise ArgumentError("An input holds a number outside its range", at=f"input {name}",
                                got=low if low < 0 else high, expected=f"0 to {spec.below - 1}")  # fmt: skip


def example(spec: ShapeDtype, sizes: Mapping[str, int], random: np.random.Generator) -> Any:
    """An array of this kind: normal numbers, truth values, and of whole numbers 0 and 1, which fit any vocabulary."""
    shape, dtype = spec.at(sizes).shape, spec.numpy_dtype()
    if spec.is_key:
        impl, words = KEYS[spec.dtype]
        return jax.random.wrap_key_data(jnp.asarray(random.integers(0, 1 << 32, (*shape, words), np.uint32)), impl=impl)
    if jnp.issubdtype(dtype, jnp.inexact):
        return np.asarray(random.normal(size=shape)).astype(dtype)
    return np.asarray(random.integers(0, 2 if spec.below is None else min(spec.below, 1 << 31), shape)).astype(dtype)


def example_sizes(
    names: Sequence[str], limits: Mapping[str, int], buckets: Mapping[str, Sequence[int]]
) -> dict[str, int]:
    """Sizes to try a program at: 3, 5, …; but no bucket, so that padding is tried too, and none that is too large."""
    chosen: dict[str, int] = {}
    for i, name in enumerate(names):
        plan = buckets.get(name, ())
        most = max(plan, default=limits.get(name, 3 + 2 * i))
        chosen[name] = next((n for n in range(min(3 + 2 * i, most), most) if n not in plan), most)
    return chosen
