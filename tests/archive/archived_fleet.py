"""Rows of a small fleet, what an archive holds of them, and what PostgreSQL does, as plain values that can be compared.

Belongs here: rows and readers for the tests of this room. Does not belong here: expectations.
"""

from __future__ import annotations

import datetime as dt
import itertools
from typing import Any

import pyarrow.parquet as pq
import sqlalchemy as sa
from sqlalchemy.dialects.postgresql import JSONB

from flywheel_pipeline.aggregates.refresh import refresh
from flywheel_pipeline.archive.columns import SOURCES
from flywheel_pipeline.archive.days import DayState, day_states
from flywheel_pipeline.archive.layout import Archive, Table
from flywheel_pipeline.database.tables import execution_telemetry
from flywheel_pipeline.sql_models.loader import load_models

DAY = dt.date(2026, 2, 2)
TODAY = DAY + dt.timedelta(days=10)
NOON = dt.datetime(2026, 2, 2, 12, tzinfo=dt.UTC)
GRAPH = load_models()
_numbers = itertools.count(1)


def row(**fields: Any) -> dict[str, Any]:
    """A successful L1 execution at noon of DAY on site-a, with these fields set or replaced."""
    at = fields.pop("at", NOON)
    return {
        "execution_id": f"a-{next(_numbers):09d}",
        "site_id": "site-a",
        "hostname": "host-1",
        "runbook_id": "L1-SSH-001",
        "platform": "linux",
        "incident_type": "ssh_config",
        "started_at": at,
        "success": True,
        "verification_passed": True,
        "resolution_level": "L1",
        "created_at": at + dt.timedelta(minutes=1),
        **fields,
    }


def write(engine: sa.Engine, *rows: dict[str, Any]) -> None:
    """Insert rows, each by a statement of its own, so that each may set other columns."""
    with engine.begin() as connection:
        for values in rows:
            connection.execute(sa.insert(execution_telemetry).values(values))


def settle(engine: sa.Engine) -> None:
    """Refresh all that waits."""
    with engine.begin() as connection:
        refresh(connection, GRAPH)


def state_of(engine: sa.Engine, archive: Archive | None, day: dt.date = DAY) -> DayState:
    """The state of one day."""
    with engine.connect() as connection:
        states = {s.day: s for s in day_states(connection, archive, today=TODAY, after_days=1)}
    return states[day]


def in_postgresql(connection: sa.Connection, table: Table, day: dt.date = DAY) -> list[dict[str, Any]]:
    """The day's rows as PostgreSQL has them, jsonb as its text, in order of their ids."""
    source = SOURCES[table]
    columns = [
        sa.cast(column, sa.Text).label(column.name) if isinstance(column.type, JSONB) else column
        for column in source.columns
    ]
    on = (
        execution_telemetry
        if table == "executions"
        else source.join(execution_telemetry, source.c.execution_id == execution_telemetry.c.execution_id)
    )
    query = (
        sa.select(*columns)
        .select_from(on)
        .where(sa.cast(sa.func.timezone("UTC", execution_telemetry.c.event_at), sa.Date) == day)
        .order_by(source.c.id)
    )
    return [{"day": day, **found} for found in connection.execute(query).mappings()]


def in_archive(archive: Archive, table: Table, day: dt.date = DAY) -> list[dict[str, Any]]:
    """The day's rows as the files that the manifest names hold them, in order of their ids."""
    found: list[dict[str, Any]] = []
    for file in archive.manifest(day).files(table):
        with archive.fs.open(archive.full_path(file.path), "rb") as stream:
            rows = pq.ParquetFile(stream).read().to_pylist()
        assert len(rows) == file.rows
        found += [{name: _in_utc(value) for name, value in values.items()} for values in rows]
    return sorted(found, key=lambda values: values["id"])


def _in_utc(value: Any) -> Any:
    return value.astimezone(dt.UTC) if isinstance(value, dt.datetime) else value
