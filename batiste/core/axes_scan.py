# SPDX-License-Identifier: Apache-2.0
"""The mark of what all iterations of a scan share, under Flax's path."""

from batiste.linen.lift import broadcast

__all__ = ["broadcast"]
