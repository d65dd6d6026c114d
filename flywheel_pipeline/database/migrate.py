"""Bringing a database to the declared schema.

Belongs here: `upgrade` (migrations, routines, SQL models and seeds in one transaction), and `check` from
`drift.py`. Does not belong here: the declarations (`tables.py`, `routines/`, `dbt_like_sql/`, `seeds/`).
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import resources
from typing import Any, Final

import psycopg
import sqlalchemy as sa
from alembic import command
from alembic.config import Config
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import Connection, Engine

from flywheel_pipeline.database import seed
from flywheel_pipeline.database.tables import metadata
from flywheel_pipeline.errors import DatabaseUnavailable, SchemaMismatch

VERSION_TABLE: Final = "flywheel_alembic_version"
SCHEMA: Final = "public"  # the routines name it: a trigger must not depend on the writer's search_path
DAGSTER_SCHEMA: Final = "dagster"

Progress = Callable[[str], None]


@dataclass(frozen=True)
class UpgradeReport:
    """What an upgrade changed, in order, one phrase each; empty when the database was up to date."""

    changes: tuple[str, ...]


@dataclass(frozen=True)
class Routine:
    """One file of `database/routines`: idempotent SQL that creates functions and triggers."""

    name: str
    text: str

    @property
    def content_hash(self) -> str:
        """Sha256 of the file, in hexadecimal."""
        return hashlib.sha256(self.text.encode()).hexdigest()


def upgrade(engine: Engine, *, progress: Progress | None = None) -> UpgradeReport:
    """Bring the database to this release: all of it or nothing, in one transaction under an advisory lock.

    In order: the schema for Dagster's tables, migrations, changed routines, changed SQL models, changed
    seeds. Up to date already, it changes nothing and reports no changes. `progress` receives each change as
    it is made.

    Raises SchemaMismatch when the database is at a revision that this release does not know, or holds tables
    of our names that Flywheel did not create; DatabaseUnavailable when the role may not create tables.
    """
    changes: list[str] = []

    def note(change: str) -> None:
        changes.append(change)
        if progress is not None:
            progress(change)

    try:
        with engine.begin() as connection:
            connection.execute(sa.text(f"SET LOCAL search_path = {SCHEMA}"))
            connection.execute(sa.text("SELECT pg_advisory_xact_lock(hashtext('flywheel:upgrade'))"))
            for step in (_create_dagster_schema, _migrate, _apply_routines, _sync_models, seed.apply_seeds):
                for change in step(connection):
                    note(change)
    except sa.exc.ProgrammingError as error:
        if not isinstance(error.orig, psycopg.errors.InsufficientPrivilege):
            raise
        raise DatabaseUnavailable(
            f"The role {engine.url.username} may not create the tables of Flywheel: "
            f"{str(error.orig).splitlines()[0]}.",
            hint=f"The database owner can GRANT CREATE on the database and on schema {SCHEMA} to it.",
        ) from error
    return UpgradeReport(tuple(changes))


def revision(connection: Connection) -> str | None:
    """Return the migration revision of a database; None before the first upgrade.

    Raises SchemaMismatch when this release does not know it, which means that a newer one was here.
    """
    context = MigrationContext.configure(
        connection, opts={"version_table": VERSION_TABLE, "version_table_schema": SCHEMA}
    )
    current = context.get_current_revision()
    known = {script.revision for script in _scripts().walk_revisions()}
    if current is not None and current not in known:
        raise SchemaMismatch(
            f"The database is at revision {current}, which is newer than this release's {head_revision()}.",
            hint="Install the release of Flywheel that upgraded it; there is no way back to an older schema.",
        )
    return current


def head_revision() -> str:
    """Return the newest migration revision of this release."""
    head = _scripts().get_current_head()
    if head is None:
        raise RuntimeError("the package holds no migrations")
    return head


def routines() -> Iterator[Routine]:
    """Yield the routine files in the order in which they are applied."""
    folder = resources.files("flywheel_pipeline.database") / "routines"
    for file in sorted(folder.iterdir(), key=lambda entry: entry.name):
        if file.name.endswith(".sql"):
            yield Routine(file.name.removesuffix(".sql"), file.read_text(encoding="utf-8"))


def execute_routine(connection: Connection, routine: Routine) -> None:
    """Execute a routine file as it stands, all its statements at once and without parameters."""
    driver = connection.connection.driver_connection
    if not isinstance(driver, psycopg.Connection):
        raise TypeError(f"routines need a psycopg 3 connection, not {type(driver).__name__}")
    with driver.cursor() as cursor:
        cursor.execute(routine.text.encode())


def _config() -> Config:
    config = Config()
    config.set_main_option("script_location", "flywheel_pipeline:database/migrations")
    config.set_main_option("path_separator", "os")
    return config


def _scripts() -> ScriptDirectory:
    return ScriptDirectory.from_config(_config())


def _create_dagster_schema(connection: Connection) -> Iterator[str]:
    if not sa.inspect(connection).has_schema(DAGSTER_SCHEMA):
        connection.execute(sa.schema.CreateSchema(DAGSTER_SCHEMA))
        yield f"schema {DAGSTER_SCHEMA}"


def _migrate(connection: Connection) -> list[str]:
    current = revision(connection)
    if current == head_revision():
        return []
    if current is None:
        foreign = sorted(set(sa.inspect(connection).get_table_names(SCHEMA)) & set(metadata.tables))
        if foreign:
            raise SchemaMismatch(
                f"The database already holds tables that Flywheel did not create: {', '.join(foreign)}.",
                hint="Give Flywheel an empty database.",
            )
    applied: list[str] = []

    def on_version_apply(*, step: Any, **_: Any) -> None:
        script = _scripts().get_revision(step.up_revision_id)
        applied.append(f"migration {step.up_revision_id}: {script.doc.rstrip('.')}")

    config = _config()
    config.attributes.update(connection=connection, on_version_apply=on_version_apply)
    command.upgrade(config, "head")
    return applied


def _apply_routines(connection: Connection) -> Iterator[str]:
    for routine in routines():
        if seed.record_content(connection, "routine", routine.name, routine.content_hash):
            execute_routine(connection, routine)
            yield f"routine {routine.name}"


def _sync_models(connection: Connection) -> list[str]:
    import importlib.util

    if importlib.util.find_spec("flywheel_pipeline.sql_models.sync") is None:
        return []
    from flywheel_pipeline.sql_models.sync import sync_models  # type: ignore[import-not-found,unused-ignore]

    return [f"model {change}" for change in sync_models(connection)]
