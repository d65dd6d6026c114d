"""Questions about the telemetry itself. Each returns a Finding; none imports Dagster."""

from __future__ import annotations

import datetime as dt

import sqlalchemy as sa

from flywheel_pipeline.quality import Finding

RECENT = dt.timedelta(days=7)
FRESH_WITHIN = dt.timedelta(hours=24)
SILENT_AFTER = dt.timedelta(hours=24)


def _violations(connection: sa.Connection, where: str, **values: object) -> tuple[list[dict[str, object]], int]:
    """Return the newest 20 rows of `telemetry_violations` that meet a condition, and how many meet it in all."""
    rows = connection.execute(
        sa.text(
            "SELECT site_id, day, execution_id, problem, sentence, count(*) OVER () AS offenders "  # noqa: S608 (constants)
            f"FROM telemetry_violations WHERE {where} ORDER BY created_at DESC, execution_id LIMIT 20"
        ),
        values,
    ).mappings()
    found = [dict(row) for row in rows]
    counts = [int(row.pop("offenders")) for row in found]
    return found, counts[0] if counts else 0


def telemetry_contract(connection: sa.Connection, now: dt.datetime) -> Finding:
    """No row that arrived in the last 7 days breaks the contract (clock skew is a question of its own)."""
    rows, offenders = _violations(connection, "problem <> 'skewed_clock' AND created_at >= :since", since=now - RECENT)
    return Finding(
        passed=not rows,
        sentence="All recent telemetry keeps the contract."
        if not rows
        else f"{offenders} rows of the last 7 days break the contract, first {rows[0]['execution_id']}: {rows[0]['sentence']}.",
        observed=f"{offenders} rows",
        required="0 rows",
        offenders=offenders,
        sample=rows,
        figures={"offenders": offenders},
    )


def no_skewed_clocks(connection: sa.Connection) -> Finding:
    """No row is dated after its arrival or two years before it; such rows are listed here and counted nowhere else."""
    rows, offenders = _violations(connection, "problem = 'skewed_clock'")
    return Finding(
        passed=not rows,
        sentence="Every row has a credible event time."
        if not rows
        else f"{offenders} rows have no credible event time and are left out of every figure.",
        observed=f"{offenders} rows",
        required="0 rows",
        offenders=offenders,
        sample=rows,
        figures={"offenders": offenders},
    )


def telemetry_freshness(connection: sa.Connection, now: dt.datetime) -> Finding:
    """The newest telemetry arrived within 24 hours of the batch's clock."""
    newest = connection.execute(sa.text("SELECT max(last_arrival_at) FROM telemetry_daily_volume")).scalar_one()
    if newest is None:
        return Finding(False, "No telemetry has arrived yet.", "no rows", "a row within 24 hours")
    age = now - newest
    hours = age.total_seconds() / 3600
    passed = age <= FRESH_WITHIN
    return Finding(
        passed=passed,
        sentence=f"The newest telemetry arrived {max(hours, 0):.1f} hours before this batch's clock"
        + ("." if passed else "; too old to promote by."),
        observed=f"{hours:.1f} hours",
        required="at most 24 hours",
        offenders=0 if passed else 1,
        figures={"age_hours": hours},
    )


def no_open_rejects(connection: sa.Connection) -> Finding:
    """No rejected row waits to be retried or discarded."""
    rows = (
        connection.execute(
            sa.text(
                "SELECT reason_code, count(*) AS rows, min(reason) AS example FROM telemetry_rejects "
                "WHERE status = 'open' GROUP BY reason_code ORDER BY count(*) DESC, reason_code"
            )
        )
        .mappings()
        .all()
    )
    offenders = sum(int(row["rows"]) for row in rows)
    return Finding(
        passed=not rows,
        sentence="No rejected row waits."
        if not rows
        else f"{offenders} rejected rows wait: `flywheel rejects list` shows them, `flywheel rejects retry` re-drives them.",
        observed=f"{offenders} rows",
        required="0 rows",
        offenders=offenders,
        sample=[dict(row) for row in rows[:20]],
        figures={"open_rejects": offenders},
    )


def agent_releases_report(connection: sa.Connection, now: dt.datetime) -> Finding:
    """Every agent release that reported at least 10 rows a day over the last week reported in the last 24 hours."""
    rows = (
        connection.execute(
            sa.text(
                """
                SELECT agent_version, sum(executions - synthetic) AS executions_of_week, max(last_event_at) AS last_event_at
                FROM telemetry_daily_volume
                WHERE last_event_at >= :week AND agent_version <> 'unknown'
                GROUP BY agent_version
                HAVING sum(executions - synthetic) >= 70 AND max(last_event_at) < :silent
                ORDER BY max(last_event_at)
                """
            ),
            {"week": now - dt.timedelta(days=8), "silent": now - SILENT_AFTER},
        )
        .mappings()
        .all()
    )
    return Finding(
        passed=not rows,
        sentence="Every agent release in use reports."
        if not rows
        else "Silent for 24 hours: agent " + ", ".join(row["agent_version"] for row in rows) + ".",
        observed=f"{len(rows)} silent releases",
        required="none",
        offenders=len(rows),
        sample=[dict(row) for row in rows[:20]],
        figures={"silent_releases": len(rows)},
    )


def sites_and_tiers_report(connection: sa.Connection, now: dt.datetime) -> Finding:
    """Every site and every tier (L1, L2, L3) with at least 10 rows a day over the last week reported in the last 24 hours."""
    rows = (
        connection.execute(
            sa.text(
                """
                SELECT CASE WHEN grouping(site_id) = 0 THEN 'site' ELSE 'tier' END AS source,
                  coalesce(site_id, level) AS name, sum(executions)::bigint AS executions_of_week,
                  max(last_event_at) AS last_event_at
                FROM telemetry_daily_volume
                WHERE last_event_at >= :week
                GROUP BY GROUPING SETS ((site_id), (level))
                HAVING sum(executions) >= 70
                ORDER BY max(last_event_at), 1 DESC, 2
                """
            ),
            {"week": now - dt.timedelta(days=8)},
        )
        .mappings()
        .all()
    )
    silent = [dict(row) for row in rows if row["last_event_at"] < now - SILENT_AFTER]
    ages = {
        kind: max(
            ((now - row["last_event_at"]).total_seconds() / 3600 for row in rows if row["source"] == kind), default=None
        )
        for kind in ("site", "tier")
    }
    sentence = f"All {len(rows)} busy sites and tiers report."
    if not rows:
        sentence = "No site and no tier reported 70 rows in the last 8 days: nothing to judge."
    if silent:
        first = silent[0]
        sentence = (
            f"{len(silent)} of {len(rows)} busy sites and tiers are silent for 24 hours, first {first['source']} "
            f"{first['name']}, last heard of {first['last_event_at']:%Y-%m-%d %H:%M} UTC."
        )
    return Finding(
        passed=not silent,
        sentence=sentence,
        observed=f"{len(silent)} of {len(rows)} silent",
        required="none",
        offenders=len(silent),
        sample=silent[:20],
        figures={
            "silent_sources": len(silent),
            "busy_sources": len(rows),
            "oldest_site_hours": ages["site"],
            "oldest_tier_hours": ages["tier"],
        },
    )
