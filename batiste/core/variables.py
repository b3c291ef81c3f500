# SPDX-License-Identifier: Apache-2.0
"""Variables of scopes, under Flax's path."""

from batiste.linen.scope import Variable

__all__ = ["Variable"]
