"""A real Spark standalone cluster on loopback: a master and worker processes, started and ended by the test.

Belongs here: processes. Does not belong here: jobs.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pytest

START_SECONDS = 180.0


def require_java() -> None:
    """Skip where Spark cannot run, saying why."""
    pytest.importorskip("pyspark", reason="the extra spark is not installed")
    if shutil.which("java") is None:
        pytest.skip("no Java on the PATH: Debian's openjdk-17-jre-headless has one")


def free_port() -> int:
    """A port of loopback that nobody listens on."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


@dataclass
class Cluster:
    """A master's URL and its workers."""

    url: str
    page: str
    home: Path
    workers: list[subprocess.Popen[bytes]] = field(default_factory=list)

    def alive(self) -> int:
        """Workers that the master counts as alive."""
        with urllib.request.urlopen(self.page, timeout=5) as answer:  # noqa: S310 (loopback)
            return answer.read().decode().count('"state" : "ALIVE"')

    def executors(self, worker: subprocess.Popen[bytes]) -> list[int]:
        """Processes that this worker started: they compute."""
        found: list[int] = []
        for thread in Path(f"/proc/{worker.pid}/task").iterdir():
            with contextlib.suppress(FileNotFoundError):  # a thread that has ended meanwhile
                found += [int(pid) for pid in (thread / "children").read_text().split()]
        return found

    def shuffles(self, number: int) -> set[str]:
        """Numbers of the shuffles of which the executors of this worker hold results: tasks that were done, for others."""
        return {path.name.split("_")[1] for path in self.home.glob(f"local-{number}/**/shuffle_*_*_*.data")}

    def kill(self, worker: subprocess.Popen[bytes]) -> None:
        """End a worker and all that it started, as a machine that loses its power does."""
        started = self.executors(worker)
        worker.kill()  # first: it would start another executor for one that ended
        worker.wait()
        for pid in started:
            with contextlib.suppress(ProcessLookupError):  # it ended by itself meanwhile
                os.kill(pid, signal.SIGKILL)


@contextmanager
def cluster(home: Path, workers: int = 2) -> Iterator[Cluster]:
    """Start a master and workers of one core each; end them at last."""
    import pyspark

    root = Path(pyspark.__file__).parent
    environment = os.environ | {"SPARK_HOME": str(root), "SPARK_LOCAL_IP": "127.0.0.1", "SPARK_NO_DAEMONIZE": "1"}
    starter = [str(root / "bin" / "spark-class")]
    port, page = free_port(), free_port()
    started: list[subprocess.Popen[bytes]] = []

    def start(name: str, *arguments: str, **more: str) -> subprocess.Popen[bytes]:
        with (home / f"{name}.log").open("wb") as log:
            process = subprocess.Popen([*starter, *arguments], env=environment | more, stdout=log, stderr=log)
        started.append(process)
        return process

    try:
        start(
            "master", "org.apache.spark.deploy.master.Master",
            "--host", "127.0.0.1", "--port", str(port), "--webui-port", str(page),
        )  # fmt: skip
        found = Cluster(f"spark://127.0.0.1:{port}", f"http://127.0.0.1:{page}/json/", home)
        for number in range(workers):
            found.workers.append(
                start(
                    f"worker-{number}", "org.apache.spark.deploy.worker.Worker", "--host", "127.0.0.1", "--cores", "1",
                    "--memory", "1g", "--webui-port", str(free_port()), "--work-dir", str(home / f"work-{number}"), found.url,
                    SPARK_LOCAL_DIRS=str(home / f"local-{number}"),
                )
            )  # fmt: skip
        deadline = time.monotonic() + START_SECONDS
        while True:
            try:
                if found.alive() == workers:
                    break
            except OSError:
                pass
            if time.monotonic() > deadline:
                pytest.fail(f"the cluster did not start; its logs: {home}")
            time.sleep(0.5)
        yield found
    finally:
        for process in reversed(started):
            if process.poll() is None:
                process.terminate()
        for process in started:
            process.wait(timeout=60)
