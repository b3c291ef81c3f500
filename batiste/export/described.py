# SPDX-License-Identifier: Apache-2.0
"""bundle.json: what a bundle says of itself. Read strictly: nothing is taken that another file could be meant by."""

from __future__ import annotations

import dataclasses
import json
import platform
from collections.abc import Callable
from importlib.metadata import version
from typing import Any

import jax
import numpy as np

from batiste.graph.errors import ArgumentError
from batiste.graph.strict import parse_json, want
from batiste.version import __version__

from .errors import BundleError, ExportError
from .signature import ShapeDtype, Signature

FILE = "bundle.json"
FORMAT = 1
LIMIT = 16 << 20


@dataclasses.dataclass(frozen=True)
class Described:
    """What stands in bundle.json; the arguments of `export` under their names."""

    inputs: dict[str, ShapeDtype]
    outputs: dict[str, ShapeDtype]
    limits: dict[str, int]
    buckets: dict[str, tuple[int, ...]]
    fallback: str | None
    programs: dict[str, dict[str, int]]
    platforms: tuple[str, ...]
    devices: int
    calling_convention: int
    weights: dict[str, ShapeDtype]
    golden: dict[str, ShapeDtype]
    tolerance: float
    tokenizer: str | None
    labels: tuple[str, ...] | None
    preprocess: str | None
    postprocess: str | None
    about: dict[str, Any]
    method: str | None
    fixed: dict[str, Any]
    forget: tuple[str, ...]
    builder: str | None
    config: dict[str, Any]
    environment: dict[str, str]
    format: int = FORMAT

    @property
    def signature(self) -> Signature:
        return Signature(self.inputs, self.outputs)

    def text(self) -> bytes:
        """The content of the file.

        Raises:
            ExportError: something of it cannot be written as JSON.
        """
        try:
            return json.dumps(vars(self), default=_listed, indent=1, allow_nan=False).encode()
        except (TypeError, ValueError) as error:
            raise ExportError(f"What goes along with the model must be JSON ({error})",
                              fix="use numbers, texts, lists and dicts") from error  # fmt: skip

    @classmethod
    def parsed(cls, content: Any) -> Described:
        """The file's content.

        Raises:
            BundleError: it is malformed.
        """
        try:
            want(len(content) <= LIMIT, "it is too large")
            found = _dict(parse_json(bytes(content)))
            want(type(found.get("format")) is int, "it has no format")
            want(found["format"] <= FORMAT, f"its format {found['format']} is of a later release")
            fields = {field.name for field in dataclasses.fields(cls)}
            want(set(found) == fields, f"it says more or less than {', '.join(sorted(fields))}"[:200])
            return cls(**{name: _READ[name](value) for name, value in found.items()})
        except (ValueError, TypeError, KeyError, RecursionError, ArgumentError) as error:
            raise BundleError(f"The bundle is malformed: {error!s:.300}", at=FILE) from None


def environment() -> dict[str, str]:
    """The versions that a bundle is written with."""
    return {
        "batiste": __version__, "jax": jax.__version__, "jaxlib": version("jaxlib"), "numpy": np.__version__,
        "python": platform.python_version(), "platform": f"{platform.system()} {platform.machine()}",
        "backend": jax.default_backend(),
    }  # fmt: skip


# ---------------------------------------------------------------- reading


def _listed(x: Any) -> list[Any]:
    if isinstance(x, ShapeDtype):
        return [x.shape, x.dtype, x.below]
    raise TypeError(f"{type(x).__name__} is no JSON")


def _dict(x: Any) -> dict[str, Any]:
    want(isinstance(x, dict), f"a value of type {type(x).__name__}")
    return x


def _list(x: Any) -> list[Any]:
    want(isinstance(x, list), f"a value of type {type(x).__name__}")
    return x


def _count(x: Any) -> bool:
    return type(x) is int and 0 <= x < 1 << 48


def _specs(closed: bool) -> Callable[[Any], dict[str, ShapeDtype]]:
    """Reads `name -> [shape, dtype, below]`; closed, without names of sizes."""

    def read(x: Any) -> dict[str, ShapeDtype]:
        specs = {}
        for name, entry in _dict(x).items():
            shape, dtype, below = _list(entry)
            sizes = all(_count(n) or (type(n) is str and 0 < len(n) <= 200 and not closed) for n in _list(shape))
            want(sizes and len(shape) <= 32 and (below is None or _count(below)), f"the shape of {name!r:.99}")
            specs[name] = ShapeDtype(tuple(shape), _text(dtype), below)
            specs[name].numpy_dtype()
        return specs

    return read


def _of(*kinds: type) -> Callable[[Any], Any]:
    def read(x: Any) -> Any:
        want(type(x) in kinds, f"a value of type {type(x).__name__}")
        return x

    return read


def _sizes(x: Any) -> dict[str, int]:
    want(all(map(_count, _dict(x).values())), "a size that is none")
    return x


def _plan(x: Any) -> dict[str, tuple[int, ...]]:
    for plan in map(_list, _dict(x).values()):
        want(plan and all(map(_count, plan)) and plan[0] > 0 and plan == sorted(set(plan)), "buckets")
    return {name: tuple(plan) for name, plan in x.items()}


def _programs(x: Any) -> dict[str, dict[str, int]]:
    want(x, "no programs")
    return {name: _sizes(sizes) for name, sizes in _dict(x).items()}


def _strings(x: Any) -> tuple[str, ...]:
    return tuple(map(_text, _list(x)))


_text, _maybe_text = _of(str), _of(str, type(None))
_READ: dict[str, Callable[[Any], Any]] = {
    "format": _of(int), "inputs": _specs(closed=False), "outputs": _specs(closed=False), "limits": _sizes,
    "buckets": _plan, "fallback": _maybe_text, "programs": _programs, "platforms": _strings, "devices": _of(int),
    "calling_convention": _of(int), "weights": _specs(closed=True), "golden": _specs(closed=True),
    "tolerance": _of(float), "tokenizer": _maybe_text, "labels": lambda x: None if x is None else _strings(x),
    "preprocess": _maybe_text, "postprocess": _maybe_text, "about": _of(dict), "method": _maybe_text,
    "fixed": _of(dict), "forget": _strings, "builder": _maybe_text, "config": _of(dict), "environment": _of(dict),
}  # fmt: skip
