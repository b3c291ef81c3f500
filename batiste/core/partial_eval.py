# SPDX-License-Identifier: Apache-2.0
"""Running functions on shapes, under Flax's path."""

from batiste.linen.abstract import without_values as lazy_init

__all__ = ["lazy_init"]
