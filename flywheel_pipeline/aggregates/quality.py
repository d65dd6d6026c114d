"""Questions about the aggregates: do they equal the log, is every execution accounted for? No Dagster here."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import sqlalchemy as sa

from flywheel_pipeline.aggregates.recount import recount
from flywheel_pipeline.quality import Finding

SAMPLE_CELLS = 500


def counters_equal_recount(engine: sa.Engine, *, full: bool) -> Finding:
    """Every counter equals a recount from the log; `full` recounts all site-days, else 500 drawn at random."""
    result = recount(engine, sample_cells=None if full else SAMPLE_CELLS)
    return Finding(
        passed=result.differences == 0,
        sentence=f"The counters equal a recount of {result.cells} site-days and {result.rules} rules."
        if result.differences == 0
        else f"{result.differences} counters differ from a recount; `flywheel rebuild` recomputes them from the log.",
        observed=f"{result.differences} differences",
        required="0 differences",
        offenders=result.differences,
        sample=result.offenders,
        figures={"differences": result.differences, "cells_recounted": result.cells, "rules": result.rules},
    )


def attributed_plus_unresolved_is_all(connection: sa.Connection) -> Finding:
    """Each L1 execution stands under a known rule or under the unresolved ids; the two add up to all of them."""
    row = connection.execute(
        sa.text(
            "SELECT (SELECT coalesce(sum(executions - synthetic), 0) FROM telemetry_daily_volume WHERE level = 'L1') AS l1, "
            "(SELECT coalesce(sum(match_count), 0) FROM l1_rules) AS attributed, "
            "(SELECT coalesce(sum(executions), 0) FROM unresolved_rule_ids) AS unresolved"
        )
    ).one()
    gap = int(row.l1 - row.attributed - row.unresolved)
    return Finding(
        passed=gap == 0,
        sentence=f"{row.attributed} attributed + {row.unresolved} unresolved = {row.l1} L1 executions."
        if gap == 0
        else f"{gap} L1 executions stand under no rule and in no list.",
        observed=f"a gap of {gap}",
        required="a gap of 0",
        offenders=abs(gap),
        figures={"l1": int(row.l1), "attributed": int(row.attributed), "unresolved": int(row.unresolved)},
    )


def no_unresolved_rule_ids(connection: sa.Connection) -> Finding:
    """No L1 telemetry names a rule that the registry does not know."""
    rows = (
        connection.execute(
            sa.text(
                "SELECT rule_id, executions, sites, first_seen, last_seen FROM unresolved_rule_ids "
                "WHERE executions > 0 ORDER BY executions DESC, rule_id"
            )
        )
        .mappings()
        .all()
    )
    executions = sum(int(row["executions"]) for row in rows)
    return Finding(
        passed=not rows,
        sentence="Every rule id in telemetry is known."
        if not rows
        else f"{len(rows)} unknown rule ids with {executions} executions; an alias or a registration resolves them.",
        observed=f"{len(rows)} ids",
        required="0 ids",
        offenders=len(rows),
        sample=[dict(row) for row in rows[:20]],
        figures={"unresolved_ids": len(rows), "unresolved_executions": executions},
    )


EXCLUDED = ("agent_unsupported", "not_applicable", "unreachable", "escalated", "suppressed", "unverified")


def exclusions_are_few(connection: sa.Connection, *, limit: float = 0.20) -> Finding:
    """For no enabled rule with 20 executions or more are over 20 % of them left out of its rate.

    Each rule with its shares by class, the largest class named; the fleet's share of each class as a figure, null
    while nothing was executed.
    """
    classes = ", ".join(EXCLUDED)
    rules = (
        connection.execute(
            sa.text(
                f"SELECT rule_id, matches, excluded, excluded::double precision / nullif(matches, 0) AS share, {classes} "  # noqa: S608 (constants)
                "FROM rule_scorecard WHERE enabled ORDER BY share DESC NULLS LAST, rule_id"
            )
        )
        .mappings()
        .all()
    )
    matches = sum(row["matches"] for row in rules)
    rows = [row for row in rules if row["matches"] >= 20 and row["share"] > limit]

    def mostly(row: Mapping[Any, Any]) -> str:
        largest = max(EXCLUDED, key=lambda name: row[name])
        return f"{largest.replace('_', ' ')} {row[largest] / row['matches']:.0%}"

    sentence = "No rule hides behind exclusions." if matches else "No rule in service was executed: nothing to judge."
    return Finding(
        passed=not rows,
        sentence=sentence
        if not rows
        else f"For {len(rows)} rules more than {limit:.0%} of the executions enter no rate; "
        f"most of all {rows[0]['rule_id']}, {rows[0]['share']:.0%}, mostly {mostly(rows[0])}.",
        observed=f"{len(rows)} rules",
        required=f"no rule above {limit:.0%}",
        offenders=len(rows),
        sample=[{**row, "mostly": mostly(row)} for row in rows[:20]],
        figures={
            "rules_above_limit": len(rows),
            **{
                f"share {name}": sum(row[name] for row in rules) / matches if matches else None
                for name in ("excluded", *EXCLUDED)
            },
        },
    )
