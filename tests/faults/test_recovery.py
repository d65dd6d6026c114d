"""Daemon, run workers and PostgreSQL killed in the middle of a run: the next refresh is exact, and it comes soon."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
import sqlalchemy as sa
from exactness import assert_exact
from fault_lab import Daemon, broken_invariants, kill_postmaster, kill_server_process, run_workers, until
from telemetry_rows import insert, row

from flywheel_pipeline.database import migrate
from flywheel_pipeline.database.embedded import EmbeddedServer
from flywheel_pipeline.database.engine import open_engine
from flywheel_pipeline.database.life import gives_sign, sign_of_life
from flywheel_pipeline.database.settings import Settings

BAR_SECONDS = 60.0


def value(engine: sa.Engine, query: str) -> int:
    with engine.connect() as connection:
        return int(connection.exec_driver_sql(query).scalar_one())


def test_a_run_gives_its_sign_as_long_as_its_connection_lives(engine: sa.Engine) -> None:
    with sign_of_life(engine, "run-1"):
        assert gives_sign(engine, "run-1")
        assert not gives_sign(engine, "run-2")
    # The server ends a session a moment after its client.
    until(lambda: not gives_sign(engine, "run-1"), 30, "the end of its connection")


@pytest.mark.long
@pytest.mark.daemon
@pytest.mark.timeout(240)
@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="finds run workers in /proc")
def test_after_a_kill_of_everything_the_next_refresh_is_exact_within_a_minute(tmp_path: Path) -> None:
    settings = Settings(home=tmp_path / "home")
    server = EmbeddedServer(settings.home)
    url = server.ensure_running()
    engine = open_engine(url)
    migrate.upgrade(engine)
    daemon = Daemon(settings, url)
    try:
        with engine.connect() as holder:
            holder.exec_driver_sql("SELECT flywheel_lock_refresh()")  # so the run is surely in its refresh when it dies
            with engine.begin() as connection:
                insert(connection, [row(hostname=f"h{n}") for n in range(20)])
            waiting = (
                "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() "
                "AND wait_event_type = 'Lock' AND wait_event = 'advisory'"
            )
            until(lambda: value(engine, waiting) == 1, 120, "a run that waits for the refresh lock")
            workers = run_workers(settings.home)
            assert workers != []
            daemon.kill()
            for pid in workers:
                kill_server_process(pid)
            kill_postmaster(server)
            holder.invalidate()

        begun = time.monotonic()
        server.ensure_running()
        with engine.begin() as connection:
            insert(connection, [row(hostname=f"late-{n}") for n in range(5)])
        daemon = Daemon(settings, url)
        until(lambda: value(engine, "SELECT count(*) FROM touched_cells") == 0, 150, "the next refresh")
        seconds = time.monotonic() - begun
        assert_exact(engine)
        assert broken_invariants(engine, deep=True) == {}
        assert value(engine, "SELECT sum(executions) FROM telemetry_daily_volume") == 25
        print(f"exact again {seconds:.1f} s after the kill")
        assert seconds < BAR_SECONDS
    finally:
        daemon.kill()
        for pid in run_workers(settings.home):
            kill_server_process(pid)
        engine.dispose()
        server.remove()
