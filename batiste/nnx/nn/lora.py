# SPDX-License-Identifier: Apache-2.0
"""Low-rank adapters, under Flax's name."""

from batiste.nn.lora import *  # noqa: F403
