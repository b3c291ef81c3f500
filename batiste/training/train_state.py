# SPDX-License-Identifier: Apache-2.0
"""TrainState: the step, the parameters and the optimizer's state of a functional training loop, as one pytree."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from batiste import struct
from batiste.graph.optional import need

OVERWRITE_WITH_GRADIENT = "_overwrite_with_gradient"


class TrainState(struct.PyTreeNode):
    """What changes in training, beside the functions that change it.

    Parameters under the key `_overwrite_with_gradient`, such as scales of 8-bit layers, are not optimized: their
    gradient is their new value. The others then stand under the key `params`.

    >>> import jax.numpy as jnp, optax
    >>> state = TrainState.create(apply_fn=None, params={"w": jnp.ones(2)}, tx=optax.sgd(0.5))
    >>> state = state.apply_gradients(grads={"w": jnp.ones(2)})
    >>> state.step, state.params["w"].tolist()
    (1, [0.5, 0.5])
    """

    step: Any
    apply_fn: Callable = struct.field(pytree_node=False)
    params: Any = struct.field(pytree_node=True)
    tx: Any = struct.field(pytree_node=False)
    opt_state: Any = struct.field(pytree_node=True)

    def apply_gradients(self, *, grads: Any, **kwargs: Any):
        """The state after one step of the optimizer; `kwargs` are other fields that change."""
        grads_of_tx, params = _optimized(grads), _optimized(self.params)
        updates, opt_state = self.tx.update(grads_of_tx, self.opt_state, params)
        params = need("optax", extra="train").apply_updates(params, updates)
        if _has_overwritten(grads):
            params = {"params": params, OVERWRITE_WITH_GRADIENT: grads[OVERWRITE_WITH_GRADIENT]}
        return self.replace(step=self.step + 1, params=params, opt_state=opt_state, **kwargs)

    @classmethod
    def create(cls, *, apply_fn: Any, params: Any, tx: Any, **kwargs: Any):
        """The state at step 0; `kwargs` are the fields that a subclass adds."""
        return cls(step=0, apply_fn=apply_fn, params=params, tx=tx, opt_state=tx.init(_optimized(params)), **kwargs)


def _has_overwritten(params: Any) -> bool:
    return hasattr(params, "keys") and OVERWRITE_WITH_GRADIENT in params


def _optimized(params: Any) -> Any:
    return params["params"] if _has_overwritten(params) else params
