# SPDX-License-Identifier: Apache-2.0
"""Module, under Flax's name."""

from batiste.graph.module import Module, first_from, iter_children, iter_modules  # noqa: F401
from batiste.nnx.views import capture, view, view_info, with_attributes  # noqa: F401
