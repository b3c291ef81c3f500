# SPDX-License-Identifier: Apache-2.0
"""Promotion of dtypes, under Flax's name."""

from batiste.precision import canonicalize_dtype as canonicalize_dtype
from batiste.precision import promote_dtype as promote_dtype
