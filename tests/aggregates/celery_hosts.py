"""Redis, Celery workers and one daemon as processes of their own: what several hosts would run.

Belongs here: their lifecycle. Does not belong here: assertions.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import sqlalchemy as sa

from flywheel_pipeline.database.settings import Settings

WITHOUT_REDIS = pytest.mark.skipif(
    shutil.which("redis-server") is None,
    reason="no redis-server here (Debian's package of that name; .ci/run installs it)",
)


def free_port() -> int:
    """A port that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def listens(port: int) -> bool:
    """Whether somebody takes connections there."""
    with socket.socket() as probe:
        probe.settimeout(1)
        return probe.connect_ex(("127.0.0.1", port)) == 0


class Hosts:
    """Each part in a process group of its own, as on a host of its own: `flywheel node PART`."""

    def __init__(self, directory: Path, url: sa.URL, **settings: object) -> None:
        """Start Redis, without a file of its own."""
        self.logs = directory
        self.parts: dict[str, subprocess.Popen[bytes]] = {}
        self.redis_port, self.code_port = free_port(), free_port()
        self.redis_url = f"redis://127.0.0.1:{self.redis_port}/0"
        self.environment = {
            **os.environ,
            "FLYWHEEL_HOME": str(directory / "home"),
            "FLYWHEEL_DATABASE_URL": url.render_as_string(hide_password=False),
            "FLYWHEEL_RUN_LAUNCHER": "celery",
            "FLYWHEEL_CELERY_BROKER_URL": self.redis_url,
            "FLYWHEEL_CODE_SERVER": f"127.0.0.1:{self.code_port}",
            "FLYWHEEL_CODE_PORT": str(self.code_port),
            **{f"FLYWHEEL_{name.upper()}": str(value) for name, value in settings.items()},
        }
        self._start("redis", ["redis-server", "--port", str(self.redis_port), "--bind", "127.0.0.1", "--save", ""])
        self.until(lambda: listens(self.redis_port), 20, "Redis")

    def settings(self) -> Settings:
        """What the parts read from their environment; the test's own must hold the same."""
        return Settings()

    def node(self, part: str, name: str = "", **options: object) -> None:
        """Start a part; `name` tells several of one kind apart."""
        given = [word for option, value in options.items() for word in (f"--{option}", str(value))]
        named = ["--name", name] if name else []
        self._start(name or part, [sys.executable, "-m", "flywheel_pipeline.cli", "node", part, *given, *named])

    def _start(self, name: str, command: list[str]) -> None:
        with (self.logs / f"{name}.log").open("wb") as log:
            self.parts[name] = subprocess.Popen(
                command,
                env=self.environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def kill(self, name: str) -> None:
        """Kill -9 of the part and all that it started, as if its host lost power."""
        os.killpg(self.parts[name].pid, signal.SIGKILL)
        self.parts.pop(name).wait()

    def until(self, question: Callable[[], object], seconds: float, what: str) -> float:
        """Ask until the answer is true and return how long that took; fail with the ends of all logs otherwise."""
        begun = time.monotonic()
        while time.monotonic() - begun < seconds:
            gone = [name for name, process in self.parts.items() if process.poll() is not None]
            if gone:
                pytest.fail(f"{gone} ended by itself\n{self.tails()}")
            if question():
                return time.monotonic() - begun
            time.sleep(0.1)
        pytest.fail(f"{what}: not within {seconds:.0f} s\n{self.tails()}")

    def tails(self) -> str:
        """The last lines of every log."""
        return "\n".join(f"== {log.name}\n{log.read_text(errors='replace')[-3000:]}" for log in self.logs.glob("*.log"))

    def stop(self) -> None:
        """End what still runs."""
        for process in self.parts.values():
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
