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

# Two runs at once would each find the other's new patterns missing: the second waits here, and then finds them.
_ONE_AT_A_TIME = "SELECT pg_advisory_xact_lock(hashtext('flywheel:patterns'))"


def pattern_id_of(key: str) -> str:
    """Return the 16 hex digits that name a pattern in the production table, from its key."""
    return hashlib.sha256(key.encode()).hexdigest()[:16]


def write_observed(connection: sa.Connection) -> dict[str, int]:
    """Upsert every observed pattern; return {'inserted': n, 'updated': n, 'unchanged': n}.

    New patterns start as pending. Counts of imported patterns stay as imported: they are history; the observed
    counts stand in `pattern_candidates`. Waits for another run that writes patterns, until its transaction ends.
    """
    connection.exec_driver_sql(_ONE_AT_A_TIME)
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
    connection.exec_driver_sql(_ONE_AT_A_TIME)
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


# A pattern's platform is the one on which telemetry saw its incident type with its runbook, if only one; else the one its
# runbook is made for; else the only one on which its incident type was seen. Of several patterns with one key the first
# has it, promoted ones first.
_KEY_ADOPTED = """
WITH seen AS MATERIALIZED (
  SELECT DISTINCT level = 'L1' AS by_rule, incident_type, runbook_id, platform FROM executions WHERE platform <> 'unknown'
),
by_runbook AS (
  SELECT incident_type, runbook_id, min(platform) AS platform FROM seen
  WHERE NOT by_rule GROUP BY incident_type, runbook_id HAVING count(DISTINCT platform) = 1
),
by_type AS (
  SELECT incident_type, min(platform) AS platform FROM seen GROUP BY incident_type HAVING count(DISTINCT platform) = 1
),
placed AS (
  SELECT p.id, p.status, p.promoted_at, p.incident_type, n.runbook_id,
         coalesce(nullif(lower(p.platform), ''), r.platform, b.platform, t.platform) AS platform
  FROM patterns AS p
  CROSS JOIN LATERAL (
    SELECT coalesce(nullif(p.runbook_id, ''),
                    CASE WHEN starts_with(p.pattern_signature, p.incident_type || ':')
                         THEN nullif(substr(p.pattern_signature, length(p.incident_type) + 2), '') END) AS runbook_id
  ) AS n
  LEFT JOIN by_runbook AS r ON r.incident_type = p.incident_type AND r.runbook_id = n.runbook_id
  LEFT JOIN by_type AS t ON t.incident_type = p.incident_type
  LEFT JOIN runbooks AS b ON b.runbook_id = n.runbook_id
  WHERE p.pattern_key IS NULL
),
keyed AS (
  SELECT id, platform, flywheel_pattern_key(incident_type, runbook_id, platform) AS pattern_key,
         row_number() OVER (PARTITION BY incident_type, runbook_id, platform
                            ORDER BY (status = 'promoted') DESC, promoted_at, id) AS nth
  FROM placed
)
UPDATE patterns AS p SET platform = k.platform, pattern_key = CASE WHEN k.nth = 1 THEN k.pattern_key END
FROM keyed AS k
WHERE k.id = p.id AND k.platform IS NOT NULL
  AND NOT EXISTS (SELECT 1 FROM patterns AS o WHERE o.pattern_key = k.pattern_key)
"""


def key_adopted(connection: sa.Connection) -> int:
    """Give the patterns that the old system left in the table their platform and key; return how many have one.

    A pattern whose platform nothing tells, or whose key another one has, keeps a null key: it can never be promoted by
    mistake.
    """
    connection.exec_driver_sql(_KEY_ADOPTED)
    return int(connection.exec_driver_sql("SELECT count(*) FROM patterns WHERE pattern_key IS NOT NULL").scalar_one())
