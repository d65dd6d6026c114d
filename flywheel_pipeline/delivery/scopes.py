"""Quarantines of a part of the fleet, as delivery reads them.

Belongs here: reading `quarantined_scopes`, and the question whether any manifest serves one. Does not belong here:
deciding and writing them (`promotion`).
"""

from __future__ import annotations

import sqlalchemy as sa

from flywheel_pipeline.delivery.manifest import ScopeOut
from flywheel_pipeline.quality import Finding


def load_quarantines(connection: sa.Connection) -> list[ScopeOut]:
    """Return every part of the fleet that a rule is kept from, with the reason as an appliance's manifest shows it."""
    rows = connection.execute(
        sa.text(
            "SELECT rule_id, scope_kind, scope_value, origin_rule_id, reason FROM quarantined_scopes "
            "ORDER BY rule_id, scope_kind, scope_value"
        )
    ).all()
    return [
        ScopeOut(
            row.rule_id,
            row.scope_kind,
            row.scope_value,
            f"quarantined {'at site' if row.scope_kind == 'site' else 'on agents'} {row.scope_value}"
            + ("" if row.origin_rule_id == row.rule_id else f", as a copy of {row.origin_rule_id}")
            + f": {row.reason}",
        )
        for row in rows
    ]


def no_manifest_serves_a_quarantined_scope(connection: sa.Connection) -> Finding:
    """No manifest serves a rule at a site, or to a release of the agent, where it is quarantined."""
    rows = [
        dict(row)
        for row in connection.execute(
            sa.text(
                """
                SELECT m.appliance_id, q.rule_id, q.scope_kind, q.scope_value, q.since
                FROM quarantined_scopes AS q
                JOIN manifest_entries AS e ON e.rule_id = q.rule_id
                JOIN manifest_contents AS c ON c.entry_ids @> ARRAY[e.entry_id]
                JOIN appliance_manifests AS m ON m.content_hash = c.content_hash
                LEFT JOIN appliances AS a ON a.appliance_id = m.appliance_id
                WHERE CASE q.scope_kind WHEN 'site' THEN m.site_id
                      ELSE coalesce(nullif(a.agent_version, ''), 'unknown') END = q.scope_value
                ORDER BY m.appliance_id, q.rule_id
                """
            )
        ).mappings()
    ]
    scopes = connection.execute(sa.text("SELECT count(*) FROM quarantined_scopes")).scalar_one()
    return Finding(
        passed=not rows,
        sentence=f"No manifest serves a rule where it is quarantined ({scopes} quarantines of a site or a release)."
        if not rows
        else f"{len(rows)} manifests serve a rule where it is quarantined, first {rows[0]['rule_id']} on "
        f"{rows[0]['appliance_id']}.",
        observed=f"{len(rows)} manifests",
        required="0 manifests",
        offenders=len(rows),
        sample=rows[:20],
        figures={"served_in_quarantine": len(rows), "quarantined_scopes": scopes},
    )
