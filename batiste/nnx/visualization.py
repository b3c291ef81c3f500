# SPDX-License-Identifier: Apache-2.0
"""Drawing objects, under Flax's name."""

from batiste.debug.show import display  # noqa: F401
