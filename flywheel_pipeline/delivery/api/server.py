"""The processes of `flywheel serve`: uvicorn with its workers on one socket.

Belongs here: how they start, find the database, and end. Does not belong here: the application (`app`).
"""

from __future__ import annotations

import logging
import multiprocessing
import os
import shutil
import signal
import socket
import sys
import tempfile
import threading
from pathlib import Path
from typing import Final

import uvicorn
from fastapi import FastAPI
from uvicorn.supervisors import Multiprocess

from flywheel_pipeline.database.engine import open_engine
from flywheel_pipeline.database.settings import Settings, get_settings
from flywheel_pipeline.delivery.api.app import create_app
from flywheel_pipeline.delivery.api.limits import Limits
from flywheel_pipeline.delivery.api.protocol import BoundedHttp
from flywheel_pipeline.serve import require_free_port

_WORKERS: Final = "FLYWHEEL_API_WORKERS"
_STOP_SECONDS: Final = 10
_CONNECTIONS: Final = 1_000
_BACKLOG: Final = 512
#: A worker that does not answer its supervisor for so long is replaced. uvicorn's 5 s are shorter than the start of a
#: worker on a busy machine, and each one was killed while it started.
_SILENT_SECONDS: Final = 60


def worker() -> FastAPI:
    """The application of one worker, from the environment; it ends when the process that started it does."""
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    parent = multiprocessing.parent_process()
    if parent is not None:
        threading.Thread(target=_end_with, args=(parent,), name="flywheel-api-parent", daemon=True).start()
    settings = get_settings()
    token = settings.api_metrics_token
    return create_app(
        open_engine(),
        Limits(workers=int(os.environ.get(_WORKERS, "1"))),
        metrics_token=token.get_secret_value() if token else None,
    )


def _end_with(parent: multiprocessing.process.BaseProcess) -> None:
    # uvicorn's workers outlive a supervisor that was killed, and would hold its port.
    parent.join()
    os.kill(os.getpid(), signal.SIGTERM)


def serve(settings: Settings, *, host: str, port: int, workers: int) -> None:
    """Serve until interrupted; the database must be ready.

    Raises:
        PortInUse: the port is taken.
    """
    listener = _listener(host, port)
    counters = Path(tempfile.mkdtemp(prefix="flywheel-api-"))
    os.environ["PROMETHEUS_MULTIPROC_DIR"] = str(counters)
    os.environ[_WORKERS] = str(workers)
    os.environ["FLYWHEEL_HOME"] = str(settings.home)
    config = uvicorn.Config(
        "flywheel_pipeline.delivery.api.server:worker",
        factory=True,
        host=host,
        port=port,
        workers=workers,
        http=BoundedHttp,
        ws="none",
        loop="uvloop" if sys.platform != "win32" else "auto",
        interface="asgi3",
        log_level="warning",
        access_log=False,
        server_header=False,
        proxy_headers=False,
        limit_concurrency=_CONNECTIONS,
        backlog=_BACKLOG,
        timeout_keep_alive=75,
        timeout_graceful_shutdown=_STOP_SECONDS,
        timeout_worker_healthcheck=_SILENT_SECONDS,
    )
    try:
        if workers == 1:
            uvicorn.Server(config).run(sockets=[listener])
        else:
            Multiprocess(config, sockets=[listener]).run()
    finally:
        listener.close()
        shutil.rmtree(counters, ignore_errors=True)


def _listener(host: str, port: int) -> socket.socket:
    """The socket that all workers accept from. It listens before they have started: who calls early waits, and nobody
    else gets the port meanwhile.
    """
    require_free_port(host, port, hint="Stop what listens there, or choose another port: flywheel serve --port 8001.")
    listener = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    listener.bind((host, port))
    listener.listen(_BACKLOG)
    listener.set_inheritable(True)
    return listener
