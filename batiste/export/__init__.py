# SPDX-License-Identifier: Apache-2.0
"""Bundles: a model as a folder that is whole or refused, and that runs without the model's code.

export(model, {"x": "float32[batch, 4]"}, "bundle/")      # portable program, weights, signature, golden outputs
bundle = load_bundle("bundle/")                           # digests are checked before anything is parsed
bundle(x=x)["output"]
"""

from __future__ import annotations

from .again import reexport
from .bundle import Bundle, load_bundle
from .errors import BundleError, ExpiredError, ExportError, GoldenError, PlatformError
from .signature import ShapeDtype, Signature
from .writing import export

__all__ = [
    "export",
    "load_bundle",
    "reexport",
    "Bundle",
    "Signature",
    "ShapeDtype",
    "ExportError",
    "BundleError",
    "GoldenError",
    "ExpiredError",
    "PlatformError",
]
