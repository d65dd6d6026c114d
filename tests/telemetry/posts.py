"""Posts for the tests of this room, in the agents' own format."""

from __future__ import annotations

import json
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import sqlalchemy as sa

from flywheel_pipeline.telemetry.contract import COLUMNS

NOW = datetime(2026, 2, 15, 12, 0, tzinfo=UTC)
SITE = "north-valley-dental"


def post(execution_id: str = "exec-1", *, site_id: str = SITE, reported: float = 0, **fields: Any) -> dict[str, Any]:
    """A post that keeps the contract; `reported` minutes after 10:00, `fields` set or replaced."""
    execution = {
        "execution_id": execution_id,
        "incident_id": "inc-1",
        "appliance_id": f"{SITE}-84:3A:5B:91:B6:61",
        "runbook_id": "RB-AUTO-BITLOCKE",
        "hostname": "NVDC01",
        "platform": "windows",
        "incident_type": "bitlocker_status",
        "started_at": "2026-02-15T09:00:00Z",
        "completed_at": "2026-02-15T09:00:42.5Z",
        "duration_seconds": 42.5,
        "success": True,
        "status": "success",
        "verification_passed": True,
        "confidence": 0.9,
        "resolution_level": "L1",
        "state_before": {"protection": "off"},
        "executed_steps": ["resume", "verify"],
        **fields,
    }
    reported_at = datetime(2026, 2, 15, 10, 0, tzinfo=UTC) + timedelta(minutes=reported)
    return {"site_id": site_id, "reported_at": reported_at.isoformat(), "execution": execution}


def failed(execution_id: str = "exec-1", **fields: Any) -> dict[str, Any]:
    """The same, but the fix failed."""
    outcome = {"success": False, "status": "failure", "error_message": "Phase 'verify' failed"}
    return post(execution_id, **{**outcome, **fields})


def line(value: Any) -> bytes:
    """One NDJSON line without its newline."""
    return json.dumps(value).encode()


def ndjson(path: Path, *values: Any) -> Path:
    """Write posts (dicts) and raw lines (bytes) as an NDJSON file."""
    path.write_bytes(b"".join((v if isinstance(v, bytes) else line(v)) + b"\n" for v in values))
    return path


def rows(engine: sa.Engine) -> dict[str, dict[str, Any]]:
    """All telemetry rows by execution id, without the database's own id."""
    query = sa.text(f"SELECT {', '.join(COLUMNS)}, event_at FROM execution_telemetry ORDER BY execution_id")
    with engine.connect() as connection:
        return {row["execution_id"]: dict(row) for row in connection.execute(query).mappings()}


def scalar(engine: sa.Engine, query: str) -> Any:
    """The one value of a query."""
    with engine.connect() as connection:
        return connection.execute(sa.text(query)).scalar_one()
