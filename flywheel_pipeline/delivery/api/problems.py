"""Refusals as HTTP answers: a stable code, a sentence, and what to do next; never a traceback, never another's data.

Belongs here: the one form of every answer that is no success. Does not belong here: deciding to refuse.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from starlette.responses import Response


class Problem(Exception):
    """A request that is refused. `code` is for programs, `reason` for people, `hint` says what to do next."""

    def __init__(
        self, status: int, code: str, reason: str, hint: str, *, headers: Mapping[str, str] | None = None, **more: Any
    ) -> None:
        super().__init__(reason)
        self.status = status
        self.body: dict[str, Any] = {"code": code, "reason": reason, "hint": hint, **more}
        self.headers = dict(headers or {})

    def response(self) -> Response:
        """The answer."""
        return json_response(self.body, self.status, self.headers)


def json_response(value: Any, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    """An answer of plain JSON values; text goes out as ASCII escapes, so that no client need guess an encoding."""
    return Response(
        json.dumps(value, separators=(",", ":"), allow_nan=False), status, headers, media_type="application/json"
    )


def busy(code: str, reason: str, retry_after_seconds: int) -> Problem:
    """429: the same request will be taken later; nothing of it was stored."""
    return Problem(
        429,
        code,
        reason,
        f"Send the same request again after {retry_after_seconds} s; keep the rows until they are answered for.",
        headers={"Retry-After": str(retry_after_seconds)},
    )
