# SPDX-License-Identifier: Apache-2.0
"""`reexport`: a bundle anew, for the JAX that is here, from the code of its model and the weights that it keeps."""

from __future__ import annotations

import os
import pkgutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from batiste import linen
from batiste.checkpoint.files import Fs
from batiste.checkpoint.leaves import nested
from batiste.graph import Module
from batiste.graph.errors import ArgumentError
from batiste.graph.flatten import is_graph_node

from .bundle import GOLDEN, WEIGHTS, Bundle
from .described import FILE, Described
from .errors import BundleError, ExportError
from .pure import Pure, pure
from .sealed import MAX_BYTES, read_folder
from .tensors import decode
from .writing import FS, Written

Builder = Callable[..., Any]


def reexport(
    path: str | os.PathLike[str], to: str | os.PathLike[str], builder: str | Builder | None = None, *,
    key: bytes | None = None, allow_unsigned: bool = False, max_bytes: int = MAX_BYTES, fs: Fs = FS,
) -> Bundle:  # fmt: skip
    """Writes the bundle `path` anew to `to`, with the same weights; its old program is not read.

    Args:
        builder: a function, or "module:function", that makes the model of the bundle's `config`: an object, a Linen
            module, or a pair of a function and a tree of weights. If it is left out, the one that the bundle names,
            which must then be signed: to import what a file names is to run it.
        key: with which the bundle is signed, and the new one will be.

    Raises:
        BundleError: the bundle is damaged, or not signed as it should be.
        ArgumentError: there is no builder, or nobody signed for it.
        ExportError: the model of the builder does not have these weights.
        GoldenError: it gives other outputs than those that the bundle keeps.
    """
    path = Path(path)
    _, files = read_folder(path, key, allow_unsigned, max_bytes)
    if missing := sorted({FILE, WEIGHTS, GOLDEN} - set(files)):
        raise BundleError("The bundle is incomplete", at=str(path), got=f"no {', '.join(missing)}")
    described = Described.parsed(files[FILE])
    built = _build(described, builder, trusted=key is not None and not allow_unsigned)
    weights = decode(files[WEIGHTS], described.weights, WEIGHTS)
    golden = decode(files[GOLDEN], described.golden, GOLDEN)
    name = described.tokenizer
    written = Written(
        model=_with_weights(built, weights, described), inputs=described.inputs, order=tuple(described.outputs),
        limits=described.limits, buckets=described.buckets, platforms=described.platforms,
        tolerance=described.tolerance, golden=_part(golden, "inputs/"),
        tokenizer=(name, files[name]) if name and name in files else None,
        said={field: getattr(described, field) for field in
              ("labels", "preprocess", "postprocess", "about", "builder", "config", "method", "fixed", "forget")},
    )  # fmt: skip
    return written.to(Path(to), key, fs, expected=_part(golden, "outputs/"))


def _part(arrays: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    return {name.removeprefix(prefix): x for name, x in arrays.items() if name.startswith(prefix)}


def _build(described: Described, builder: str | Builder | None, trusted: bool) -> Any:
    """What the builder makes, of the bundle's configuration."""
    if builder is None and described.builder is None:
        raise ArgumentError(
            "The bundle does not name what makes its model", fix="reexport(…, builder='module:function')"
        )
    if builder is None and not trusted:
        raise ArgumentError("The bundle names code to run, and no key was given that it is signed with",
                            got=described.builder,
                            fix=f"if you trust it, pass builder={described.builder!r} yourself")  # fmt: skip
    chosen = described.builder if builder is None else builder
    if isinstance(chosen, str):
        try:
            chosen = pkgutil.resolve_name(chosen)
        except (ImportError, AttributeError, ValueError) as error:
            raise ArgumentError(f"The builder cannot be imported ({error})", got=chosen,
                                expected="module:function, from a folder on PYTHONPATH") from error  # fmt: skip
    if not callable(chosen):
        raise ArgumentError("The builder is no function", got=chosen)
    return chosen(**described.config)


def _with_weights(built: Any, weights: Mapping[str, Any], described: Described) -> Pure:
    """The model with the weights of the bundle; those that its program did not use are the builder's own."""
    model, tree = built if isinstance(built, tuple) else (built, None)
    if isinstance(model, Module):
        model.eval()  # as it was, for in a bundle nothing is trained
    if tree is None and weights and (isinstance(model, linen.Module) or not is_graph_node(model)):
        tree = nested(weights)
    options: Any = {"outputs": tuple(described.outputs)}
    options.update((name, getattr(described, name)) for name in ("method", "fixed", "forget"))
    made = pure(model, tree, tuple(described.inputs), **options)
    wrong = []
    for name, x in weights.items():
        own = made.weights.get(name)
        if own is None or own.shape != x.shape or own.dtype != x.dtype:
            there = "nothing" if own is None else f"{own.dtype}{list(own.shape)}"
            wrong.append(f"{name}: {described.weights[name]} in the bundle, {there} in the model")
    if wrong:
        raise ExportError("The builder makes another model than the bundle holds", got="\n  ".join(["", *wrong[:20]]),
                          fix="check out the code of that time, or pass a builder that makes that model")  # fmt: skip
    return made._replace(weights={**made.weights, **weights})
