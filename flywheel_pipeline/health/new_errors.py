"""Errors never seen before: a message of the last day that no older row of the log resembles.

Belongs here: the question. Does not belong here: what makes two messages alike (`attribution.mask`). It reads the log
itself, so it stays right when the masks change and needs no table of its own; it is asked at night.
"""

from __future__ import annotations

import datetime as dt
from typing import Any, Final

import sqlalchemy as sa

from flywheel_pipeline.health.attribution import mask
from flywheel_pipeline.quality import Finding

NEW_WITHIN: Final = dt.timedelta(hours=24)
HISTORY: Final = dt.timedelta(days=7)  # a younger log has seen too little to call anything new

_SIGNATURES = """
SELECT coalesce(nullif(failure_type, ''), 'no class') AS failure_type, error_message,
  count(*) FILTER (WHERE created_at >= :since) AS recent, count(*) FILTER (WHERE created_at < :since) AS before,
  count(DISTINCT site_id) FILTER (WHERE created_at >= :since) AS sites,
  min(agent_version) FILTER (WHERE created_at >= :since) AS agent_version,
  array_agg(DISTINCT hostname) FILTER (WHERE created_at >= :since) AS hosts
FROM execution_telemetry
WHERE NOT success AND created_at <= :now
  AND chaos_campaign_id IS NULL AND NOT coalesce(tags @> '{"synthetic": true}', false)
GROUP BY 1, 2
ORDER BY before DESC, error_message, failure_type
"""


def no_new_errors(connection: sa.Connection, now: dt.datetime) -> Finding:
    """No failure class and no error template arrived in the last 24 hours for the first time.

    By arrival, so that what an appliance delivers late is not missed. A template carries no host name, address or
    account (`attribution.mask`).
    """
    since = now - NEW_WITHIN
    required = "none, against all older rows of the log"
    oldest = connection.execute(sa.text("SELECT min(created_at) FROM execution_telemetry")).scalar_one()
    if oldest is None or oldest > now - HISTORY:
        begins = "is empty" if oldest is None else f"begins {oldest:%Y-%m-%d}"
        return Finding(
            True, f"Not judged: the log {begins}, and below {HISTORY.days} days all errors are new.", "-", required
        )
    rows = connection.execute(sa.text(_SIGNATURES), {"since": since, "now": now}).mappings().all()
    recent = [row for row in rows if row["recent"]]
    unseen: dict[str, dict[str, Any]] = {}
    known_exactly = {row["error_message"] for row in rows if row["before"]}
    hosts = sorted({host for row in recent for host in row["hosts"] or ()})
    for row in recent:
        if row["error_message"] in known_exactly:
            continue
        template = mask(row["error_message"], hosts)
        found = unseen.setdefault(
            template,
            {"kind": "template", "what": template, "executions": 0, "sites": 0, "agent": row["agent_version"]},
        )
        found["executions"] += row["recent"]
        found["sites"] = max(found["sites"], row["sites"])
    # Most frequent first: what is common is crossed off at once, and the search ends when nothing is left to find.
    for row in rows:
        if not unseen:
            break
        if row["before"]:
            unseen.pop(mask(row["error_message"], hosts), None)
    known_classes = {row["failure_type"] for row in rows if row["before"]}
    classes: dict[str, dict[str, Any]] = {}
    for row in recent:
        if row["failure_type"] not in known_classes:
            found = classes.setdefault(
                row["failure_type"],
                {
                    "kind": "class",
                    "what": row["failure_type"],
                    "executions": 0,
                    "sites": 0,
                    "agent": row["agent_version"],
                },
            )
            found["executions"] += row["recent"]
            found["sites"] = max(found["sites"], row["sites"])
    offenders = [
        *sorted(classes.values(), key=lambda o: (-o["executions"], o["what"])),
        *sorted(unseen.values(), key=lambda o: (-o["executions"], o["what"])),
    ]
    failures = sum(row["recent"] for row in recent)
    sentence = f"All {failures:,} failures of the last 24 hours have been seen before."
    if not failures:
        sentence = "No failure arrived in the last 24 hours."
    if offenders:
        first = offenders[0]
        sentence = (
            f"Never seen before the last 24 hours: {len(classes)} error classes and {len(unseen)} templates, first "
            f"“{first['what']}” ({first['executions']:,} executions, agent {first['agent'] or 'unknown'})."
        )
    return Finding(
        passed=not offenders,
        sentence=sentence,
        observed=f"{len(offenders)} new",
        required=required,
        offenders=len(offenders),
        sample=offenders[:20],
        figures={
            "new_classes": len(classes),
            "new_templates": len(unseen),
            "new_executions": sum(o["executions"] for o in unseen.values()),
            "failures_of_the_day": failures,
        },
    )
