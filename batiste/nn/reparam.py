# SPDX-License-Identifier: Apache-2.0
"""Layers around a layer that normalise its weights before each call: by their spectral norm, or to unit vectors.

The normalised weights are written into the wrapped layer, which then holds what was last used.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp
from jax import Array, lax
from jax.typing import DTypeLike

from batiste.graph import BatchStat, Module, Param, PathContains, data, iter_graph, make, to_flat_state
from batiste.graph.errors import ArgumentError
from batiste.graph.filters import All, Filter
from batiste.graph.split import state
from batiste.precision import promote_dtype

from . import initializers
from .checks import params_stream
from .initializers import Initializer

Path = tuple[Any, ...]
default_variable_filter = PathContains("kernel")


def _params(layer: Module, chosen: Filter) -> list[tuple[Path, Param]]:
    """The layer's own Params that the filter matches, with their paths, in the order of its state."""
    live = {path: x for path, x in iter_graph(layer, graph=True) if isinstance(x, Param)}
    chosen_state: Any = state(layer, All(Param, chosen), graph=True)
    return [(path, live[path]) for path, _ in to_flat_state(chosen_state)]


def _unit(x: Array, dims: tuple[int, ...] | None, epsilon: float) -> Array:
    """x / √(Σ |x|² + ε), the sum over `dims`."""
    square = jnp.square(x.real) + jnp.square(x.imag) if jnp.iscomplexobj(x) else jnp.square(x)
    return x * lax.rsqrt(jnp.sum(square, axis=dims, keepdims=True) + epsilon)


def over_spectral_norm(value: Array, u: Array, n_steps: int, epsilon: float) -> tuple[Array, Array, Array]:
    """W / σ, the new u and σ = v W uᵀ, for W of any dims as the matrix [product of the other dims, last dim]"""
    matrix, v = value.reshape(-1, value.shape[-1]), None
    for _ in range(n_steps):
        v = _unit(u @ matrix.T, None, epsilon)
        u = _unit(v @ matrix, None, epsilon)
    if v is None:
        v = _unit(u @ matrix.T, None, epsilon)
    u, v = lax.stop_gradient(u), lax.stop_gradient(v)
    sigma = (v @ matrix @ u.T)[0, 0]
    return value / jnp.where(sigma == 0, 1, sigma), u, sigma


def unit_along(value: Array, features: tuple[int, ...], scale: Array | None, epsilon: float) -> Array:
    """scale W / ‖W‖, the norm over all dims but `features`"""
    new = _unit(value, tuple(dim for dim in range(value.ndim) if dim not in features), epsilon)
    if scale is None:
        return new
    return new * scale.reshape([size if dim in features else 1 for dim, size in enumerate(value.shape)])


class SpectralNorm(Module):
    """y = layer(x) with every weight matrix W of it divided by σ = v W uᵀ, the estimate of its greatest singular value

    v ← unit(u Wᵀ), u ← unit(v W), `n_steps` times from the u of the last call. Arrays of more dims count as matrices
    [product of the other dims, last dim]; scalars and vectors stay as they are.

    Args:
        layer_instance: the layer; its weights are replaced at each call.
        dtype: what the new weights are rounded to; None for no rounding.
        param_dtype: of u and σ, which are kept in `batch_stats` under (*path of the weight, "u") and (…, "sigma").
        error_on_non_matrix: refuse arrays of more than two dims.
        update_stats: keep the new u and σ at each call, unless it says otherwise. `train()` and `eval()` switch it.

    Raises:
        ArgumentError: a weight has more than two dims, and `error_on_non_matrix` is set.

    >>> from batiste.graph import Rngs
    >>> from batiste.nn.linear import Linear
    >>> layer = SpectralNorm(Linear(3, 4, rngs=Rngs(0)), n_steps=50, rngs=Rngs(1))
    >>> y = layer(jnp.ones((2, 3)))
    >>> jnp.linalg.norm(layer.layer_instance.kernel[...], 2).round(3)
    Array(1., dtype=float32)

    Source: Miyato et al. 2018, "Spectral Normalization for Generative Adversarial Networks", algorithm 1.
    """

    def __init__(
        self,
        layer_instance: Module,
        *,
        n_steps: int = 1,
        epsilon: float = 1e-12,
        dtype: DTypeLike | None = None,
        param_dtype: DTypeLike = jnp.float32,
        error_on_non_matrix: bool = False,
        update_stats: bool = True,
        rngs: Any,
    ):
        stream = params_stream(self, rngs)
        self.layer_instance = layer_instance
        self.n_steps = n_steps
        self.epsilon = epsilon
        self.dtype = dtype
        self.param_dtype = param_dtype
        self.error_on_non_matrix = error_on_non_matrix
        self.use_running_average = not update_stats
        stats = {}
        for path, param in _params(layer_instance, ...):
            if len(param.shape) > 2 and error_on_non_matrix:
                raise ArgumentError(f"Layer instance parameter is {len(param.shape)}D but error_on_non_matrix is True",
                                    got=f"{param.shape} at {'/'.join(map(str, path))}",
                                    fix="leave out error_on_non_matrix to have it taken for a matrix")  # fmt: skip
            if len(param.shape) > 1:
                stats[*path, "u"] = make(BatchStat, initializers.normal(), (1, param.shape[-1]), param_dtype, stream)
                stats[*path, "sigma"] = make(BatchStat, initializers.ones, (), param_dtype)
        self.batch_stats = data(stats)

    def __call__(self, x: Array, update_stats: bool | None = None) -> Array:
        """Args:
        update_stats: keep the new u and σ, instead of the layer's own setting.
        """
        update_stats = not self.use_running_average if update_stats is None else update_stats
        for path, param in _params(self.layer_instance, ...):
            if (*path, "u") in self.batch_stats:
                self._divide(path, param, update_stats)
        return self.layer_instance(x)  # type: ignore[operator]

    def _divide(self, path: Path, param: Param, update_stats: bool) -> None:
        """Writes W / σ into a weight."""
        value = param[...]
        kept_u, kept_sigma = self.batch_stats[*path, "u"], self.batch_stats[*path, "sigma"]
        new, u, sigma = over_spectral_norm(value, kept_u[...], self.n_steps, self.epsilon)
        if update_stats:
            kept_u[...] = u.astype(kept_u.dtype)
            kept_sigma[...] = sigma.astype(kept_sigma.dtype)
        param[...] = new.astype(self.dtype or new.dtype).astype(value.dtype)


class WeightNorm(Module):
    """y = layer(x) with every chosen weight W of it replaced by g W / ‖W‖, the norm over all dims but `feature_axes`

    Args:
        layer_instance: the layer; its weights are replaced at each call.
        feature_axes: dims along which norms and scales differ; None takes one norm of the whole.
        use_scale: learn the factor g, kept in `scales` under the path of the weight; else it is 1.
        dtype: what the new weights are rounded to; None for no rounding.
        variable_filter: which Params of the layer are weights.

    Raises:
        ArgumentError: a chosen weight lacks one of the axes.

    >>> from batiste.graph import Rngs
    >>> from batiste.nn.linear import Linear
    >>> layer = WeightNorm(Linear(8, 4, rngs=Rngs(0)), rngs=Rngs(1))
    >>> y = layer(jnp.ones((5, 8)))
    >>> jnp.linalg.norm(layer.layer_instance.kernel[...], axis=0).round(3)
    Array([1., 1., 1., 1.], dtype=float32)

    Source: Salimans, Kingma 2016, "Weight Normalization", eq. 2.
    """

    def __init__(
        self,
        layer_instance: Module,
        *,
        feature_axes: int | Sequence[int] | None = -1,
        use_scale: bool = True,
        scale_init: Initializer = initializers.ones,
        epsilon: float = 1e-12,
        dtype: DTypeLike | None = None,
        param_dtype: DTypeLike = jnp.float32,
        variable_filter: Filter = default_variable_filter,
        promote_dtype: Callable[..., Any] = promote_dtype,
        rngs: Any,
    ):
        stream = params_stream(self, rngs)
        self.layer_instance = layer_instance
        several = () if feature_axes is None else feature_axes
        self.feature_axes = several if isinstance(several, int) else tuple(several)
        self.use_scale = use_scale
        self.scale_init = scale_init
        self.epsilon = epsilon
        self.dtype = dtype
        self.param_dtype = param_dtype
        self.variable_filter = variable_filter
        self.promote_dtype = promote_dtype
        scales = {}
        for path, param in _params(layer_instance, variable_filter):
            shape = tuple(param.shape[dim] for dim in self._features(path, param))
            # the default draws no key, so that the streams give what comes next the keys it would have had
            key = None if scale_init is initializers.ones else stream
            scales[path] = make(Param, scale_init, shape, param_dtype, key)
        self.scales = data(scales) if use_scale else None

    def __call__(self, x: Array, *args: Any, **kwargs: Any) -> Array:
        """Args:
        args, kwargs: are passed on to the layer.
        """
        for path, param in _params(self.layer_instance, self.variable_filter):
            value, features = param[...], self._features(path, param)
            new = unit_along(value, features, None if self.scales is None else self.scales[path][...], self.epsilon)
            if self.dtype is not None:
                (new,) = self.promote_dtype((new,), dtype=self.dtype)
            param[...] = new.astype(value.dtype)
        return self.layer_instance(x, *args, **kwargs)  # type: ignore[operator]

    def _features(self, path: Path, param: Param) -> tuple[int, ...]:
        """`feature_axes`, counted from the front, in order."""
        axes, ndim = (self.feature_axes,) if isinstance(self.feature_axes, int) else self.feature_axes, len(param.shape)
        for axis in axes:
            if not -ndim <= axis < ndim:
                raise ArgumentError(f"WeightNorm got a weight without dim {axis} of its feature_axes", at=self,
                                    got=f"{param.shape} at {'/'.join(map(str, path))}",
                                    fix="choose other feature_axes, or filter this weight out")  # fmt: skip
        return tuple(sorted({axis % ndim for axis in axes}))
