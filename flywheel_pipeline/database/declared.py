"""What this release declares beside `tables.py`: migrations, routines, SQL models; and how each is applied.

Belongs here: reading the declarations and applying one of them to a connection. Does not belong here: the
order of an upgrade (`migrate.py`) and the comparison with a live database (`drift.py`).
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import resources
from typing import Final

import psycopg
from alembic.config import Config
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import Connection

from flywheel_pipeline.errors import SchemaMismatch

VERSION_TABLE: Final = "flywheel_alembic_version"
SCHEMA: Final = "public"  # the routines name it: a trigger must not depend on the writer's search_path


@dataclass(frozen=True)
class Routine:
    """One file of `database/routines`: idempotent SQL that creates functions and triggers."""

    name: str
    text: str

    @property
    def content_hash(self) -> str:
        """Sha256 of the file, in hexadecimal."""
        return hashlib.sha256(self.text.encode()).hexdigest()


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


def read_models() -> None:
    """Read and check the SQL models, which takes 0.3 s; whoever asks for them after that has them at once."""
    from flywheel_pipeline.sql_models.loader import load_models  # here, since sqlglot takes 0.2 s to import

    load_models()


def sync_relations(connection: Connection) -> list[str]:
    """Create or replace the relations of changed SQL models in the first schema of the search_path; read no row."""
    from flywheel_pipeline.sql_models import sync

    return [f"model {change}" for change in sync.sync_relations(connection)]


def fill_models(connection: Connection) -> list[str]:
    """Compute what the changed SQL models ask for."""
    from flywheel_pipeline.sql_models import sync

    return [f"model {change}" for change in sync.fill_models(connection)]


def pending_models(connection: Connection) -> list[str]:
    """Name the SQL models whose relations an upgrade changed, and whose rows it did not come to; sorted."""
    from flywheel_pipeline.sql_models import sync

    return sync.pending_models(connection)


def alembic_config() -> Config:
    """Return the alembic configuration of the migrations in this package."""
    config = Config()
    config.set_main_option("script_location", "flywheel_pipeline:database/migrations")
    config.set_main_option("path_separator", "os")
    return config


def scripts() -> ScriptDirectory:
    """Return the migrations of this package."""
    return ScriptDirectory.from_config(alembic_config())


def head_revision() -> str:
    """Return the newest migration revision of this release."""
    head = scripts().get_current_head()
    if head is None:
        raise RuntimeError("the package holds no migrations")
    return head


def revision(connection: Connection) -> str | None:
    """Return the migration revision of a database; None before the first upgrade.

    Raises SchemaMismatch when this release does not know it, which means that a newer one was here.
    """
    context = MigrationContext.configure(
        connection, opts={"version_table": VERSION_TABLE, "version_table_schema": SCHEMA}
    )
    current = context.get_current_revision()
    known = {script.revision for script in scripts().walk_revisions()}
    if current is not None and current not in known:
        raise SchemaMismatch(
            f"The database is at revision {current}, which is newer than this release's {head_revision()}.",
            hint="Install the release of Flywheel that upgraded it; there is no way back to an older schema.",
        )
    return current
