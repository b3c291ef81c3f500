# SPDX-License-Identifier: Apache-2.0
"""Writes a model as a bundle, and runs a bundle without the model's code."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import export as jax_export

from batiste.graph import Module, merge, split
from batiste.graph.errors import ArgumentError, DtypeError, ShapeError
from batiste.graph.optional import need

from .sealed import BundleError, seal, unseal

PLATFORMS = ("cpu", "cuda", "tpu")
GOLDEN_SIZE = 3


def export(
    model: Module | Callable[..., jax.Array],
    signature: Mapping[str, tuple[str, str]],
    path: str | Path,
    *,
    key: bytes | None = None,
) -> None:
    """Writes `model(**inputs)`, one array, as a bundle in the new folder `path`.

    Args:
      signature: for each input its shape, with names for the sizes that are open, and its dtype.
      key: signs the manifest (HMAC-SHA256).
    """
    tensors = need("safetensors.numpy", extra="export")
    function, weights = parts(model)
    scope = jax_export.SymbolicScope()
    args = {
        name: jax.ShapeDtypeStruct(jax_export.symbolic_shape(shape, scope=scope), np.dtype(dtype))
        for name, (shape, dtype) in signature.items()
    }
    program = jax_export.export(jax.jit(function), platforms=PLATFORMS)(weights, args)
    random = np.random.default_rng(0)
    inputs = {name: golden(random, spec) for name, spec in args.items()}
    output = np.asarray(jax.jit(function)(weights, inputs))
    contents = {
        "program.bin": bytes(program.serialize()),
        "weights.safetensors": tensors.save(weights),
        "golden.safetensors": tensors.save({**{"in." + name: x for name, x in inputs.items()}, "out": output}),
        "signature.json": json.dumps({name: list(spec) for name, spec in signature.items()}).encode(),
    }
    seal(Path(path), contents, key)


def parts(model: Any) -> tuple[Callable[..., jax.Array], dict[str, np.ndarray]]:
    """A function of (weights, inputs), and the weights by their paths."""
    if not isinstance(model, Module):
        return lambda weights, inputs: model(**inputs), {}
    graph, state = split(model)
    leaves, tree = jax.tree_util.tree_flatten_with_path(state)
    names = [jax.tree_util.keystr(path) for path, _ in leaves]
    for name, (_, leaf) in zip(names, leaves, strict=True):
        if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            raise ArgumentError(
                "a model that holds random keys cannot be exported",
                at=name,
                fix="drop its rngs, or make dropout deterministic without them",
            )

    def function(weights: dict[str, jax.Array], inputs: dict[str, jax.Array]) -> jax.Array:
        return merge(graph, jax.tree.unflatten(tree, [weights[name] for name in names]))(**inputs)

    return function, {name: np.asarray(leaf) for name, (_, leaf) in zip(names, leaves, strict=True)}


def golden(random: np.random.Generator, spec: jax.ShapeDtypeStruct) -> np.ndarray:
    """Numbers for one input; open sizes are 3."""
    shape = tuple(size if isinstance(size, int) else GOLDEN_SIZE for size in spec.shape)
    return np.asarray(random.normal(size=shape)).astype(spec.dtype)


def load_bundle(path: str | Path, *, key: bytes | None = None, max_bytes: int = 1 << 32) -> Bundle:
    """The bundle at `path`; its digests (and its signature, given a key) are checked before anything is parsed."""
    return Bundle(unseal(Path(path), key, max_bytes))


class Bundle:
    """A program with its weights: `bundle(**inputs)`."""

    def __init__(self, contents: dict[str, bytes]) -> None:
        tensors = need("safetensors.numpy", extra="export")
        self.signature: dict[str, tuple[str, str]] = {
            name: tuple(spec) for name, spec in json.loads(contents["signature.json"]).items()
        }
        self.weights = tensors.load(contents["weights.safetensors"])
        self.golden = tensors.load(contents["golden.safetensors"])
        self.program = jax_export.deserialize(bytearray(contents["program.bin"]))
        self.run = jax.jit(self.program.call)

    def __call__(self, **inputs: Any) -> jax.Array:
        if set(inputs) != set(self.signature):
            raise ArgumentError(
                "inputs of other names", at="bundle", got=sorted(inputs), expected=sorted(self.signature)
            )
        sizes: dict[str, int] = {}
        for name, (shape, dtype) in self.signature.items():
            x = inputs[name]
            if x.dtype != np.dtype(dtype):
                raise DtypeError(f"input {name} has another dtype", at="bundle", got=x.dtype, expected=dtype)
            wanted = [size.strip() for size in shape.split(",") if size.strip()]
            fits = len(wanted) == len(x.shape) and all(
                size == (int(want) if want.isdigit() else sizes.setdefault(want, size))
                for want, size in zip(wanted, x.shape, strict=True)
            )
            if not fits:
                raise ShapeError(f"input {name} has another shape", at="bundle", got=x.shape, expected=f"({shape})")
        return self.run(self.weights, inputs)

    def verify(self) -> None:
        """Raises BundleError unless the golden inputs give the golden outputs, to 1e-5."""
        inputs = {name[3:]: x for name, x in self.golden.items() if name.startswith("in.")}
        if not np.allclose(self(**inputs), self.golden["out"], rtol=1e-5, atol=1e-5):
            raise BundleError("the bundle does not give its golden outputs here")
