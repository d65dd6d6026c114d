"""A run cancelled in the UI, as the UI does it: through the webserver, which tells the code server, which tells the run.

Two moments: before the refresh has the lock, and in the middle of it, with cells deleted and not yet written again.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import sqlalchemy as sa
from exactness import assert_exact
from fault_lab import broken_invariants, kill_server_process, run_workers, until
from service_processes import free_port
from telemetry_rows import insert, row

from flywheel_pipeline.build import PIPELINE_JOB
from flywheel_pipeline.database import migrate
from flywheel_pipeline.database.embedded import EmbeddedServer
from flywheel_pipeline.database.engine import open_engine
from flywheel_pipeline.database.life import gives_sign
from flywheel_pipeline.database.settings import Settings
from flywheel_pipeline.serve import Services, start

pytestmark = [pytest.mark.daemon, pytest.mark.long, pytest.mark.timeout(420)]

BAR_SECONDS = 60.0
#: What the button "Terminate" of a run's page sends.
TERMINATE = """
mutation ($runId: String!) {
  terminateRun(runId: $runId, terminatePolicy: SAFE_TERMINATE) {
    __typename
    ... on TerminateRunSuccess { run { runId } }
    ... on TerminateRunFailure { message }
    ... on PythonError { message stack }
  }
}
"""
#: Backends that wait for a lock, with whether they hold the refresh lock meanwhile.
WAITING = """
SELECT a.pid, a.wait_event, EXISTS (
  SELECT 1 FROM pg_locks AS l WHERE l.pid = a.pid AND l.locktype = 'advisory' AND l.granted
    AND (l.classid::bigint << 32) + l.objid::bigint = 7380407443113377793
) AS refreshes
FROM pg_stat_activity AS a WHERE a.datname = current_database() AND a.wait_event_type = 'Lock'
"""


class World:
    """A database of its own with webserver and daemon at work on it."""

    def __init__(self, home: Path) -> None:
        self.settings = Settings(home=home)
        self.server = EmbeddedServer(home)
        self.url = self.server.ensure_running()
        self.engine = open_engine(self.url)
        migrate.upgrade(self.engine)
        self.services: Services = start(self.settings, self.url, host="127.0.0.1", port=free_port())

    def close(self) -> None:
        """End everything, the runs too."""
        self.services.stop()
        for pid in run_workers(self.settings.home):
            kill_server_process(pid)
        self.engine.dispose()
        self.server.remove()

    def rows(self, query: str, **values: Any) -> list[Any]:
        """The rows of a query."""
        with self.engine.connect() as connection:
            return list(connection.execute(sa.text(query), values).all())

    def runs(self) -> dict[str, str]:
        """Status of every run of the pipeline, the newest last."""
        found = self.rows(
            "SELECT run_id, status FROM dagster.runs WHERE pipeline_name = :job ORDER BY id", job=PIPELINE_JOB
        )
        return {run.run_id: run.status for run in found}

    def unfinished(self) -> list[str]:
        """Runs of the pipeline that have not ended."""
        return [run_id for run_id, status in self.runs().items() if status not in ("SUCCESS", "FAILURE", "CANCELED")]

    def waiting(self) -> list[tuple[int, str, bool]]:
        """(backend, what it waits for, whether it holds the refresh lock)."""
        return [tuple(found) for found in self.rows(WAITING)]

    def terminate(self, run_id: str) -> dict[str, Any]:
        """Press the button."""
        answer = httpx.post(
            f"{self.services.url}/graphql", json={"query": TERMINATE, "variables": {"runId": run_id}}, timeout=30
        )
        said: dict[str, Any] = answer.json()
        assert "errors" not in said, said
        found: dict[str, Any] = said["data"]["terminateRun"]
        return found


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    opened = World(tmp_path_factory.mktemp("cancelled") / "home")
    try:
        yield opened
    finally:
        opened.close()


@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="finds run workers in /proc")
@pytest.mark.parametrize(
    ("hold", "waits_for", "refreshes"),
    [
        pytest.param("SELECT flywheel_lock_refresh()", "advisory", False, id="before the refresh"),
        pytest.param("LOCK TABLE rule_daily_stats IN SHARE MODE", "relation", True, id="in mid-refresh"),
    ],
)
def test_a_run_cancelled_in_the_ui_loses_nothing_and_the_next_tick_does_its_work(
    world: World, hold: str, waits_for: str, refreshes: bool
) -> None:
    name = f"cancelled-{waits_for}"
    until(lambda: world.unfinished() == [], 120, "the end of earlier runs")
    before = world.runs()
    counted = "SELECT site_id, day, executions FROM rule_daily_stats ORDER BY 1, 2"
    counts = world.rows(counted)
    with world.engine.connect() as holder:
        holder.exec_driver_sql(hold)
        with world.engine.begin() as connection:
            insert(connection, [row(site_id=name, hostname=f"h{n}") for n in range(20)])
        cells = world.rows("SELECT site_id, day FROM touched_cells ORDER BY 1, 2")
        assert cells != []
        until(lambda: [w[1:] for w in world.waiting()] == [(waits_for, refreshes)], 120, "a run that waits")
        ((backend, _, _),) = world.waiting()
        # One; unless this machine took half a minute to begin it: then the sensor has sent another one after it.
        cancelled = [run_id for run_id in world.runs() if run_id not in before and gives_sign(world.engine, run_id)]
        assert cancelled != []

        for run_id in cancelled:
            assert world.terminate(run_id)["__typename"] == "TerminateRunSuccess"
        # All this while the lock is still held: the run ends at once, and so does what it does in the database.
        until(
            lambda: {world.runs()[run_id] for run_id in cancelled} == {"CANCELED"}, 60, "the end of the cancelled run"
        )
        until(lambda: backend not in {w[0] for w in world.waiting()}, 30, "the end of the run's statement")
        until(lambda: not any(gives_sign(world.engine, run_id) for run_id in cancelled), 30, "the end of its process")
        assert world.rows("SELECT site_id, day FROM touched_cells ORDER BY 1, 2") == cells
        assert world.rows(counted) == counts
        with world.engine.begin() as connection:
            insert(connection, [row(site_id=name, hostname=f"late-{n}") for n in range(5)])
        # The sensor does not wait for the dead run: the next one waits for the lock by now.
        until(lambda: [w[1:] for w in world.waiting()] == [(waits_for, refreshes)], BAR_SECONDS, "the next run")
        holder.rollback()
    until(lambda: world.rows("SELECT 1 FROM touched_cells") == [], BAR_SECONDS, "the next refresh")
    until(lambda: world.unfinished() == [], 120, "the end of the next run")
    assert {world.runs()[run_id] for run_id in cancelled} == {"CANCELED"}  # and nobody took it up again
    assert_exact(world.engine)
    assert broken_invariants(world.engine, deep=True) == {}
    counted_now = world.rows("SELECT sum(executions)::int FROM telemetry_daily_volume WHERE site_id = :site", site=name)
    assert [tuple(found) for found in counted_now] == [(25,)]
