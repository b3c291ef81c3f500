# SPDX-License-Identifier: Apache-2.0
"""Pooling, under the name that it has in the functional face."""

from batiste.nn.pooling import avg_pool, max_pool, min_pool, pool

__all__ = ["avg_pool", "max_pool", "min_pool", "pool"]
