"""Questions about the pattern candidates. Each returns a Finding; none imports Dagster."""

from __future__ import annotations

from typing import Final

import sqlalchemy as sa

from flywheel_pipeline.quality import Finding

AT_LEAST: Final = 20  # observed executions
GAP: Final = 0.10  # fraction


def reported_rates_are_observed(connection: sa.Connection) -> Finding:
    """No imported pattern succeeds more than 10 points less often in telemetry than its success-only reports said.

    The old stream reported only successes, so each pattern stood at 100 %. Gates never read these counts; people do.
    """
    rows = (
        connection.execute(
            sa.text(
                """
                SELECT c.pattern_id AS pattern, c.incident_type, c.runbook_id, c.status,
                  p.success_count::double precision / nullif(p.occurrences, 0) AS reported_rate,
                  c.reported_occurrences AS reported, c.raw_rate AS observed_rate, c.executions AS observed
                FROM pattern_candidates AS c
                JOIN patterns AS p ON p.pattern_key = c.pattern_key
                WHERE c.reported_occurrences > 0
                ORDER BY p.success_count::double precision / p.occurrences - c.raw_rate DESC NULLS LAST, c.pattern_id
                """
            )
        )
        .mappings()
        .all()
    )
    compared = [row for row in rows if row["observed"] >= AT_LEAST and row["reported_rate"] is not None]
    offenders = [dict(row) for row in compared if row["reported_rate"] - row["observed_rate"] > GAP]
    unseen = sum(row["observed"] == 0 for row in rows)
    sentence = f"The reported rates of {len(compared)} imported patterns are those observed."
    if not compared:
        sentence = f"No imported pattern has {AT_LEAST} observed executions: nothing to judge."
    if offenders:
        first = offenders[0]
        sentence = (
            f"{len(offenders)} of {len(compared)} imported patterns were reported better than they are, first "
            f"{first['pattern']}: reported {first['reported_rate']:.0%}, observed {first['observed_rate']:.0%} "
            f"of {first['observed']:,}."
        )
    return Finding(
        passed=not offenders,
        sentence=sentence,
        observed=f"{len(offenders)} of {len(compared)} patterns",
        required=f"none more than {GAP * 100:.0f} points better than observed",
        offenders=len(offenders),
        sample=offenders[:20],
        figures={
            "imported_patterns": len(rows),
            "compared": len(compared),
            "reported_too_good": len(offenders),
            "never_observed": unseen,
        },
    )
