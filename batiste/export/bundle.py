# SPDX-License-Identifier: Apache-2.0
"""`load_bundle`: a program with its weights, checked before it is parsed, run without the model's code."""

from __future__ import annotations

import itertools
import os
import threading
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import export as jax_export

from batiste.graph.errors import ArgumentError, ShapeError
from batiste.graph.jaxcompat import mesh_of

from .described import FILE, Described
from .errors import BundleError, ExpiredError, GoldenError, PlatformError
from .executables import Executables, executable_name, named_anew
from .sealed import MAX_BYTES, read_folder
from .signature import Signature, example, uncut
from .tensors import decode

WEIGHTS, GOLDEN = "weights.safetensors", "golden.safetensors"


def load_bundle(
    path: str | os.PathLike[str], key: bytes | None = None, *, allow_unsigned: bool = False,
    buckets: Mapping[str, Sequence[int]] | None = None, executables: str | os.PathLike[str] | None = None,
    max_bytes: int = MAX_BYTES,
) -> Bundle:  # fmt: skip
    """The bundle in the folder `path`. Sizes, digests and the signature are checked before anything is parsed.

    Args:
        key: refuses bundles that are not signed with it; those without any signature too, unless `allow_unsigned`.
        buckets: pads open sizes to these, in place of what the bundle says.
        executables: a folder of this user in which compiled programs are kept for the next start.
        max_bytes: refuses, before memory is taken, a larger bundle.

    Raises:
        BundleError: the bundle is damaged, incomplete, too large, or not signed as it should be.
    """
    path = Path(path)
    digest, files = read_folder(path, key, allow_unsigned, max_bytes)
    if FILE not in files:
        raise BundleError("The bundle is incomplete", at=str(path), got=f"no {FILE}")
    described = Described.parsed(files.pop(FILE))
    wanted = {*described.programs, WEIGHTS, GOLDEN, *filter(None, [described.tokenizer])}
    if missing := sorted(wanted - set(files)):
        raise BundleError("The bundle is incomplete", at=str(path), got=f"no {', '.join(missing)}")
    kept = None if executables is None else Executables(executables)
    return Bundle(path, digest, described, files, buckets, kept)


class Bundle:
    """A program with its weights: `bundle(**inputs)`, a dict of outputs.

    signature: the inputs and outputs, `name -> ShapeDtype`, with names for open sizes.
    buckets: the values to which open sizes are padded, `name -> sizes`; empty if each value has a program of its own.
    programs: how many programs have been compiled. None is, after `compile()`, where every open size has buckets.
    described: all that `export` was told: labels, names of pre- and postprocessing, versions.
    digest: of the manifest, and so of everything.
    """

    def __init__(
        self, path: Path, digest: str, described: Described, files: dict[str, memoryview],
        buckets: Mapping[str, Sequence[int]] | None = None, executables: Executables | None = None,
    ):  # fmt: skip
        self.path, self.digest, self.described = path, digest, described
        self.signature: Signature = described.signature
        self.files = files
        self.executables = executables if described.devices == 1 else None  # those are kept for one device
        self.buckets = self._plan(buckets)
        self._refuse_narrow()
        weights = decode(files.pop(WEIGHTS), described.weights, WEIGHTS)
        self.weights: dict[str, Any] = weights  # of several devices, until a program says where each belongs
        if described.devices == 1:
            self.weights = {name: jax.device_put(x) for name, x in weights.items()}
        self._compiled: dict[tuple[int, ...], Any] = {}
        self._lock = threading.Lock()

    def __repr__(self) -> str:
        return f"Bundle({str(self.path)!r}: {self.signature})"

    def _plan(self, given: Mapping[str, Sequence[int]] | None) -> dict[str, tuple[int, ...]]:
        plan = self.described.buckets if given is None else {name: tuple(sorted(set(n))) for name, n in given.items()}
        for name, sizes in plan.items():
            known = self.described.buckets.get(name) if self.described.fallback else None
            most = self.described.limits.get(name)
            if name not in self.signature.sizes or not sizes or (known is not None and not set(sizes) <= set(known)):
                raise ArgumentError("The bundle has no programs for these buckets", got=f"{name}: {sizes}",
                                    expected=known or ", ".join(self.signature.sizes) or "none")  # fmt: skip
            if uneven := uncut(self.signature.outputs, name, self.signature.sizes):
                raise ArgumentError("This size cannot be padded: an output could not be cut", got=name, expected=uneven)
            if most is not None and sizes[-1] > most:
                raise ArgumentError("A bucket is above its limit", got=f"{name}: {sizes[-1]}", expected=most)
        return dict(plan)

    def _refuse_narrow(self) -> None:
        wide = [name for specs in (*self.signature, self.described.weights) for name, spec in specs.items()
                if spec.dtype in ("float64", "int64", "uint64", "complex128")]  # fmt: skip
        if wide and jax.dtypes.canonicalize_dtype(np.float64) != np.float64:
            raise PlatformError("The bundle computes with 64 bits", got=", ".join(wide[:8]),
                                fix="set JAX_ENABLE_X64=1, or export it without")  # fmt: skip

    # ---------------------------------------------------------------- running

    @property
    def programs(self) -> int:
        """How many programs have been compiled."""
        return len(self._compiled)

    def __call__(self, **inputs: Any) -> dict[str, Any]:
        """The outputs by name. Inputs of open sizes are padded to the next bucket, and the outputs cut again.

        Raises:
            ArgumentError, ShapeError, DtypeError: an input does not fit; nothing was computed.
            PlatformError: the program is not for this device.
        """
        sizes = self.signature.check(inputs)
        return self._run(inputs, sizes, self.room(sizes))

    def _run(self, inputs: Mapping[str, Any], sizes: Mapping[str, int], room: Mapping[str, int]) -> dict[str, Any]:
        program = self._program(room)
        if room == sizes:
            found = program(self.weights, inputs)
            return {name: found[name] for name in self.signature.outputs}
        return self._cut(
            program(self.weights, {name: self._padded(name, x, room) for name, x in inputs.items()}), sizes
        )

    def room(self, sizes: Mapping[str, int], buckets: Mapping[str, Sequence[int]] | None = None) -> dict[str, int]:
        """The sizes of the program that inputs of these sizes run in, by these buckets in place of its own.

        Raises:
            ShapeError: a size is above the largest bucket, or the limit.
        """
        room, buckets = {}, self.buckets if buckets is None else buckets
        for name, n in sizes.items():
            plan, most = buckets.get(name), self.described.limits.get(name)
            room[name] = n if plan is None else next((size for size in plan if size >= n), 0)
            if room[name] < n or n < 1 or (most is not None and n > most):
                raise ShapeError(f"The size {name} is outside what the bundle can do", got=n,
                                 expected=f"1 to {plan[-1] if plan else most or 'any'}")  # fmt: skip
        return room

    def _padded(self, name: str, x: Any, room: Mapping[str, int]) -> Any:
        wanted = self.signature.inputs[name].at(room).shape
        if tuple(x.shape) == wanted:
            return x
        if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
            return jnp.resize(x, wanted)
        padded = np.zeros(wanted, x.dtype)  # in NumPy: in JAX, each size would be a program
        padded[tuple(map(slice, x.shape))] = x
        return padded

    def _cut(self, outputs: Mapping[str, Any], sizes: Mapping[str, int]) -> dict[str, Any]:
        cut = {}
        for name, spec in self.signature.outputs.items():
            slices = tuple(slice(sizes[n]) if n in sizes else slice(None) for n in spec.shape)  # type: ignore[index]
            cut[name] = np.asarray(outputs[name])[slices]
        return cut

    # ---------------------------------------------------------------- compiling

    def compile(self, sizes: Mapping[str, int] | Iterable[Mapping[str, int]] | None = None) -> int:
        """Compiles ahead of time for these sizes, such as `{"batch": 8}`; if not, for all buckets. How many those are.

        Raises:
            ArgumentError: an open size has neither a bucket nor a value here.
            PlatformError: the program is not for this device.
        """
        if sizes is None:
            if open_sizes := [name for name in self.signature.sizes if name not in self.buckets]:
                raise ArgumentError("An open size has no buckets", got=", ".join(open_sizes),
                                    fix="load_bundle(…, buckets={name: sizes}), or compile({name: size})")  # fmt: skip
            plan = [self.buckets[name] for name in self.signature.sizes]
            sizes = [dict(zip(self.signature.sizes, chosen)) for chosen in itertools.product(*plan)]
        rooms: list[Any] = [sizes] if isinstance(sizes, Mapping) else list(sizes)
        for room in rooms:
            if set(room) != set(self.signature.sizes):
                raise ArgumentError(
                    "Each open size needs a value", got=dict(room), expected=", ".join(self.signature.sizes)
                )
            self._program(self.room(room))
        return len(rooms)

    def _program(self, room: Mapping[str, int]) -> Any:
        key = tuple(room[name] for name in self.signature.sizes)
        found = self._compiled.get(key)
        if found is None:
            with self._lock:
                found = self._compiled.get(key)
                if found is None:
                    found = self._compiled[key] = self._made(room)
        return found

    def _made(self, room: Mapping[str, int]) -> Any:
        self.check_device()
        name = next((n for n, sizes in self.described.programs.items() if sizes.items() <= room.items()), None)
        if name is None:
            raise BundleError("The bundle has no program for a size", got=dict(room))
        inputs = {n: example(spec, room, np.random.default_rng(0)) for n, spec in self.signature.inputs.items()}
        args = (self.weights, inputs)
        kept = executable_name(self.digest, name, room)
        if self.executables is not None:
            trees = jax.tree.structure((args, {})), jax.tree.structure(dict.fromkeys(self.signature.outputs, 0))
            found = self.executables.get(kept, *trees)
            if found is not None:
                return found
        try:
            exported = jax_export.deserialize(bytearray(self.files[name]))
            if self.described.devices > 1:
                self._place(exported)
                args = (self.weights, inputs)
            jitted = jax.jit if self.executables is None else named_anew
            compiled = jitted(exported.call).lower(*args).compile()
        except Exception as error:
            raise ExpiredError(f"This JAX cannot read the program: {str(error).strip()[:300] or type(error).__name__}",
                               at=name, got=jax.__version__, expected=self.described.environment.get("jax"),
                               fix=self._again()) from error  # fmt: skip
        if self.executables is not None:
            self.executables.put(kept, compiled, args)
        return compiled

    def _place(self, exported: jax_export.Exported) -> None:
        """Puts the weights where a program of several devices has them: on the first devices that are here."""
        mesh = mesh_of(exported)
        shardings = exported.in_shardings_jax(mesh)
        whole = jax.NamedSharding(mesh, jax.P())
        self.weights = {name: jax.device_put(self.weights[name], place or whole)
                        for name, place in zip(sorted(self.weights), shardings)}  # fmt: skip

    def check_device(self) -> None:
        """Raises PlatformError or ExpiredError if the program cannot run on the devices that are here."""
        here = jax.default_backend()
        names = {"gpu": ("cuda", "rocm")}.get(here, (here,))
        if not set(names) & set(self.described.platforms):
            there = ", ".join(self.described.platforms)
            raise PlatformError("The program is for other devices", got=here, expected=there,
                                fix="export it with platforms= for this one")  # fmt: skip
        if self.described.devices > jax.device_count():
            raise PlatformError(
                "The program needs more devices", got=jax.device_count(), expected=self.described.devices
            )
        least = jax_export.minimum_supported_calling_convention_version
        most = jax_export.maximum_supported_calling_convention_version
        if not least <= self.described.calling_convention <= most:
            raise ExpiredError("The program is of another time than this JAX", got=self.described.calling_convention,
                               expected=f"{least} to {most}", fix=self._again())  # fmt: skip

    def _again(self) -> str:
        return f"batiste reexport {self.path} --out {self.path}-new"

    # ---------------------------------------------------------------- proving

    def verify(self, tolerance: float | None = None) -> float:
        """The largest difference between the golden outputs and those of the golden inputs here.

        Raises:
            GoldenError: one differs by more than the tolerance; it names the output.
        """
        specs, tolerance = self.described.golden, self.described.tolerance if tolerance is None else tolerance
        arrays = decode(self.files[GOLDEN], specs, GOLDEN)
        given = {name.removeprefix("inputs/"): x for name, x in arrays.items() if name.startswith("inputs/")}
        sizes = self.signature.check(given)
        fits = all(sizes[name] <= plan[-1] for name, plan in self.buckets.items())
        room = self.room(sizes, self.buckets if fits else self.described.buckets)
        outputs, worst = self._run(given, sizes, room), 0.0
        for name in self.signature.outputs:
            expected = arrays.get(f"outputs/{name}")
            if expected is None or name not in outputs:
                raise BundleError("The bundle has no golden output of this name", at=name)
            worst = max(worst, compare(name, plain(outputs[name]), plain(expected), tolerance))
        return worst


def plain(x: Any) -> np.ndarray:
    """Numbers to compare by; of random keys, their words."""
    if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
        return np.asarray(jax.random.key_data(x))
    if jnp.issubdtype(x.dtype, jnp.complexfloating):
        return np.asarray(x, np.complex128)
    return np.asarray(x, np.float64)


def compare(name: str, found: np.ndarray, expected: np.ndarray, tolerance: float) -> float:
    """The largest difference of two arrays, each as a part of 1 + |expected|; infinities must be the same.

    Raises:
        GoldenError: it is above the tolerance, or the shapes differ.
    """
    if found.shape != expected.shape:
        raise GoldenError("An output has another shape", at=f"output {name}", got=found.shape, expected=expected.shape)
    with np.errstate(invalid="ignore", over="ignore"):
        difference = np.where(found == expected, 0.0, np.abs(found - expected) / (1 + np.abs(expected)))
    worst = float(difference.max(initial=0.0))
    if not worst <= tolerance:
        raise GoldenError("The bundle gives another output here than where it was written", at=f"output {name}",
                          got=f"a difference of {worst:.2g}", expected=f"at most {tolerance:.2g}")  # fmt: skip
    return worst
