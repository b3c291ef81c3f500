# SPDX-License-Identifier: Apache-2.0
"""Policies: a model that was written without a thought of dtypes, kept in one and computed in another."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterable
from fnmatch import fnmatchcase
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from batiste.graph import Param, Pytree, iter_graph, iter_modules, recursive_map
from batiste.graph.errors import ArgumentError
from batiste.graph.structure import show_path

from .fp8 import fp8_dot_general, fp8_einsum

M = TypeVar("M")
Path = tuple[Any, ...]

KEEP = ("*Norm", "!WeightNorm", "!SpectralNorm", "*router*")
"""What stays in float32 unless a policy says otherwise: normalising layers (but not layers whose weights are
normalised), and what chooses experts."""


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
            modules and their parts keep their parameters in `accumulate`, and compute in it; what fits a pattern with
            `!` in front does not by itself. A normalising layer hands on the dtype of the others.
        dot_general, einsum: what takes the place of `jax.lax.dot_general` and `jax.numpy.einsum` in the layers that
            are not kept and have not been given a product of their own; such as `fp8_dot_general`.

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
    dot_general: Callable[..., Any] | None = None
    einsum: Callable[..., Any] | None = None

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
                return x.replace(jax.tree.map(lambda leaf, dtype=dtype: cast(leaf, dtype), x.get_value()))
            if isinstance(x, Pytree) and "dtype" in vars(x):
                dtype = self.accumulate if path in kept else self.compute
                vars(x)["dtype"] = self.compute if moments_apart(x) else dtype
                if "param_dtype" in vars(x):  # it is also that of what a layer starts from, such as a cell's carry
                    vars(x)["param_dtype"] = dtype
                if path not in kept and (product := self.replaces(x)):
                    vars(x).update(product)
            return x

        return recursive_map(change, model)

    def replaces(self, part: Any) -> dict[str, Callable[..., Any]]:
        """The attribute of a layer that multiplies, with what takes its place; nothing if it stays."""
        name = own_product(part)
        product = {"dot_general": self.dot_general, "einsum_op": self.einsum}.get(name)
        return {} if product is None else {name: product}

    def kept(self, model: Any) -> set[Path]:
        """The paths of the modules that stay in `accumulate`."""
        return set(fitting(model, self.keep))

    def cast(self, tree: M) -> M:
        """The floats of a tree of arrays in `compute`: what goes into the model."""
        return jax.tree.map(lambda x: cast(x, self.compute), tree)

    def result(self, tree: M) -> M:
        """The floats of a tree of arrays in `output`: what comes out."""
        return jax.tree.map(lambda x: cast(x, self.output), tree)

    def wrap(self, f: Callable[..., Any]) -> Callable[..., Any]:
        """`f(model, *args)` with the model as it computes: calling it casts its arguments to `compute` and its result
        to `output`. What else `f` does, such as the loss, stays in the dtypes that it is given."""

        @functools.wraps(f)
        def mixed(model: Any, *args: Any, **kwargs: Any) -> Any:
            computing = self(model)
            object.__setattr__(computing, "__class__", _casting(type(model), self))  # a copy: it is nobody else's
            return f(computing, *args, **kwargs)

        return mixed

    def store(self, model: Any) -> None:
        """Casts the parameters of a model to `param`, in place; those that are kept, to `accumulate`."""
        kept = self.kept(model)
        for path, x in iter_graph(model):
            if isinstance(x, Param):
                dtype = self.accumulate if path[:-1] in kept else self.param
                x.set_value(jax.tree.map(lambda leaf, dtype=dtype: cast(leaf, dtype), x.get_value()))


@functools.lru_cache(maxsize=256)
def _casting(cls: type, policy: Policy) -> type:
    """A class like this one, whose call casts."""

    def __call__(self: Any, *args: Any, **kwargs: Any) -> Any:
        args, kwargs = policy.cast((args, kwargs))
        return policy.result(cls.__call__(self, *args, **kwargs))

    return type(cls)(cls.__name__, (cls,), {"__call__": __call__, "__module__": cls.__module__, "__doc__": cls.__doc__})


def fitting(model: Any, patterns: Iterable[str]) -> dict[Path, str]:
    """The paths of the modules whose path or class fits one of the patterns, and of their parts, with the pattern."""
    patterns, found = tuple(patterns), dict[Path, str]()
    for path, module in sorted(iter_modules(model), key=lambda item: len(item[0])):  # parts after what they are part of
        above = (found[path[:n]] for n in range(len(path)) if path[:n] in found)
        pattern = next(above, None) or fits(path, type(module), patterns)
        if pattern is not None:
            found[path] = pattern
    return found


def fits(path: Path, cls: type, patterns: Iterable[str]) -> str | None:
    """The pattern that a module's path, or a name of its class or bases, fits; None if one with `!` fits too."""
    names = [show_path(path), *(base.__name__ for base in cls.__mro__)]
    found = [p for p in patterns if any(fnmatchcase(name, p.removeprefix("!")) for name in names)]
    return None if not found or any(p.startswith("!") for p in found) else found[0]


def own_product(part: Any) -> str:
    """The name of the attribute by which a layer multiplies as JAX does: `dot_general`, `einsum_op`, or nothing."""
    settings = vars(part)
    if settings.get("dot_general", False) in (None, jax.lax.dot_general) and settings.get("dot_general_cls") is None:
        return "dot_general"
    return "einsum_op" if settings.get("einsum_op") is jnp.einsum else ""


def moments_apart(module: Any) -> bool:
    """Whether a layer's `dtype` is that of its result only, because it takes its moments in float32 by itself."""
    return hasattr(module, "epsilon") and hasattr(module, "use_fast_variance")


def cast(x: Any, dtype: Any) -> Any:
    """`x` in `dtype`, if it is an array of floats."""
    return x.astype(dtype) if hasattr(x, "dtype") and jnp.issubdtype(x.dtype, jnp.floating) else x


_PRESETS = {
    "float32": Policy(),
    "bfloat16": Policy(compute=jnp.bfloat16),
    "float16": Policy(compute=jnp.float16),
    "fp8": Policy(compute=jnp.bfloat16, dot_general=fp8_dot_general, einsum=fp8_einsum),
}


def policy(name: str) -> Policy:
    """The policy of this name: `float32`, `bfloat16`, `float16` or `fp8`

    `float16` needs a loss scale, which a training step made with it has. In `fp8`, layers multiply 8-bit floats, each
    array scaled by its own greatest value; the rest is bfloat16. `delayed` takes the scales from the last calls.

    Raises:
        ArgumentError: there is none.
    """
    if name not in _PRESETS:
        raise ArgumentError("unknown policy", got=repr(name), expected=", ".join(_PRESETS),
                            fix="pass one of these, or a Policy(...)")  # fmt: skip
    return _PRESETS[name]
