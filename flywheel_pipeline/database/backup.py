"""Backup and restore: pg_dump and pg_restore around one database, with what must come back written beside it.

Belongs here: choosing the client programs, one consistent dump, its description, and a restore that is held against
that description. Does not belong here: copying a data directory, and schedules of backups.

A dump is one snapshot of everything, Dagster's storage included, so it may be taken while writers write and a refresh
runs: what had not committed is not in it, and the outbox that is in it says what is still to be counted. Nothing that
Flywheel keeps depends on transaction ids, positions in the log or the cluster it came from, so a restored system goes on
exactly, on another PostgreSQL of version 15 or later too.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

import psycopg
import sqlalchemy as sa

from flywheel_pipeline import __version__
from flywheel_pipeline.database import declared
from flywheel_pipeline.database.embedded import client_programs
from flywheel_pipeline.database.limits import let_idle
from flywheel_pipeline.database.tables import metadata
from flywheel_pipeline.errors import DatabaseUnavailable, FlywheelError, SchemaMismatch, UsageError

FORMAT: Final = "flywheel-backup/1"
Progress = Callable[[str], None]


@dataclass(frozen=True)
class Backup:
    """A dump as its description says it. `rows` counts the rows of each declared table in the dump's own snapshot."""

    format: str
    file: str
    sha256: str
    bytes: int
    taken_at: str
    release: str
    revision: str
    server_version: int
    rows: dict[str, int]
    last_event_id: int | None
    duration_seconds: float


def describing(path: Path) -> Path:
    """Return the path of the description that stands beside a dump."""
    return path.with_name(path.name + ".json")


def backup(engine: sa.Engine, path: Path, *, progress: Progress | None = None) -> Backup:
    """Dump the database to `path` (pg_dump's custom format), with its description in `<path>.json`.

    The file appears when it is whole; an earlier one of that name is not replaced.

    Raises:
        UsageError: the file exists, or its directory does not, or an option of the URL cannot be handed to pg_dump.
        SchemaMismatch: the database holds no Flywheel schema.
        DatabaseUnavailable: no pg_dump fits this server.
        FlywheelError: pg_dump failed; its own words say why.
    """
    path = path.expanduser().resolve()
    if path.exists() or describing(path).exists():
        raise UsageError(f"{path.name} exists already.", hint="A backup is never overwritten: name another file.")
    if not path.parent.is_dir():
        raise UsageError(f"The directory {path.parent} does not exist.", hint="Create it, or name another file.")
    begun = time.monotonic()
    partial = path.with_name(f".{path.name}.partial-{os.getpid()}")
    # The description is of the dump's own snapshot: this transaction exports it, and pg_dump works in it.
    with engine.connect().execution_options(isolation_level="REPEATABLE READ") as connection, connection.begin():
        let_idle(connection)
        revision = declared.revision(connection)
        if revision is None:
            raise SchemaMismatch("The database holds no Flywheel schema.", hint="There is nothing to back up here.")
        version = _server_version(connection)
        program = _program("pg_dump", version)
        snapshot = str(connection.exec_driver_sql("SELECT pg_export_snapshot()").scalar_one())
        taken_at = connection.exec_driver_sql("SELECT now()").scalar_one()
        rows = _count_rows(connection)
        last_event = connection.exec_driver_sql("SELECT max(event_id) FROM rule_events").scalar_one()
        if progress is not None:
            progress(f"dumping {sum(rows.values()):,} rows")
        try:
            with partial.open("xb") as file:
                partial.chmod(0o600)  # telemetry of clinics: for nobody else's eyes
                _run(
                    program,
                    _Session.of(connection),
                    ["--format=custom", "--no-owner", "--no-privileges", f"--snapshot={snapshot}"],
                    output=file,
                )
                os.fsync(file.fileno())
            found = Backup(
                format=FORMAT,
                file=path.name,
                sha256=_sha256(partial),
                bytes=partial.stat().st_size,
                taken_at=taken_at.isoformat(),
                release=__version__,
                revision=revision,
                server_version=version,
                rows=rows,
                last_event_id=last_event,
                duration_seconds=round(time.monotonic() - begun, 3),
            )
            description = describing(path).with_name(f".{describing(path).name}.partial-{os.getpid()}")
            description.write_text(json.dumps(asdict(found), indent=2) + "\n", "utf-8")
            description.chmod(0o600)
            description.replace(describing(path))
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)
    return found


def read_description(path: Path) -> Backup:
    """Read the description of a dump and hold the file against it.

    Raises:
        UsageError: there is no such file or description, or it is not a backup of Flywheel.
        FlywheelError: the file is not the one that was written: damaged, cut short, or another.
    """
    path = path.expanduser().resolve()
    if not path.is_file():
        raise UsageError(f"There is no file {path}.", hint="Name the file that `flywheel backup` wrote.")
    try:
        document: Any = json.loads(describing(path).read_text("utf-8"))
        described = Backup(**document)
    except FileNotFoundError as error:
        raise UsageError(
            f"The description {describing(path).name} is missing.",
            hint="It stands beside the backup: copy both. Without it pg_restore can read the file, but nothing proves it whole.",
        ) from error
    except (ValueError, TypeError) as error:
        raise UsageError(f"{describing(path).name} does not describe a backup of Flywheel: {error}.") from error
    if described.format != FORMAT:
        raise UsageError(f"The backup has the format {described.format!r}; this release reads {FORMAT!r}.")
    if path.stat().st_size != described.bytes or _sha256(path) != described.sha256:
        raise FlywheelError(
            f"{path.name} is not the file that was backed up: it has another length or hash.",
            hint="It was damaged or cut short on its way; copy it again. Nothing was restored.",
        )
    return described


def restore(engine: sa.Engine, path: Path, *, progress: Progress | None = None) -> Backup:
    """Restore a dump into an empty database, all of it or nothing, and hold it against its description.

    The schema stays at the release of the backup; `flywheel db upgrade` brings it to this one.

    Raises:
        UsageError: the file is missing or no backup, or an option of the URL cannot be handed to psql.
        SchemaMismatch: the database is not empty, or the backup is of a newer release.
        DatabaseUnavailable: no pg_restore fits.
        FlywheelError: the file is damaged, pg_restore failed, or the rows are not those of the description.
    """
    described = read_description(path)
    if described.revision not in {script.revision for script in declared.scripts().walk_revisions()}:
        raise SchemaMismatch(
            f"The backup is at revision {described.revision}, which this release does not know.",
            hint=f"Restore it with release {described.release} or later.",
        )
    with engine.connect() as connection:
        ours = sorted(set(sa.inspect(connection).get_table_names(declared.SCHEMA)) & set(metadata.tables))
        version = _server_version(connection)
        session = _Session.of(connection)
    if ours:
        raise SchemaMismatch(
            f"The database holds tables of Flywheel already: {', '.join(ours[:3])}.",
            hint="Restore into an empty database: set FLYWHEEL_HOME to a new directory, or FLYWHEEL_DATABASE_URL to a new database.",
        )
    if progress is not None:
        progress(f"restoring {sum(described.rows.values()):,} rows")
    _restore_script(_program("pg_restore", version), _program("psql", version), session, path, version)
    with engine.begin() as connection:
        connection.exec_driver_sql("ANALYZE")
        found = _count_rows(connection)
        last_event = connection.exec_driver_sql("SELECT max(event_id) FROM rule_events").scalar_one()
    wrong = {name: (rows, found.get(name)) for name, rows in described.rows.items() if found.get(name) != rows}
    if wrong or last_event != described.last_event_id:
        named = ", ".join(f"{name} {got} instead of {rows}" for name, (rows, got) in list(wrong.items())[:3])
        raise FlywheelError(
            f"The restored database does not hold what the backup describes: {named or 'the ledger ends elsewhere'}.",
            hint="Do not use it: drop the database and restore again.",
        )
    return described


def _restore_script(pg_restore: str, psql: str, session: _Session, path: Path, version: int) -> None:
    """Restore in one transaction. What a newer pg_restore sets and an older server does not know is left out."""
    script = subprocess.Popen(
        [pg_restore, "--no-owner", "--no-privileges", "--file=-", str(path.expanduser().resolve())],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert script.stdout is not None  # noqa: S101 (Popen with a pipe)
    with session.handed_on() as handed:
        client = subprocess.Popen(
            [psql, "--no-psqlrc", "--quiet", "--single-transaction", "--set=ON_ERROR_STOP=1", "--dbname", _SERVICE],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            **handed,
        )
    assert client.stdin is not None  # noqa: S101
    head = True  # settings stand before the first data
    try:
        for line in script.stdout:
            if head and line.startswith(b"SET transaction_timeout") and version < 170000:
                continue
            if head and line.strip() == b"CREATE SCHEMA public;":
                continue
            head = head and not line.startswith(b"COPY ")
            client.stdin.write(line)
        client.stdin.close()
    except BrokenPipeError:
        script.kill()  # psql ended first: its words say why
    complaint = client.stderr.read().decode(errors="replace") if client.stderr else ""
    client.wait()
    reading = script.stderr.read().decode(errors="replace") if script.stderr else ""
    script.wait()
    for name, code, said in (("psql", client.returncode, complaint), ("pg_restore", script.returncode, reading)):
        if code != 0:
            raise FlywheelError(
                f"{name} could not restore the backup: {_first_error(said)}.", hint="Nothing was restored."
            )


def _count_rows(connection: sa.Connection) -> dict[str, int]:
    present = set(sa.inspect(connection).get_table_names(declared.SCHEMA))
    return {
        name: int(connection.execute(sa.select(sa.func.count()).select_from(sa.table(name))).scalar_one())
        for name in sorted(present & set(metadata.tables))
    }


def _server_version(connection: sa.Connection) -> int:
    return int(connection.exec_driver_sql("SHOW server_version_num").scalar_one())


def _program(name: str, server_version: int) -> str:
    """Choose a client program: the wheel's, else one on the PATH that is not older than the server."""
    major = server_version // 10000
    candidates = [str(path) for path in (client_programs() / name,) if path.is_file()]
    candidates += [found for found in (shutil.which(name),) if found]
    seen = []
    for program in candidates:
        said = subprocess.run([program, "--version"], capture_output=True, text=True, check=False).stdout
        match = re.search(r"(\d+)", said)
        seen.append(f"{program} {match[1] if match else '?'}")
        if match and int(match[1]) >= major:
            return program
    raise DatabaseUnavailable(
        f"The server is PostgreSQL {major}, and no {name} of that version or later was found ({', '.join(seen) or 'none'}).",
        hint=f"Install the PostgreSQL {major} client programs and put them on the PATH.",
    )


_SERVICE: Final = "service=flywheel"


@dataclass(frozen=True)
class _Session:
    """How a session is connected, for a client program that is to connect as it is: options of libpq, and the password."""

    options: dict[str, str]
    password: str

    @classmethod
    def of(cls, connection: sa.Connection) -> _Session:
        """Read the options in force: those of the URL, of a service that it names, and of the environment.

        Raises UsageError for a value that no service file can hold.
        """
        driver = connection.connection.driver_connection
        assert isinstance(driver, psycopg.Connection)  # noqa: S101 - engine.DRIVER
        options = driver.info.get_parameters() | {"application_name": "flywheel backup"}
        for name in ("service", "servicefile"):
            options.pop(name, None)
        for name, value in options.items():
            if "\n" in value or value != value.rstrip():
                raise UsageError(
                    f"The option {name} of the database URL has a line break in it or white space at its end, "
                    "so it cannot be handed to PostgreSQL's client programs.",
                    hint=f"Give {name} another value.",
                )
        return cls(options, driver.info.password)

    @contextmanager
    def handed_on(self) -> Iterator[dict[str, Any]]:
        """Give the arguments for `subprocess` with which `_SERVICE` is this session.

        Command lines are for everybody on the machine to see, so no option stands there. They are in a service file without
        a name, which the program inherits open and nobody finds, not even after a kill; the password, which a service file
        would cut at white space, is in the program's environment.
        """
        with tempfile.TemporaryFile("w+", encoding="utf-8") as file:
            file.write("\n".join(["[flywheel]", *(f"{name}={value}" for name, value in self.options.items()), ""]))
            file.flush()
            file.seek(0)
            environment = {**os.environ, "PGSERVICEFILE": f"/dev/fd/{file.fileno()}"}
            if self.password:
                environment["PGPASSWORD"] = self.password
            yield {"env": environment, "pass_fds": (file.fileno(),)}


def _run(program: str, session: _Session, options: list[str], *, output: Any) -> None:
    with session.handed_on() as handed:
        done = subprocess.run(
            [program, *options, "--dbname", _SERVICE], stdout=output, stderr=subprocess.PIPE, check=False, **handed
        )
    if done.returncode != 0:
        said = _first_error(done.stderr.decode(errors="replace"))
        raise FlywheelError(f"{Path(program).name} failed: {said}.", hint="Nothing was written.")


def _first_error(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    errors = [line for line in lines if "error" in line.lower() or "fatal" in line.lower()]
    return (errors or lines or ["it did not say why"])[0].rstrip(".")


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
