"""Questions about the rules in service: do they match, do their successes hold? No Dagster here."""

from __future__ import annotations

import datetime as dt
from typing import Any, Final

import sqlalchemy as sa

from flywheel_pipeline.aggregates.last_match import last_matches
from flywheel_pipeline.promotion.decide import incident_types
from flywheel_pipeline.quality import Finding

DORMANT_AFTER: Final = dt.timedelta(days=14)
DOUBTFUL_SHARE: Final = 0.20  # fraction of a rule's successes
AT_LEAST: Final = 20  # successes: below that a share says little


def _recent_month(now: dt.datetime) -> dt.date:
    """The first day of the month before: from there the roll-up by month covers 28 to 62 days, never a full scan."""
    first = now.astimezone(dt.UTC).date().replace(day=1)
    return (first - dt.timedelta(days=1)).replace(day=1)


def rules_in_service_match(connection: sa.Connection, now: dt.datetime) -> Finding:
    """Every rule in service for 14 days matched in the last 14; a built-in one only if its drift occurred.

    A built-in rule waits for its drift, and agents ship with it whether a site needs it or not; it is an offender
    where L2 healed its incident types meanwhile, so that it should have matched. A promoted rule was made since its
    drift recurs. Without any L1 telemetry in that time the question has no answer, which is no pass.
    """
    rows = connection.execute(
        sa.text(
            """
            WITH service AS (
              SELECT rule_id, max(occurred_at) AS since
              FROM rule_events
              WHERE flywheel_state_is_enabled(to_state) AND NOT flywheel_state_is_enabled(from_state)
              GROUP BY rule_id
            )
            SELECT r.rule_id, r.source, v.since, r.incident_pattern, r.platform
            FROM l1_rules AS r
            JOIN service AS v ON v.rule_id = r.rule_id
            WHERE r.enabled AND v.since <= :before
            ORDER BY v.since, r.rule_id
            """
        ),
        {"before": now - DORMANT_AFTER},
    ).all()
    newest = connection.execute(
        sa.text("SELECT max(last_event_at) FROM telemetry_daily_volume WHERE level = 'L1' AND executions > synthetic")
    ).scalar_one()
    figures: dict[str, float | int | None] = {"rules_in_service_14_days": len(rows)}
    required = f"a match within {DORMANT_AFTER.days} days for every rule that is {DORMANT_AFTER.days} days in service"
    if not rows:
        return Finding(True, "No rule has been in service for 14 days: nothing to judge.", "0 rules", required)
    if newest is None or newest < now - DORMANT_AFTER:
        return Finding(
            passed=False,
            sentence=f"Whether {len(rows)} rules match cannot be told: no L1 telemetry in {DORMANT_AFTER.days} days.",
            observed="no L1 telemetry",
            required=required,
            figures=figures,
        )
    last = last_matches(connection, [row.rule_id for row in rows])
    silent = [row for row in rows if row.rule_id not in last or last[row.rule_id] < now - DORMANT_AFTER]
    occurred = {
        (row.incident_type, row.platform): int(row.executions)
        for row in connection.execute(
            sa.text(
                "SELECT incident_type, platform, sum(executions) AS executions FROM pattern_month_stats "
                "WHERE month >= :month GROUP BY incident_type, platform HAVING sum(executions) > 0"
            ),
            {"month": _recent_month(now)},
        )
    }
    offenders: list[dict[str, Any]] = []
    for row in silent:
        types = sorted(incident_types(row.incident_pattern))
        by_l2 = sum(occurred.get((kind, row.platform), 0) for kind in types)
        if row.source == "builtin" and not by_l2:
            continue
        offenders.append(
            {
                "rule": row.rule_id,
                "source": row.source,
                "matches": ", ".join(types) or "nothing it names",
                "in service since": row.since,
                "last match": last.get(row.rule_id, "never"),
                "healed by L2 instead": by_l2,
            }
        )
    offenders.sort(key=lambda o: (-o["healed by L2 instead"], o["rule"]))
    never = sum(o["last match"] == "never" for o in offenders)
    sentence = f"Each of {len(rows)} rules in service matches."
    if silent:
        sentence = f"Each of {len(rows)} rules in service matches, or its drift did not occur ({len(silent)} built-in)."
    if offenders:
        first = offenders[0]
        sentence = (
            f"{len(offenders)} of {len(rows)} rules in service matched nothing for {DORMANT_AFTER.days} days, {never} of "
            f"them never; first {first['rule']}"
        )
        if first["healed by L2 instead"]:
            sentence += (
                f", while L2 healed {first['matches']} {first['healed by L2 instead']:,} times: "
                "compare its conditions with these incidents"
            )
        sentence += "."
    return Finding(
        passed=not offenders,
        sentence=sentence,
        observed=f"{len(offenders)} of {len(rows)} rules without a match",
        required=required,
        offenders=len(offenders),
        sample=offenders[:20],
        figures={
            **figures,
            "rules_without_a_match": len(offenders),
            "never_matched": never,
            "builtin_without_incident": len(silent) - len(offenders),
        },
    )


def successes_are_verified_and_last(connection: sa.Connection, now: dt.datetime) -> Finding:
    """For no enabled rule are over 20 % of the successes unverified, or of the verified ones followed by the same drift.

    Over this month and the one before, for rules with 20 successes or more. Two shares: unverified of what was
    reported as success (and belongs to no excluded class), recurring within 24 hours of what was verified.
    """
    rows = (
        connection.execute(
            sa.text(
                """
                SELECT m.rule_id AS rule, sum(m.unverified)::bigint AS unverified,
                  sum(m.successes)::bigint AS verified, sum(m.refired)::bigint AS recurring,
                  sum(m.unverified)::double precision / nullif(sum(m.unverified + m.successes), 0) AS unverified_share,
                  sum(m.refired)::double precision / nullif(sum(m.successes), 0) AS recurring_share
                FROM rule_month_stats AS m
                JOIN l1_rules AS r ON r.rule_id = m.rule_id AND r.enabled
                WHERE m.month >= :month
                GROUP BY m.rule_id
                """
            ),
            {"month": _recent_month(now)},
        )
        .mappings()
        .all()
    )

    def over(row: Any, share: str, of: int) -> bool:
        return of >= AT_LEAST and row[share] is not None and row[share] > DOUBTFUL_SHARE

    offenders = [
        dict(row)
        for row in rows
        if over(row, "unverified_share", row["unverified"] + row["verified"])
        or over(row, "recurring_share", row["verified"])
    ]
    offenders.sort(key=lambda o: (-(o["unverified"] + o["recurring"]), o["rule"]))
    unverified, verified = sum(r["unverified"] for r in rows), sum(r["verified"] for r in rows)
    recurring = sum(r["recurring"] for r in rows)
    sentence = "Successes are verified, and they last."
    if not unverified + verified:
        sentence = "No rule in service reported a success since last month: nothing to judge."
    if offenders:
        worst = offenders[0]
        parts = [
            text
            for text, said in (
                (f"{worst['unverified_share'] or 0:.0%} were not verified", bool(worst["unverified"])),
                (f"{worst['recurring_share'] or 0:.0%} came back within 24 hours", bool(worst["recurring"])),
            )
            if said
        ]
        sentence = (
            f"The successes of {len(offenders)} rules are in doubt, most of all those of {worst['rule']}: "
            + ", ".join(parts)
            + "."
        )
    return Finding(
        passed=not offenders,
        sentence=sentence,
        observed=f"{len(offenders)} rules above {DOUBTFUL_SHARE:.0%}",
        required=f"at most {DOUBTFUL_SHARE:.0%} unverified and {DOUBTFUL_SHARE:.0%} recurring, of {AT_LEAST} or more",
        offenders=len(offenders),
        sample=offenders[:20],
        figures={
            "rules_in_doubt": len(offenders),
            "unverified": unverified,
            "recurring": recurring,
            "unverified_share": unverified / (unverified + verified) if unverified + verified else None,
            "recurring_share": recurring / verified if verified else None,
        },
    )
