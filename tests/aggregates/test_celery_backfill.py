"""A backfill of six days over two Celery workers, one of them killed in the middle: missed, repeated, exact.

Real: Redis, two workers, a code server, one daemon, PostgreSQL. The kill hits a run in mid-transaction: somebody else
holds the refresh lock meanwhile, so that both workers stand in the middle of a day at that moment. The lock is held until the
kill is noticed, so that the daemon alone has work to do and the time it takes is its own.
"""

from __future__ import annotations

import datetime as dt
import random
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import dagster as dg
import psycopg
import pytest
import sqlalchemy as sa
from celery_hosts import WITHOUT_REDIS, Hosts, listens
from dagster._core.execution.backfill import BULK_ACTION_TERMINAL_STATUSES, BulkActionStatus, PartitionBackfill
from dagster._core.storage.tags import PARENT_RUN_ID_TAG, PARTITION_NAME_TAG
from exactness import assert_exact, graph
from telemetry_rows import NOON, insert, row
from test_rebuild import contents, spoil

from flywheel_pipeline.aggregates.refresh import refresh
from flywheel_pipeline.build import build_defs
from flywheel_pipeline.run import dagster_instance

DAYS = 6
BACKFILL = "six-days"
NOTICED_SECONDS = 30
AT_ONCE = 2  # of three slots, one is left to the minute path

pytestmark = [WITHOUT_REDIS, pytest.mark.long, pytest.mark.daemon, pytest.mark.timeout(420)]


@pytest.fixture
def fleet(engine: sa.Engine) -> sa.Engine:
    """Twelve hundred executions on three sites over six days, counted."""
    pick = random.Random(6)
    with engine.begin() as connection:
        insert(
            connection,
            [
                row(
                    at=NOON + dt.timedelta(days=pick.randrange(DAYS), minutes=pick.randrange(600)),
                    site_id=f"site-{pick.choice('abc')}",
                    hostname=f"h{pick.randrange(9)}",
                    success=pick.random() < 0.7,
                    resolution_level=pick.choice(["L1", "L2"]),
                )
                for _ in range(1200)
            ],
        )
        refresh(connection, graph())
    return engine


@pytest.fixture
def hosts(fleet: sa.Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hosts]:
    """Redis, a code server, a daemon and two workers of two runs each; three slots, two of them for backfills."""
    started = Hosts(tmp_path, fleet.url, run_slots=3)
    try:
        for name, value in started.environment.items():
            monkeypatch.setenv(name, value)
        started.node("code")
        for worker in ("east", "west"):
            started.node("worker", worker, concurrency=2)
        started.until(lambda: listens(started.code_port), 60, "the code server")
        started.node("daemon")
        yield started
    finally:
        started.stop()


def request_backfill(instance: dg.DagsterInstance, days: list[str]) -> None:
    """What the UI's button does."""
    instance.add_backfill(
        PartitionBackfill.from_asset_partitions(
            backfill_id=BACKFILL,
            asset_graph=build_defs().resolve_asset_graph(),
            partition_names=days,
            asset_selection=[dg.AssetKey("day_backfill")],
            backfill_timestamp=time.time(),
            tags={},
            dynamic_partitions_store=instance,
            all_partitions=False,
            title=None,
            description=None,
            run_config=None,
        )
    )


def runs_of(instance: dg.DagsterInstance) -> list[dg.DagsterRun]:
    """The runs of the backfill, retries among them."""
    return list(instance.get_runs(dg.RunsFilter(tags={"dagster/backfill": BACKFILL})))


def steps(instance: dg.DagsterInstance, run: dg.DagsterRun, kind: dg.DagsterEventType) -> int:
    """How many steps of this run have an event of this kind."""
    return len(instance.all_logs(run.run_id, of_type=kind))


def worker_of(instance: dg.DagsterInstance, run: dg.DagsterRun) -> str:
    """The Celery worker that has this run, by its node name without the host."""
    launcher = instance.run_launcher
    task = launcher.celery.AsyncResult(run.tags["dagster-celery/task_id"])  # type: ignore[attr-defined]
    return str(task.info["hostname"]).partition("@")[0]


def waiting(connection: psycopg.Connection[tuple[int]]) -> int:
    """How many refreshes wait for the lock that this connection holds."""
    row = connection.execute(
        "SELECT count(*) FROM pg_locks AS w JOIN pg_locks AS h USING (database, classid, objid, objsubid) "
        "WHERE w.locktype = 'advisory' AND NOT w.granted AND h.granted AND h.pid = pg_backend_pid()"
    ).fetchone()
    assert row is not None
    return row[0]


def test_a_worker_killed_in_mid_backfill_is_missed_and_only_its_days_are_computed_again(
    fleet: sa.Engine, hosts: Hosts
) -> None:
    right = contents(fleet)
    spoil(fleet)
    assert contents(fleet) != right
    days = sorted({str(cell[1]) for cell in right["telemetry_daily_volume"]})
    assert len(days) == DAYS
    with dagster_instance(fleet.url, hosts.settings()) as instance:
        assert type(instance.run_launcher).__name__ == "WatchedCeleryRunLauncher"
        request_backfill(instance, days)

        def done() -> list[dg.DagsterRun]:
            return [run for run in runs_of(instance) if run.status == dg.DagsterRunStatus.SUCCESS]

        hosts.until(lambda: done(), 120, "the first day")
        url = fleet.url.set(drivername="postgresql").render_as_string(hide_password=False)
        with psycopg.connect(url) as other:
            other.execute("SELECT flywheel_lock_refresh()")
            hosts.until(lambda: waiting(other) == AT_ONCE, 60, "that both slots stand in the middle of a day")
            before = {run.run_id for run in done()}
            assert 0 < len(before) < DAYS
            running = [run for run in runs_of(instance) if run.status == dg.DagsterRunStatus.STARTED]
            assert [steps(instance, run, dg.DagsterEventType.STEP_START) for run in running] == [1] * AT_ONCE
            victim = worker_of(instance, running[0])
            killed = [run.run_id for run in running if worker_of(instance, run) == victim]
            hosts.kill(victim)
            killed_at = time.time()

            def missed() -> bool:
                states = [instance.get_run_by_id(run_id).status for run_id in killed]  # type: ignore[union-attr]
                return all(status == dg.DagsterRunStatus.FAILURE for status in states)

            hosts.until(missed, 4 * NOTICED_SECONDS, "that the worker is gone")
        failures = [instance.all_logs(run_id, of_type=dg.DagsterEventType.RUN_FAILURE) for run_id in killed]
        for (failure,) in failures:
            assert victim in failure.message
            assert "lock in the database" in failure.message
        # By the daemon's own record of it, not by when this test came to ask.
        noticed = max(failure.timestamp for (failure,) in failures) - killed_at
        print(f"\nnoticed after {noticed:.1f} s: {len(killed)} of {DAYS} days were on the killed worker")
        assert noticed <= NOTICED_SECONDS

        def over() -> bool:
            found = instance.get_backfill(BACKFILL)
            return found is not None and found.status in BULK_ACTION_TERMINAL_STATUSES

        rest = hosts.until(over, 180, "the end of the backfill")
        print(f"the backfill ended {rest:.1f} s later")
        backfill = instance.get_backfill(BACKFILL)
        assert backfill is not None
        assert backfill.status == BulkActionStatus.COMPLETED_SUCCESS

        runs = runs_of(instance)
        assert len(runs) == DAYS + len(killed)
        assert sorted(run.tags[PARENT_RUN_ID_TAG] for run in runs if PARENT_RUN_ID_TAG in run.tags) == sorted(killed)
        succeeded = Counter(
            run.tags[PARTITION_NAME_TAG]
            for run in runs
            for _ in range(steps(instance, run, dg.DagsterEventType.STEP_SUCCESS))
        )
        assert succeeded == Counter(days), "each day's step was done once"
        assert before <= {run.run_id for run in done()}
    assert contents(fleet) == right
    assert_exact(fleet)
