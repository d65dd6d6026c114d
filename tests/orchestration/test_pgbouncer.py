"""What may stand behind PgBouncer and what may not, shown on a real one that pools transactions.

deploy/README.md says the same in words. Each test here is the evidence for a sentence there.
"""

from __future__ import annotations

import datetime as dt
import os
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import psycopg
import pytest
import sqlalchemy as sa

from flywheel_pipeline.database.embedded import UNPRIVILEGED_USERS, EmbeddedServer
from flywheel_pipeline.database.engine import open_engine
from flywheel_pipeline.database.life import gives_sign, sign_of_life
from flywheel_pipeline.delivery.api.connections import Connections
from flywheel_pipeline.delivery.tokens import authenticate_and_ask, issue
from flywheel_pipeline.errors import DatabaseUnavailable

PGBOUNCER = shutil.which("pgbouncer", path=f"{os.environ['PATH']}:/usr/sbin")
pytestmark = pytest.mark.skipif(
    PGBOUNCER is None, reason="no pgbouncer here (Debian's package of that name; .ci/run installs it)"
)
WHO_AM_I = "SELECT flywheel_session_appliance() AS appliance"


def loaded_at(engine: sa.Engine) -> dt.datetime:
    """When the postmaster last read its configuration, the names of users included: a new session inherits it."""
    with psycopg.connect(engine.url.set(drivername="postgresql").render_as_string(hide_password=False)) as fresh:
        (at,) = fresh.execute("SELECT pg_conf_load_time()").fetchone() or (None,)
        assert isinstance(at, dt.datetime)
        return at


class Bouncer:
    """One PgBouncer before one database, pooling transactions over two server connections."""

    def __init__(self, directory: Path, engine: sa.Engine, server: EmbeddedServer, *, ignoring: str) -> None:
        """Start it and wait until it listens."""
        assert PGBOUNCER is not None
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = int(probe.getsockname()[1])
        self.url = sa.make_url(f"postgresql+psycopg://flywheel@127.0.0.1:{port}/{engine.url.database}")
        directory.chmod(0o755)
        file = directory / "pgbouncer.ini"
        target = f"host={server.socket_directory} port=5432 user=flywheel"
        file.write_text(
            f"[databases]\n{engine.url.database} = {target}\n[pgbouncer]\nlisten_addr = 127.0.0.1\n"
            f"listen_port = {port}\nunix_socket_dir =\nauth_type = any\npool_mode = transaction\n"
            f"default_pool_size = 2\nignore_startup_parameters = {ignoring}\n"
        )
        user = []
        if os.geteuid() == 0:  # PgBouncer refuses root, as PostgreSQL does, and needs to be let in by its own name
            user = ["-u", UNPRIVILEGED_USERS[0]]
            with (server.data / "pg_ident.conf").open("a") as idents:
                idents.write(f'flywheel "{UNPRIVILEGED_USERS[0]}" flywheel\n')
            before = loaded_at(engine)
            with engine.connect() as connection:
                connection.exec_driver_sql("SELECT pg_reload_conf()")
            deadline = time.monotonic() + 30
            while loaded_at(engine) == before:
                assert time.monotonic() < deadline, "PostgreSQL does not read its configuration again"
                time.sleep(0.02)
        self.process = subprocess.Popen(
            [PGBOUNCER, *user, str(file)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, cwd="/"
        )
        deadline = time.monotonic() + 15
        while True:
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", port)) == 0:
                    return
            assert self.process.poll() is None, "pgbouncer ended by itself"
            assert time.monotonic() < deadline, "pgbouncer does not listen"
            time.sleep(0.05)

    def stop(self) -> None:
        """End it."""
        self.process.kill()
        self.process.wait()


@pytest.fixture
def bouncer(engine: sa.Engine, server: EmbeddedServer, tmp_path: Path) -> Iterator[Bouncer]:
    """As deploy/README.md says to configure it."""
    started = Bouncer(tmp_path, engine, server, ignoring="options,extra_float_digits")
    yield started
    started.stop()


def test_it_must_be_told_to_pass_over_the_options_that_a_session_begins_with(
    engine: sa.Engine, server: EmbeddedServer, tmp_path: Path
) -> None:
    strict = Bouncer(tmp_path, engine, server, ignoring="extra_float_digits")
    try:
        with pytest.raises(DatabaseUnavailable, match="options"):
            open_engine(strict.url)
    finally:
        strict.stop()


def ask_by_turns(engine: sa.Engine, token: str) -> set[object]:
    """Two readers of the agent API, sharing the pooler's connections, as `/agent/sync` reads."""
    connections = Connections(engine)
    try:
        first, second = connections._connect(), connections._connect()
        said = set()
        for _ in range(12):  # psycopg prepares what it sees the fifth time
            for connection in (first, second):
                caller, answer = authenticate_and_ask(connection, token, "flywheel_agent_api", WHO_AM_I)
                said.add((caller.appliance_id, answer.appliance))
                with psycopg.connect(engine.url.set(drivername="postgresql").render_as_string()) as other:
                    other.execute("SELECT 1")
        return said
    finally:
        connections.close()


def test_the_agent_api_answers_through_it_once_it_prepares_no_statements(
    engine: sa.Engine, bouncer: Bouncer, monkeypatch: pytest.MonkeyPatch
) -> None:
    with engine.begin() as connection:
        connection.exec_driver_sql("INSERT INTO sites (site_id) VALUES ('clinic')")
        token = issue(connection, "clinic-1", actor="test", reason="pooled", site_id="clinic").token
    prepared = open_engine(bouncer.url)
    with pytest.raises(psycopg.errors.Error, match="prepared statement"):
        ask_by_turns(prepared, token)
    prepared.dispose()
    monkeypatch.setenv("FLYWHEEL_PREPARE_STATEMENTS", "false")
    pooled = open_engine(bouncer.url)
    assert ask_by_turns(pooled, token) == {("clinic-1", "clinic-1")}
    pooled.dispose()


def test_a_runs_sign_of_life_does_not_end_with_the_run_behind_it(engine: sa.Engine, bouncer: Bouncer) -> None:
    with sign_of_life(engine, "direct"):
        assert gives_sign(engine, "direct")
    deadline = time.monotonic() + 30
    while gives_sign(engine, "direct"):  # the server ends a session a moment after its client
        assert time.monotonic() < deadline
        time.sleep(0.05)
    pooled = open_engine(bouncer.url)
    with sign_of_life(pooled, "pooled"):
        assert gives_sign(engine, "pooled")
    pooled.dispose()
    # The pooler keeps the session, and the session the lock: a dead run would look alive for ever.
    assert gives_sign(engine, "pooled")


def test_the_sensor_is_not_woken_through_it(engine: sa.Engine, bouncer: Bouncer) -> None:
    heard = {}
    for name, url, seconds in (("direct", engine.url, 20.0), ("pooled", bouncer.url, 1.0)):
        with psycopg.connect(
            url.set(drivername="postgresql").render_as_string(hide_password=False), autocommit=True
        ) as listener:
            listener.execute("LISTEN flywheel_telemetry")
            with engine.begin() as connection:
                connection.exec_driver_sql("NOTIFY flywheel_telemetry")
            heard[name] = len(list(listener.notifies(timeout=seconds, stop_after=1)))
    assert heard == {"direct": 1, "pooled": 0}
