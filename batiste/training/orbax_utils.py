# SPDX-License-Identifier: Apache-2.0
"""Arguments for Orbax, made from an example of what is saved or restored."""

from __future__ import annotations

from typing import Any

import jax

from batiste.graph.optional import need

PyTree = Any


def orbax() -> Any:
    """Orbax, imported when first used."""
    return need("orbax.checkpoint", extra="checkpoint")


def is_multi_device_array(value: Any) -> bool:
    """Whether parts of an array lie on different devices."""
    return isinstance(value, jax.Array) and not value.is_fully_replicated


def save_args_from_target(target: Any) -> Any:
    """Orbax's `SaveArgs` for every leaf."""
    return jax.tree.map(lambda _: orbax().SaveArgs(), target)


def restore_args_from_target(target: Any, mesh: Any = None) -> Any:
    """Orbax's `RestoreArgs` for every leaf: the dtype, and for arrays of JAX the sharding, of the leaf in `target`."""
    return orbax().checkpoint_utils.construct_restore_args(target, set_global_shape=False)


def maybe_construct_transformations(target: Any, transforms: Any | None) -> Any:
    """`transforms`; unless given, those by which what a checkpoint lacks is taken from `target`."""
    return {} if transforms is None else transforms
