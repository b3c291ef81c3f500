# SPDX-License-Identifier: Apache-2.0
"""Precision: in which dtypes a model is kept, computed and summed, chosen from outside.

mixed = policy("bfloat16")                        # or float16, fp8, Policy(compute=..., keep=(...))
logits = mixed(model)(mixed.cast(x))              # bfloat16 products; parameters and gradients are float32
print(explain_precision(model, mixed))            # part by part, before anything runs
print(audit(mixed(model), mixed.cast(x)))         # operation by operation, with every silent upcast
"""

from __future__ import annotations

from .audit import Audit, Upcast, audit
from .delayed import DelayedDot, DelayedEinsum, Fp8State, delayed
from .dtypes import canonicalize_dtype, promote_dtype
from .explain import explain_precision
from .fp8 import fp8_dot_general, fp8_einsum
from .policy import Policy, policy

__all__ = [
    "Audit", "DelayedDot", "DelayedEinsum", "Fp8State", "Policy", "Upcast", "audit", "canonicalize_dtype", "delayed",
    "explain_precision", "fp8_dot_general", "fp8_einsum", "policy", "promote_dtype",
]  # fmt: skip
