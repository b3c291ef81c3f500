# SPDX-License-Identifier: Apache-2.0
"""Quantisation after training: a model with weights of 8 or 4 bits, and what that costs, layer by layer.

small = quantize(model, bits=4, group=32, keep=("*Norm", "head"))
print(error_report(model, small, x))              # bytes, error of each weight and of each result
y = small(x)                                      # the same layers: floats are made where they are multiplied
saved = to_bytes(nnx.to_pure_dict(nnx.state(small)))          # int8 arrays and scales, as any other state
"""

from __future__ import annotations

from .quantize import quantize, weight_of
from .report import Report, error_report
from .weight import Quantized, QuantizedWeight

__all__ = ["Quantized", "QuantizedWeight", "Report", "error_report", "quantize", "weight_of"]
