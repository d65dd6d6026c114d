"""Bringing a database to the declared schema.

Belongs here: `upgrade`: migrations, routines, SQL models and seeds in one transaction. Does not belong here:
the declarations (`tables.py`, `declared.py`, `seed.py`), and how the comparison works (`drift.py`).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Final

import psycopg
import sqlalchemy as sa
from alembic import command
from sqlalchemy import Connection, Engine

from flywheel_pipeline.database import declared, roles, seed
from flywheel_pipeline.database.drift import Difference, check
from flywheel_pipeline.database.tables import metadata
from flywheel_pipeline.errors import DatabaseUnavailable, SchemaMismatch

__all__ = ["DAGSTER_SCHEMA", "Difference", "Progress", "UpgradeReport", "check", "upgrade"]

DAGSTER_SCHEMA: Final = "dagster"

# Writers queue behind whoever waits for a lock on their table. So nobody is waited for longer than this; then the upgrade
# steps back, lets the queue through, and tries again.
LOCK_TIMEOUT_SECONDS: Final = 2.0
PATIENCE_SECONDS: Final = 120.0

Progress = Callable[[str], None]


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
    """Bring the database to this release: all of it or nothing, in one transaction under an advisory lock.

    In order: the schema for Dagster's tables, migrations, changed routines, changed SQL models, changed
    seeds, roles and their grants. Up to date already, it changes nothing and reports no changes. `progress`
    receives each change as it is made. Writers may go on: where a table cannot be locked within `lock_timeout_seconds`, everything is
    undone and tried again, until `patience_seconds` are over.

    Raises SchemaMismatch when the database is at a revision that this release does not know, or holds tables
    of our names that Flywheel did not create; DatabaseUnavailable when the role may not create tables, or when
    somebody kept a table locked all the time.
    """
    deadline = time.monotonic() + patience_seconds
    while True:
        try:
            return _upgrade_once(engine, progress, lock_timeout_seconds)
        except (sa.exc.OperationalError, psycopg.OperationalError) as error:
            cause = error.orig if isinstance(error, sa.exc.OperationalError) else error
            if not isinstance(cause, (psycopg.errors.LockNotAvailable, psycopg.errors.DeadlockDetected)):
                raise
            if time.monotonic() >= deadline:
                raise DatabaseUnavailable(
                    f"The upgrade could not lock the tables it changes within {patience_seconds:.0f} s; nothing was changed.",
                    hint=f"{_who_is_at_work(engine)} End it, or upgrade when less is going on.",
                ) from error
        if progress is not None:
            progress("a table is in use: stepping back for the writers, and trying again")
        time.sleep(lock_timeout_seconds / 2)


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


def _upgrade_once(engine: Engine, progress: Progress | None, lock_timeout_seconds: float) -> UpgradeReport:
    changes: list[str] = []
    steps = (create_dagster_schema, _migrate, installation)
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
    return UpgradeReport(tuple(changes))


def installation(connection: Connection) -> Iterator[str]:
    """Install what stands on the tables, within the caller's transaction: routines, SQL models, seeds, roles; yield each change."""
    yield from _apply_routines(connection)
    yield from declared.sync_sql_models(connection)
    yield from seed.apply_seeds(connection)
    yield from roles.apply_roles(connection)


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
