"""Raw telemetry rows for the tests of this room, written by plain SQL as any client might.

Belongs here: building and inserting rows. Does not belong here: expectations.
"""

from __future__ import annotations

import datetime as dt
import itertools
from collections.abc import Iterable, Mapping
from typing import Any

import sqlalchemy as sa

from flywheel_pipeline.database.tables import execution_telemetry

NOON = dt.datetime(2026, 2, 2, 12, tzinfo=dt.UTC)
_numbers = itertools.count(1)


def row(**fields: Any) -> dict[str, Any]:
    """A successful, verified L1 execution at noon of 2026-02-02 on site-a, with these fields set or replaced."""
    at = fields.pop("at", NOON)
    return {
        "execution_id": f"e-{next(_numbers):09d}",
        "site_id": "site-a",
        "hostname": "host-1",
        "runbook_id": "L1-SSH-001",
        "rule_id": None,
        "action": None,
        "platform": "windows",
        "incident_type": "ssh_config",
        "agent_version": "1.0.56",
        "started_at": at,
        "completed_at": at,
        "duration_seconds": 1.0,
        "success": True,
        "status": None,
        "verification_passed": True,
        "resolution_level": "L1",
        "error_message": None,
        "failure_type": None,
        "chaos_campaign_id": None,
        "tags": sa.null(),
        "created_at": at + dt.timedelta(minutes=1),
        **fields,
    }


def insert(connection: sa.Connection, rows: Iterable[Mapping[str, Any]]) -> list[str]:
    """Insert rows with one statement; return their execution ids."""
    rows = list(rows)
    if rows:
        connection.execute(sa.insert(execution_telemetry).values(rows))
    return [r["execution_id"] for r in rows]
