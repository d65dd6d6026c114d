"""Webserver, daemon and agent API as child processes, started together and stopped together.

Belongs here: their lifecycle. Does not belong here: what they run. `dagster dev` started in the background ignores
INT and TERM, so its two are started apart; all are stopped by their process groups.
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
CODE_SERVER_WORKSPACE = """\
# Written by Flywheel at each start: changes here are lost.
load_from:
  - grpc_server:
      host: {host}
      port: {port}
      location_name: flywheel
"""
API_PORT_HINT = "Stop what listens there, or choose another port for the agent API: FLYWHEEL_API_PORT=8001."
READY_SECONDS = 90.0
STOP_SECONDS = 15.0


@dataclass
class Services:
    """The running children. `url` is the UI's address, `api_url` the agent API's; `logs` holds their output."""

    url: str
    logs: Path
    api_url: str | None = None
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


def require_free_port(
    host: str, port: int, *, hint: str = "Stop what listens there, or choose another port: flywheel up --port 3001."
) -> None:
    """Refuse a port that somebody listens on; `hint` says what to do.

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
                hint=hint,
            ) from error


def write_workspace(settings: Settings) -> Path:
    """Write the workspace file of UI and daemon, and return it: the code location as a module, or as a server elsewhere."""
    text = WORKSPACE
    if settings.code_server is not None:
        host, _, port = settings.code_server.rpartition(":")
        text = CODE_SERVER_WORKSPACE.format(host=host, port=port)
    workspace = settings.dagster_home / "workspace.yaml"
    workspace.write_text(text, "utf-8")
    return workspace


def start(
    settings: Settings,
    url: sa.URL,
    *,
    host: str,
    port: int,
    daemon: bool = True,
    api: tuple[str, int] | None = None,
) -> Services:
    """Start webserver, daemon and, where `api` gives its host and port, the agent API; wait until they answer.

    Raises:
        PortInUse: a port is taken.
        FlywheelError: a child ended, or did not answer within 90 seconds; the log's last lines are shown.
    """
    require_free_port(host, port)
    if api is not None:
        require_free_port(*api, hint=API_PORT_HINT)
    write_dagster_home(settings, url)
    settings.logs.mkdir(parents=True, exist_ok=True)
    workspace = write_workspace(settings)
    environment = {**os.environ, **dagster_environment(settings, url)}
    commands = {
        "webserver": [sys.executable, "-m", "dagster_webserver", "-h", host, "-p", str(port), "-w", str(workspace)],
    }
    if daemon:
        commands["daemon"] = [sys.executable, "-m", "dagster._daemon", "run", "-w", str(workspace)]
    services = Services(f"http://{host}:{port}", settings.logs)
    if api is not None:
        commands["api"] = [
            sys.executable,
            "-m",
            "flywheel_pipeline.cli",
            "serve",
            "--host",
            api[0],
            "--port",
            str(api[1]),
        ]
        environment["FLYWHEEL_DATABASE_URL"] = url.render_as_string(hide_password=False)
        services.api_url = f"http://{api[0]}:{api[1]}"
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
    waiting = {"UI": f"{services.url}/server_info"}
    if services.api_url is not None:
        waiting["agent API"] = f"{services.api_url}/healthz"
    deadline = time.monotonic() + READY_SECONDS
    while time.monotonic() < deadline:
        if dead := services.dead():
            tail = (services.logs / f"{dead[0]}.log").read_text(errors="replace").strip().splitlines()[-5:]
            raise FlywheelError(
                f"The {dead[0]} ended: {' | '.join(tail)}", hint=f"Its log: {services.logs / (dead[0] + '.log')}"
            )
        waiting = {name: address for name, address in waiting.items() if not _answers(address)}
        if not waiting:
            return
        time.sleep(0.2)
    raise FlywheelError(
        f"The {' and the '.join(waiting)} did not answer within {READY_SECONDS:.0f} s: {', '.join(waiting.values())}.",
        hint=f"Its logs: {services.logs}",
    )


def _answers(address: str) -> bool:
    try:
        with urllib.request.urlopen(address, timeout=2) as answer:  # noqa: S310
            return bool(answer.status == 200)
    except (urllib.error.URLError, OSError):
        return False
