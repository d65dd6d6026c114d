"""Service levels of delivery: what is late, by how much, and how long it usually takes.

Belongs here: questions with a clock in them, each answered by a Finding with offenders and ages. Does not belong here:
whether manifests are right (`quality`). None of them decides anything: they warn. Ages count against the clock of the
last batch, so that a replay is judged in its own time.
"""

from __future__ import annotations

import sqlalchemy as sa

from flywheel_pipeline.database.settings import get_settings
from flywheel_pipeline.quality import Finding

_CLOCK = "coalesce((SELECT b.as_of FROM refresh_batches AS b ORDER BY b.batch_id DESC LIMIT 1), now())"
SAMPLE = 20


def promoted_rules_are_delivered_in_time(connection: sa.Connection, *, within_hours: float | None = None) -> Finding:
    """No live appliance waits longer than the service level for a promoted rule that it should run."""
    limit = get_settings().deliver_within_hours if within_hours is None else within_hours
    late = connection.execute(
        sa.text(
            "SELECT rule_id, rule_version, appliance_id, agent_version, command_status, since, age_hours, "
            "count(*) OVER () AS total FROM overdue_deployments "
            "WHERE problem = 'never_delivered' AND live AND age_hours > :limit "
            "ORDER BY age_hours DESC, rule_id, appliance_id LIMIT :sample"
        ),
        {"limit": limit, "sample": SAMPLE},
    ).mappings()
    rows = [dict(row) for row in late]
    total = int(rows[0]["total"]) if rows else 0
    usual = connection.execute(
        sa.text(
            "SELECT percentile_cont(ARRAY[0.5, 0.95]) WITHIN GROUP (ORDER BY hours) FROM ("
            "  SELECT extract(epoch FROM delivered_at - promoted_at) / 3600 AS hours FROM deployments "
            "  WHERE delivered_at >= promoted_at) AS d"
        )
    ).scalar_one()
    return Finding(
        passed=total == 0,
        sentence=f"Every promoted rule reached its live appliances within {limit:g} hours."
        if not total
        else f"{total:,} rules on appliances are not delivered after {limit:g} hours, the oldest {rows[0]['rule_id']} "
        f"on {rows[0]['appliance_id']} after {rows[0]['age_hours']:,.0f}; see that the appliance fetches its commands.",
        observed=f"{total} late",
        required=f"0 later than {limit:g} hours",
        offenders=total,
        sample=_shown(rows),
        figures={"late": total, **_percentiles("promoted_to_delivered", usual)},
    )


def delivered_rules_are_executed_in_time(connection: sa.Connection, *, within_hours: float | None = None) -> Finding:
    """Every rule in service that was delivered longer ago than the service level was executed somewhere since.

    One appliance may have nothing to heal for long; a rule that nobody executes matches nothing, or never gets its
    turn.
    """
    limit = get_settings().execute_within_hours if within_hours is None else within_hours
    rows = [
        dict(row)
        for row in connection.execute(
            sa.text(
                f"""
                SELECT d.rule_id, d.rule_version, count(*) AS appliances, min(d.delivered_at) AS since,
                       (extract(epoch FROM {_CLOCK} - min(d.delivered_at)) / 3600)::float8 AS age_hours
                FROM deployments AS d
                JOIN l1_rules AS r ON r.rule_id = d.rule_id AND r.rule_version = d.rule_version AND r.enabled
                WHERE d.delivered_at IS NOT NULL OR d.first_executed_at IS NOT NULL
                GROUP BY d.rule_id, d.rule_version
                HAVING count(d.first_executed_at) = 0
                  AND extract(epoch FROM {_CLOCK} - min(d.delivered_at)) / 3600 > :limit
                ORDER BY min(d.delivered_at), d.rule_id
                """  # noqa: S608
            ),
            {"limit": limit},
        ).mappings()
    ]
    usual = connection.execute(
        sa.text(
            "SELECT percentile_cont(ARRAY[0.5, 0.95]) WITHIN GROUP (ORDER BY hours) FROM ("
            "  SELECT extract(epoch FROM first_executed_at - delivered_at) / 3600 AS hours FROM deployments "
            "  WHERE first_executed_at >= delivered_at) AS d"
        )
    ).scalar_one()
    return Finding(
        passed=not rows,
        sentence=f"Every delivered rule was executed somewhere within {limit:g} hours."
        if not rows
        else f"{len(rows)} delivered rules were executed nowhere after {limit:g} hours, the oldest {rows[0]['rule_id']}; "
        "see whether another rule stands before it (rule_conflicts) or its conditions match nothing.",
        observed=f"{len(rows)} rules",
        required=f"0 rules later than {limit:g} hours",
        offenders=len(rows),
        sample=_shown(rows[:SAMPLE]),
        figures={"never_executed_rules": len(rows), **_percentiles("delivered_to_executed", usual)},
    )


def appliances_run_what_they_should(connection: sa.Connection, *, within_hours: float | None = None) -> Finding:
    """Every live appliance reports the rule set of its manifest, and has let go what was withdrawn, in time."""
    limit = get_settings().deliver_within_hours if within_hours is None else within_hours
    counts = _counts(connection, "SELECT drift, count(*) FROM appliance_drift GROUP BY drift")
    rows = [
        dict(row)
        for row in connection.execute(
            sa.text(
                f"""
                SELECT appliance_id, agent_version, drift, since, drift_hours AS age_hours, tombstones, last_checkin,
                       count(*) OVER () AS total
                FROM appliance_drift
                WHERE drift <> 'in_step' AND drift_hours > :limit
                  AND status = 'online' AND last_checkin >= {_CLOCK} - interval '7 days'
                ORDER BY drift_hours DESC, appliance_id LIMIT :sample
                """  # noqa: S608
            ),
            {"limit": limit, "sample": SAMPLE},
        ).mappings()
    ]
    total = int(rows[0]["total"]) if rows else 0
    tombstones = connection.execute(sa.text("SELECT coalesce(sum(tombstones), 0) FROM appliance_drift")).scalar_one()
    return Finding(
        passed=total == 0,
        sentence="Every live appliance reports the rules that it should run, or has had less time than its service level."
        if not total
        else f"{total:,} live appliances run something else than they should, or do not say what, for more than "
        f"{limit:g} hours; longest {rows[0]['appliance_id']} ({rows[0]['drift'].replace('_', ' ')}).",
        observed=f"{total} appliances",
        required=f"0 appliances for more than {limit:g} hours",
        offenders=total,
        sample=_shown(rows),
        figures={
            "late": total,
            **{name: int(counts.get(name, 0)) for name in ("in_step", "differs", "unreported", "no_manifest")},
            "tombstones": int(tombstones),
        },
    )


def commands_are_settled_in_time(connection: sa.Connection, *, within_hours: float | None = None) -> Finding:
    """No command is open for longer than the service level, past its expiry, or without one; no withdrawal was refused.

    Settled are acknowledged, failed and superseded commands. An expired one is settled as long as its appliance shows
    no sign of life, and queued again when it does; its age counts from its first queueing.
    """
    limit = get_settings().settle_within_hours if within_hours is None else within_hours
    rows = [
        dict(row)
        for row in connection.execute(
            sa.text(
                f"""
                SELECT appliance_id, command_type, rule_id, rule_version, status, problem, since, age_hours,
                       count(*) OVER () AS total
                FROM (
                  SELECT c.*, c.created_at AS since,
                    (extract(epoch FROM {_CLOCK} - c.created_at) / 3600)::float8 AS age_hours,
                    CASE
                      WHEN c.status = 'failed' THEN 'the appliance refused to drop the rule: ' || coalesce(c.status_reason, '')
                      WHEN c.expires_at IS NULL THEN 'open, and it never expires'
                      WHEN c.expires_at < {_CLOCK} THEN 'open although expired: nothing is published'
                      ELSE 'not answered, however often it was queued'
                    END AS problem
                  FROM appliance_commands AS c
                  WHERE c.status IN ('pending', 'delivered')
                     OR (c.command_type = 'withdraw_rule' AND c.status = 'failed' AND EXISTS (
                          SELECT 1 FROM appliance_commands AS s
                          WHERE s.appliance_id = c.appliance_id AND s.rule_id = c.rule_id
                            AND s.rule_version = c.rule_version AND s.command_type = 'sync_promoted_rule'
                            AND s.withdrawn_at IS NOT NULL AND s.gone_at IS NULL))
                ) AS c
                WHERE c.status = 'failed' OR c.expires_at IS NULL OR c.age_hours > :limit
                   OR c.expires_at < {_CLOCK} - interval '1 hour'
                ORDER BY age_hours DESC, appliance_id, rule_id LIMIT :sample
                """  # noqa: S608
            ),
            {"limit": limit, "sample": SAMPLE},
        ).mappings()
    ]
    total = int(rows[0]["total"]) if rows else 0
    counts = _counts(connection, "SELECT status, count(*) FROM appliance_commands GROUP BY status")
    return Finding(
        passed=total == 0,
        sentence="Every command was settled in time."
        if not total
        else f"{total:,} commands are not settled; the oldest, {rows[0]['command_type']} of {rows[0]['rule_id']} for "
        f"{rows[0]['appliance_id']}, is {rows[0]['age_hours']:,.0f} hours old: {rows[0]['problem']}.",
        observed=f"{total} commands",
        required=f"0 commands older than {limit:g} hours",
        offenders=total,
        sample=_shown(rows),
        figures={
            "unsettled": total,
            **{
                name: int(counts.get(name, 0))
                for name in ("pending", "delivered", "acknowledged", "failed", "expired", "superseded")
            },
        },
    )


def _counts(connection: sa.Connection, query: str) -> dict[str, int]:
    """The rows of a query of names and counts."""
    return {str(row[0]): int(row[1]) for row in connection.execute(sa.text(query))}


def _percentiles(name: str, values: list[float | None] | None) -> dict[str, float | None]:
    """The figures `<name>_p50_hours` and `<name>_p95_hours`; none over nothing."""
    p50, p95 = values or (None, None)
    return {
        f"{name}_p50_hours": None if p50 is None else float(p50),
        f"{name}_p95_hours": None if p95 is None else float(p95),
    }


def _shown(rows: list[dict[str, object]]) -> list[dict[str, object]]:
    shown = []
    for row in rows:
        kept = {name: value for name, value in row.items() if name != "total"}
        if isinstance(kept.get("age_hours"), float):
            kept["age_hours"] = round(float(kept["age_hours"]), 1)  # type: ignore[arg-type]
        shown.append(kept)
    return shown
