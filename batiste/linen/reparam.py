# SPDX-License-Identifier: Apache-2.0
"""Modules around a module that normalise its weights in each call, in the functional face."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import DTypeLike

from batiste.graph.errors import ArgumentError
from batiste.nn import initializers
from batiste.nn.initializers import Initializer
from batiste.nn.linear import as_tuple
from batiste.nn.reparam import over_spectral_norm, unit_along

from .boxes import is_axis_metadata, replace_boxed
from .module import Module, compact, nowrap
from .scope import unboxed
from .transforms import map_variables


class _Reparameterised(Module):
    """A module that calls another one with its parameters in another form."""

    @nowrap
    def run(self, change: Callable[[str, Array], Array], *args: Any, **kwargs: Any) -> Any:
        """The result of `layer_instance`, each parameter W of it replaced by `change(path, W)`."""
        layer = self.layer_instance  # type: ignore[attr-defined]
        changed: dict[str, Array] = {}

        def change_once(path: Any, value: Any) -> Any:
            name = "/".join(
                (layer.name, *(entry.key for entry in path), *(["value"] if is_axis_metadata(value) else []))
            )
            if name not in changed:
                changed[name] = change(name, unboxed(value))
            return replace_boxed(value, changed[name])

        def change_all(variables: Mapping[str, Any]) -> Mapping[str, Any]:
            return {
                col: jax.tree_util.tree_map_with_path(change_once, tree, is_leaf=is_axis_metadata)
                for col, tree in variables.items()
            }

        forward = map_variables(
            lambda layer, *args, **kwargs: layer(*args, **kwargs),
            "params",
            change_all,
            init=self.is_initializing(),
            mutable=True,
        )
        return forward(layer, *args, **kwargs)


class SpectralNorm(_Reparameterised):
    """y = layer(x) with every weight matrix W of it divided by an estimate of its greatest singular value

    See `batiste.nn.SpectralNorm`.

    Args:
        layer_instance: the module.
        n_steps: steps of the power iteration in each call.
        dtype: of the new weights; None for that of the old.
        param_dtype: of what is kept of the iteration, in `collection_name` under the path of the weight.
        error_on_non_matrix: refuse arrays of more than two dims.

    Raises:
        ArgumentError: a weight has more than two dims, and `error_on_non_matrix` is set.

    Source: Miyato et al. 2018, "Spectral Normalization for Generative Adversarial Networks", algorithm 1.
    """

    layer_instance: Module
    n_steps: int = 1
    epsilon: float = 1e-12
    dtype: DTypeLike | None = None
    param_dtype: DTypeLike = jnp.float32
    error_on_non_matrix: bool = False
    collection_name: str = "batch_stats"

    @compact
    def __call__(self, *args: Any, update_stats: bool, **kwargs: Any) -> Any:
        """Args:
        update_stats: keep the new state of the iteration.
        """
        return self.run(lambda path, value: self._divided(path, value, update_stats), *args, **kwargs)

    @nowrap
    def _divided(self, path: str, value: Array, update_stats: bool) -> Array:
        value = jnp.asarray(value)
        if value.ndim <= 1:
            return value
        if value.ndim > 2 and self.error_on_non_matrix:
            raise ArgumentError(f"Input is {value.ndim}D but error_on_non_matrix is True", at="/".join(self.path),
                                got=f"{value.shape} at {path}",
                                fix="leave out error_on_non_matrix to have it taken for a matrix")  # fmt: skip
        shape, normal = (1, value.shape[-1]), initializers.normal(1.0)
        kept_u = self.variable(
            self.collection_name,
            f"{path}/u",
            lambda: normal(self.make_rng("params"), shape, self.param_dtype),
        )
        kept_sigma = self.variable(self.collection_name, f"{path}/sigma", jnp.ones, (), self.param_dtype)
        new, u, sigma = over_spectral_norm(value, kept_u.value, self.n_steps, self.epsilon)
        if update_stats:
            kept_u.value, kept_sigma.value = u.astype(self.param_dtype), sigma.astype(self.param_dtype)
        return new.astype(self.dtype or new.dtype)


class WeightNorm(_Reparameterised):
    """y = layer(x) with every chosen weight W of it replaced by g W / ‖W‖, the norm over all dims but `feature_axes`

    See `batiste.nn.WeightNorm`.

    Args:
        layer_instance: the module.
        feature_axes: dims along which norms and scales differ; None takes one norm of the whole.
        use_scale: learn the factor g, a parameter under the path of the weight; else it is 1.
        dtype: of the new weights; None for what they promote to.
        variable_filter: parts of the paths of what counts as a weight; None, or no part, for all.

    Source: Salimans, Kingma 2016, "Weight Normalization", eq. 2.
    """

    layer_instance: Module
    epsilon: float = 1e-12
    dtype: DTypeLike | None = None
    param_dtype: DTypeLike = jnp.float32
    use_scale: bool = True
    scale_init: Initializer = initializers.ones
    feature_axes: int | Sequence[int] | None = -1
    variable_filter: Iterable[str] | None = dataclasses.field(default_factory=lambda: {"kernel"})

    @compact
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.run(self._normalised, *args, **kwargs)

    @nowrap
    def _normalised(self, path: str, value: Array) -> Array:
        if self.variable_filter and not any(part in path for part in self.variable_filter):
            return value
        value = jnp.asarray(value)
        axes = () if self.feature_axes is None else as_tuple(self.feature_axes)
        features = tuple(sorted({axis % value.ndim for axis in axes}))
        scale = None
        if self.use_scale:
            shape = tuple(value.shape[axis] for axis in features)
            scale = self.param(f"{path}/scale", self.scale_init, shape, self.param_dtype)
        new = unit_along(value, features, scale, self.epsilon)
        return new.astype(self.dtype or new.dtype)
