# SPDX-License-Identifier: Apache-2.0
"""The trace that is running."""

from batiste.errors import JaxTransformError
from batiste.graph.jaxcompat import current_trace

__all__ = ["check_trace_level", "current_trace"]


def check_trace_level(base_level) -> None:
    """Nothing, in the trace that `current_trace()` gave.

    Raises:
        JaxTransformError: another one is running.
    """
    if current_trace() != base_level:
        raise JaxTransformError
