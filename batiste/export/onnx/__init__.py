# SPDX-License-Identifier: Apache-2.0
"""ONNX: the program of a model, operation by operation, as a file for the runtimes of other worlds."""

from __future__ import annotations

from .writing import export_onnx

__all__ = ["export_onnx"]
