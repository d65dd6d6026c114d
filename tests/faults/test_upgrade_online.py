"""Upgrades from every earlier revision, with data, while writers write: nothing is lost, and nobody waits for long.

How long the lock on telemetry lasts is the machine's; that no row is read under it, so that it lasts no longer for more of
them, is not. Controls show that these tests see an upgrade in one transaction, and one whose first says that all is done.

The database stands at an earlier revision with this release's routines and models as far as that revision can hold them,
all marked as of an older content: so the upgrade changes everything that it may ever have to change under writers.
"""

from __future__ import annotations

import datetime as dt
import json
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Final

import psycopg
import pytest
import sqlalchemy as sa
from alembic import command
from exactness import assert_exact, graph
from fault_lab import broken_invariants, refresh_once, until
from fleet_database import NOON as FLEET_NOON
from fleet_database import Fleet
from telemetry_rows import NOON, insert, row

from flywheel_pipeline.database import declared, migrate
from flywheel_pipeline.database.current import require_current
from flywheel_pipeline.database.engine import open_engine
from flywheel_pipeline.database.tables import metadata
from flywheel_pipeline.delivery.publish import acknowledge_command, queue_commands, take_commands, write_manifests
from flywheel_pipeline.errors import DatabaseUnavailable, SchemaMismatch

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


# Not taken over: what the upgrade itself makes, or the writers do.
_OF_THE_UPGRADE: Final = {"execution_telemetry", "touched_cells", "schema_objects", "outcome_class_rules", "runbooks"}


def serve(engine: sa.Engine) -> None:
    """Rules, one quarantined and one at its second version, their manifests, commands in every state, rejects."""
    with engine.begin() as connection:
        connection.exec_driver_sql(
            "INSERT INTO telemetry_rejects (source, line_number, reason_code, reason, payload, payload_bytes, payload_hash, status) "
            "VALUES ('a.ndjson', 1, 'invalid_json', 'no JSON', '{', 1, 'a', 'open'), "
            "('appliance:site-a-01', NULL, 'invalid_json', 'no JSON', '[', 400, 'b', 'discarded')"
        )
        fleet = Fleet(connection)
        for appliance in ("site-a-01", "site-a-02", "site-b-01"):
            fleet.appliance(appliance, agent_version="1.0.56" if appliance == "site-b-01" else "1.0.70")
        for rule_id in ("RB-AUTO-FIREWALL", "RB-AUTO-SSH", "RB-AUTO-SERVICE"):
            fleet.rule(rule_id, incident_pattern={"incident_type": rule_id.lower()})
        for hour in range(3):
            clock = FLEET_NOON + dt.timedelta(hours=hour)
            batch = fleet.batch(clock)
            write_manifests(connection, batch)
            queue_commands(connection, batch)
            if hour == 0:
                taken = take_commands(connection, "site-a-01", clock)
                acknowledge_command(connection, "site-a-01", taken[0].id, clock)
                fleet.quarantine("RB-AUTO-FIREWALL")
                fleet.quarantine("RB-AUTO-SSH")
                fleet.promote_again("RB-AUTO-SSH")


def rows_of(connection: sa.Connection, relation: str) -> list[dict[str, Any]]:
    return list(connection.exec_driver_sql(f"SELECT to_jsonb(t) FROM {relation} t ORDER BY t::text").scalars())


def take_over(donor: sa.Connection, connection: sa.Connection) -> dict[str, list[str]]:
    """Copy the donor's rows into the tables of an earlier revision; return the columns they have there, by table."""
    connection.exec_driver_sql("SET LOCAL session_replication_role = replica")  # the rows are consistent as they are
    taken: dict[str, list[str]] = {}
    for table in sa.inspect(connection).get_table_names("public"):
        relation = table
        if table == "manifest_contents":
            relation = "(SELECT c.*, flywheel_manifest_rules(entry_ids) AS rules FROM manifest_contents c)"
        known = table == "rule_manifests" or table in metadata.tables
        if not known or table in _OF_THE_UPGRADE or not (rows := rows_of(donor, relation)):
            continue
        found = [c for c in sa.inspect(connection).get_columns(table) if c["name"] in rows[0] and "computed" not in c]
        columns = [column["name"] for column in found]
        listed = ", ".join(columns)
        connection.execute(
            sa.text(
                f"INSERT INTO {table} ({listed}) OVERRIDING SYSTEM VALUE "
                f"SELECT {listed} FROM jsonb_populate_recordset(NULL::{table}, CAST(:rows AS jsonb)) ON CONFLICT DO NOTHING"
            ),
            {"rows": json.dumps(rows)},
        )
        for column in (c["name"] for c in found if "identity" in c):
            connection.exec_driver_sql(
                f"SELECT setval(pg_get_serial_sequence('{table}', '{column}'), (SELECT max({column}) FROM {table}))"
            )
        taken[table] = columns
    connection.exec_driver_sql("SET LOCAL session_replication_role = origin")
    return taken


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


@dataclass
class Transaction:
    """What a transaction held and had read when it committed."""

    exclusive: list[str]  # locks on telemetry that writers wait for
    rows_read: dict[str, int]  # by table, none without a row


@contextmanager
def transactions_of(engine: sa.Engine) -> Iterator[list[Transaction]]:
    """Note every transaction that commits on this engine."""
    seen: list[Transaction] = []

    def note(connection: sa.Connection) -> None:
        cursor = connection.connection.cursor()
        cursor.execute(
            "SELECT mode FROM pg_locks WHERE relation = to_regclass('public.execution_telemetry') AND granted "
            "AND pid = pg_backend_pid() AND mode = ANY (%s)",
            (list(EXCLUSIVE),),
        )
        exclusive = [mode for (mode,) in cursor.fetchall()]
        cursor.execute(
            "SELECT relname, coalesce(seq_tup_read, 0) + coalesce(idx_tup_fetch, 0) FROM pg_stat_xact_user_tables "
            "WHERE schemaname = 'public' AND seq_tup_read + coalesce(idx_tup_fetch, 0) > 0"
        )
        seen.append(Transaction(exclusive, dict(cursor.fetchall())))
        cursor.execute("SELECT pg_stat_force_next_flush()")  # the next transaction begins to count at nothing

    sa.event.listen(engine, "commit", note)
    try:
        yield seen
    finally:
        sa.event.remove(engine, "commit", note)


def read_under_lock(transactions: list[Transaction]) -> Counter[str]:
    """Rows read, by table, in transactions that kept writers of telemetry waiting: what makes the wait grow with them."""
    return sum((Counter(t.rows_read) for t in transactions if t.exclusive), Counter())


@contextmanager
def upgrading(engine: sa.Engine) -> Iterator[sa.Engine]:
    """An engine for the upgrade alone, as its command has one."""
    own = open_engine(engine.url)
    try:
        yield own
    finally:
        own.dispose()


@pytest.fixture
def counted(engine: sa.Engine) -> sa.Engine:
    """A database with telemetry of which everything is computed, as an older release with fewer class rules did."""
    with engine.begin() as connection:
        connection.exec_driver_sql("DELETE FROM outcome_class_rules WHERE rule_name = 'unknown_action'")
        insert(
            connection, [row(hostname=f"h{n % 5}", at=NOON.replace(day=2 + n % 9), **SOME[n % 3]) for n in range(300)]
        )
    refresh_once(engine, graph())
    with engine.begin() as connection:
        # An older SELECT gave other figures, and the table is as it was.
        connection.exec_driver_sql("UPDATE rule_daily_stats SET raw_failures = raw_failures + 1")
        connection.exec_driver_sql("UPDATE schema_objects SET content_hash = 'older'")
    return engine


SOME: Final = ({}, {"success": False, "error_message": "Unknown action: run_windows_runbook"}, {"success": False})
IN_ONE: Final = (tuple(step for part in migrate.PARTS for step in part),)


def test_no_row_is_read_under_a_lock_that_writers_wait_for(counted: sa.Engine) -> None:
    growing = {
        "execution_telemetry",
        "touched_cells",
        *(model.name for model in graph() if model.materialized != "view"),
    }
    with upgrading(counted) as own, transactions_of(own) as transactions:
        report = migrate.upgrade(own)
    assert {change.split()[0] for change in report.changes} == {"routine", "model", "grants", "seed"}
    assert read_under_lock(transactions).keys() & growing == set()
    assert [bool(t.exclusive) for t in transactions] == [True, False]
    assert transactions[1].rows_read["execution_telemetry"] >= 300


def test_control_in_one_transaction_every_row_is_read_under_the_lock(
    counted: sa.Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(migrate, "PARTS", IN_ONE)
    with upgrading(counted) as own, transactions_of(own) as transactions:
        migrate.upgrade(own)
    assert read_under_lock(transactions)["execution_telemetry"] >= 300


def upgrade_and_write_into_its_scans(engine: sa.Engine, lock_timeout: str) -> dict[str, set[bool]]:
    """Upgrade, and insert, correct and delete beside each statement that scans; say whether that could commit, by scan."""
    committed: dict[str, set[bool]] = {}

    def write(*event: Any) -> None:
        scan = next((s for s in ("flywheel_touch_all", "INSERT INTO outcome_class_rules") if s in str(event[2])), None)
        if scan is None:
            return
        # All that the scan locks is locked, before it or after, and its transaction is open.
        try:
            with engine.begin() as connection:
                connection.exec_driver_sql(f"SET LOCAL lock_timeout = '{lock_timeout}'")
                insert(connection, [row(site_id="site-new", at=NOON.replace(day=20 + n), **SOME[n]) for n in range(3)])
                connection.exec_driver_sql(
                    "UPDATE execution_telemetry SET success = NOT success, site_id = 'site-b' "
                    "WHERE id IN (SELECT id FROM execution_telemetry WHERE site_id = 'site-a' ORDER BY id LIMIT 1)"
                )
                connection.exec_driver_sql(
                    "DELETE FROM execution_telemetry WHERE id = (SELECT max(id) - 1 FROM execution_telemetry)"
                )
            committed.setdefault(scan, set()).add(True)
        except sa.exc.OperationalError as error:
            if not isinstance(error.orig, psycopg.errors.LockNotAvailable):
                raise
            committed.setdefault(scan, set()).add(False)

    with upgrading(engine) as own:
        for event in ("before_cursor_execute", "after_cursor_execute"):
            sa.event.listen(own, event, write)
        migrate.upgrade(own)
    return committed


def test_what_is_written_while_an_upgrade_scans_is_neither_kept_waiting_nor_missed(counted: sa.Engine) -> None:
    committed = upgrade_and_write_into_its_scans(counted, "30s")
    assert committed == {"flywheel_touch_all": {True}, "INSERT INTO outcome_class_rules": {True}}
    refresh_once(counted, graph())
    assert_exact(counted)


def test_control_in_one_transaction_a_scan_keeps_writers_waiting(
    counted: sa.Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(migrate, "PARTS", IN_ONE)
    committed = upgrade_and_write_into_its_scans(counted, "10ms")
    assert committed == {"flywheel_touch_all": {False}, "INSERT INTO outcome_class_rules": {False}}


class Ended(BaseException):
    """The upgrade's process ends here."""


def end_an_upgrade(engine: sa.Engine, when: str) -> None:
    """Let an upgrade commit its first transaction, and end it before the second or at the end of that."""
    begun: list[sa.Connection] = []

    def begin(connection: sa.Connection) -> None:
        begun.append(connection)
        if when == "between" and len(begun) == 2:
            raise Ended

    def progress(change: str) -> None:
        if when == "late" and change.startswith("seed builtin_rules"):
            raise Ended

    with upgrading(engine) as own:
        sa.event.listen(own, "begin", begin)
        with pytest.raises(Ended):
            migrate.upgrade(own, progress=progress)
    assert len(begun) == 2


@pytest.mark.parametrize("when", ["between", "late"])
def test_an_upgrade_that_ends_half_way_is_refused_until_the_next_completes_it(counted: sa.Engine, when: str) -> None:
    end_an_upgrade(counted, when)
    with counted.begin() as connection:
        insert(connection, [row(site_id="site-b", **SOME[n]) for n in range(3)])
        connection.exec_driver_sql("UPDATE execution_telemetry SET success = NOT success WHERE hostname = 'h1'")
    with counted.connect() as connection, pytest.raises(SchemaMismatch, match="does not hold this release's model"):
        require_current(connection)
    with pytest.raises(SchemaMismatch, match="other SQL models"):
        refresh_once(counted, graph())
    assert {found.problem for found in migrate.check(counted)} == {"not computed"}

    changes = migrate.upgrade(counted).changes
    assert [change.split()[0] for change in changes] == ["model", "seed", "seed", "seed"]  # and no routine again
    assert migrate.check(counted) == []
    assert migrate.upgrade(counted).changes == ()
    refresh_once(counted, graph())
    assert_exact(counted)


def test_control_a_first_transaction_that_calls_itself_complete_leaves_old_figures(counted: sa.Engine) -> None:
    end_an_upgrade(counted, "between")
    with counted.begin() as connection:
        for model in graph():
            connection.execute(
                sa.text("UPDATE schema_objects SET content_hash = :hash WHERE kind = 'model' AND name = :name"),
                {"hash": model.content_hash, "name": model.name},
            )
    migrate.upgrade(counted)
    refresh_once(counted, graph())
    with pytest.raises(AssertionError):
        assert_exact(counted)


@pytest.mark.parametrize("revision", EACH)
def test_a_populated_database_of_each_revision_upgrades_under_writers(
    engine: sa.Engine, empty_engine: sa.Engine, revision: str, record_property: pytest.RecordProperty
) -> None:
    serve(engine)
    at_revision(empty_engine, revision)
    with engine.connect() as donor, empty_engine.begin() as connection:
        taken = take_over(donor, connection)
        before = insert(connection, [row(hostname=f"h{n % 5}", success=n % 3 > 0) for n in range(300)])
    with upgrading(empty_engine) as own, transactions_of(own) as transactions, writing(empty_engine) as waits:
        report = migrate.upgrade(own)
    assert any(change.startswith("routine") for change in report.changes)
    assert any(change.startswith("migration") for change in report.changes) == (revision != REVISIONS[-1])
    record_property("longest_wait_of_a_writer_seconds", round(max(waits.commits), 3))
    record_property("locks_held_seconds", {mode: round(s, 3) for mode, s in waits.held.items()})
    print(f"{revision} -> {REVISIONS[-1]}: longest wait {max(waits.commits):.3f} s, locks on telemetry {waits.held}")

    assert read_under_lock(transactions)["execution_telemetry"] == 0
    assert transactions[-1].rows_read["execution_telemetry"] >= 300
    assert migrate.check(empty_engine) == []
    assert migrate.upgrade(empty_engine).changes == ()
    assert {"rule_events", "l1_rules", "appliance_commands", "refresh_batches", "promotion_decisions"} <= taken.keys()
    assert "telemetry_rejects" in taken
    with engine.connect() as donor, empty_engine.connect() as connection:
        taken["rule_manifests"] = ["rules", "withheld", "manifest_hash", "site_id"]
        taken["appliance_commands"].append("told_at")  # what 0005 concludes
        for table, columns in taken.items():
            listed = ", ".join(c for c in dict.fromkeys(columns) if (table, c) != ("manifest_contents", "rules"))
            relation = f"(SELECT {listed} FROM {table})"
            assert rows_of(connection, relation) == rows_of(donor, relation), table
    refresh_once(empty_engine, graph())
    with empty_engine.connect() as connection:
        kept = set(connection.exec_driver_sql("SELECT execution_id FROM execution_telemetry").scalars())
    assert kept == {*before, *waits.acknowledged}
    assert_exact(empty_engine)
    # All but the fifth: the decision of `serve` names a policy that nobody wrote.
    assert broken_invariants(empty_engine, deep=True, invariants=[n for n in range(1, 13) if n != 5]) == {}


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
