"""uvicorn's HTTP protocol with a bound on what precedes a body: bytes of the head, and the time it may take.

Belongs here: what a client can do before any handler sees it. Does not belong here: bodies (`bodies`). Neither httptools
nor uvicorn bounds the head of a request: a client could send one header for ever, into memory.
"""

from __future__ import annotations

from asyncio.events import TimerHandle
from typing import Any, Final

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

HEAD_BYTES: Final = 32 << 10
HEAD_SECONDS: Final = 15.0
#: Bytes behind a head that are no body: chunk extensions, and trailers, which the parser collects like headers.
SILENT_BYTES: Final = 1 << 20


class BoundedHttp(HttpToolsProtocol):
    """Answers 400 to a head of more than 32 KiB, and closes a connection whose head takes more than 15 s."""

    _head_bytes = 0
    _silent_bytes = 0
    _in_head = True
    _deadline: TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:
        """Give a new connection the time for its first head."""
        super().connection_made(transport)
        self._begin_head()

    def data_received(self, data: bytes) -> None:
        """Count the bytes of a head before they are parsed."""
        if self._in_head:
            if self._deadline is None:
                self._begin_head()
            self._head_bytes += len(data)
            # A head and the beginning of its body come in one piece: only more than one piece can be too much.
            if self._head_bytes - len(data) > HEAD_BYTES or (
                len(data) > HEAD_BYTES and b"\r\n\r\n" not in data[:HEAD_BYTES]
            ):
                self._end_head()
                self.send_400_response("The head of the request is larger than 32 KiB.")
                return
        else:
            self._silent_bytes += len(data)
            if self._silent_bytes > SILENT_BYTES:
                self.transport.close()
                return
        super().data_received(data)

    def on_body(self, body: bytes) -> None:
        """Hear the body."""
        self._silent_bytes = 0
        super().on_body(body)

    def on_headers_complete(self) -> None:
        """Stop the clock of the head."""
        self._in_head = False
        self._silent_bytes = 0
        self._end_head()
        super().on_headers_complete()

    def on_message_complete(self) -> None:
        """Expect the next head, without a deadline until its first byte: keep-alive has its own."""
        super().on_message_complete()
        self._in_head = True
        self._head_bytes = 0

    def connection_lost(self, exc: Exception | None) -> None:
        """Stop the clock."""
        self._end_head()
        super().connection_lost(exc)

    def _begin_head(self) -> None:
        self._deadline = self.loop.call_later(HEAD_SECONDS, self._too_slow)

    def _end_head(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None

    def _too_slow(self) -> None:
        self._deadline = None
        if not self.transport.is_closing():
            self.transport.close()
