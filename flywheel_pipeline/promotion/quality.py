"""Questions about decisions, ledger and registry. Each returns a Finding; none imports Dagster."""

from __future__ import annotations

from collections import Counter
from typing import Any

import sqlalchemy as sa

from flywheel_pipeline.aggregates.batches import Batch
from flywheel_pipeline.promotion.certificate import evidence_of
from flywheel_pipeline.promotion.gates import next_stage
from flywheel_pipeline.promotion.ledger import fold
from flywheel_pipeline.promotion.policy import load_policy
from flywheel_pipeline.quality import Finding

_TO_PROMOTE = (
    "SELECT d.subject_id AS pattern_key, d.evidence ->> 'runbook_id' AS runbook_id, d.evidence ->> 'platform' AS platform, "
    "d.evidence ->> 'incident_type' AS incident_type, d.evidence ->> 'stage' AS stage, "
    "d.verdict = 'advance' AS sequential FROM promotion_decisions AS d "
    "WHERE d.confirmed_batch_id = :batch AND d.subject_kind = 'pattern' AND d.verdict IN ('promote', 'advance')"
)


def executable_runbooks_only(connection: sa.Connection, batch: Batch) -> Finding:
    """Each rule this batch would enable runs an executable runbook of the catalogue, for its platform."""
    rows = (
        connection.execute(
            sa.text(
                f"SELECT p.*, flywheel_runbook_problem(p.runbook_id, p.platform) AS problem FROM ({_TO_PROMOTE}) AS p "  # noqa: S608
                "ORDER BY p.pattern_key"
            ),
            {"batch": batch.batch_id},
        )
        .mappings()
        .all()
    )
    offenders = [dict(row) for row in rows if row["problem"] is not None]
    return Finding(
        passed=not offenders,
        sentence=f"All {len(rows)} patterns to promote run executable runbooks."
        if not offenders
        else f"{len(offenders)} of {len(rows)} patterns to promote name a runbook that cannot run: {offenders[0]['problem']}.",
        observed=f"{len(offenders)} of {len(rows)}",
        required="0",
        offenders=len(offenders),
        sample=offenders[:20],
        figures={"to_promote": len(rows), "offenders": len(offenders)},
    )


# Raw executions, from the log itself and not from the aggregates that the decision was taken on: of L2 before the
# canary, of the rule's own version from then on, each level by itself.
_RAW_RECOUNT = """
SELECT p.pattern_key, 'L1' AS level, count(*) AS executions, coalesce(sum(e.success::int), 0) AS successes
FROM ({to_promote}) AS p
JOIN l1_rules AS r ON r.pattern_key = p.pattern_key AND r.source = 'promoted' AND r.state = p.stage
JOIN executions AS e ON e.level = 'L1' AND e.rule_id = r.rule_id AND e.outcome_class <> 'synthetic' AND e.event_at >= (
  SELECT min(v.occurred_at) FROM rule_events AS v
  WHERE v.rule_id = r.rule_id AND v.rule_version = r.rule_version AND v.to_state = 'canary')
WHERE p.stage IN ('canary', 'ring') AND p.sequential
GROUP BY p.pattern_key
UNION ALL
SELECT p.pattern_key, 'L2', count(*), coalesce(sum(t.success::int), 0)
FROM ({to_promote}) AS p
JOIN execution_telemetry AS t
  ON coalesce(nullif(t.incident_type, ''), 'unknown') = p.incident_type
 AND coalesce(nullif(lower(t.platform), ''), 'unknown') = p.platform
 AND flywheel_level(t.resolution_level, t.rule_id, t.runbook_id) = 'L2'
 AND flywheel_runbook_ref('L2', t.rule_id, t.runbook_id, t.action) = p.runbook_id
WHERE t.chaos_campaign_id IS NULL AND NOT coalesce(t.tags @> '{{"synthetic": true}}', false)
  AND t.event_at BETWEEN t.created_at - interval '730 days' AND t.created_at + interval '10 minutes'
GROUP BY p.pattern_key
"""


def success_floor(connection: sa.Connection, batch: Batch) -> Finding:
    """Each pattern this batch would promote meets the success floor of the policy, recounted from the log.

    Under a threshold policy the floor and the least count are held against raw executions. Under a sequential policy
    the decision's capped episodes are held against the floor of its stage, after a recount of the raw executions
    shows that the log still holds at least as many, and as many successes, as the evidence claims of L2 and of the rule.
    """
    policy = load_policy(batch.policy_name)
    decisions = connection.execute(
        sa.text(
            "SELECT subject_id, evidence, gates FROM promotion_decisions "
            "WHERE confirmed_batch_id = :batch AND subject_kind = 'pattern' AND verdict IN ('promote', 'advance') "
            "ORDER BY subject_id"
        ),
        {"batch": batch.batch_id},
    ).all()
    raw = {
        (row.pattern_key, row.level): row
        for row in connection.execute(sa.text(_RAW_RECOUNT.format(to_promote=_TO_PROMOTE)), {"batch": batch.batch_id})
    }
    offenders: list[dict[str, Any]] = []
    lowest: float | None = None
    for row in decisions:
        present = evidence_of(row.evidence)
        widening = policy.kind == "sequential" and next_stage(present, policy) == present.stage
        floor, least = policy.success_floor(present.incident_type, present.stage, widening=widening)
        sites = row.evidence["sites"]
        own_stage = policy.kind == "sequential" and row.evidence["stage"] in ("canary", "ring")
        short = False
        n = s = good = rated = 0
        for level in ("L1", "L2"):
            counted = raw.get((row.subject_id, level))
            logged, healed = (int(counted.executions), int(counted.successes)) if counted else (0, 0)
            # Decisions of a release before this one name no level: of the rule from the canary on, of L2 before.
            claimed = [x for x in sites if x.get("level", "L1" if own_stage else "L2") == level]
            if policy.kind == "threshold" or claimed or (level == "L1") == own_stage:
                n, s = n + logged, s + healed
            successes = sum(int(x["successes"]) for x in claimed)
            episodes = successes + sum(int(x["failures"]) for x in claimed)
            if policy.kind == "sequential":
                short |= logged < episodes or healed < successes
                good, rated = good + successes, rated + episodes
        rate = (s / n if n else None) if policy.kind == "threshold" else (good / rated if rated else None)
        if policy.kind == "sequential":
            least = max(least, rated)
        if rate is not None:
            lowest = rate if lowest is None else min(lowest, rate)
        if rate is None or rate < floor or n < least or s < good or short:
            offenders.append(
                {
                    "pattern": row.subject_id,
                    "executions": n,
                    "successes": s,
                    "rate": rate,
                    "floor": floor,
                    "least": least,
                }
            )
    return Finding(
        passed=not offenders,
        sentence=f"All {len(decisions)} patterns to promote meet the floor of policy {policy.name}, recounted from the log."
        if not offenders
        else f"{len(offenders)} of {len(decisions)} patterns to promote miss the floor of policy {policy.name}.",
        observed=f"lowest rate {lowest:.1%}" if lowest is not None else "nothing to promote",
        required=f"floor of policy {policy.name}",
        offenders=len(offenders),
        sample=offenders[:20],
        figures={"to_promote": len(decisions), "offenders": len(offenders)},
    )


def registry_equals_ledger(connection: sa.Connection) -> Finding:
    """`l1_rules` equals the fold of `rule_events`, recomputed here in Python from every event."""
    events = connection.execute(
        sa.text(
            "SELECT event_id, rule_id, rule_version, to_state, content_hash, definition, rollout_step "
            "FROM rule_events ORDER BY event_id"
        )
    ).mappings()
    folded = fold([dict(event) for event in events])
    rules = {
        row["rule_id"]: dict(row)
        for row in connection.execute(
            sa.text(
                "SELECT rule_id, state, enabled, rule_version, content_hash, runbook_id, incident_pattern, last_event_id, "
                "rollout_step "
                "FROM l1_rules"
            )
        ).mappings()
    }
    offenders: list[dict[str, Any]] = []
    for rule_id in sorted(folded.keys() | rules.keys()):
        expected, found = folded.get(rule_id), rules.get(rule_id)
        if expected is None or found is None:
            offenders.append(
                {"rule_id": rule_id, "problem": "not in the ledger" if expected is None else "not in l1_rules"}
            )
            continue
        wrong = [column for column, value in expected.items() if found[column] != value]
        if wrong:
            offenders.append({"rule_id": rule_id, "problem": "differs in " + ", ".join(wrong)})
    return Finding(
        passed=not offenders,
        sentence=f"l1_rules equals the fold of its ledger for all {len(folded)} rules."
        if not offenders
        else f"{len(offenders)} rules differ from their ledger: somebody wrote past it.",
        observed=f"{len(offenders)} differences",
        required="0 differences",
        offenders=len(offenders),
        sample=offenders[:20],
        figures={"rules": len(folded), "differences": len(offenders)},
    )


def patterns_and_rules_reconcile(connection: sa.Connection) -> Finding:
    """Every promoted pattern has its own rule, and every promoted rule its own promoted pattern.

    Kinds of orphans: a pattern that points at no rule; one merged into the rule of another pattern (the old system cut
    ids to 8 characters); one whose rule never came into service; a rule without a promoted pattern; a rule whose
    pattern points at another rule.
    """
    rows = (
        connection.execute(
            sa.text(
                """
                SELECT CASE
                         WHEN r.rule_id IS NULL THEN 'pattern without rule'
                         WHEN r.pattern_key IS DISTINCT FROM p.pattern_key OR p.pattern_key IS NULL THEN 'pattern merged'
                         ELSE 'pattern promoted, rule not'
                       END AS kind,
                       coalesce(p.pattern_key, p.pattern_id) AS pattern, p.promoted_to_rule_id AS rule_id, r.state
                FROM patterns AS p LEFT JOIN l1_rules AS r ON r.rule_id = p.promoted_to_rule_id
                WHERE p.status = 'promoted'
                  AND (r.rule_id IS NULL OR p.pattern_key IS NULL OR r.pattern_key IS DISTINCT FROM p.pattern_key
                       OR r.state IN ('proposed', 'shadow'))
                UNION ALL
                SELECT CASE WHEN p.pattern_key IS NULL THEN 'rule without pattern' ELSE 'rule of a pattern that names another' END,
                       r.pattern_key, r.rule_id, r.state
                FROM l1_rules AS r LEFT JOIN patterns AS p ON p.pattern_key = r.pattern_key
                WHERE r.source = 'promoted' AND r.state NOT IN ('retired', 'proposed', 'shadow')
                  AND (p.pattern_key IS NULL OR p.status = 'promoted' AND p.promoted_to_rule_id IS DISTINCT FROM r.rule_id)
                ORDER BY 1 DESC, 3, 2
                """
            )
        )
        .mappings()
        .all()
    )
    kinds = Counter(row["kind"] for row in rows)
    return Finding(
        passed=not rows,
        sentence="Every promoted pattern has its own rule, and every promoted rule its pattern."
        if not rows
        else "Orphans: " + ", ".join(f"{count} x {kind}" for kind, count in kinds.most_common()) + ".",
        observed=f"{len(rows)} orphans",
        required="none",
        offenders=len(rows),
        sample=[dict(row) for row in rows[:20]],
        figures={"orphans": len(rows), **{kind.replace(" ", "_"): count for kind, count in kinds.items()}},
    )


def no_placeholder_enabled(connection: sa.Connection) -> Finding:
    """No enabled rule has a placeholder, pseudo or non-catalogue runbook."""
    rows = (
        connection.execute(
            sa.text(
                "SELECT rule_id, source, runbook_id, platform, flywheel_runbook_problem(runbook_id, platform) AS problem "
                "FROM l1_rules WHERE enabled AND flywheel_runbook_problem(runbook_id, platform) IS NOT NULL ORDER BY rule_id"
            )
        )
        .mappings()
        .all()
    )
    return Finding(
        passed=not rows,
        sentence="Every enabled rule runs an executable runbook."
        if not rows
        else f"{len(rows)} enabled rules cannot run: {rows[0]['rule_id']}, {rows[0]['problem']}.",
        observed=f"{len(rows)} rules",
        required="0 rules",
        offenders=len(rows),
        sample=[dict(row) for row in rows[:20]],
        figures={"offenders": len(rows)},
    )
