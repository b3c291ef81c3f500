# SPDX-License-Identifier: Apache-2.0
"""Nested mappings, flattened and back, under Flax's name."""

from batiste.graph.states import empty_node, flatten_mapping, flatten_to_sequence, unflatten_mapping  # noqa: F401
