# SPDX-License-Identifier: Apache-2.0
"""Precision: in which dtypes a model is kept, computed and summed, chosen from outside."""

from __future__ import annotations

from .dtypes import canonicalize_dtype, promote_dtype
from .policy import Policy, policy

__all__ = ["Policy", "canonicalize_dtype", "policy", "promote_dtype"]
