"""Alembic environment: migrations on the connection that `migrate.upgrade` hands over, in its transaction.

For developers, the alembic command works too, on the database in use: `alembic revision --autogenerate`
against a migrated database writes what `tables.py` declares beyond it.
"""

from __future__ import annotations

from typing import Any

import sqlalchemy as sa
from alembic import context

from flywheel_pipeline.database.declared import VERSION_TABLE
from flywheel_pipeline.database.engine import open_engine
from flywheel_pipeline.database.tables import metadata


def _ours(_object: Any, _name: str | None, kind: str, reflected: bool, compare_to: Any) -> bool:
    """Leave out relations that nobody declared: those of the SQL models, and other systems' tables."""
    return not (kind == "table" and reflected and compare_to is None)


def _run(connection: sa.Connection) -> None:
    context.configure(
        connection=connection,
        target_metadata=metadata,
        version_table=VERSION_TABLE,
        include_object=_ours,
        compare_server_default=True,
        on_version_apply=context.config.attributes.get("on_version_apply"),
    )
    with context.begin_transaction():
        context.run_migrations()


given = context.config.attributes.get("connection")
if given is not None:
    _run(given)
else:
    with open_engine().connect() as own:
        _run(own)
