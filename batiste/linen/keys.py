# SPDX-License-Identifier: Apache-2.0
"""Random keys of scopes: what counts as one, and how names and counts go into it."""

from __future__ import annotations

import functools
import hashlib
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np


def is_key(x: Any) -> bool:
    """Whether `x` is one random key, typed or raw, or a `LazyRng` around one."""
    if isinstance(x, LazyRng):
        return is_key(x.rng)
    if not isinstance(x, (jax.Array, np.ndarray)):
        return False
    if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
        return x.shape == ()
    return x.dtype == np.uint32 and x.ndim == 1


@functools.lru_cache(maxsize=4096)
def hash_of(parts: tuple[str | int, ...]) -> int:
    """The first 32 bits of SHA-1 of names and counts, one after another."""
    digest = hashlib.sha1()
    for part in parts:
        digest.update(part.encode() if isinstance(part, str) else part.to_bytes((part.bit_length() + 7) // 8, "big"))
    return int.from_bytes(digest.digest()[:4], "big")


def fold_in(key: jax.Array, parts: tuple[str | int, ...]) -> jax.Array:
    """`key` with the hash of names and counts folded in; the same key if there are none."""
    return jax.random.fold_in(key, np.uint32(hash_of(parts))) if parts else key


class LazyRng(NamedTuple):
    """A key, and names and counts that will be folded in when it is used."""

    rng: Any
    suffix: tuple[str | int, ...] = ()

    @classmethod
    def create(cls, rng: Any, *suffix: str | int) -> LazyRng:
        """`rng`, a key or another `LazyRng`, with more to fold in."""
        return cls(rng.rng, rng.suffix + suffix) if isinstance(rng, LazyRng) else cls(rng, suffix)

    def as_jax_rng(self) -> jax.Array:
        """The key with everything folded in."""
        return fold_in(self.rng, self.suffix)

    def clear_suffix(self) -> LazyRng:
        """The key with nothing to fold in."""
        return LazyRng(self.rng)
