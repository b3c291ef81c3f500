# SPDX-License-Identifier: Apache-2.0
"""What a client is told when it gets no answer, in the shape of OpenAI's API."""

from __future__ import annotations

from typing import Any

from batiste.serve.errors import Refusal

KINDS = {401: "authentication_error", 429: "rate_limit_error", 500: "server_error", 503: "server_error",
         504: "timeout_error"}  # fmt: skip
CODES = {401: "invalid_api_key", 429: "overloaded", 503: "overloaded"}


class RequestError(Refusal):
    """A request that is not answered: a status, the field that is wrong, and when to try again.

    >>> RequestError(400, "'n' is too large", param="n").body()["error"]["param"]
    'n'
    """

    def __init__(self, status: int, problem: str, *, param: str | None = None, code: str | None = None,
                 after: float | None = None):  # fmt: skip
        super().__init__(status, problem, after=after)
        self.param, self.code = param, code

    @classmethod
    def of(cls, refusal: Refusal) -> RequestError:
        """The same, in the words of this API."""
        if isinstance(refusal, cls):
            return refusal
        return cls(refusal.status, refusal.problem, code=CODES.get(refusal.status), after=refusal.after)

    def body(self) -> dict[str, Any]:
        """What stands in the answer."""
        kind = KINDS.get(self.status, "invalid_request_error")
        return {"error": {"message": str(self), "type": kind, "param": self.param, "code": self.code}}
