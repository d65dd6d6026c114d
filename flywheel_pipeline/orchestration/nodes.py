"""The parts of a deployment, each as one process in the foreground: code location, UI, daemon, worker.

Belongs here: the command line of each part and its environment. Does not belong here: all of them on one host
(`serve.py`), and the agent API (`flywheel serve`). A container's first process becomes Dagster's own, so that signals
reach it.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Final

import sqlalchemy as sa

from flywheel_pipeline.database.dagster_home import dagster_environment, write_dagster_home
from flywheel_pipeline.database.settings import Settings
from flywheel_pipeline.errors import UsageError
from flywheel_pipeline.orchestration.launchers import EXTRAS
from flywheel_pipeline.serve import write_workspace

PARTS: Final = ("code", "ui", "daemon", "worker")
MODULE: Final = "flywheel_pipeline.definitions"


def node_command(settings: Settings, part: str, workspace: Path, *, concurrency: int, name: str) -> list[str]:
    """Return the command line of a part.

    Args:
        settings: addresses, and the code server that UI and daemon ask.
        part: one of `PARTS`.
        workspace: the workspace file that UI and daemon read.
        concurrency: runs at once on this host, of a worker.
        name: of the worker, unique on its host.

    Raises:
        UsageError: there is no such part, or a worker without Celery.
    """
    if part == "code":
        listen = ["--host", settings.code_host, "--port", str(settings.code_port)]
        # UI and daemon are told to run Dagster's commands with this Python, whatever is first in their PATH.
        environment = ["--use-python-environment-entry-point", "--empty-working-directory"]
        return [sys.executable, "-m", "dagster", "api", "grpc", "-m", MODULE, *listen, *environment]
    if part == "ui":
        host, port = settings.ui_host, settings.ui_port
        return [sys.executable, "-m", "dagster_webserver", "-h", host, "-p", str(port), "-w", str(workspace)]
    if part == "daemon":
        return [sys.executable, "-m", "dagster._daemon", "run", "-w", str(workspace)]
    if part == "worker":
        if settings.run_launcher != "celery":
            raise UsageError(
                f"A worker takes runs from Celery, and FLYWHEEL_RUN_LAUNCHER is {settings.run_launcher}.",
                hint=f"Set FLYWHEEL_RUN_LAUNCHER=celery, with the extra `celery` ({EXTRAS['celery']}) installed.",
            )
        celery = ["celery", "-A", "flywheel_pipeline.orchestration.celery_app:app", "worker"]
        limits = ["--concurrency", str(concurrency), "--loglevel", "INFO"]
        return [sys.executable, "-m", *celery, *limits, "-n", f"{name}@%h", "--without-gossip", "--without-mingle"]
    raise UsageError(f"There is no part {part!r}.", hint=f"The parts are {', '.join(PARTS)}.")


def become_node(settings: Settings, url: sa.URL, part: str, *, concurrency: int = 1, name: str = "flywheel") -> None:
    """Write DAGSTER_HOME and replace this process by the part's; does not return.

    Raises:
        UsageError: as `node_command` and `write_dagster_home` do.
    """
    write_dagster_home(settings, url)
    workspace = write_workspace(settings)
    command = node_command(settings, part, workspace, concurrency=concurrency, name=name)
    os.environ.update(dagster_environment(settings, url))
    os.execv(command[0], command)  # noqa: S606 - our own command line, without a shell
