# SPDX-License-Identifier: Apache-2.0
"""Trace levels, under Flax's name."""

from batiste.graph.jaxcompat import current_trace  # noqa: F401
