"""Backup and restore on real servers: in mid-run, onto another major version, and every way in which a file can be wrong."""

from __future__ import annotations

import datetime as dt
import itertools
import os
import random
import re
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import sqlalchemy as sa
from sqlalchemy import Engine

from flywheel_pipeline.aggregates.refresh import pending_cells, refresh
from flywheel_pipeline.database import migrate
from flywheel_pipeline.database.backup import backup, describing, restore
from flywheel_pipeline.database.embedded import EmbeddedServer
from flywheel_pipeline.database.engine import open_engine
from flywheel_pipeline.database.tables import execution_telemetry
from flywheel_pipeline.doctor import examine
from flywheel_pipeline.errors import FlywheelError, SchemaMismatch, UsageError

PACKAGE = Path(migrate.__file__).parents[1]
_numbers = itertools.count(1)
NOON = dt.datetime(2026, 2, 2, 12, tzinfo=dt.UTC)


def insert(engine: Engine, seed: int, count: int) -> None:
    pick = random.Random(seed)
    rows = [
        {
            "execution_id": f"b-{next(_numbers):06d}",
            "site_id": f"site-{pick.randrange(3)}",
            "hostname": f"h{pick.randrange(5)}",
            "runbook_id": pick.choice(["L1-SSH-001", "RB-AUTO-NOBODY", "L2-run_windows_runbook:RB-WIN-SEC-001"]),
            "platform": "windows",
            "incident_type": "firewall",
            "success": pick.random() < 0.8,
            "verification_passed": True,
            "started_at": NOON + dt.timedelta(hours=pick.randrange(72)),
            "created_at": NOON + dt.timedelta(hours=73),
        }
        for _ in range(count)
    ]
    with engine.begin() as connection:
        connection.execute(sa.insert(execution_telemetry).values(rows))


def figures(engine: Engine) -> list[tuple[object, ...]]:
    with engine.connect() as connection:
        return [
            tuple(row)
            for table in ("rule_site_stats", "pattern_site_stats", "episodes", "telemetry_daily_volume")
            for row in connection.exec_driver_sql(f"SELECT * FROM {table} ORDER BY 1, 2, 3, 4, 5, 6, 7, 8")
        ]


def refreshed(engine: Engine) -> list[tuple[object, ...]]:
    with engine.begin() as connection:
        refresh(connection)
        assert pending_cells(connection) == 0
    assert [item.statement for item in examine(engine, deep=True) if not item.finding.passed] == []
    return figures(engine)


def sibling(engine: Engine, server: EmbeddedServer) -> Engine:
    name = f"restored_{next(_numbers)}"
    administrator = open_engine(server.url.set(database="postgres")).execution_options(isolation_level="AUTOCOMMIT")
    with administrator.connect() as connection:
        connection.exec_driver_sql(f"CREATE DATABASE {name}")
    administrator.dispose()
    return open_engine(engine.url.set(database=name))


def test_a_backup_taken_while_a_refresh_runs_and_writers_write_goes_on_exactly(
    engine: Engine, server: EmbeddedServer, tmp_path: Path
) -> None:
    insert(engine, 1, 300)
    refreshed(engine)
    insert(engine, 2, 200)  # committed and waiting in the outbox
    stop = threading.Event()

    def write() -> None:
        for seed in itertools.count(100):
            if stop.is_set():
                return
            insert(engine, seed, 3)

    writer = threading.Thread(target=write)
    with engine.connect() as half_way, half_way.begin() as transaction:
        refresh(half_way)  # it has taken the outbox and written cells, and has not committed
        writer.start()
        described = backup(engine, tmp_path / "b.dump")
        stop.set()
        transaction.rollback()
    writer.join()
    assert described.rows["touched_cells"] > 0
    assert described.rows["execution_telemetry"] >= 500
    restored = sibling(engine, server)
    restore(restored, tmp_path / "b.dump")
    assert migrate.check(restored) == []
    with engine.begin() as connection:  # bring the original to the rows of the backup
        kept = [row[0] for row in restored.connect().exec_driver_sql("SELECT execution_id FROM execution_telemetry")]
        connection.execute(sa.text("DELETE FROM execution_telemetry WHERE execution_id <> ALL(:kept)"), {"kept": kept})
    assert refreshed(restored) == refreshed(engine)
    insert(restored, 7, 50)  # keys go on where they were
    refreshed(restored)
    restored.dispose()


def test_a_backup_moves_to_another_major_version_and_back(
    engine: Engine, server: EmbeddedServer, url: str, tmp_path: Path
) -> None:
    insert(engine, 3, 200)
    expected = refreshed(engine)
    insert(engine, 4, 20)
    backup(engine, tmp_path / "new.dump")
    administrator = open_engine(url).execution_options(isolation_level="AUTOCOMMIT")
    with administrator.connect() as connection:
        connection.exec_driver_sql("CREATE DATABASE from_newer")
    administrator.dispose()
    older = open_engine(administrator.url.set(database="from_newer"))
    restore(older, tmp_path / "new.dump")
    assert figures(older) == expected
    # Roles are the server's and no part of a dump: the upgrade creates them and gives their grants, and nothing else.
    assert {change.split()[0] for change in migrate.upgrade(older).changes} <= {"role", "grants", "schema"}
    assert migrate.upgrade(older).changes == ()
    counted = refreshed(older)
    backup(older, tmp_path / "old.dump")
    assert "p@ss" not in describing(tmp_path / "old.dump").read_text()
    newer = sibling(engine, server)
    restore(newer, tmp_path / "old.dump")
    assert figures(newer) == counted == refreshed(engine)
    older.dispose()
    newer.dispose()


def test_the_files_are_for_their_owner_alone_and_never_overwritten(engine: Engine, tmp_path: Path) -> None:
    path = tmp_path / "b.dump"
    backup(engine, path)
    assert (path.stat().st_mode & 0o777, describing(path).stat().st_mode & 0o777) == (0o600, 0o600)
    before = path.read_bytes()
    with pytest.raises(UsageError, match="exists already"):
        backup(engine, path)
    assert path.read_bytes() == before
    assert sorted(file.name for file in tmp_path.iterdir()) == ["b.dump", "b.dump.json"]


def dumping(connection: sa.Connection, *, waits: bool) -> list[int]:
    """Process ids of client programs of a backup or restore at this database, once there are any (60 s at most)."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        found = connection.exec_driver_sql(
            "SELECT pid FROM pg_stat_activity WHERE datname = current_database() AND application_name = 'flywheel backup'"
            + (" AND wait_event_type = 'Lock'" if waits else "")
        ).scalars()
        pids = list(found)
        connection.rollback()
        if pids:
            return pids
        time.sleep(0.01)
    return []


def test_a_failed_dump_leaves_no_file(engine: Engine, tmp_path: Path) -> None:
    with engine.begin() as connection:
        connection.exec_driver_sql("CREATE TABLE somebody_elses (id int)")

    def kill() -> None:
        with engine.connect() as watcher:
            for pid in dumping(watcher, waits=True):
                watcher.execute(sa.text("SELECT pg_terminate_backend(:pid)"), {"pid": pid})

    killer = threading.Thread(target=kill)
    with engine.connect() as blocker, blocker.begin():
        # pg_dump locks every table before it reads; it waits for this one until its session is ended under it.
        blocker.exec_driver_sql("LOCK TABLE somebody_elses IN ACCESS EXCLUSIVE MODE")
        killer.start()
        with pytest.raises(FlywheelError, match="pg_dump failed: "):
            backup(engine, tmp_path / "b.dump")
    killer.join()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("damage", ["cut", "flipped", "description", "no description", "nonsense", "newer"])
def test_a_damaged_backup_is_refused_before_anything_is_restored(
    engine: Engine, empty_engine: Engine, tmp_path: Path, damage: str
) -> None:
    path = tmp_path / "b.dump"
    backup(engine, path)
    content, description = path.read_bytes(), describing(path).read_text()
    if damage == "cut":
        path.write_bytes(content[:-100])
    elif damage == "flipped":
        path.write_bytes(content[:200] + bytes([content[200] ^ 1]) + content[201:])
    elif damage == "description":
        describing(path).write_text("[]")
    elif damage == "no description":
        describing(path).unlink()
    elif damage == "nonsense":
        describing(path).write_text('{"format": "flywheel-backup/1"}')
    else:
        describing(path).write_text(re.sub(r'"revision": "\d+"', '"revision": "9999"', description))
    with pytest.raises((UsageError, FlywheelError, SchemaMismatch)) as refusal:
        restore(empty_engine, path)
    assert refusal.value.message
    with empty_engine.connect() as connection:
        assert sa.inspect(connection).get_table_names() == []


def test_a_database_in_use_is_never_restored_over(engine: Engine, tmp_path: Path) -> None:
    insert(engine, 6, 5)
    backup(engine, tmp_path / "b.dump")
    with pytest.raises(SchemaMismatch, match="holds tables of Flywheel already"):
        restore(engine, tmp_path / "b.dump")
    with engine.connect() as connection:
        assert connection.exec_driver_sql("SELECT count(*) FROM execution_telemetry").scalar_one() == 5


def test_a_restore_that_is_killed_leaves_the_database_empty(
    engine: Engine, empty_engine: Engine, tmp_path: Path
) -> None:
    insert(engine, 8, 2000)
    backup(engine, tmp_path / "b.dump")
    with empty_engine.connect() as watcher:
        child = subprocess.Popen(
            [
                sys.executable,
                "-c",
                "from flywheel_pipeline.cli import main; main()",
                "restore",
                str(tmp_path / "b.dump"),
            ],
            env={**os.environ, "FLYWHEEL_DATABASE_URL": empty_engine.url.render_as_string(hide_password=False)},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        busy = dumping(watcher, waits=False)
        os.killpg(child.pid, 9)
        child.wait()
        assert busy
    with empty_engine.connect() as connection:
        connection.exec_driver_sql(
            "SELECT pg_terminate_backend(pid, 5000) FROM pg_stat_activity WHERE application_name = 'flywheel backup'"
        )
        assert sa.inspect(connection).get_table_names() == []
    restore(empty_engine, tmp_path / "b.dump")


def test_nothing_that_is_kept_depends_on_transaction_ids_or_log_positions() -> None:
    forbidden = re.compile(
        r"\bxmin\b|\bxmax\b|txid_|pg_current_xact|pg_snapshot\b|pg_xact|pg_current_wal|\bpg_lsn\b", re.IGNORECASE
    )
    found = [
        f"{file.name}: {line.strip()}"
        for file in [*PACKAGE.rglob("*.py"), *PACKAGE.rglob("*.sql"), *(PACKAGE.parent / "dbt_like_sql").rglob("*.sql")]
        for line in file.read_text("utf-8").splitlines()
        if forbidden.search(line)
    ]
    assert [line for line in found if not line.startswith("loader.py: _SESSION = (")] == []  # that one refuses them
