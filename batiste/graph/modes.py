# SPDX-License-Identifier: Apache-2.0
"""The two defaults of the object face: may objects be shared, and do structural changes travel."""

from __future__ import annotations

from .switch import Switch


class set_graph_mode(Switch, flag="nnx_graph_mode"):
    """The default of `graph=`: True lets objects be shared, False takes them as trees. Also by block or function."""


class set_graph_updates(Switch, flag="nnx_graph_updates"):
    """The default of `graph_updates=`: whether transforms hand structural changes back. Also by block or function."""


def graph_mode(graph: bool | None) -> bool:
    """The value of a `graph=` argument."""
    return set_graph_mode.current_value() if graph is None else graph


def graph_updates_mode(graph_updates: bool | None) -> bool:
    """The value of a `graph_updates=` argument."""
    return set_graph_updates.current_value() if graph_updates is None else graph_updates
