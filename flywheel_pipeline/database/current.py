"""Is the database at this release? Asked before any command works on it, so that none fails half way with SQL.

Belongs here: the quick question, by recorded revisions and hashes. Does not belong here: the thorough comparison with
the live catalogue (`drift.py`) and the upgrade (`migrate.py`).
"""

from __future__ import annotations

import sqlalchemy as sa

from flywheel_pipeline.database import declared, seed
from flywheel_pipeline.errors import SchemaMismatch


def require_current(connection: sa.Connection) -> None:
    """Refuse a database that was never upgraded, or not to this release, or to a newer one.

    A changed SQL model counts: its relation must be made anew before it is read or refreshed. So do models and seeds that an
    upgrade left when it was ended between its two transactions.

    Raises:
        SchemaMismatch: with the first differences and what to do.
    """
    revision = declared.revision(connection)
    if revision is None:
        raise SchemaMismatch("The database holds no Flywheel schema yet.", hint="Run `flywheel db upgrade`.")
    if revision != declared.head_revision():
        raise SchemaMismatch(
            f"The database is at revision {revision}, this release is at {declared.head_revision()}.",
            hint="Run `flywheel db upgrade`.",
        )
    recorded = {
        (row.kind, row.name): row.content_hash
        for row in connection.execute(sa.text("SELECT kind, name, content_hash FROM schema_objects"))
    }
    from flywheel_pipeline.sql_models.loader import load_models

    expected = {("routine", routine.name): routine.content_hash for routine in declared.routines()}
    expected |= {("model", model.name): model.content_hash for model in load_models().models.values()}
    expected |= {("seed", name): content for name, content in seed.content_hashes().items()}
    stale = [f"{kind} {name}" for (kind, name), content in expected.items() if recorded.get((kind, name)) != content]
    stale += [f"{kind} {name}" for kind, name in recorded if kind == "model" and (kind, name) not in expected]
    if stale:
        named = ", ".join(stale[:3]) + (f" and {len(stale) - 3} more" if len(stale) > 3 else "")
        raise SchemaMismatch(
            f"The database does not hold this release's {named}.",
            hint="Run `flywheel db upgrade`; it changes what differs and nothing else.",
        )
