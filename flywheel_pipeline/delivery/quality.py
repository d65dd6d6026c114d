"""Questions about what is delivered. Each returns a Finding; none imports Dagster."""

from __future__ import annotations

import datetime as dt
from collections import Counter
from typing import Any

import sqlalchemy as sa

from flywheel_pipeline.aggregates.last_match import last_matches
from flywheel_pipeline.quality import Finding

EXECUTED_WITHIN = dt.timedelta(days=3)

_SERVED_BUT_NOT_ENABLED = """
SELECT m.appliance_id, e.rule_id, coalesce(r.state, 'unknown') AS state, 'served although not in service' AS problem
FROM manifest_entries AS e
LEFT JOIN l1_rules AS r ON r.rule_id = e.rule_id
JOIN manifest_contents AS c ON c.entry_ids @> ARRAY[e.entry_id]
JOIN appliance_manifests AS m ON m.content_hash = c.content_hash
WHERE r.enabled IS NOT TRUE OR r.rule_version <> e.rule_version
"""
# Rules of the whole fleet must stand in every manifest, or among what is withheld there with its reason.
_FORGOTTEN = """
SELECT m.appliance_id, r.rule_id, r.state, 'in service, but neither served nor withheld' AS problem
FROM (
  SELECT c.content_hash, r.rule_id FROM manifest_contents AS c CROSS JOIN l1_rules AS r WHERE r.state = 'fleet'
  EXCEPT
  SELECT c.content_hash, e.rule_id
  FROM manifest_contents AS c CROSS JOIN LATERAL unnest(c.entry_ids) AS n(entry_id) JOIN manifest_entries AS e USING (entry_id)
  EXCEPT SELECT c.content_hash, w ->> 'rule_id' FROM manifest_contents AS c CROSS JOIN LATERAL jsonb_array_elements(c.withheld) AS w
) AS f
JOIN l1_rules AS r ON r.rule_id = f.rule_id
JOIN appliance_manifests AS m ON m.content_hash = f.content_hash
WHERE flywheel_runbook_problem(r.runbook_id, r.platform) IS NULL
"""
_NO_MANIFEST = """
SELECT a.appliance_id, NULL AS rule_id, a.status AS state, 'an appliance without a manifest' AS problem
FROM appliances AS a
WHERE a.status <> 'retired' AND NOT EXISTS (SELECT 1 FROM appliance_manifests AS m WHERE m.appliance_id = a.appliance_id)
"""


def manifests_match_registry(connection: sa.Connection) -> Finding:
    """No manifest serves a rule that is out of service, and none forgets one that is in service everywhere."""
    query = " UNION ALL ".join((_SERVED_BUT_NOT_ENABLED, _FORGOTTEN, _NO_MANIFEST))
    rows = [dict(row) for row in connection.execute(sa.text(f"{query} ORDER BY 4, 1, 2")).mappings()]
    served = sum(row["problem"] == "served although not in service" for row in rows)
    return Finding(
        passed=not rows,
        sentence="Every manifest serves what the registry says."
        if not rows
        else f"{len(rows)} differences between manifests and registry, {served} of them rules served out of service.",
        observed=f"{len(rows)} differences",
        required="0 differences",
        offenders=len(rows),
        sample=rows[:20],
        figures={"differences": len(rows), "served_out_of_service": served},
    )


def promoted_rules_are_received(connection: sa.Connection) -> Finding:
    """Every promoted rule in service was acknowledged or executed by some appliance that it is for."""
    rows = (
        connection.execute(
            sa.text(
                """
                SELECT d.rule_id, d.rule_version, min(d.promoted_at) AS promoted_at, count(*) AS appliances,
                       count(*) FILTER (WHERE d.state = 'withheld') AS withheld, min(d.withheld_reason) AS withheld_reason
                FROM deployments AS d
                JOIN l1_rules AS r ON r.rule_id = d.rule_id AND r.rule_version = d.rule_version
                WHERE r.enabled AND r.source = 'promoted'
                GROUP BY d.rule_id, d.rule_version
                HAVING count(*) FILTER (WHERE d.state IN ('acknowledged', 'executed')) = 0
                ORDER BY min(d.promoted_at), d.rule_id
                """
            )
        )
        .mappings()
        .all()
    )
    return Finding(
        passed=not rows,
        sentence="Every promoted rule reached somebody."
        if not rows
        else f"{len(rows)} promoted rules have reached no appliance yet, first {rows[0]['rule_id']}.",
        observed=f"{len(rows)} rules",
        required="0 rules",
        offenders=len(rows),
        sample=[dict(row) for row in rows[:20]],
        figures={"rules_nobody_received": len(rows)},
    )


def no_rule_is_shadowed(connection: sa.Connection) -> Finding:
    """No rule in a manifest stands behind another that matches all that it matches: it would never fire."""
    rows = [
        dict(row)
        for row in connection.execute(
            sa.text(
                """
                SELECT c.loser_id AS never_fires, c.winner_id AS wins, c.incident_type, c.platform, c.same_runbook,
                       w.source AS winner_source, l.source AS loser_source, c.appliances
                FROM rule_conflicts AS c
                LEFT JOIN l1_rules AS w ON w.rule_id = c.winner_id
                LEFT JOIN l1_rules AS l ON l.rule_id = c.loser_id
                WHERE c.kind = 'shadowed'
                ORDER BY c.same_runbook, c.appliances DESC, c.loser_id, c.incident_type
                """
            )
        ).mappings()
    ]
    overlaps = connection.execute(sa.text("SELECT count(*) FROM rule_conflicts WHERE kind = 'overlaps'")).scalar_one()
    return Finding(
        passed=not rows,
        sentence="No served rule stands behind another that matches all that it matches."
        if not rows
        else f"{len(rows)} served rules never fire on an incident type that they are for, first {rows[0]['never_fires']} "
        f"on {rows[0]['incident_type']}: {rows[0]['wins']} matches first. Retire one of the two, or narrow its conditions.",
        observed=f"{len(rows)} shadowed",
        required="0 shadowed",
        offenders=len(rows),
        sample=rows[:20],
        figures={
            "shadowed": len(rows),
            "shadowed_with_another_runbook": sum(not row["same_runbook"] for row in rows),
            "overlaps": int(overlaps),
        },
    )


def agents_run_what_they_claim(connection: sa.Connection) -> Finding:
    """No appliance answers `Unknown action` to a form that its report or its release says it can run."""
    rows = [
        dict(row)
        for row in connection.execute(
            sa.text(
                """
                SELECT appliance_id, site_id, agent_version, action_form, claimed_by, executions, first_seen, last_seen,
                       cardinality(open_on) AS withheld_on, array_to_string(rule_ids, ', ') AS rules
                FROM capability_findings WHERE cardinality(open_on) > 0
                ORDER BY claimed_by IS NULL, executions DESC, appliance_id, action_form
                """
            )
        ).mappings()
    ]
    lying = [row for row in rows if row["claimed_by"] is not None]
    return Finding(
        passed=not lying,
        sentence="No agent refuses an action form that it claims to run."
        if not lying
        else f"{len(lying)} findings of agents that refuse what they claim, first {lying[0]['appliance_id']} at "
        f"{lying[0]['site_id']}: {lying[0]['action_form']} in {lying[0]['agent_version'] or 'an unnamed release'}. "
        "The form is withheld there; upgrade the agent, or correct the version table.",
        observed=f"{len(lying)} contradictions",
        required="0 contradictions",
        offenders=len(lying),
        sample=rows[:20],
        figures={"contradictions": len(lying), "open_findings": len(rows)},
    )


_IN_SERVICE = """
WITH service AS (
  SELECT rule_id, rule_version, min(occurred_at) AS since
  FROM rule_events
  WHERE flywheel_state_is_enabled(to_state)
  GROUP BY rule_id, rule_version
)
SELECT r.rule_id, r.rule_version, v.since
FROM l1_rules AS r
JOIN service AS v ON v.rule_id = r.rule_id AND v.rule_version = r.rule_version
WHERE r.enabled AND r.source = 'promoted' AND v.since <= :before
ORDER BY v.since, r.rule_id
"""
_FURTHEST = ("acknowledged", "delivered", "queued", "promoted", "withheld")
_STUCK = {
    "acknowledged": "appliances run it, and its drift did not occur or its conditions do not match",
    "delivered": "fetched and never acknowledged: look at the agents",
    "queued": "commands wait: the appliances do not check in",
    "promoted": "never queued, or its commands failed: publish again",
    "withheld": "no agent can run it: update the agents",
    "nobody": "no manifest holds it: rebuild the manifests",
}


def promoted_rules_are_executed(connection: sa.Connection, now: dt.datetime) -> Finding:
    """Every promoted rule was executed somewhere within 3 days of entering service, or where its delivery stopped."""
    rows = connection.execute(sa.text(_IN_SERVICE), {"before": now - EXECUTED_WITHIN}).all()
    # Anywhere, on an appliance that the deployments know or not; only for the others is their delivery looked up.
    last = last_matches(connection, [row.rule_id for row in rows])
    never = [row for row in rows if row.rule_id not in last or last[row.rule_id] < row.since]
    states: dict[tuple[str, int], Counter[str]] = {(row.rule_id, row.rule_version): Counter() for row in never}
    if never:
        for row in connection.execute(
            sa.text(
                "SELECT rule_id, rule_version, state, count(*) AS appliances FROM deployments "
                "WHERE rule_id = ANY(:ids) GROUP BY rule_id, rule_version, state"
            ),
            {"ids": [row.rule_id for row in never]},
        ):
            if (row.rule_id, row.rule_version) in states:
                states[row.rule_id, row.rule_version][row.state] += row.appliances
    offenders: list[dict[str, Any]] = []
    furthest: Counter[str] = Counter()
    for row in never:
        reached = states[row.rule_id, row.rule_version]
        stage = next((state for state in _FURTHEST if reached[state]), "nobody")
        furthest[stage] += 1
        offenders.append(
            {
                "rule": row.rule_id,
                "version": row.rule_version,
                "in service since": row.since,
                "furthest": stage,
                "appliances": ", ".join(f"{reached[state]} {state}" for state in _FURTHEST if reached[state]) or "none",
                "so": _STUCK[stage],
            }
        )
    sentence = f"All {len(rows)} promoted rules in service for {EXECUTED_WITHIN.days} days were executed."
    if not rows:
        sentence = f"No promoted rule has been in service for {EXECUTED_WITHIN.days} days: nothing to judge."
    if offenders:
        first = offenders[0]
        sentence = (
            f"{len(offenders)} of {len(rows)} promoted rules were never executed: "
            + ", ".join(f"{count} {stage}" for stage, count in furthest.most_common())
            + f"; first {first['rule']}, in service since {first['in service since']:%Y-%m-%d}: {first['so']}."
        )
    return Finding(
        passed=not offenders,
        sentence=sentence,
        observed=f"{len(offenders)} of {len(rows)} rules",
        required=f"an execution within {EXECUTED_WITHIN.days} days of entering service",
        offenders=len(offenders),
        sample=offenders[:20],
        figures={
            "rules_judged": len(rows),
            "never_executed": len(offenders),
            **{f"stuck_{stage}": furthest[stage] for stage in (*_FURTHEST, "nobody")},
        },
    )
