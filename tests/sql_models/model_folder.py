"""What the tests of this room share: folders of small models, and rows of telemetry.

Belongs here: plain helpers. Does not belong here: fixtures (`conftest.py`) and assertions.
"""

from __future__ import annotations

from pathlib import Path

import sqlalchemy as sa

from flywheel_pipeline.sql_models.loader import ModelGraph, load_models
from flywheel_pipeline.sql_models.sync import fill_models, sync_relations


class ModelFolder:
    """A folder of rooms with small models in it."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def write(
        self,
        name: str,
        sql: str,
        columns: dict[str, str],
        *,
        key: list[str],
        room: str = "aggregates",
        materialized: str = "view",
        cell: str | None = None,
        description: str = "A model of a test.",
        extra: str = "",
    ) -> Path:
        """Write one model; `columns` maps name to type, each described as 'the <name>'."""
        lines = [
            f"name: {name}",
            f"room: {room}",
            f"materialized: {materialized}",
            *([f"cell: {cell}"] if cell else []),
            "grain: one row per test",
            f"description: {description}",
            "owner: team:tests",
            f"key: [{', '.join(key)}]",
            "columns:",
            *(f'  {column}: ["{given}", the {column}]' for column, given in columns.items()),
            "consumers: [tests]",
            *([extra] if extra else []),
        ]
        path = self.root / room / f"{name}.sql"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("/*---\n" + "\n".join(lines) + "\n---*/\n" + sql + "\n")
        return path

    def remove(self, name: str, room: str = "aggregates") -> None:
        """Delete one model."""
        (self.root / room / f"{name}.sql").unlink()

    def load(self) -> ModelGraph:
        """Load the folder."""
        return load_models(self.root)


def bring_in_line(connection: sa.Connection, graph: ModelGraph | None = None) -> list[str]:
    """Do what both transactions of an upgrade do about the models, in one; return what was done."""
    return [*sync_relations(connection, graph), *fill_models(connection, graph)]


def telemetry_row(
    connection: sa.Connection,
    execution_id: str,
    site_id: str,
    started_at: str,
    *,
    success: bool = True,
    hostname: str = "ws-01",
) -> None:
    """Insert one row of telemetry that started at this UTC time."""
    connection.execute(
        sa.text(
            "INSERT INTO execution_telemetry (execution_id, site_id, runbook_id, hostname, started_at, "
            "created_at, success, verification_passed, resolution_level, incident_type, platform) "
            "VALUES (:id, :site, 'L1-FIREWALL-001', :host, CAST(:at AS timestamptz), "
            "CAST(:at AS timestamptz), :success, :success, 'L1', 'firewall', 'windows')"
        ),
        {"id": execution_id, "site": site_id, "host": hostname, "at": f"{started_at}+00", "success": success},
    )
