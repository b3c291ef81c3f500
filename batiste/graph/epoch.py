# SPDX-License-Identifier: Apache-2.0
"""The epoch: one number that moves whenever the structure of some object changes."""

from __future__ import annotations

import itertools

_ticks = itertools.count(1)


class Epoch:
    """Counts the structural changes of all objects that some plan rests on; a plan is valid inside one epoch."""

    now = 0


def structure_changed() -> None:
    """Moves the epoch: every remembered flattening is looked at again before it is used."""
    Epoch.now = next(_ticks)
