# SPDX-License-Identifier: Apache-2.0
"""Promotion of dtypes, under the name that it has in the functional face."""

from batiste.precision import canonicalize_dtype, promote_dtype

__all__ = ["canonicalize_dtype", "promote_dtype"]
