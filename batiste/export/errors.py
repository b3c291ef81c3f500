# SPDX-License-Identifier: Apache-2.0
"""What can be wrong with an export: the model does not allow it, the bundle is damaged, or it is of another world."""

from __future__ import annotations

from batiste.graph.errors import BatisteError


class ExportError(BatisteError, ValueError):
    """A model cannot be exported as it is: it writes state, calls Python, or holds what a file cannot."""


class BundleError(BatisteError, ValueError):
    """A bundle is damaged, incomplete, larger than allowed, or not signed as it should be. Nothing of it was run."""


class GoldenError(BundleError):
    """A whole bundle gives other outputs here than where it was written."""


class PlatformError(BatisteError, RuntimeError):
    """A bundle was exported for other devices than this program has."""


class ExpiredError(BundleError):
    """The program of a bundle is older than this JAX reads: it must be exported again from its weights."""
