# SPDX-License-Identifier: Apache-2.0
"""Short texts that processes tell each other through the coordinator, from any thread and without a device."""

from __future__ import annotations

import collections
from typing import Any

import jax

from batiste.graph.jaxcompat import processes_state

from .runtime import BarrierTimeout

__all__ = ["exchange"]

_rounds: collections.Counter[str] = collections.Counter()


def exchange(name: str, word: str, *, timeout: float = 600) -> list[str]:
    """What each process says, in the order of their numbers; all say something under a name, each time they meet.

    >>> exchange("lunch", "at one")
    ['at one']

    Raises:
        BarrierTimeout: some said nothing in time.
    """
    client: Any = processes_state.client
    if client is None or jax.process_count() == 1:
        return [word]
    _rounds[name] += 1
    here = jax.process_index()
    if _rounds[name] > 2:  # whoever spoke in the last round has heard all of the one before
        client.key_value_delete(_key(name, _rounds[name] - 2, here))
    client.key_value_set(_key(name, _rounds[name], here), word)
    words: list[str] = []
    for process in range(jax.process_count()):
        try:
            words.append(client.blocking_key_value_get(_key(name, _rounds[name], process), round(1000 * timeout)))
        except jax.errors.JaxRuntimeError as error:
            if "DEADLINE_EXCEEDED" not in str(error):
                raise
            raise BarrierTimeout(name, timeout, [process], jax.process_count()) from error
    return words


def _key(name: str, turn: int, process: int) -> str:
    return f"batiste/exchange/{name}/{turn}/{process}"
