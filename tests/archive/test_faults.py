"""Faults for real: an export killed in the middle, writers beside it, a purge beside it, a role that may not."""

from __future__ import annotations

import datetime as dt
import os
import random
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from archived_fleet import DAY, GRAPH, NOON, TODAY, in_archive, in_postgresql, row, settle, state_of, write
from fsspec.implementations.local import LocalFileSystem

from flywheel_pipeline.aggregates.refresh import purge, refresh
from flywheel_pipeline.archive.days import State, day_states, exclude_others
from flywheel_pipeline.archive.errors import NothingToArchive
from flywheel_pipeline.archive.export import export_day, export_due
from flywheel_pipeline.archive.layout import TABLES, Archive
from flywheel_pipeline.archive.sweep import sweep
from flywheel_pipeline.database import roles
from flywheel_pipeline.database.engine import open_engine
from flywheel_pipeline.errors import DatabaseUnavailable

# The export itself, stopped after its first row group: what is killed has written half of a file.
EXPORT_AND_WAIT = """
import datetime as dt, sys, time
from flywheel_pipeline.archive import parquet, stream
from flywheel_pipeline.archive.export import export_day
from flywheel_pipeline.archive.layout import Archive
from flywheel_pipeline.database.engine import open_engine
from flywheel_pipeline.errors import DatabaseUnavailable
parquet.GROUP_BYTES = 1 << 17
stream.BATCH_BYTES = 1 << 15
def stop(day, rows, of):
    assert 0 < rows < of
    print(rows, flush=True)
    if rows > of / 2:
        time.sleep(600)
export_day(open_engine(sys.argv[1]), Archive.open(sys.argv[2], create=True), dt.date.fromisoformat(sys.argv[3]), progress=stop)
"""


def fill(engine: sa.Engine, rows: int, *, prefix: str = "e") -> None:
    with engine.begin() as connection:
        connection.execute(
            sa.text(
                "INSERT INTO execution_telemetry (execution_id, site_id, runbook_id, hostname, success, started_at, error_message) "
                "SELECT :prefix || n, 's' || n % 3, 'L1-X', 'h', true, '2026-02-02 12:00+00', repeat(md5(n::text), 10) "
                "FROM generate_series(1, :rows) AS n"
            ),
            {"prefix": prefix, "rows": rows},
        )
    settle(engine)


@pytest.mark.parametrize("before", ["nothing", "an older export"])
def test_an_export_killed_in_the_middle_leaves_the_old_day_whole(
    engine: sa.Engine, database_url: str, folder: Archive, before: str
) -> None:
    write(engine, row())
    settle(engine)
    if before != "nothing":
        export_day(engine, folder, DAY)
    fill(engine, 3000)
    process = subprocess.Popen(
        [sys.executable, "-c", EXPORT_AND_WAIT, database_url, folder.root, DAY.isoformat()],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
    )
    assert process.stdout is not None
    while int(process.stdout.readline()) <= 1500:
        pass
    half_written = set(Path(folder.root, "executions").rglob("*.parquet"))
    process.send_signal(signal.SIGKILL)
    process.wait()
    if before == "nothing":
        assert folder.days() == []
        assert state_of(engine, folder).state is State.BROKEN
    else:
        assert [values["hostname"] for values in in_archive(folder, "executions")] == ["host-1"]
        folder.verify(DAY)
        assert state_of(engine, folder).state is State.CORRECTED
    (made,) = export_due(engine, folder, today=TODAY, after_days=1).exported
    assert made.rows == 3001
    folder.verify(DAY)
    named = {Path(folder.full_path(file.path)) for file in folder.manifest(DAY).files_}
    swept = {Path(folder.full_path(remains.path)) for remains in sweep(engine, folder, grace_hours=0)}
    assert swept == half_written - named
    assert swept
    folder.verify(DAY)


def test_with_writers_and_refreshes_beside_it_no_day_is_called_up_to_date_that_is_not(
    engine: sa.Engine, folder: Archive
) -> None:
    days = [DAY, DAY + dt.timedelta(days=1)]
    for day in range(2):
        write(engine, *(row(at=NOON + dt.timedelta(days=day), execution_id=f"{day}-{n}") for n in range(20)))
    settle(engine)
    stopped = threading.Event()
    failures: list[BaseException] = []

    def writer(number: int) -> None:
        chance = random.Random(number)
        own = sa.create_engine(engine.url)
        try:
            for turn in range(10_000):
                if stopped.is_set():
                    return
                day = chance.randrange(2)
                with own.connect() as connection:
                    transaction = connection.begin()
                    at = NOON + dt.timedelta(days=day)
                    if day == 1 and chance.random() < 0.5:  # of the first day no row is added: its number tells nothing
                        values = row(at=at, execution_id=f"w{number}-{turn}")
                        connection.execute(
                            sa.insert(sa.table("execution_telemetry", *map(sa.column, values))).values(values)
                        )
                    else:
                        kind = (
                            "SET success = NOT success"
                            if chance.random() < 0.7
                            else "SET started_at = started_at + interval '1 minute'"
                        )
                        connection.execute(
                            sa.text(f"UPDATE execution_telemetry {kind} WHERE execution_id = :id"),
                            {"id": f"{day}-{number * 5 + chance.randrange(5)}"},
                        )
                    time.sleep(chance.random() * 0.05)  # long enough for an export to begin and end in between
                    if chance.random() < 0.2:
                        transaction.rollback()
                    else:
                        transaction.commit()
                time.sleep(0.2 + chance.random())  # now and then nothing waits
        except BaseException as error:  # noqa: BLE001 (shown by the test)
            failures.append(error)
        finally:
            own.dispose()

    def refresher() -> None:
        try:
            while not stopped.is_set():
                with engine.begin() as connection:
                    refresh(connection, GRAPH)
        except BaseException as error:  # noqa: BLE001 (shown by the test)
            failures.append(error)

    threads = [threading.Thread(target=writer, args=(n,)) for n in range(2)] + [threading.Thread(target=refresher)]
    for thread in threads:
        thread.start()
    looks = up_to_date = exports = 0
    until = time.monotonic() + 120  # 5 s here; a slow machine at its limit may take its time
    try:
        while (up_to_date < 4 or exports < 6) and time.monotonic() < until:
            with engine.connect() as connection:
                due = [s.day for s in day_states(connection, folder, today=TODAY, after_days=1) if s.waits]
            for day in due:
                exports += _exported(engine, folder, day)
            # In one snapshot: what is said of each day, and its rows.
            with engine.connect().execution_options(isolation_level="REPEATABLE READ") as connection:
                for state in day_states(connection, folder, today=TODAY, after_days=1):
                    looks += 1
                    if state.state is State.ARCHIVED:
                        up_to_date += 1
                        for table in TABLES:
                            assert in_archive(folder, table, state.day) == in_postgresql(connection, table, state.day)
    finally:
        stopped.set()
        for thread in threads:
            thread.join()
    assert failures == []
    assert exports >= 6
    assert looks > up_to_date >= 4
    settle(engine)
    export_due(engine, folder, today=TODAY, after_days=1)
    with engine.connect() as connection:
        for day in days:
            folder.verify(day)
            for table in TABLES:
                assert in_archive(folder, table, day) == in_postgresql(connection, table, day)


def _exported(engine: sa.Engine, archive: Archive, day: dt.date) -> bool:
    try:
        export_day(engine, archive, day)
    except NothingToArchive:  # a writer was faster
        return False
    return True


def _wait_for_the_export_at_the_lock(engine: sa.Engine, export: threading.Thread) -> None:
    """Return when the export stands at the lock on `day_versions`; fail where it ends without, or never comes to it."""
    until = time.monotonic() + 120  # a slow machine at its limit
    while time.monotonic() < until:
        with engine.connect() as connection:
            waiting = connection.exec_driver_sql(
                "SELECT count(*) FROM pg_locks WHERE relation = 'day_versions'::regclass AND NOT granted "
                "AND database = (SELECT oid FROM pg_database WHERE datname = current_database())"
            ).scalar_one()
        if waiting == 1:
            return
        assert export.is_alive(), "the export waited for nobody"
        time.sleep(0.02)
    pytest.fail("the export never came to the lock")


def test_who_exports_waits_for_who_purges_and_sees_what_he_did(engine: sa.Engine, folder: Archive) -> None:
    write(engine, row())
    settle(engine)
    export_day(engine, folder, DAY)
    outcome: list[str] = []

    def export() -> None:
        try:
            export_day(engine, folder, DAY)
            outcome.append("exported")
        except Exception as error:  # noqa: BLE001 (shown by the test)
            outcome.append(type(error).__name__)

    with engine.begin() as connection:
        exclude_others(connection)
        connection.execute(
            sa.text("INSERT INTO sealed_days (day, rows_purged, actor) VALUES (:day, 1, 'test')"), {"day": DAY}
        )
        thread = threading.Thread(target=export)
        thread.start()
        _wait_for_the_export_at_the_lock(engine, thread)
        assert outcome == []
    thread.join()
    assert outcome == ["NothingToArchive"]  # its snapshot is younger than the purge


def test_the_pipelines_role_may_export_and_a_reader_may_not(engine: sa.Engine, folder: Archive) -> None:
    write(engine, row())
    settle(engine)
    limited = open_engine(engine.url.update_query_dict({"options": f"-crole={roles.PIPELINE}"}))
    assert export_day(limited, folder, DAY).rows == 1
    sweep(limited, folder)
    limited.dispose()
    for role in (roles.READER, roles.INTAKE, roles.AGENT_API):
        other = open_engine(engine.url.update_query_dict({"options": f"-crole={role}"}))
        with pytest.raises(sa.exc.ProgrammingError, match="permission denied"):
            export_day(other, folder, DAY)
        other.dispose()
    assert folder.verify(DAY).rows == 1


class SlowFolder(LocalFileSystem):
    """Files that take their time, as those of a far-away store do."""

    def open(self, *args: Any, **options: Any) -> Any:
        time.sleep(0.7)
        return super().open(*args, **options)

    def rm_file(self, path: str) -> None:
        time.sleep(0.7)
        super().rm_file(path)


def test_a_server_that_ends_idle_transactions_lets_the_archive_take_its_time(
    impatient: sa.Engine, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    Path(tmp_path, "archive").mkdir()
    slow = Archive(SlowFolder(), str(tmp_path / "archive"), "a slow folder")
    for number in range(3):
        write(impatient, row(at=NOON + dt.timedelta(days=number), execution_id=f"e-{number}"))
    with impatient.begin() as connection:  # so that corrections are read after the executions were written
        connection.exec_driver_sql("UPDATE execution_telemetry SET success = false")
    settle(impatient)
    assert len(export_due(impatient, slow, today=TODAY, after_days=1).exported) == 3
    export_day(impatient, slow, DAY)
    assert state_of(impatient, slow).state is State.ARCHIVED
    assert len(sweep(impatient, slow, grace_hours=0)) == 2
    purge(impatient, before=DAY + dt.timedelta(days=2), actor="test", archive=slow)
    assert state_of(impatient, slow).state is State.SEALED
    assert caplog.records == []  # of SQLAlchemy's pool: a connection was dead when it came back


@pytest.mark.parametrize("limit", ["transaction_timeout", "statement_timeout"])
def test_an_export_that_a_limit_of_the_server_ends_is_one_sentence(
    engine: sa.Engine, folder: Archive, limit: str
) -> None:
    write(engine, row())
    settle(engine)
    limited = open_engine(engine.url.update_query_dict({"options": f"-c{limit}=600"}))
    with engine.begin() as held:
        if limit == "statement_timeout":  # the export waits for this one
            exclude_others(held)
        with pytest.raises(DatabaseUnavailable, match=f"broke off the export: .*due to {limit.replace('_', ' ')}"):
            export_day(limited, folder, DAY, progress=lambda *_: time.sleep(1.5))
    limited.dispose()
    assert folder.days() == []


def test_an_export_that_lost_its_lock_is_not_published(engine: sa.Engine, folder: Archive) -> None:
    write(engine, row())
    settle(engine)
    administrator = sa.create_engine(engine.url, isolation_level="AUTOCOMMIT")

    def take_the_lock_away(_day: dt.date, _rows: int, _of: int) -> None:
        with administrator.connect() as connection:
            ended = connection.exec_driver_sql(
                "SELECT pg_terminate_backend(pid, 5000) FROM pg_locks WHERE relation = 'day_versions'::regclass "
                "AND mode = 'ShareUpdateExclusiveLock' AND database = (SELECT oid FROM pg_database WHERE datname = current_database())"
            ).scalars()
            assert list(ended) == [True]

    with pytest.raises(DatabaseUnavailable, match="broke off the export"):
        export_day(engine, folder, DAY, progress=take_the_lock_away)
    administrator.dispose()
    assert folder.days() == []
    assert export_day(engine, folder, DAY).rows == 1
