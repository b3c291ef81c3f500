# SPDX-License-Identifier: Apache-2.0
"""Policies: a model that was written without a thought of dtypes, kept in one and computed in another."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from fnmatch import fnmatchcase
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from batiste.graph import Param, Pytree, iter_graph, iter_modules, recursive_map
from batiste.graph.errors import ArgumentError
from batiste.graph.structure import show_path

M = TypeVar("M")
Path = tuple[Any, ...]

KEEP = ("*Norm", "*router*")
"""What stays in float32 unless a policy says otherwise: normalising layers, and what chooses experts."""


@dataclasses.dataclass(frozen=True)
class Policy:
    """In which dtypes a model is kept, computed and summed: `policy(model)` is the model as it computes

        def loss(model, batch):
            logits = policy(model)(batch.x)            # bfloat16 products, float32 parameters and gradients
            return cross_entropy(policy.result(logits), batch.y)

    The parameters of `policy(model)` are those of `model`, cast: gradients arrive in the dtype of the parameters, and
    nothing that is trained, saved or updated changes. All else (statistics, random streams) is the very same.

    Args:
        param: of the parameters, see `store`.
        compute: of products and of what goes from layer to layer.
        output: of results, see `result`.
        accumulate: of sums over many values: moments of normalising layers, softmax, gradients over parts of a batch.
        keep: patterns (`*`, `?`) for paths (`blocks/*/router`) or names of classes and their bases (`*Norm`): these
            modules and their parts keep their parameters in `accumulate`, and compute in it. A normalising layer hands
            on the dtype of the others.

    Source: Micikevicius et al. 2018, "Mixed precision training".

    >>> from batiste import nnx
    >>> model = nnx.Sequential(nnx.Linear(2, 3, rngs=nnx.Rngs(0)), nnx.LayerNorm(3, rngs=nnx.Rngs(0)))
    >>> mixed = policy("bfloat16")
    >>> mixed(model)(jnp.ones((1, 2))).dtype, model.layers[0].kernel.dtype
    (dtype(bfloat16), dtype('float32'))
    """

    param: DTypeLike = jnp.float32
    compute: DTypeLike = jnp.float32
    output: DTypeLike = jnp.float32
    accumulate: DTypeLike = jnp.float32
    keep: tuple[str, ...] = KEEP

    def __post_init__(self):
        for field in ("param", "compute", "output", "accumulate"):
            dtype = jnp.dtype(getattr(self, field))
            if not jnp.issubdtype(dtype, jnp.floating):
                raise ArgumentError(f"a policy's {field} is a float dtype", got=str(dtype), expected="such as bfloat16",
                                    fix=f"pass {field}=jnp.bfloat16")  # fmt: skip
            object.__setattr__(self, field, dtype)
        if isinstance(self.keep, str):
            raise ArgumentError("keep is a tuple of patterns", got=repr(self.keep), fix=f"pass keep=({self.keep!r},)")
        object.__setattr__(self, "keep", tuple(self.keep))

    def __call__(self, model: M) -> M:
        """The model as it computes: a copy whose parameters are cast, and whose `dtype` settings are set."""
        kept = self.kept(model)

        def change(path: Path, x: Any) -> Any:
            if isinstance(x, Param):
                dtype = self.accumulate if path[:-1] in kept else self.compute
                return x.replace(jax.tree.map(lambda leaf, dtype=dtype: _cast(leaf, dtype), x.get_value()))
            if isinstance(x, Pytree) and "dtype" in vars(x):
                vars(x)["dtype"] = self.accumulate if path in kept and not moments_apart(x) else self.compute
            return x

        return recursive_map(change, model)

    def kept(self, model: Any) -> set[Path]:
        """The paths of the modules that stay in `accumulate`."""
        found: set[Path] = set()
        for path, module in iter_modules(model):
            if any(path[:n] in found for n in range(len(path))) or self._keeps(path, module):
                found.add(path)
        return found

    def _keeps(self, path: Path, module: Any) -> bool:
        names = [show_path(path), *(cls.__name__ for cls in type(module).__mro__)]
        return any(fnmatchcase(name, pattern) for name in names for pattern in self.keep)

    def cast(self, tree: M) -> M:
        """The floats of a tree of arrays in `compute`: what goes into the model."""
        return jax.tree.map(lambda x: _cast(x, self.compute), tree)

    def result(self, tree: M) -> M:
        """The floats of a tree of arrays in `output`: what comes out."""
        return jax.tree.map(lambda x: _cast(x, self.output), tree)

    def wrap(self, f: Callable[..., Any]) -> Callable[..., Any]:
        """`f(model, *args)` under the policy: arguments cast to `compute`, the result to `output`."""

        @functools.wraps(f)
        def mixed(model: Any, *args: Any, **kwargs: Any) -> Any:
            args, kwargs = self.cast((args, kwargs))
            return self.result(f(self(model), *args, **kwargs))

        return mixed

    def store(self, model: Any) -> None:
        """Casts the parameters of a model to `param`, in place; those that are kept, to `accumulate`."""
        kept = self.kept(model)
        for path, x in iter_graph(model):
            if isinstance(x, Param):
                dtype = self.accumulate if path[:-1] in kept else self.param
                x.set_value(jax.tree.map(lambda leaf, dtype=dtype: _cast(leaf, dtype), x.get_value()))


def moments_apart(module: Any) -> bool:
    """Whether a layer's `dtype` is that of its result only, because it takes its moments in float32 by itself."""
    return hasattr(module, "epsilon") and hasattr(module, "use_fast_variance")


def _cast(x: Any, dtype: Any) -> Any:
    return x.astype(dtype) if hasattr(x, "dtype") and jnp.issubdtype(x.dtype, jnp.floating) else x


_PRESETS = {
    "float32": Policy(),
    "bfloat16": Policy(compute=jnp.bfloat16),
    "float16": Policy(compute=jnp.float16),
}


def policy(name: str) -> Policy:
    """The policy of this name: `float32`, `bfloat16`, or `float16` (which needs a loss scale, see `DynamicScale`).

    Raises:
        ArgumentError: there is none.
    """
    if name not in _PRESETS:
        raise ArgumentError("unknown policy", got=repr(name), expected=", ".join(_PRESETS),
                            fix="pass one of these, or a Policy(...)")  # fmt: skip
    return _PRESETS[name]
