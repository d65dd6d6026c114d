"""Where everything stands, as one object: the command `flywheel status`, the golden table, and tests read it.

Belongs here: reading. Does not belong here: judging (checks) and printing (cli).
"""

from __future__ import annotations

from typing import Any

import sqlalchemy as sa

from flywheel_pipeline.aggregates.batches import policy_in_force


def _one(connection: sa.Connection, query: str) -> dict[str, Any]:
    return dict(connection.execute(sa.text(query)).mappings().one())


def _all(connection: sa.Connection, query: str) -> list[dict[str, Any]]:
    return [dict(row) for row in connection.execute(sa.text(query)).mappings()]


def read_status(connection: sa.Connection, *, top: int = 5) -> dict[str, Any]:
    """Return the state of the pipeline as JSON types.

    Keys: telemetry {rows, l1, not_l1, successful, unresolved, l1_promoted, l1_builtin, waiting_cells, open_rejects},
    patterns {total, promoted, pending, approved, rejected}, rules {promoted, enabled, quarantined, builtin,
    builtin_enabled}, top_rules (promoted rules by matches) and builtin_rules [{rule_id, matches, successes, failures,
    success_rate}], quarantined [{rule_id, reason, actor, at}],
    quarantined_scopes [{rule_id, scope_kind, scope_value, reason, actor, at}], held [{pattern, reason}], unresolved_ids, policy,
    batch. Rates are fractions, null over nothing.
    """
    rules = (
        "SELECT rule_id, match_count AS matches, success_count AS successes, failure_count AS failures, success_rate "
        "FROM l1_rules WHERE {where} AND match_count > 0 ORDER BY match_count DESC, rule_id LIMIT {limit}"
    )
    activation = policy_in_force(connection)
    batch = (
        connection.execute(
            sa.text(
                "SELECT batch_id, run_id, refreshed_at, policy_name, policy_hash FROM refresh_batches "
                "WHERE refreshed_at IS NOT NULL ORDER BY refresh_seq DESC LIMIT 1"
            )
        )
        .mappings()
        .one_or_none()
    )
    return {
        "telemetry": _one(
            connection,
            """
            SELECT coalesce(sum(executions), 0)::bigint AS rows,
                   coalesce(sum(executions) FILTER (WHERE level = 'L1'), 0)::bigint AS l1,
                   coalesce(sum(executions) FILTER (WHERE level <> 'L1'), 0)::bigint AS not_l1,
                   coalesce(sum(raw_successes), 0)::bigint AS successful,
                   (SELECT coalesce(sum(executions), 0)::bigint FROM unresolved_rule_ids) AS unresolved,
                   (SELECT coalesce(sum(match_count), 0)::bigint FROM l1_rules WHERE source = 'promoted') AS l1_promoted,
                   (SELECT coalesce(sum(match_count), 0)::bigint FROM l1_rules WHERE source = 'builtin') AS l1_builtin,
                   (SELECT count(*) FROM (SELECT DISTINCT site_id, day FROM touched_cells) AS c) AS waiting_cells,
                   (SELECT count(*) FROM telemetry_rejects WHERE status = 'open') AS open_rejects
            FROM telemetry_daily_volume
            """,
        ),
        "patterns": _one(
            connection,
            """
            SELECT count(*) AS total,
                   count(*) FILTER (WHERE status = 'promoted') AS promoted,
                   count(*) FILTER (WHERE status = 'pending') AS pending,
                   count(*) FILTER (WHERE status = 'approved') AS approved,
                   count(*) FILTER (WHERE status = 'rejected') AS rejected
            FROM patterns
            """,
        ),
        "rules": _one(
            connection,
            """
            SELECT count(*) FILTER (WHERE source = 'promoted') AS promoted,
                   count(*) FILTER (WHERE source = 'promoted' AND enabled) AS enabled,
                   count(*) FILTER (WHERE source = 'promoted' AND state = 'quarantined') AS quarantined,
                   count(*) FILTER (WHERE source = 'builtin') AS builtin,
                   count(*) FILTER (WHERE source = 'builtin' AND enabled) AS builtin_enabled
            FROM l1_rules
            """,
        ),
        "top_rules": _all(connection, rules.format(where="source = 'promoted'", limit=int(top))),
        "builtin_rules": _all(connection, rules.format(where="source = 'builtin'", limit=1000)),
        "quarantined": _all(
            connection,
            "SELECT rule_id, state_reason AS reason, state_actor AS actor, state_at::text AS at FROM l1_rules "
            "WHERE state = 'quarantined' ORDER BY rule_id",
        ),
        "quarantined_scopes": _all(
            connection,
            "SELECT rule_id, scope_kind, scope_value, reason, actor, since::text AS at FROM quarantined_scopes "
            "ORDER BY rule_id, scope_kind, scope_value",
        ),
        "held": _all(
            connection,
            """
            SELECT p.pattern_key AS pattern, d.reason, d.verdict FROM patterns AS p
            JOIN LATERAL (
              SELECT reason, verdict FROM promotion_decisions
              WHERE subject_kind = 'pattern' AND subject_id = p.pattern_key ORDER BY decision_id DESC LIMIT 1
            ) AS d ON true
            WHERE p.status IN ('pending', 'approved') ORDER BY p.pattern_key
            """,
        ),
        "unresolved_ids": _all(
            connection,
            "SELECT rule_id, executions, first_seen::text AS first_seen, last_seen::text AS last_seen "
            "FROM unresolved_rule_ids WHERE executions > 0 ORDER BY executions DESC, rule_id LIMIT 50",
        ),
        "policy": {
            "name": activation.policy_name,
            "as_of": activation.as_of.isoformat() if activation.as_of else None,
            "actor": activation.actor,
        },
        "batch": None
        if batch is None
        else {
            "batch_id": batch["batch_id"],
            "run_id": batch["run_id"],
            "refreshed_at": batch["refreshed_at"].isoformat(),
            "policy": batch["policy_name"],
            "policy_hash": batch["policy_hash"],
        },
    }
