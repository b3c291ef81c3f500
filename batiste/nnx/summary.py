# SPDX-License-Identifier: Apache-2.0
"""Tables of a model, under Flax's name."""

from batiste.debug.summary import *  # noqa: F403
