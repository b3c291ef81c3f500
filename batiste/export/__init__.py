# SPDX-License-Identifier: Apache-2.0
"""A model as a bundle: a folder with its program, weights, signature and golden outputs, that runs without its code.

export(model, {"x": ("batch, 4", "float32")}, "bundle")   # portable StableHLO; weights as safetensors beside it
bundle = load_bundle("bundle")                            # digests are checked before anything is parsed
y = bundle(x=x)                                           # any batch size; names, shapes and dtypes are checked
bundle.verify()                                           # the golden outputs, to 1e-5
"""

from __future__ import annotations

from .bundle import Bundle, export, load_bundle
from .sealed import BundleError

__all__ = ["Bundle", "BundleError", "export", "load_bundle"]
