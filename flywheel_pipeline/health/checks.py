"""Dagster checks of the health room."""

from __future__ import annotations

from collections.abc import Mapping

import sqlalchemy as sa

from flywheel_pipeline.aggregates.batches import Batch
from flywheel_pipeline.checks import Check, at_batch, check_step
from flywheel_pipeline.health import quality
from flywheel_pipeline.health.failing_rules import AT_LEAST, BELOW, failing_rules
from flywheel_pipeline.health.severity import since_when, streaks
from flywheel_pipeline.health.stored import Kept, kept_attributions, update_attributions
from flywheel_pipeline.quality import Finding


def no_failing_rules(connection: sa.Connection) -> Finding:
    """No enabled rule with 20 matches or more heals fewer than half of them; those that do are shown with their causes.

    The causes are those kept by the last attribution of each rule; `_no_failing_rules` brings them up to date first.
    """
    found = failing_rules(connection)
    kept = kept_attributions(connection, [rule.rule_id for rule in found])
    causes = {rule_id: answer.sentence for rule_id, answer in kept.items()}
    since = streaks(connection, [rule.rule_id for rule in found])
    severe = [streak for streak in since.values() if streak.severe]
    figures: dict[str, float | int | None] = {
        "failing_rules": len(found),
        "severe_rules": len(severe),
        "longest_failing_days": max((streak.days for streak in since.values()), default=0),
        "failures_of_failing_rules": sum(streak.failures for streak in since.values()),
    }
    for rule in found[:10]:
        figures[f"rate {rule.rule_id}"] = rule.rate
    return Finding(
        passed=not found,
        sentence="No rule in service fails."
        if not found
        else f"{found[0].sentence} {since_when(since.get(found[0].rule_id)).capitalize()}. "
        f"{causes.get(found[0].rule_id, '')}".strip(),
        observed=f"{len(found)} rules below {BELOW:.0%}",
        required=f"no enabled rule below {BELOW:.0%} of at least {AT_LEAST} matches",
        offenders=len(found),
        severe=bool(severe),
        sample=[
            {
                "rule": rule.rule_id,
                "matches": rule.matches,
                "successes": rule.successes,
                "rate": f"{rule.rate:.0%}",
                "since when": since_when(since.get(rule.rule_id)),
                "severity": "error" if any(streak.rule_id == rule.rule_id for streak in severe) else "warning",
                "rate of what it could fix": "n/a" if rule.rated_rate is None else f"{rule.rated_rate:.0%}",
                "where, since when and what to do": causes.get(rule.rule_id, ""),
                "causes": "; ".join(
                    f"{family['what']} {family['share']:.0%}: {family['advice']}"
                    for family in (kept[rule.rule_id].result["families"][:5] if rule.rule_id in kept else ())
                ),
                "top errors": "; ".join(f"{count} x {template}" for template, count in rule.top_errors[:3]),
            }
            for rule in found[:20]
        ],
        figures=figures,
        pages={} if not found or found[0].rule_id not in kept else _why_page(kept[found[0].rule_id]),
    )


def _why_page(answer: Kept) -> dict[str, str]:
    """Of the worst rule: where and what fails, from the raw to the adjusted rate; of the others the table says enough."""
    pages = {"why_the_first_fails": answer.page}
    if "waterfall" in answer.plots:
        pages["waterfall_of_the_first"] = f"![from the raw to the adjusted rate]({answer.plots['waterfall']})"
    return pages


def _no_failing_rules(engine: sa.Engine, batch: Batch, _tags: Mapping[str, str]) -> Finding:
    # The attribution may come later in the same run than this check: whichever comes first computes, the other finds it.
    with engine.begin() as connection:
        update_attributions(connection, batch_id=batch.batch_id)
    with engine.connect() as connection:
        return no_failing_rules(connection)


# On the asset before the promotion gates: a failed gate must not hide which rules fail.
health_checks = check_step(
    "health_checks",
    [
        Check(
            "rule_quarantines",
            "no_failing_rules",
            "No enabled rule heals fewer than half of what it matches; a week of it, or 1,000 failures, is an error.",
            _no_failing_rules,
            warn=True,
        ),
        Check(
            "rule_scorecard",
            "rules_in_service_match",
            "Every rule in service for 14 days matched in the last 14; a built-in one only if its drift occurred.",
            at_batch(quality.rules_in_service_match),
            warn=True,
        ),
        Check(
            "rule_scorecard",
            "successes_are_verified_and_last",
            "For no enabled rule are over 20 % of the successes unverified, or followed by the same drift in 24 hours.",
            at_batch(quality.successes_are_verified_and_last),
            warn=True,
        ),
    ],
)
