# SPDX-License-Identifier: Apache-2.0
"""What a client is told when it gets no answer."""

from __future__ import annotations

import math
from typing import Any

from batiste.graph.errors import BatisteError


class Refusal(BatisteError):
    """A request that is not answered: an HTTP status, what is wrong, and in how many seconds to try again.

    >>> Refusal(429, "too many requests wait", after=0.2).headers
    {'retry-after': '1'}
    """

    def __init__(self, status: int, problem: str, *, after: float | None = None):
        super().__init__(problem)
        self.status, self.after = status, after

    @property
    def headers(self) -> dict[str, str]:
        return {} if self.after is None else {"retry-after": str(max(1, math.ceil(self.after)))}

    def body(self) -> dict[str, Any]:
        """What stands in the answer."""
        return {"error": str(self)}


class Died(BatisteError):
    """The process of an engine ended, or was ended, in the middle of a batch."""
