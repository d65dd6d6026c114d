"""A real HTTP receiver for Apprise's json:// URLs, on a port of its own, that can be down, and can act on a delivery."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Any, Self


class Receiver:
    """Collects what it receives. `status` is what it answers; `on_receive` runs after receiving and before answering."""

    def __init__(self, *, port: int = 0, token: str = "s3cr3t-T0ken") -> None:  # noqa: S107
        self.messages: list[dict[str, Any]] = []
        self.status = 200
        self.on_receive: Callable[[dict[str, Any]], None] | None = None
        self.token = token
        receiver = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                content = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                receiver.messages.append(content)
                if receiver.on_receive is not None:
                    receiver.on_receive(content)
                self.send_response(receiver.status)
                self.end_headers()

            def log_message(self, *_: object) -> None:
                return

        self._server = ThreadingHTTPServer(("127.0.0.1", port), Handler)
        self._server.daemon_threads = True
        self.port = self._server.server_address[1]
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True)
        self._thread.start()

    @property
    def url(self) -> str:
        """Where it listens, with credentials that must never show up anywhere."""
        return f"json://watcher:{self.token}@127.0.0.1:{self.port}/hook/{self.token}"

    @property
    def bodies(self) -> list[str]:
        """The texts received, in order."""
        return [message["message"] for message in self.messages]

    @property
    def text(self) -> str:
        """All texts received."""
        return "\n\n".join(self.bodies)

    def close(self) -> None:
        """Stop listening: from now on connections are refused."""
        self._server.shutdown()
        self._server.server_close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
