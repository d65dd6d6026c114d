"""Dagster checks of the health room."""

from __future__ import annotations

import sqlalchemy as sa

from flywheel_pipeline.checks import Check, check_step, reading
from flywheel_pipeline.health.failing_rules import AT_LEAST, BELOW, failing_rules
from flywheel_pipeline.quality import Finding


def no_failing_rules(connection: sa.Connection) -> Finding:
    """No enabled rule with 20 matches or more heals fewer than half of them; those that do are shown with their errors."""
    found = failing_rules(connection)
    figures: dict[str, float | int | None] = {"failing_rules": len(found)}
    for rule in found[:10]:
        figures[f"rate {rule.rule_id}"] = rule.rate
    return Finding(
        passed=not found,
        sentence="No rule in service fails." if not found else found[0].sentence,
        observed=f"{len(found)} rules below {BELOW:.0%}",
        required=f"no enabled rule below {BELOW:.0%} of at least {AT_LEAST} matches",
        offenders=len(found),
        sample=[
            {
                "rule": rule.rule_id,
                "matches": rule.matches,
                "successes": rule.successes,
                "rate": f"{rule.rate:.0%}",
                "rate of what it could fix": "n/a" if rule.rated_rate is None else f"{rule.rated_rate:.0%}",
                "top errors": "; ".join(f"{count} x {template}" for template, count in rule.top_errors[:3]),
            }
            for rule in found[:20]
        ],
        figures=figures,
    )


# On the asset before the promotion gates: a failed gate must not hide which rules fail.
health_checks = check_step(
    "health_checks",
    [
        Check(
            "rule_quarantines",
            "no_failing_rules",
            "No enabled rule heals fewer than half of what it matches; why it fails stands in the table.",
            reading(no_failing_rules),
            warn=True,
        )
    ],
)
