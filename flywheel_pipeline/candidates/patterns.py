"""Writing observed patterns into the production table `patterns`.

Belongs here: the upsert from `pattern_candidates` and the import of legacy rows. Does not belong here: any decision;
`status` moves to promoted or rejected in the promotion room only.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import sqlalchemy as sa

from flywheel_pipeline.candidates.keys import pattern_key
from flywheel_pipeline.database import tables


def pattern_id_of(key: str) -> str:
    """Return the 16 hex digits that name a pattern in the production table, from its key."""
    return hashlib.sha256(key.encode()).hexdigest()[:16]


def write_observed(connection: sa.Connection) -> dict[str, int]:
    """Upsert every observed pattern; return {'inserted': n, 'updated': n, 'unchanged': n}.

    New patterns start as pending. Counts of imported patterns stay as imported: they are history; the observed
    counts stand in `pattern_candidates`.
    """
    rows = connection.execute(
        sa.text(
            "SELECT pattern_key, incident_type, runbook_id, platform, executions, raw_successes, first_at, last_at "
            "FROM pattern_candidates WHERE executions > 0"
        )
    ).all()
    known: dict[str, str] = {
        row.pattern_key: row.source
        for row in connection.execute(sa.text("SELECT pattern_key, source FROM patterns WHERE pattern_key IS NOT NULL"))
    }
    new = [
        {
            "pattern_id": pattern_id_of(row.pattern_key),
            "pattern_signature": row.pattern_key,
            "description": f"L2 healed {row.incident_type} with {row.runbook_id or 'no runbook'} on {row.platform}",
            "incident_type": row.incident_type,
            "runbook_id": row.runbook_id,
            "platform": row.platform,
            "pattern_key": row.pattern_key,
            "occurrences": row.executions,
            "success_count": row.raw_successes,
            "failure_count": row.executions - row.raw_successes,
            "first_seen": row.first_at,
            "last_seen": row.last_at,
            "source": "observed",
        }
        for row in rows
        if row.pattern_key not in known
    ]
    if new:
        connection.execute(sa.insert(tables.patterns), new)
    updated = connection.execute(
        sa.text(
            "UPDATE patterns AS p SET occurrences = c.executions, success_count = c.raw_successes, "
            "failure_count = c.executions - c.raw_successes, first_seen = c.first_at, last_seen = c.last_at "
            "FROM (SELECT pattern_key, executions, raw_successes, first_at, last_at FROM pattern_candidates "
            "      WHERE status IS NOT NULL) AS c "
            "WHERE c.pattern_key = p.pattern_key AND p.source = 'observed' "
            "  AND (p.occurrences, p.success_count, p.first_seen, p.last_seen) "
            "      IS DISTINCT FROM (c.executions, c.raw_successes, c.first_at, c.last_at)"
        )
    ).rowcount
    return {"inserted": len(new), "updated": updated, "unchanged": len(rows) - len(new) - updated}


def import_patterns(connection: sa.Connection, rows: Sequence[Mapping[str, Any]]) -> int:
    """Insert legacy pattern rows as history, their key computed; return how many were new.

    A row whose key another pattern holds already keeps a null key: it can never be promoted by mistake.
    """
    taken = set(connection.execute(sa.text("SELECT pattern_key FROM patterns WHERE pattern_key IS NOT NULL")).scalars())
    values = []
    known = set(connection.execute(sa.text("SELECT pattern_id FROM patterns")).scalars())
    for row in rows:
        if row["pattern_id"] in known:
            continue
        key: str | None = None
        if row.get("platform") and row.get("runbook_id"):
            key = pattern_key(row["incident_type"], row["runbook_id"], row["platform"])
            if key in taken:
                key = None
            else:
                taken.add(key)
        values.append({**row, "pattern_key": key, "source": "imported"})
    if values:
        connection.execute(sa.insert(tables.patterns), values)
    return len(values)
