# SPDX-License-Identifier: Apache-2.0
"""`export`: a model as a bundle, a folder that runs without the model's code."""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from batiste.checkpoint.files import Fs

from .bundle import GOLDEN, WEIGHTS, Bundle, compare, load_bundle, plain
from .described import FILE, Described, environment
from .errors import ExportError, PlatformError
from .lowering import PLATFORMS, Programs, programs
from .pure import Pure, method_of, pure
from .sealed import refuse_taken, write_folder
from .signature import ShapeDtype, Signature, example, example_sizes, open_sizes
from .tensors import encode

FS = Fs()


def export(
    model: Any, signature: Mapping[str, Any], path: str | os.PathLike[str], *,
    weights: Any = None, method: str | None = None, fixed: Mapping[str, Any] | None = None,
    outputs: Sequence[str] | None = None, limits: Mapping[str, int] | None = None,
    buckets: Mapping[str, Sequence[int]] | None = None, platforms: Sequence[str] = PLATFORMS,
    forget: Sequence[str] = (), golden: Mapping[str, Any] | None = None, tolerance: float = 1e-5,
    key: bytes | None = None, tokenizer: str | os.PathLike[str] | None = None, labels: Sequence[str] | None = None,
    preprocess: str | None = None, postprocess: str | None = None, about: Mapping[str, Any] | None = None,
    builder: str | None = None, config: Mapping[str, Any] | None = None, fs: Fs = FS,
) -> Bundle:  # fmt: skip
    """Writes `model(**inputs)` as a bundle in the new folder `path`, and returns it as `load_bundle` does.

    >>> import tempfile; from batiste import nnx
    >>> model = nnx.Linear(4, 2, rngs=nnx.Rngs(0))
    >>> bundle = export(model, {"inputs": "float32[batch, 4]"}, tempfile.mkdtemp() + "/linear")
    >>> print(bundle.signature)
    (inputs: float32[batch, 4]) -> (output: float32[batch, 2])
    >>> bundle(inputs=np.ones((3, 4), "float32"))["output"].shape
    (3, 2)

    Args:
        model: an object, a method of one, a Linen module with `weights=variables`, or a function of weights and inputs.
        signature: for each argument (by its name, or by position) such as `"float32[batch, 4]"`, or an example;
            `"int32[batch, length] < 256"` bounds whole numbers.
        weights: the tree that a Linen module or a function takes.
        method: what to call, if not the model itself.
        fixed: further arguments of the call, such as `{"train": False}`.
        outputs: names of the outputs in order, if not those of the dict that the model returns.
        limits: the largest value of open sizes, such as `{"length": 512}`.
        buckets: values to which open sizes are padded. Where JAX cannot leave sizes open, there is a program for each.
        platforms: where the program shall run; none of them needs to be here.
        forget: patterns of state that the call writes in vain: each call begins with what it is now.
        golden: inputs to compare by, if not random ones.
        tolerance: to which the golden outputs agree.
        key: signs the manifest (HMAC-SHA256).
        tokenizer: a file that goes along. `labels`, `preprocess`, `postprocess`, `about`: told to whoever serves it.
        builder, config: "module:function" that makes the model of these arguments, for `reexport` in later years.

    Raises:
        ExportError: the call writes state, calls Python, or JAX cannot export it.
        ArgumentError: the signature and the model do not fit.
        GoldenError: padded to buckets, the outputs are others than without.
        SaveError: the path is taken, or the operating system refused something.
    """
    inputs = {name: ShapeDtype.of(given, f"input {name}") for name, given in signature.items()}
    written = Written(
        model=pure(model, weights, tuple(inputs), method=method, fixed=fixed or {}, outputs=outputs, forget=forget),
        inputs=inputs, order=outputs,
        limits=dict(limits or {}), buckets=buckets or {}, platforms=platforms, golden=golden,
        tolerance=float(tolerance),
        tokenizer=None if tokenizer is None else ("tokenizer" + Path(tokenizer).suffix, Path(tokenizer).read_bytes()),
        said={
            "labels": None if labels is None else tuple(map(str, labels)), "preprocess": preprocess,
            "postprocess": postprocess, "about": dict(about or {}), "builder": builder, "config": dict(config or {}),
            "forget": tuple(forget),
            "method": method_of(model, method) if builder else None, "fixed": dict(fixed or {}) if builder else {},
        },
    )  # fmt: skip
    return written.to(Path(path), key, fs)


@dataclasses.dataclass
class Written:
    """All that goes into a bundle, before it is lowered."""

    model: Pure
    inputs: dict[str, ShapeDtype]
    order: Sequence[str] | None
    limits: dict[str, int]
    buckets: Mapping[str, Sequence[int]]
    platforms: Sequence[str]
    golden: Mapping[str, Any] | None
    tolerance: float
    tokenizer: tuple[str, Any] | None
    said: dict[str, Any]

    def to(self, path: Path, key: bytes | None, fs: Fs, expected: Mapping[str, Any] | None = None) -> Bundle:
        """Writes the bundle; `expected` are the golden outputs that the model must give already."""
        refuse_taken(path)
        model, found = programs(
            self.model, self.inputs, limits=self.limits, buckets=self.buckets, platforms=self.platforms
        )
        given = golden_inputs(self.inputs, found, self.limits, self.golden)
        outputs = golden_outputs(model, given)
        for name, x in (expected or {}).items():
            compare(name, plain(outputs[name]), plain(x), self.tolerance)
        golden = {f"inputs/{name}": x for name, x in given.items()} | {
            f"outputs/{name}": x for name, x in outputs.items()
        }
        (weight_specs, weight_bytes), (golden_specs, golden_bytes) = encode(model.weights), encode(golden)
        names = ["program.bin"] if found.fallback is None else [f"program{i}.bin" for i in range(len(found.lowered))]
        first = found.lowered[0].exported
        described = Described(
            inputs=self.inputs, outputs={name: found.outputs[name] for name in self.order or found.outputs},
            limits=self.limits, buckets=found.buckets, fallback=found.fallback,
            programs={name: program.sizes for name, program in zip(names, found.lowered)}, platforms=first.platforms,
            devices=first.nr_devices, calling_convention=first.calling_convention_version, weights=weight_specs,
            golden=golden_specs, tolerance=self.tolerance, environment=environment(),
            tokenizer=self.tokenizer and self.tokenizer[0], **self.said,
        )  # fmt: skip
        files: dict[str, Any] = {FILE: [described.text()], WEIGHTS: weight_bytes, GOLDEN: golden_bytes}
        files.update((name, [program.exported.serialize()]) for name, program in zip(names, found.lowered))
        files.update({name: [content] for name, content in filter(None, [self.tokenizer])})
        bundle = write_folder(fs, path, files, key, lambda part: _verified(part, key))
        bundle.path = path
        return bundle


def _verified(folder: Path, key: bytes | None) -> Bundle:
    bundle = load_bundle(folder, key)
    with contextlib.suppress(PlatformError):  # it is for other devices than those here
        bundle.verify()
    return bundle


def golden_inputs(
    inputs: Mapping[str, ShapeDtype], found: Programs, limits: Mapping[str, int], given: Mapping[str, Any] | None
) -> dict[str, Any]:
    """The inputs that a bundle is verified with: random ones of sizes that need padding, or those that are given."""
    if given is not None:
        Signature(dict(inputs), {}).check(given)
        return dict(given)
    random = np.random.default_rng(0)
    sizes = example_sizes(open_sizes(inputs), limits, found.buckets)
    return {name: example(spec, sizes, random) for name, spec in inputs.items()}


def golden_outputs(model: Pure, inputs: Mapping[str, Any]) -> dict[str, Any]:
    """The outputs of the model itself.

    Raises:
        ExportError: one is NaN.
    """
    outputs = jax.jit(model.run)(model.weights, dict(inputs))
    for name, x in outputs.items():
        if np.isnan(plain(x)).any():
            raise ExportError("An output of the golden inputs is NaN", at=f"output {name}",
                              fix="give inputs that mean something: golden={…}")  # fmt: skip
    return outputs
