"""Upgrades from every earlier revision, with data, while writers write: nothing is lost, and nobody waits for long.

The database stands at an earlier revision with this release's routines and models as far as that revision can hold them,
all marked as of an older content: so the upgrade changes everything that it may ever have to change under writers.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import psycopg
import pytest
import sqlalchemy as sa
from alembic import command
from exactness import assert_exact, graph
from fault_lab import broken_invariants, refresh_once, until
from telemetry_rows import NOON, insert, row

from flywheel_pipeline.database import declared, migrate
from flywheel_pipeline.errors import DatabaseUnavailable

REVISIONS = [script.revision for script in reversed(list(declared.scripts().walk_revisions()))]
# The first one has the longest way; the others are on it.
EACH = [REVISIONS[0], REVISIONS[-1], *(pytest.param(r, marks=pytest.mark.long) for r in REVISIONS[1:-1])]
EXCLUSIVE = ("ShareLock", "ShareRowExclusiveLock", "ExclusiveLock", "AccessExclusiveLock")


def at_revision(engine: sa.Engine, revision: str) -> None:
    """Make the schema of this revision, with routines and models that look as if an older release had made them."""
    with engine.begin() as connection:
        connection.exec_driver_sql("SET LOCAL search_path = public")
        list(migrate.create_dagster_schema(connection))
        config = declared.alembic_config()
        config.attributes.update(connection=connection, on_version_apply=None)
        command.upgrade(config, revision)
        connection.exec_driver_sql("SET LOCAL check_function_bodies = off")
        for routine in declared.routines():
            # A routine of today may need a column of tomorrow; the outbox is needed by the writers below.
            savepoint = connection.begin_nested()
            try:
                declared.execute_routine(connection, routine)
                savepoint.commit()
            except (sa.exc.DBAPIError, psycopg.Error):
                savepoint.rollback()
        triggers = connection.exec_driver_sql(
            "SELECT count(*) FROM pg_trigger WHERE tgrelid = 'execution_telemetry'::regclass AND tgname LIKE 'flywheel_touch%%'"
        ).scalar_one()
        assert triggers == 4


@dataclass
class Waits:
    """How long writers waited for their commits, and how long who held which lock on telemetry (seconds)."""

    acknowledged: list[str] = field(default_factory=list)
    commits: list[float] = field(default_factory=list)
    held: dict[str, float] = field(default_factory=dict)


@contextmanager
def writing(engine: sa.Engine, writers: int = 3) -> Iterator[Waits]:
    """Writers that commit one batch after the other, and a watcher of locks, as long as the context lasts."""
    done, waits, errors = threading.Event(), Waits(), []

    def write(number: int) -> None:
        try:
            while not done.is_set():
                rows = [
                    row(site_id=f"site-{number}", hostname=f"h{n}", at=NOON.replace(day=3 + n % 3)) for n in range(5)
                ]
                begun = time.monotonic()
                with engine.begin() as connection:
                    ids = insert(connection, rows)
                waits.commits.append(time.monotonic() - begun)
                waits.acknowledged += ids
        except BaseException as error:  # noqa: BLE001 (raised again below)
            errors.append(error)

    def watch() -> None:
        first: dict[tuple[int, str], float] = {}
        with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
            while not done.is_set():
                for pid, mode in connection.execute(
                    sa.text(
                        "SELECT pid, mode FROM pg_locks WHERE relation = 'execution_telemetry'::regclass AND granted "
                        "AND mode = ANY (:modes)"
                    ),
                    {"modes": list(EXCLUSIVE)},
                ):
                    seen = first.setdefault((pid, mode), time.monotonic())
                    waits.held[mode] = max(waits.held.get(mode, 0.0), time.monotonic() - seen)
                time.sleep(0.002)

    threads = [threading.Thread(target=write, args=[n], daemon=True) for n in range(writers)]
    threads.append(threading.Thread(target=watch, daemon=True))
    for thread in threads:
        thread.start()
    try:
        time.sleep(0.2)
        yield waits
        time.sleep(0.2)
    finally:
        done.set()
        for thread in threads:
            thread.join(30)
    if errors:
        raise errors[0]


@pytest.mark.parametrize("revision", EACH)
def test_a_populated_database_of_each_revision_upgrades_under_writers(
    empty_engine: sa.Engine, revision: str, record_property: pytest.RecordProperty
) -> None:
    at_revision(empty_engine, revision)
    with empty_engine.begin() as connection:
        before = insert(connection, [row(hostname=f"h{n % 5}", success=n % 3 > 0) for n in range(300)])
    with writing(empty_engine) as waits:
        report = migrate.upgrade(empty_engine)
    assert any(change.startswith("routine") for change in report.changes)
    assert any(change.startswith("migration") for change in report.changes) == (revision != REVISIONS[-1])
    record_property("longest_wait_of_a_writer_seconds", round(max(waits.commits), 3))
    record_property("locks_held_seconds", {mode: round(s, 3) for mode, s in waits.held.items()})
    print(f"{revision} -> {REVISIONS[-1]}: longest wait {max(waits.commits):.3f} s, locks on telemetry {waits.held}")

    assert migrate.check(empty_engine) == []
    assert migrate.upgrade(empty_engine).changes == ()
    refresh_once(empty_engine, graph())
    with empty_engine.connect() as connection:
        kept = set(connection.exec_driver_sql("SELECT execution_id FROM execution_telemetry").scalars())
    assert kept == {*before, *waits.acknowledged}
    assert_exact(empty_engine)
    assert broken_invariants(empty_engine, deep=True) == {}


def test_an_upgrade_does_not_queue_the_writers_behind_a_long_reader(engine: sa.Engine) -> None:
    with engine.begin() as connection:
        connection.exec_driver_sql("UPDATE schema_objects SET content_hash = 'older' WHERE kind = 'routine'")
    told: list[str] = []
    with engine.connect() as reader, writing(engine) as waits:
        landed: list[int] = []

        def let_a_writer_pass(change: str) -> None:
            told.append(change)
            if "stepping back" in change:
                # The upgrade has let go of its place in the queue, and the reader is still there: writers must get by.
                before = len(waits.commits)
                until(lambda: len(waits.commits) > before, 60, "a commit of a writer between two tries")
                landed.append(len(waits.commits) - before)

        reader.exec_driver_sql("SELECT count(*) FROM execution_telemetry")  # and it stays in its transaction
        with pytest.raises(DatabaseUnavailable, match="could not lock") as refused:
            migrate.upgrade(engine, progress=let_a_writer_pass, patience_seconds=4.0, lock_timeout_seconds=0.3)
        assert landed != []
        assert refused.value.hint is not None
        assert "flywheel" in refused.value.hint  # it names who holds the lock
        reader.rollback()
        report = migrate.upgrade(engine)
    assert any(change.startswith("routine") for change in report.changes)
    refresh_once(engine, graph())
    assert_exact(engine)
