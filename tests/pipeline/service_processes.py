"""Real webserver and daemon in a test: a free port, the processes they left, and waiting with their logs at hand.

Belongs here: what every test over running services needs. Does not belong here: assertions on the pipeline.
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import pytest

from flywheel_pipeline.serve import Services

Answer = TypeVar("Answer")


def free_port() -> int:
    """A port that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def processes_of(home: Path) -> dict[int, str]:
    """The live processes that were started for this FLYWHEEL_HOME, by their environment, except this one."""
    marker = f"FLYWHEEL_HOME={home}".encode()
    found = {}
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit() or int(entry.name) == os.getpid():
            continue
        try:
            if marker in (entry / "environ").read_bytes().split(b"\0"):
                found[int(entry.name)] = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode()
        except (FileNotFoundError, ProcessLookupError, PermissionError):
            continue  # it ended meanwhile, or belongs to somebody else
    return found


def wait_for(question: Callable[[], Answer | None], *, seconds: float, what: str, services: Services) -> Answer:
    """Ask until there is an answer; fail with the children's logs otherwise."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        assert services.dead() == []
        answer = question()
        if answer is not None:
            return answer
        time.sleep(0.1)
    logs = "\n".join(f"== {log}\n{log.read_text(errors='replace')[-3000:]}" for log in services.logs.glob("*.log"))
    pytest.fail(f"{what} did not happen within {seconds} s\n{logs}")
