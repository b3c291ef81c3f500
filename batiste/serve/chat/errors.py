# SPDX-License-Identifier: Apache-2.0
"""What a client is told when it gets no answer, in the shape of OpenAI's API."""

from __future__ import annotations

import math
from typing import Any

from batiste.graph.errors import BatisteError

KINDS = {401: "authentication_error", 429: "rate_limit_error", 500: "server_error", 503: "server_error",
         504: "timeout_error"}  # fmt: skip


class RequestError(BatisteError):
    """A request that is not answered: a status, the field that is wrong, and when to try again.

    >>> RequestError(400, "'n' is too large", param="n").body()["error"]["param"]
    'n'
    """

    def __init__(self, status: int, problem: str, *, param: str | None = None, code: str | None = None,
                 after: float | None = None):  # fmt: skip
        super().__init__(problem)
        self.status, self.param, self.code, self.after = status, param, code, after

    def body(self) -> dict[str, Any]:
        """What stands in the answer."""
        kind = KINDS.get(self.status, "invalid_request_error")
        return {"error": {"message": str(self), "type": kind, "param": self.param, "code": self.code}}

    @property
    def headers(self) -> dict[str, str]:
        return {} if self.after is None else {"retry-after": str(max(1, math.ceil(self.after)))}
