"""Webserver and daemon as two child processes, started together and stopped together.

Belongs here: their lifecycle. Does not belong here: what they run. `dagster dev` started in the background ignores
INT and TERM, so the two are started apart and stopped by their process groups.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from dataclasses import dataclass, field
from pathlib import Path

import sqlalchemy as sa

from flywheel_pipeline.database.dagster_home import dagster_environment, write_dagster_home
from flywheel_pipeline.database.settings import Settings
from flywheel_pipeline.errors import FlywheelError, PortInUse

WORKSPACE = """\
# Written by Flywheel at each start: changes here are lost.
load_from:
  - python_module:
      module_name: flywheel_pipeline.definitions
      location_name: flywheel
"""
READY_SECONDS = 90.0
STOP_SECONDS = 15.0


@dataclass
class Services:
    """The running children. `url` is the UI's address; `logs` holds their output."""

    url: str
    logs: Path
    processes: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)

    def dead(self) -> list[str]:
        """Return the names of children that ended by themselves."""
        return [name for name, process in self.processes.items() if process.poll() is not None]

    def stop(self) -> None:
        """Stop all children and what they started: TERM, then KILL after 15 seconds."""
        for process in self.processes.values():
            _signal(process, signal.SIGTERM)
        deadline = time.monotonic() + STOP_SECONDS
        for process in self.processes.values():
            try:
                process.wait(max(deadline - time.monotonic(), 0.1))
            except subprocess.TimeoutExpired:
                _signal(process, signal.SIGKILL)
                process.wait()
            # What a child leaves behind in its group (code servers) goes with it.
            _signal(process, signal.SIGKILL)


def _signal(process: subprocess.Popen[bytes], number: signal.Signals) -> None:
    try:
        os.killpg(process.pid, number)
    except ProcessLookupError:
        return


def require_free_port(host: str, port: int) -> None:
    """Refuse a port that somebody listens on.

    Raises:
        PortInUse: with what to do.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise PortInUse(
                f"Port {port} on {host} cannot be used: {error.strerror or error}.",
                hint="Stop what listens there, or choose another port: flywheel up --port 3001.",
            ) from error


def start(settings: Settings, url: sa.URL, *, host: str, port: int, daemon: bool = True) -> Services:
    """Start webserver and daemon and wait until the UI answers.

    Raises:
        PortInUse: the port is taken.
        FlywheelError: a child ended, or the UI did not answer within 90 seconds; the log's last lines are shown.
    """
    require_free_port(host, port)
    write_dagster_home(settings, url)
    settings.logs.mkdir(parents=True, exist_ok=True)
    workspace = settings.dagster_home / "workspace.yaml"
    workspace.write_text(WORKSPACE, "utf-8")
    environment = {**os.environ, **dagster_environment(settings, url)}
    commands = {
        "webserver": [sys.executable, "-m", "dagster_webserver", "-h", host, "-p", str(port), "-w", str(workspace)],
    }
    if daemon:
        commands["daemon"] = [sys.executable, "-m", "dagster._daemon", "run", "-w", str(workspace)]
    services = Services(f"http://{host}:{port}", settings.logs)
    try:
        for name, command in commands.items():
            with (settings.logs / f"{name}.log").open("wb") as log:
                services.processes[name] = subprocess.Popen(
                    command,
                    env=environment,
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                )
        _wait_ready(services)
    except BaseException:
        services.stop()
        raise
    return services


def _wait_ready(services: Services) -> None:
    deadline = time.monotonic() + READY_SECONDS
    while time.monotonic() < deadline:
        if dead := services.dead():
            tail = (services.logs / f"{dead[0]}.log").read_text(errors="replace").strip().splitlines()[-5:]
            raise FlywheelError(
                f"The {dead[0]} ended: {' | '.join(tail)}", hint=f"Its log: {services.logs / (dead[0] + '.log')}"
            )
        try:
            with urllib.request.urlopen(f"{services.url}/server_info", timeout=2) as answer:  # noqa: S310
                if answer.status == 200:
                    return
        except (urllib.error.URLError, OSError):
            time.sleep(0.2)
    raise FlywheelError(
        f"The UI did not answer on {services.url} within {READY_SECONDS:.0f} s.", hint=f"Its logs: {services.logs}"
    )
