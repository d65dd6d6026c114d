"""Security headers, the size of request heads, and the last word on errors: one middleware around everything.

Belongs here: what every answer carries. Does not belong here: anything that depends on the request's meaning.
"""

from __future__ import annotations

import logging
from typing import Final

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from flywheel_pipeline.delivery.api.problems import Problem

_log = logging.getLogger("flywheel.api")

#: Set on every answer, each exactly once. An API has no page: nothing may be loaded, framed or sniffed.
SECURITY_HEADERS: Final[tuple[tuple[bytes, bytes], ...]] = (
    (b"content-security-policy", b"default-src 'none'; frame-ancestors 'none'; base-uri 'none'; form-action 'none'"),
    (b"x-content-type-options", b"nosniff"),
    (b"x-frame-options", b"DENY"),
    (b"referrer-policy", b"no-referrer"),
    (b"cross-origin-resource-policy", b"same-origin"),
    (b"permissions-policy", b"interest-cohort=()"),
)
_OURS: Final = frozenset(name for name, _ in SECURITY_HEADERS) | {b"server", b"set-cookie"}


class SecurityHeaders:
    """ASGI middleware: sets the security headers, removes banners and cookies, and answers what nobody caught."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started = False

        async def secured(message: Message) -> None:
            nonlocal started
            if message["type"] == "http.response.start":
                started = True
                kept = [(name, value) for name, value in message.get("headers", ()) if name.lower() not in _OURS]
                if not any(name.lower() == b"cache-control" for name, _ in kept):
                    kept.append((b"cache-control", b"no-store"))
                message = {**message, "headers": [*kept, *SECURITY_HEADERS]}
            await send(message)

        try:
            await self._app(scope, receive, secured)
        except Exception as error:
            # The one place that catches everything: whoever calls gets JSON and no traceback, the log gets it whole.
            _log.exception("a request failed: %s %s", scope["method"], type(error).__name__)
            if started:
                raise
            failed = Problem(
                500, "failed", "The request failed here; the server's log says why.", "Send it again later."
            )
            await failed.response()(scope, receive, secured)
