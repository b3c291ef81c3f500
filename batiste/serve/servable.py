# SPDX-License-Identifier: Apache-2.0
"""What is served: a signature, sizes that are known beforehand, and a program over a batch of rows."""

from __future__ import annotations

import dataclasses
import itertools
import os
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from batiste.export import Bundle, Signature, load_bundle
from batiste.export.signature import ShapeDtype, example, open_sizes
from batiste.graph.errors import ArgumentError, ShapeError

from .apart import Apart

Arrays = Mapping[str, np.ndarray]
BATCHES = (1, 2, 4, 8, 16, 32)


@dataclasses.dataclass(frozen=True)
class Servable:
    """A model as the server sees it.

    Args:
        name, version: by which clients ask for it.
        signature: inputs and outputs; the first dim of each, one open size, counts the rows of a batch.
        run: from inputs of a size in `buckets` to outputs; of rows that are padding nothing is looked at.
        buckets: the values of each open size that `run` is called with.
        programs: how many programs have been compiled so far.
        digest: of what it was loaded from.
        apart: the process that it runs in, if that is not this one.

    Raises:
        ArgumentError: there is no common first dim, or an open size has no buckets.
    """

    name: str
    signature: Signature
    run: Callable[[Arrays], Mapping[str, Any]]
    buckets: Mapping[str, Sequence[int]]
    version: str = "1"
    programs: Callable[[], int] = lambda: 0
    digest: str = ""
    apart: Apart | None = None

    def __post_init__(self):
        firsts = {spec.shape[0] if spec.shape else None for side in self.signature for spec in side.values()}
        if len(firsts) != 1 or not isinstance(next(iter(firsts)), str):
            raise ArgumentError("what is served in batches has rows: each input and output begins with one open size",
                                at=self.name, got=str(self.signature), expected="such as float32[batch, 4]",
                                fix="export it with an open batch size")  # fmt: skip
        if missing := [size for size in self.signature.sizes if not self.buckets.get(size)]:
            raise ArgumentError("an open size has no buckets, so that requests would compile", at=self.name,
                                got=", ".join(missing), fix="pass buckets={size: (…)}")  # fmt: skip

    @classmethod
    def of_function(
        cls, run: Callable[..., Mapping[str, Any]], signature: tuple[Mapping[str, Any], Mapping[str, Any]], name: str,
        *, buckets: Mapping[str, Sequence[int]] | None = None, **options: Any,
    ) -> Servable:  # fmt: skip
        """Of a function `run(**inputs) -> outputs` over rows, with the texts of its inputs and outputs.

        >>> double = lambda x: {"y": 2 * x}
        >>> served = Servable.of_function(double, ({"x": "float32[batch, 2]"}, {"y": "float32[batch, 2]"}), "double")
        >>> served.answer({"x": np.ones((3, 2), np.float32)})["y"].shape
        (3, 2)
        """
        sides = Signature(*({key: ShapeDtype.of(spec, key) for key, spec in side.items()} for side in signature))
        plan = dict(buckets or {})
        for first in open_sizes(sides.inputs)[:1]:
            plan.setdefault(first, BATCHES)
        return cls(name, sides, lambda arrays: run(**arrays), plan, **options)

    @classmethod
    def of_bundle(cls, path: str | os.PathLike[str] | Bundle, name: str | None = None, version: str = "1", *,
                  buckets: Mapping[str, Sequence[int]] | None = None, **options: Any) -> Servable:  # fmt: skip
        """Of a bundle, checked against its golden outputs.

        Raises:
            BundleError: it is damaged, or not signed as it should be.
        """
        bundle = path if isinstance(path, Bundle) else load_bundle(path, buckets=buckets, **options)
        plan = dict(bundle.buckets)
        first = bundle.signature.sizes[:1]
        if first and first[0] not in plan:
            most = bundle.described.limits.get(first[0], BATCHES[-1])
            plan[first[0]] = tuple(n for n in BATCHES if n <= most)
        bundle.verify()
        return cls(name or Path(bundle.path).name, bundle.signature, lambda arrays: bundle(**arrays), plan, version,
                   lambda: bundle.programs, bundle.digest)  # fmt: skip

    @classmethod
    def in_process(cls, target: str, **options: Any) -> Servable:
        """What the function `target`, a text such as "my_models:load", gives: made and run in a process of its own.

        Args:
            options: the function's arguments: what JSON can say, paths and bytes.

        Raises:
            ArgumentError: it gives none.
        """
        apart = Apart(target, options)
        about = apart.about
        return cls(about["name"], apart.signature, apart.run, about["buckets"], about["version"],
                   lambda: apart.programs, about["digest"], apart)  # fmt: skip

    def close(self) -> None:
        """Ends its process, if it has one."""
        if self.apart is not None:
            self.apart.close()

    # ------------------------------------------------------------ sizes
    @property
    def batch(self) -> str:
        """The name of the size that counts rows."""
        return self.signature.sizes[0]

    @property
    def rows(self) -> int:
        """The most rows of a batch."""
        return max(self.buckets[self.batch])

    def room(self, sizes: Mapping[str, int]) -> dict[str, int]:
        """The buckets that these sizes fit in.

        Raises:
            ShapeError: a size is above the largest.
        """
        found = {}
        for name, n in sizes.items():
            plan = sorted(self.buckets[name])
            if not 1 <= n <= plan[-1]:
                raise ShapeError(f"The size {name} is outside what is served", got=n, expected=f"1 to {plan[-1]}")
            found[name] = next(size for size in plan if size >= n)
        return found

    # ------------------------------------------------------------ running
    def answer(self, arrays: Arrays) -> dict[str, np.ndarray]:
        """The outputs of these inputs, padded to buckets and cut again."""
        return self.batched([(arrays, self.signature.check(arrays))])[0]

    def batched(self, items: Sequence[tuple[Arrays, Mapping[str, int]]]) -> list[dict[str, np.ndarray]]:
        """The outputs of several inputs with their sizes, computed together: each in the room of all."""
        rows = [sizes[self.batch] for _, sizes in items]
        largest = {name: max(sizes[name] for _, sizes in items) for name in self.signature.sizes}
        room = self.room({**largest, self.batch: sum(rows)})
        together = {}
        for name, spec in self.signature.inputs.items():
            if len(items) == 1 and items[0][0][name].shape == spec.at(room).shape:
                together[name] = items[0][0][name]
                continue
            whole = np.zeros(spec.at(room).shape, spec.numpy_dtype())
            for start, (arrays, _) in zip(itertools.accumulate([0, *rows]), items):
                x = arrays[name]
                whole[(slice(start, start + x.shape[0]), *map(slice, x.shape[1:]))] = x
            together[name] = whole
        outputs = {name: np.asarray(x) for name, x in self.run(together).items()}
        found = []
        for start, (_, sizes) in zip(itertools.accumulate([0, *rows]), items):
            cut = {}
            for name, spec in self.signature.outputs.items():
                rest = [slice(sizes[n]) if isinstance(n, str) and n in sizes else slice(None) for n in spec.shape[1:]]
                cut[name] = outputs[name][(slice(start, start + sizes[self.batch]), *rest)]
            found.append(cut)
        return found

    def warm(self) -> dict[int, float]:
        """Runs every combination of buckets, so that nothing compiles later.

        Returns:
            for each number of rows, the seconds that a batch of the largest other sizes takes.
        """
        names, costs = self.signature.sizes, dict.fromkeys(self.buckets[self.batch], 0.0)
        random = np.random.default_rng(0)
        for sizes in itertools.product(*(self.buckets[name] for name in names)):
            room = dict(zip(names, sizes))
            inputs = {name: example(spec, room, random) for name, spec in self.signature.inputs.items()}
            for _ in range(2):  # the first time may compile
                start = time.monotonic()
                {name: np.asarray(x) for name, x in self.run(inputs).items()}
                took = time.monotonic() - start
            costs[room[self.batch]] = max(costs[room[self.batch]], took)
        return costs
