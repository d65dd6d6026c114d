"""Faults injected for real: signals to servers, backends, daemons and workers, cut connections, a full disk.

Belongs here: doing harm and undoing it, and the one question that is asked after each: does everything hold? Does not
belong here: who writes meanwhile (`fault_writers.py`), and which fault comes when (`soak.py`, the tests).
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import psycopg
import sqlalchemy as sa

from flywheel_pipeline.aggregates.refresh import RefreshReport, refresh
from flywheel_pipeline.database.dagster_home import dagster_environment, write_dagster_home
from flywheel_pipeline.database.embedded import EmbeddedServer
from flywheel_pipeline.database.settings import Settings
from flywheel_pipeline.doctor import examine
from flywheel_pipeline.serve import WORKSPACE
from flywheel_pipeline.sql_models.loader import ModelGraph

FORK = multiprocessing.get_context("fork")
#: What a client may meet while a fault lasts, and answers by trying again.
PASSING = (sa.exc.OperationalError, sa.exc.InternalError, psycopg.OperationalError, psycopg.InternalError)


def end_with_parent() -> None:
    """Have the kernel kill this process when its parent dies: a killed test leaves nobody behind. Linux only."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)


def leave_the_group() -> None:
    """Take a forked process out of its parent's group: a Ctrl-C is for the parent, which ends its children itself."""
    os.setpgrp()
    end_with_parent()


def until(condition: Callable[[], bool], seconds: float = 60.0, what: str = "it") -> float:
    """Wait for a condition; return how many seconds that took. Fails with TimeoutError."""
    begun = time.monotonic()
    while not condition():
        if time.monotonic() - begun > seconds:
            raise TimeoutError(f"{what} did not happen within {seconds:.0f} s")
        time.sleep(0.02)
    return time.monotonic() - begun


# -- what must hold afterwards ---------------------------------------------------------------------


def refresh_once(engine: sa.Engine, graph: ModelGraph) -> RefreshReport:
    """One refresh in one transaction, as the pipeline's step does it."""
    with engine.begin() as connection:
        return refresh(connection, graph)


def broken_invariants(
    engine: sa.Engine, *, deep: bool = False, invariants: Sequence[int] = tuple(range(1, 13))
) -> dict[int, str]:
    """What the doctor finds broken, by number of the invariant; empty if all of these hold."""
    found = examine(engine, deep=deep, invariants=invariants)
    if [item.invariant for item in found] != list(invariants):
        raise AssertionError("the doctor left an invariant out")
    return {item.invariant: item.finding.sentence for item in found if not item.finding.passed}


# -- PostgreSQL ------------------------------------------------------------------------------------


def postmaster_pid(server: EmbeddedServer) -> int:
    """Pid of the postmaster, from its lock file."""
    return int((server.data / "postmaster.pid").read_text().splitlines()[0])


def kill_postmaster(server: EmbeddedServer) -> None:
    """Kill -9 of the postmaster: its children leave, nobody writes a checkpoint."""
    os.kill(postmaster_pid(server), signal.SIGKILL)


def backends(engine: sa.Engine) -> list[int]:
    """Pids of the client backends in the database of `engine`, except the one that asks."""
    with engine.connect() as connection:
        return list(
            connection.exec_driver_sql(
                "SELECT pid FROM pg_stat_activity WHERE datname = current_database() AND backend_type = 'client backend' "
                "AND pid <> pg_backend_pid() ORDER BY pid"
            ).scalars()
        )


def terminate_backends(engine: sa.Engine) -> int:
    """Drop every other connection to the database, as an administrator or a failing network would; return how many."""
    pids = backends(engine)
    with engine.connect() as connection:
        for pid in pids:
            connection.execute(sa.text("SELECT pg_terminate_backend(:pid)"), {"pid": pid})
    return len(pids)


def kill_server_process(pid: int) -> None:
    """Kill -9 of one backend: the postmaster throws all others out and recovers. It may have gone by itself."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)


def ready(server: EmbeddedServer) -> Callable[[], bool]:
    """Whether the server takes connections, and starts it where it is gone for good."""

    def question() -> bool:
        if server.is_running():
            return True
        server.ensure_running()
        return True

    return question


# -- a full disk -----------------------------------------------------------------------------------


class SmallDisk:
    """A tmpfs of its own, on which a data directory can be filled to the last byte."""

    def __init__(self, place: Path, megabytes: int) -> None:
        """Mount it at `place`; raises OSError with the reason where this user may not."""
        self.place = place
        place.mkdir(parents=True, exist_ok=True)
        done = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", f"size={megabytes}m,mode=0755", "tmpfs", str(place)],
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode != 0:
            raise OSError(f"a tmpfs cannot be mounted here: {done.stderr.strip()}")

    @contextlib.contextmanager
    def full(self) -> Iterator[None]:
        """No byte is free while the context lasts."""
        filler = self.place / "filler"
        with filler.open("wb", buffering=0) as handle:
            try:
                room = os.statvfs(self.place)
                with contextlib.suppress(OSError):  # somebody else was faster: the loop below takes what is left
                    os.posix_fallocate(handle.fileno(), 0, max(room.f_bavail * room.f_frsize - (4 << 20), 1))
                handle.seek(0, os.SEEK_END)
                for size in (1 << 20, 1 << 16, 1 << 12):
                    with contextlib.suppress(OSError):
                        while True:
                            handle.write(bytes(size))
                yield
            finally:
                filler.unlink()

    def unmount(self) -> None:
        """Give it back, with all that is on it."""
        subprocess.run(["umount", "--lazy", str(self.place)], check=True)


# -- the network -----------------------------------------------------------------------------------


class Proxy:
    """A process between clients and the server's socket that cuts all connections, or freezes, on demand."""

    def __init__(self, server: EmbeddedServer, place: Path) -> None:
        """Listen in the directory `place`; clients name it as their host."""
        place.mkdir(parents=True, exist_ok=True)
        self.place = place
        self.process = FORK.Process(
            target=_serve_proxy, args=(str(place / ".s.PGSQL.5432"), str(server.socket_directory / ".s.PGSQL.5432"))
        )
        self.process.start()
        until((place / ".s.PGSQL.5432").exists, 10, "the proxy's socket")

    def url(self, url: sa.URL) -> sa.URL:
        """The same database, through the proxy."""
        return url.update_query_dict({"host": str(self.place)})

    def _signal(self, number: signal.Signals) -> None:
        if self.process.pid is not None:
            os.kill(self.process.pid, number)

    def cut(self) -> None:
        """Abort every connection, in the middle of whatever it carries."""
        self._signal(signal.SIGUSR1)

    @contextlib.contextmanager
    def frozen(self) -> Iterator[None]:
        """Nothing passes while the context lasts, and nobody is told."""
        self._signal(signal.SIGSTOP)
        try:
            yield
        finally:
            self._signal(signal.SIGCONT)

    def stop(self) -> None:
        """End the process."""
        self._signal(signal.SIGCONT)
        self._signal(signal.SIGKILL)
        self.process.join()


def _serve_proxy(listen: str, target: str) -> None:
    leave_the_group()
    transports: set[asyncio.StreamWriter] = set()

    async def pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError):
            while data := await reader.read(1 << 14):
                writer.write(data)
                await writer.drain()
        writer.transport.abort()

    async def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            there_reader, there_writer = await asyncio.open_unix_connection(target)
        except OSError:
            writer.transport.abort()
            return
        transports.update((writer, there_writer))
        await asyncio.gather(pump(reader, there_writer), pump(there_reader, writer))
        transports.difference_update((writer, there_writer))

    def cut() -> None:
        for writer in list(transports):
            writer.transport.abort()

    async def serve() -> None:
        asyncio.get_running_loop().add_signal_handler(signal.SIGUSR1, cut)
        async with await asyncio.start_unix_server(connected, listen) as listener:
            await listener.serve_forever()

    with contextlib.suppress(FileNotFoundError):
        os.unlink(listen)
    asyncio.run(serve())


# -- daemon and run workers ------------------------------------------------------------------------


class Daemon:
    """A real Dagster daemon with its code server, in a process group of its own; as `flywheel up` starts one."""

    def __init__(self, settings: Settings, url: sa.URL, name: str = "daemon") -> None:
        """Start it; its log is `name`.log under the home."""
        write_dagster_home(settings, url)
        workspace = settings.dagster_home / "workspace.yaml"
        workspace.write_text(WORKSPACE, "utf-8")
        settings.logs.mkdir(parents=True, exist_ok=True)
        self.log = settings.logs / f"{name}.log"
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "dagster._daemon", "run", "-w", str(workspace)],
                env={**os.environ, **dagster_environment(settings, url)},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                preexec_fn=end_with_parent,
            )

    def alive(self) -> bool:
        """Whether the daemon itself still runs."""
        return self.process.poll() is None

    def kill(self) -> None:
        """Kill -9 of the daemon, its code server, and the run workers that are their children."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


class AgentApi:
    """`flywheel serve` in a process group of its own, on a port of its own; killed and started again in its place."""

    def __init__(self, home: Path, url: sa.URL) -> None:
        """Start it; its log is serve.log under its home."""
        home.mkdir(parents=True, exist_ok=True)
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = int(probe.getsockname()[1])
        self.address = f"http://127.0.0.1:{self.port}"
        self.home, self.url = home, url
        self.start()

    def start(self) -> None:
        """Start it, and do not wait: who calls it meanwhile calls again."""
        with (self.home / "serve.log").open("ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "flywheel_pipeline.cli", "serve", "--port", str(self.port), "--workers", "1"],
                env={
                    **os.environ,
                    "FLYWHEEL_HOME": str(self.home),
                    "FLYWHEEL_DATABASE_URL": self.url.render_as_string(hide_password=False),
                },
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                preexec_fn=end_with_parent,
            )

    def alive(self) -> bool:
        """Whether it still runs."""
        return self.process.poll() is None

    def kill(self) -> None:
        """Kill -9 of the server and its workers, in the middle of whatever they answer."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


def run_workers(home: Path) -> list[int]:
    """Pids of the processes that execute runs for this FLYWHEEL_HOME: children of a code server that run Python."""
    marker = f"FLYWHEEL_HOME={home}".encode()
    found = []
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit() or int(entry.name) == os.getpid():
            continue
        try:
            command = (entry / "cmdline").read_bytes()
            if marker in (entry / "environ").read_bytes().split(b"\0") and (
                b"multiprocessing.spawn" in command or b"execute_run" in command
            ):
                found.append(int(entry.name))
        except (FileNotFoundError, ProcessLookupError, PermissionError):
            continue
    return sorted(found)
