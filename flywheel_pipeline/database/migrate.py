"""Bringing a database to the declared schema, and naming every difference from it.

Belongs here: `upgrade` (migrations, routines, SQL models, seeds; one transaction) and `check`. Does not
belong here: the declaration itself (`tables.py`, `routines/`, `dbt_like_sql/`, `seeds/`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from sqlalchemy import Engine

from flywheel_pipeline.database.tables import metadata


@dataclass(frozen=True)
class UpgradeReport:
    """What an upgrade changed, in order, one sentence each; empty when the database was up to date."""

    changes: tuple[str, ...]


def upgrade(engine: Engine, *, progress: Callable[[str], None] | None = None) -> UpgradeReport:
    """Create the declared tables (the migrations follow)."""
    if progress:
        progress("create the declared tables")
    metadata.create_all(engine)
    return UpgradeReport(())
