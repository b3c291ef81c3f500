# SPDX-License-Identifier: Apache-2.0
"""A mixture of experts: each position is sent to the few of many feed-forward parts that a router chooses for it.

Dims:  G groups (the leading dims)   T positions   D features   E experts   C capacity   F hidden features   k chosen

Each group has C places at each expert, so all shapes are known beforehand; a position that comes too late for its
expert is dropped there, and passes by. Positions travel to their experts and back as two products with one array
[G, T, E, C]; where experts live on different devices the compiler makes an all-to-all of each.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import DTypeLike

from batiste.graph import Intermediate, Module, Param, data, make
from batiste.graph.errors import ArgumentError
from batiste.graph.module import CAPTURES
from batiste.precision import promote_dtype
from batiste.sharding import constrain

from . import initializers
from .activations import gelu
from .checks import check_last_dim, check_sizes, params_stream
from .initializers import Initializer
from .linear import Linear, value_of

default_kernel_init = initializers.variance_scaling(1.0, "fan_in", "truncated_normal", batch_axis=0)
PLACES = ("expert", "group", None, "embed")


class RouterLoss(Intermediate, collection="router_losses"):
    """What a router adds to the loss of the model: `nnx.capture(model, nn.RouterLoss)` collects it."""


class Routing(NamedTuple):
    """Where positions go: `dispatch[G, T, E, C]` is 1 at their places, `combine` holds the weights of their return."""

    dispatch: Array
    combine: Array


class Experts(Module):
    """y[E, ..., D] = act(x[E, ..., D] @ up[E, D, F]) @ down[E, F, D], or act(x @ gate) * (x @ up) in its place

    Args:
        gated: with a third kernel `gate`.

    >>> from batiste.graph import Rngs
    >>> Experts(2, 3, 8, rngs=Rngs(0))(jnp.ones((2, 5, 3))).shape
    (2, 5, 3)

    Source: Shazeer 2020, "GLU Variants Improve Transformer", eq. 6 (gated).
    """

    def __init__(self, num_experts: int, features: int, hidden_features: int, *, gated: bool = False,
                 activation: Callable[[Array], Array] = gelu, dtype: DTypeLike | None = None,
                 param_dtype: DTypeLike = jnp.float32, kernel_init: Initializer = default_kernel_init,
                 rngs: Any):  # fmt: skip
        check_sizes(self, num_experts=num_experts, features=features, hidden_features=hidden_features)
        stream = params_stream(self, rngs)
        wide, narrow = (num_experts, features, hidden_features), (num_experts, hidden_features, features)
        self.up = make(Param, kernel_init, wide, param_dtype, stream)
        self.gate = data(make(Param, kernel_init, wide, param_dtype, stream) if gated else None)
        self.down = make(Param, kernel_init, narrow, param_dtype, stream)
        self.num_experts, self.features, self.hidden_features = num_experts, features, hidden_features
        self.activation = activation
        self.dtype = dtype
        self.param_dtype = param_dtype

    def __call__(self, x: Array) -> Array:
        check_last_dim(self, x, self.features, "features")
        x, up, gate, down = promote_dtype((x, self.up[...], value_of(self.gate), self.down[...]), dtype=self.dtype)
        hidden = jnp.einsum("e...d,edf->e...f", x, up)
        if gate is None:
            hidden = self.activation(hidden)
        else:
            hidden = self.activation(jnp.einsum("e...d,edf->e...f", x, gate)) * hidden
        return jnp.einsum("e...f,efd->e...d", hidden, down)


class MixtureOfExperts(Module):
    """y[..., T, D] = sum over the k experts e chosen for x of p_e * expert_e(x[..., T, D])

    The router works in float32: p = softmax(x @ router), renormalised over the chosen. First choices get their places
    before second ones, earlier positions before later ones. While `RouterLoss` is captured, `load_balance` (1 when all
    experts get the same) and `router_z` are sown.

    Args:
        capacity_factor: C = ⌈capacity_factor * k * T / E⌉; E / k drops nothing, whatever the router does.
        gated, activation, dtype, param_dtype, kernel_init: of the experts.

    Raises:
        ArgumentError: `top_k` is not between 1 and `num_experts`.
        ShapeError: the last dim of `x` is not `features`.

    >>> from batiste.graph import Rngs
    >>> MixtureOfExperts(4, 3, 8, rngs=Rngs(0))(jnp.ones((2, 5, 3))).shape
    (2, 5, 3)

    Source: Lepikhin et al. 2020, "GShard", algorithm 1; Fedus et al. 2021, "Switch Transformers", eq. 4 (balance);
        Zoph et al. 2022, "ST-MoE", eq. 5 (z-loss).
    """

    def __init__(self, num_experts: int, features: int, hidden_features: int, *, top_k: int = 2,
                 capacity_factor: float = 1.25, gated: bool = False, activation: Callable[[Array], Array] = gelu,
                 dtype: DTypeLike | None = None, param_dtype: DTypeLike = jnp.float32,
                 kernel_init: Initializer = default_kernel_init, rngs: Any):  # fmt: skip
        if not 1 <= top_k <= num_experts:
            raise ArgumentError("MixtureOfExperts got a wrong top_k", got=top_k, expected=f"1 to {num_experts}")
        self.router = Linear(features, num_experts, use_bias=False, dtype=jnp.float32, param_dtype=param_dtype,
                             rngs=rngs)  # fmt: skip
        self.experts = Experts(num_experts, features, hidden_features, gated=gated, activation=activation, dtype=dtype,
                               param_dtype=param_dtype, kernel_init=kernel_init, rngs=rngs)  # fmt: skip
        self.num_experts, self.features, self.top_k = num_experts, features, top_k
        self.capacity_factor = capacity_factor

    def capacity(self, positions: int) -> int:
        """The places of one group at one expert, at most one per position."""
        return min(positions, math.ceil(self.capacity_factor * self.top_k * positions / self.num_experts))

    def __call__(self, x: Array) -> Array:
        check_last_dim(self, x, self.features, "features")
        groups = x.reshape(-1, x.shape[-2] if x.ndim > 1 else 1, self.features)
        logits = self.router(groups)
        probabilities = jax.nn.softmax(logits)
        routing = route(probabilities, self.top_k, self.capacity(groups.shape[1]))
        if CAPTURES in self.__dict__:
            self.sow(RouterLoss, "load_balance", load_balance(probabilities))
            self.sow(RouterLoss, "router_z", jnp.mean(jnp.square(jax.nn.logsumexp(logits, axis=-1))))
        sent = jnp.einsum("gtec,gtd->egcd", routing.dispatch.astype(x.dtype), groups)
        sent = constrain(constrain(sent, (None, "batch", None, "embed")), PLACES)
        back = constrain(constrain(self.experts(sent), PLACES), (None, "batch", None, "embed"))
        return jnp.einsum("gtec,egcd->gtd", routing.combine.astype(back.dtype), back).reshape(x.shape)


def route(probabilities: Array, top_k: int, capacity: int) -> Routing:
    """The places of each position at its `top_k` experts, and their weights, from probabilities[G, T, E].

    >>> routing = route(jnp.array([[[0.9, 0.1], [0.8, 0.2]]]), top_k=1, capacity=1)
    >>> routing.combine[0, :, 0, 0]  # the second position comes too late
    Array([1., 0.], dtype=float32)

    Source: Lepikhin et al. 2020, "GShard", algorithm 1.
    """
    groups, positions, experts = probabilities.shape
    wanted = chosen(probabilities, top_k)
    weights = jnp.sum(probabilities[:, None] * wanted, axis=-1)  # [G, k, T]
    weights = weights / jnp.sum(weights, axis=1, keepdims=True)
    before = jnp.cumsum(wanted.reshape(groups, top_k * positions, experts), axis=1).reshape(wanted.shape) - wanted
    place = jnp.sum(before * wanted, axis=-1)  # [G, k, T]; too large a place has no one in its one-hot row
    places = jax.nn.one_hot(place, capacity, dtype=probabilities.dtype)
    wanted = wanted.astype(probabilities.dtype)
    dispatch = jnp.einsum("gkte,gktc->gtec", wanted, places)
    combine = jnp.einsum("gkte,gktc,gkt->gtec", wanted, places, weights)
    return Routing(dispatch, combine)


def chosen(probabilities: Array, top_k: int) -> Array:
    """The choices of each position as one-hot rows[G, k, T, E], the first ones first.

    Spelled with `argmax`: the compiler cannot divide `top_k` over devices and would gather all probabilities.
    """
    left, rows = jax.lax.stop_gradient(probabilities), []
    for _ in range(top_k):
        rows.append(jax.nn.one_hot(jnp.argmax(left, axis=-1), left.shape[-1], dtype=jnp.int32))
        left = jnp.where(rows[-1] > 0, -1.0, left)
    return jnp.stack(rows, axis=1)


def load_balance(probabilities: Array) -> Array:
    """E * sum over e of f_e * p_e: f_e the share of positions that prefer expert e, p_e its mean probability

    >>> load_balance(jnp.array([[[0.5, 0.5], [0.5, 0.5]]]))
    Array(1., dtype=float32)

    Source: Fedus et al. 2021, "Switch Transformers", eq. 4.
    """
    experts = probabilities.shape[-1]
    preferred = jax.nn.one_hot(jnp.argmax(probabilities, axis=-1), experts)
    dims = tuple(range(probabilities.ndim - 1))
    return experts * jnp.sum(jnp.mean(preferred, axis=dims) * jnp.mean(probabilities, axis=dims))
