"""Backup and restore on real servers: in mid-run, onto another major version, and every way in which a file can be wrong."""

from __future__ import annotations

import datetime as dt
import itertools
import os
import random
import re
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import sqlalchemy as sa
from sqlalchemy import Engine

from flywheel_pipeline.aggregates.refresh import pending_cells, refresh
from flywheel_pipeline.database import migrate
from flywheel_pipeline.database.backup import backup, describing, read_description, restore
from flywheel_pipeline.database.embedded import EmbeddedServer, client_programs
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


def test_a_server_that_ends_idle_transactions_lets_a_dump_take_its_time(impatient: Engine, tmp_path: Path) -> None:
    made = backup(impatient, tmp_path / "a.dump", progress=lambda _: time.sleep(0.8))
    assert read_description(tmp_path / "a.dump") == made


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


def arguments_of(program: str) -> list[bytes]:
    """What everybody on this machine sees of the child process of this name, once there is one (60 s at most)."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        for process in Path("/proc").glob("[0-9]*"):
            try:
                arguments = (process / "cmdline").read_bytes().split(b"\0")
                parent = re.search(r"^PPid:\s+(\d+)$", (process / "status").read_text(), re.MULTILINE)
            except (FileNotFoundError, ProcessLookupError):
                continue
            if parent and int(parent[1]) == os.getpid() and Path(arguments[0].decode()).name == program:
                return arguments
        time.sleep(0.01)
    return []


SECRETS = ("p@ss w0rd ", "opens the key", "-cflywheel.test=of_an_option")


@pytest.fixture
def secretive(engine: Engine) -> Iterator[Engine]:
    """The database of `engine`, with a secret in every place of the URL where one can stand."""
    password, key, options = SECRETS
    url = engine.url.set(password=password).update_query_dict({"sslpassword": key, "options": options})
    made = open_engine(url)
    yield made
    made.dispose()


def test_while_pg_dump_works_its_command_line_holds_no_option_of_the_connection(
    engine: Engine, secretive: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(temporary))
    with engine.begin() as connection:
        connection.exec_driver_sql("CREATE TABLE somebody_elses (id int)")
    errors: list[BaseException] = []

    def dump() -> None:
        try:
            backup(secretive, tmp_path / "b.dump")
        except BaseException as error:  # noqa: BLE001 (asserted below)
            errors.append(error)

    dumper = threading.Thread(target=dump)
    with engine.connect() as blocker, blocker.begin():
        blocker.exec_driver_sql("LOCK TABLE somebody_elses IN ACCESS EXCLUSIVE MODE")
        dumper.start()
        with engine.connect() as watcher:
            assert dumping(watcher, waits=True)  # it is connected, under the name that it was given
        arguments = arguments_of("pg_dump")
        assert list(temporary.iterdir()) == []  # a kill leaves nothing behind that holds a secret
    dumper.join()
    assert errors == []
    assert [a for a in arguments if not a.startswith((b"--format", b"--no-", b"--snapshot"))][1:] == [
        b"--dbname",
        b"service=flywheel",
        b"",
    ]


@pytest.fixture
def recorded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Client programs that note their command line, their service file and their password, and then do their work."""
    programs, notes = tmp_path / "bin", tmp_path / "notes"
    programs.mkdir()
    notes.mkdir()
    for name in ("pg_dump", "pg_restore", "psql"):
        program = programs / name
        program.write_text(
            "#!/bin/sh\n"
            f'if [ "$1" != --version ]; then cat /proc/$$/cmdline > {notes}/{name}.arguments; '
            f'cat "$PGSERVICEFILE" > {notes}/{name}.service; printf %s "$PGPASSWORD" > {notes}/{name}.password; fi\n'
            f'exec {client_programs() / name} "$@"\n'
        )
        program.chmod(0o700)
    monkeypatch.setattr("flywheel_pipeline.database.backup.client_programs", lambda: programs)
    return notes


def test_what_the_url_holds_reaches_the_client_programs_and_no_command_line(
    secretive: Engine, empty_engine: Engine, recorded: Path, tmp_path: Path
) -> None:
    password, key, options = SECRETS
    insert(secretive, 9, 5)
    backup(secretive, tmp_path / "b.dump")
    target = open_engine(empty_engine.url.set(password=password).update_query_dict({"sslpassword": key}))
    restore(target, tmp_path / "b.dump")
    target.dispose()
    for name in ("pg_dump", "psql"):
        arguments = (recorded / f"{name}.arguments").read_bytes().decode()
        assert "service=flywheel" in arguments
        assert [word for word in (*SECRETS, "sslpassword", str(secretive.url.database)) if word in arguments] == []
        service = (recorded / f"{name}.service").read_text().splitlines()
        assert f"sslpassword={key}" in service
        assert "application_name=flywheel backup" in service
        assert not any(line.startswith("password") for line in service)
        assert (recorded / f"{name}.password").read_text() == password
    assert any(
        line.startswith(f"options={options}") for line in (recorded / "pg_dump.service").read_text().splitlines()
    )
    assert not any(word in (recorded / "pg_restore.arguments").read_text() for word in SECRETS)


def test_a_url_that_names_a_service_is_backed_up_from_where_the_service_leads(
    engine: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    insert(engine, 10, 5)
    url = engine.url
    service = tmp_path / "services.conf"
    service.write_text(
        f"[clinic]\nhost={url.query['host']}\nuser={url.username}\ndbname={url.database}\nsslpassword=of the service\n"
    )
    monkeypatch.setenv("PGSERVICEFILE", str(service))
    by_service = open_engine("postgresql:///?service=clinic")
    assert backup(by_service, tmp_path / "b.dump").rows["execution_telemetry"] == 5
    by_service.dispose()


@pytest.mark.parametrize("value", ["ends in white space ", "two\nlines"])
def test_an_option_that_no_service_file_can_hold_is_refused_by_its_name(
    engine: Engine, tmp_path: Path, value: str
) -> None:
    odd = open_engine(engine.url.update_query_dict({"sslpassword": value}))
    with pytest.raises(UsageError, match="The option sslpassword of the database URL") as refusal:
        backup(odd, tmp_path / "b.dump")
    odd.dispose()
    assert value not in f"{refusal.value.message} {refusal.value.hint}"
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
