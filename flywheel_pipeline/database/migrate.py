"""Bringing a database to the declared schema.

Belongs here: `upgrade`: the catalogue in one transaction (migrations, routines, the models' relations, roles), and then, in
another, what reads rows (the models' rows, seeds). Does not belong here: the declarations (`tables.py`, `declared.py`,
`seed.py`), and how the comparison works (`drift.py`).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Final

import psycopg
import sqlalchemy as sa
from alembic import command
from sqlalchemy import Connection, Engine

from flywheel_pipeline.database import declared, roles, seed
from flywheel_pipeline.database.drift import Difference, check
from flywheel_pipeline.database.roles import DAGSTER_SCHEMA
from flywheel_pipeline.database.tables import metadata
from flywheel_pipeline.errors import DatabaseUnavailable, SchemaMismatch

__all__ = ["DAGSTER_SCHEMA", "Difference", "Progress", "UpgradeReport", "check", "upgrade"]

# Writers queue behind whoever waits for a lock on their table. So nobody is waited for longer than this; then the upgrade
# steps back, lets the queue through, and tries again.
LOCK_TIMEOUT_SECONDS: Final = 2.0
PATIENCE_SECONDS: Final = 120.0

Progress = Callable[[str], None]
Step = Callable[[Connection], Iterable[str]]


@dataclass(frozen=True)
class UpgradeReport:
    """What an upgrade changed, in order, one phrase each; empty when the database was up to date."""

    changes: tuple[str, ...]


def upgrade(
    engine: Engine,
    *,
    progress: Progress | None = None,
    lock_timeout_seconds: float = LOCK_TIMEOUT_SECONDS,
    patience_seconds: float = PATIENCE_SECONDS,
) -> UpgradeReport:
    """Bring the database to this release, in two transactions under an advisory lock, each all or nothing.

    The first changes the catalogue, under locks that writers wait for, and reads no telemetry: the schema for Dagster's
    tables, migrations, changed routines, relations of changed SQL models, roles and their grants. The second holds no lock
    that a writer waits for: what changed models ask to be computed, and changed seeds. Between the two, commands and
    refreshes refuse the database as they do one of another release, and the next upgrade does what is left.

    Up to date already, it changes nothing and reports no changes. `progress` receives each change as it is made. Where a
    table cannot be locked within `lock_timeout_seconds`, the transaction is undone and tried again, until
    `patience_seconds` are over.

    Raises SchemaMismatch when the database is at a revision that this release does not know, or holds tables
    of our names that Flywheel did not create; DatabaseUnavailable when the role may not create tables, or when
    somebody kept a table locked all the time.
    """
    deadline = time.monotonic() + patience_seconds
    changes: list[str] = []
    declared.read_models()  # now, so that no writer waits for it
    for steps in PARTS:
        while True:
            try:
                changes += _apply(engine, steps, progress, lock_timeout_seconds)
                break
            except (sa.exc.OperationalError, psycopg.OperationalError) as error:
                cause = error.orig if isinstance(error, sa.exc.OperationalError) else error
                if not isinstance(cause, (psycopg.errors.LockNotAvailable, psycopg.errors.DeadlockDetected)):
                    raise
                if time.monotonic() >= deadline:
                    left = "the rest waits for the next upgrade" if changes else "nothing was changed"
                    raise DatabaseUnavailable(
                        f"The upgrade could not lock what it changes within {patience_seconds:.0f} s; {left}.",
                        hint=f"{_who_is_at_work(engine)} End it, or upgrade when less is going on.",
                    ) from error
            if progress is not None:
                progress("a table is in use: stepping back for the writers, and trying again")
            time.sleep(lock_timeout_seconds / 2)
    return UpgradeReport(tuple(changes))


def _who_is_at_work(engine: Engine) -> str:
    with engine.connect() as connection:
        row = connection.execute(
            sa.text(
                "SELECT pid, application_name, state, extract(epoch FROM clock_timestamp() - xact_start)::int AS seconds "
                "FROM pg_stat_activity WHERE datname = current_database() AND pid <> pg_backend_pid() "
                "AND xact_start IS NOT NULL ORDER BY xact_start LIMIT 1"
            )
        ).one_or_none()
    if row is None:
        return "No transaction is open any more."
    return (
        f"The oldest transaction is that of process {row.pid} ({row.application_name}, {row.state}, {row.seconds} s)."
    )


def _apply(engine: Engine, steps: Iterable[Step], progress: Progress | None, lock_timeout_seconds: float) -> list[str]:
    """Take these steps in one transaction; return the changes."""
    changes: list[str] = []
    try:
        with engine.begin() as connection:
            connection.execute(sa.text(f"SET LOCAL search_path = {declared.SCHEMA}"))
            connection.execute(sa.text("SELECT pg_advisory_xact_lock(hashtext('flywheel:upgrade'))"))
            connection.execute(
                sa.text("SELECT set_config('lock_timeout', :ms, true)"), {"ms": f"{lock_timeout_seconds * 1000:.0f}ms"}
            )
            for step in steps:
                for change in step(connection):
                    changes.append(change)
                    if progress is not None:
                        progress(change)
    except sa.exc.ProgrammingError as error:
        if not isinstance(error.orig, psycopg.errors.InsufficientPrivilege):
            raise
        raise DatabaseUnavailable(
            f"The role {engine.url.username} may not create the tables of Flywheel: {str(error.orig).splitlines()[0]}.",
            hint="The owner of the database can GRANT CREATE on it and on its schema public to that role.",
        ) from error
    return changes


def installation(connection: Connection) -> Iterator[str]:
    """Install what stands on the tables, within the caller's transaction: routines, SQL models, roles, seeds; yield each change."""
    for step in (*_CATALOGUE, *_ROWS):
        yield from step(connection)


def create_dagster_schema(connection: Connection) -> Iterator[str]:
    if not sa.inspect(connection).has_schema(DAGSTER_SCHEMA):
        connection.execute(sa.schema.CreateSchema(DAGSTER_SCHEMA))
        yield f"schema {DAGSTER_SCHEMA}"


def _migrate(connection: Connection) -> list[str]:
    current = declared.revision(connection)
    if current == declared.head_revision():
        return []
    if current is None:
        theirs = sorted(set(sa.inspect(connection).get_table_names(declared.SCHEMA)) & set(metadata.tables))
        if theirs:
            raise SchemaMismatch(
                f"The database already holds tables that Flywheel did not create: {', '.join(theirs)}.",
                hint="`flywheel adopt` lists what it takes to adopt them; otherwise give Flywheel an empty database.",
            )
    applied: list[str] = []
    scripts = declared.scripts()

    def on_version_apply(*, step: Any, **_: Any) -> None:
        script = scripts.get_revision(step.up_revision_id)
        applied.append(f"migration {step.up_revision_id}: {script.doc.rstrip('.')}")

    config = declared.alembic_config()
    config.attributes.update(connection=connection, on_version_apply=on_version_apply)
    command.upgrade(config, "head")
    return applied


def _apply_routines(connection: Connection) -> Iterator[str]:
    for routine in declared.routines():
        if seed.record_content(connection, "routine", routine.name, routine.content_hash):
            declared.execute_routine(connection, routine)
            yield f"routine {routine.name}"
    # A file that was renamed or is gone leaves no record; what it created is for migrations to drop.
    connection.execute(
        sa.text("DELETE FROM schema_objects WHERE kind = 'routine' AND NOT name = ANY(:names)"),
        {"names": [routine.name for routine in declared.routines()]},
    )


# What stands on the tables: first what writers wait for, then what reads their rows.
_CATALOGUE: Final[tuple[Step, ...]] = (_apply_routines, declared.sync_relations, roles.apply_roles)
_ROWS: Final[tuple[Step, ...]] = (declared.fill_models, seed.apply_seeds)
#: Each a transaction. What writers wait for comes first and reads no telemetry, so that it takes no longer for more rows.
PARTS: Final[tuple[tuple[Step, ...], ...]] = (
    (create_dagster_schema, _migrate, *_CATALOGUE),
    _ROWS,
)
