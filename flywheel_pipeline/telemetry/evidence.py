"""Evidence bundles against telemetry: what was reported must agree with what was recorded on the host.

Belongs here: the question. It joins the log with the bundles, so it is asked at night.
"""

from __future__ import annotations

import datetime as dt
from collections import Counter
from typing import Final

import sqlalchemy as sa

from flywheel_pipeline.quality import Finding

WITHIN: Final = dt.timedelta(days=7)
#: Bundles younger than this may be ahead of their telemetry: agents queue up to 60 minutes.
SETTLED_AFTER: Final = dt.timedelta(hours=2)

# A bundle names its execution by evidence_bundle_id; older agents only share the incident id on one appliance.
_COMPARED = """
WITH bundles AS (
  SELECT bundle_id, appliance_id, incident_id, check_type, lower(btrim(outcome)) AS outcome, created_at
  FROM evidence_bundles
  WHERE created_at >= :since AND created_at < :until
),
named AS (
  SELECT b.bundle_id, bool_or(t.success) AS success, bool_and(t.success) AS all_success, min(t.execution_id) AS execution_id
  FROM bundles AS b
  JOIN execution_telemetry AS t ON t.evidence_bundle_id = b.bundle_id
  GROUP BY b.bundle_id
),
by_incident AS (
  SELECT b.bundle_id, bool_or(t.success) AS success, bool_and(t.success) AS all_success, min(t.execution_id) AS execution_id
  FROM bundles AS b
  JOIN execution_telemetry AS t
    ON t.incident_id = b.incident_id AND t.appliance_id IN (b.appliance_id, 'unknown') AND t.evidence_bundle_id IS NULL
  WHERE NOT EXISTS (SELECT FROM named AS n WHERE n.bundle_id = b.bundle_id)
  GROUP BY b.bundle_id
),
told AS (SELECT * FROM named UNION ALL SELECT * FROM by_incident)
SELECT b.bundle_id, b.appliance_id, b.check_type, b.outcome, t.execution_id, b.created_at,
  CASE
    WHEN b.outcome IS NULL OR b.outcome = '' THEN 'no outcome'
    WHEN t.bundle_id IS NULL AND b.outcome <> 'success' THEN 'failure never reported'
    WHEN t.bundle_id IS NULL THEN 'success never reported'
    WHEN t.all_success AND b.outcome <> 'success' THEN 'reported as success'
    WHEN NOT t.success AND b.outcome = 'success' THEN 'reported as failure'
    ELSE 'agrees'
  END AS verdict
FROM bundles AS b
LEFT JOIN told AS t ON t.bundle_id = b.bundle_id
ORDER BY b.created_at DESC, b.bundle_id
"""
_DISAGREES: Final = ("reported as success", "failure never reported", "reported as failure")


def evidence_agrees(connection: sa.Connection, now: dt.datetime) -> Finding:
    """No evidence bundle of the last 7 days contradicts its telemetry, and none shows a failure that was never reported.

    Only the outcome `success` is one; a bundle without outcome compares with nothing. A success in evidence without
    telemetry is counted, yet hides no failure.
    """
    rows = (
        connection.execute(sa.text(_COMPARED), {"since": now - WITHIN, "until": now - SETTLED_AFTER}).mappings().all()
    )
    counts = Counter(row["verdict"] for row in rows)
    offenders = [row for row in rows if row["verdict"] in _DISAGREES]
    offenders.sort(key=lambda row: _DISAGREES.index(row["verdict"]))
    compared = len(rows) - counts["no outcome"] - counts["success never reported"]
    sentence = f"All {compared:,} evidence bundles of the last {WITHIN.days} days agree with telemetry."
    if not compared:
        sentence = f"No evidence bundle of the last {WITHIN.days} days can be compared: nothing to judge."
    if offenders:
        said = ", ".join(f"{counts[verdict]:,} {verdict}" for verdict in _DISAGREES if counts[verdict])
        sentence = (
            f"{len(offenders):,} of {compared:,} evidence bundles disagree with telemetry: {said}; "
            f"first {offenders[0]['bundle_id']} of {offenders[0]['appliance_id']}, outcome {offenders[0]['outcome']}."
        )
    return Finding(
        passed=not offenders,
        sentence=sentence,
        observed=f"{len(offenders)} of {compared} bundles",
        required="0 bundles",
        offenders=len(offenders),
        sample=[dict(row) for row in offenders[:20]],
        figures={
            "compared": compared,
            "disagreeing": len(offenders),
            "disagreeing_share": len(offenders) / compared if compared else None,
            **{verdict.replace(" ", "_"): counts[verdict] for verdict in (*_DISAGREES, "success never reported")},
        },
    )
