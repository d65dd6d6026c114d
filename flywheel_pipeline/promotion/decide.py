"""Deciding: evidence from the database, verdict from the pure gates, one row where the verdict or its reasons change.

Belongs here: loading evidence, writing `promotion_decisions`. Does not belong here: the gates themselves
(`gates.py`) and anything that changes a rule (`apply.py`, through the ledger).
"""

from __future__ import annotations

import datetime as dt
import hashlib
import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import sqlalchemy as sa

from flywheel_pipeline.aggregates.batches import Batch
from flywheel_pipeline.candidates.keys import rule_id_of_pattern
from flywheel_pipeline.database import tables
from flywheel_pipeline.delivery.capability import served_action
from flywheel_pipeline.delivery.manifest import cohort
from flywheel_pipeline.delivery.publish import load_appliances
from flywheel_pipeline.health.cusum import ScopeAlarm, ScopeFigure
from flywheel_pipeline.health.demotion import advance_checkpoints, attribute_rules, load_scopes
from flywheel_pipeline.promotion.gates import (
    Decision,
    PatternEvidence,
    RuleEvidence,
    SiteEvidence,
    decide_pattern,
    decide_rule,
    is_healthy,
)
from flywheel_pipeline.promotion.ledger import ENABLED_STATES
from flywheel_pipeline.promotion.plain import plain
from flywheel_pipeline.promotion.policy import Policy, load_policy

RECURRENCE = dt.timedelta(hours=24)
SCOPES_ON_RECORD = 12
EARLY_GATES = ("telemetry_contract", "telemetry_freshness", "counters_equal_recount")


@dataclass(frozen=True)
class Decided:
    """A decision as stored: `changed` tells a new row from a confirmed one; `alarms`: scopes that leave service.

    `scopes`: where the CUSUM of a rule stands, fleet first.
    """

    decision_id: int
    subject_kind: Literal["pattern", "rule"]
    subject_id: str
    changed: bool
    decision: Decision
    alarms: tuple[ScopeAlarm, ...] = ()
    scopes: tuple[ScopeFigure, ...] = ()


def conditions_of(incident_type: str) -> dict[str, str]:
    """Return the match conditions of a rule promoted from a pattern of this incident type."""
    return {"incident_type": incident_type}


def incident_types(incident_pattern: Any) -> set[str]:
    """Return the incident types a rule's conditions name, in any of the shapes in the wild."""
    parts = incident_pattern if isinstance(incident_pattern, list) else [incident_pattern]
    found: set[str] = set()
    for part in parts:
        if not isinstance(part, Mapping):
            continue
        values = [part.get("incident_type"), part.get("check_type")]
        if part.get("field") in ("incident_type", "check_type"):
            values.append(part.get("value"))
        for value in values:
            found.update(v for v in (value if isinstance(value, list) else [value]) if isinstance(v, str) and v)
    return found


# The one rule that stands for a pattern, where several were imported or re-admitted with its key: the one that is
# furthest in service, then one out of service. A retired one still stands: its id is taken for ever.
RULE_OF_PATTERN = """
SELECT DISTINCT ON (pattern_key) pattern_key, rule_id, state, state_at, rule_version, rollout_step
FROM l1_rules WHERE source = 'promoted' AND pattern_key = ANY(:keys)
ORDER BY pattern_key,
  array_position(ARRAY['fleet', 'ring', 'canary', 'shadow', 'proposed', 'quarantined', 'retired'], state::text), rule_id
"""

# Before the canary, the settled episodes of L2; from the canary on, those of the rule's own version, and beside them,
# for the keys in :beside, those of L2 from before the canary at sites that the rule does not run at (:served names those
# it does). The first ones by event time count, so that evidence cannot be picked; a re-admission begins with fresh
# evidence.
_STAGED = f"""
    standing AS ({RULE_OF_PATTERN}),
    staged AS (
      SELECT r.rule_id, r.pattern_key, v.occurred_at AS since FROM standing AS r
      JOIN LATERAL (
        SELECT min(e.occurred_at) AS occurred_at FROM rule_events AS e
        WHERE e.rule_id = r.rule_id AND e.rule_version = r.rule_version AND e.to_state = 'canary'
      ) AS v ON true
      WHERE r.state IN ('canary', 'ring')
    ),
    own AS (
      SELECT s.pattern_key, e.site_id, e.day, e.hostname, e.outcome = 'success' AS succeeded, e.first_at,
             row_number() OVER (PARTITION BY s.pattern_key, e.site_id, e.hostname ORDER BY e.first_at, e.day) AS nth_of_host
      FROM staged AS s
      JOIN episodes AS e ON e.level = 'L1' AND e.rule_id = s.rule_id AND e.first_at >= s.since
      WHERE e.outcome <> 'unrated' AND e.last_at <= :settled_before
    )
"""  # noqa: S608 (a constant)
_SITE_EVIDENCE = sa.text(
    f"""
    WITH {_STAGED},
    served AS (
      SELECT * FROM jsonb_to_recordset(CAST(:served AS jsonb)) AS v (pattern_key text, site_id text)
      UNION SELECT pattern_key, site_id FROM own
    ),
    readmitted AS (
      SELECT definition ->> 'pattern_key' AS pattern_key, max(occurred_at) AS since
      FROM rule_events WHERE kind = 'readmitted' GROUP BY 1
    ),
    rated AS (
      SELECT e.pattern_key, e.site_id, e.day, e.hostname, e.succeeded, e.first_at, e.nth_of_host, 'L2' AS level
      FROM pattern_evidence AS e
      LEFT JOIN staged AS s ON s.pattern_key = e.pattern_key
      LEFT JOIN readmitted AS a ON a.pattern_key = e.pattern_key
      WHERE e.pattern_key = ANY(:keys) AND e.last_at <= :settled_before
        AND (s.pattern_key IS NULL
             OR (s.pattern_key = ANY(:beside) AND e.first_at < s.since AND NOT EXISTS (
                   SELECT 1 FROM served AS v WHERE v.pattern_key = e.pattern_key AND v.site_id = e.site_id)))
        AND e.first_at >= coalesce(a.since, '-infinity')
      UNION ALL
      SELECT own.*, 'L1' FROM own
    )
    SELECT pattern_key, site_id, level,
           count(*) FILTER (WHERE succeeded) AS successes,
           count(*) FILTER (WHERE NOT succeeded) AS failures,
           count(DISTINCT hostname) AS hosts
    FROM (
      SELECT r.*, row_number() OVER (PARTITION BY pattern_key, site_id ORDER BY first_at, day, hostname) AS nth_of_site
      FROM rated AS r WHERE nth_of_host <= :host_cap
    ) AS capped
    WHERE nth_of_site <= :site_cap
    GROUP BY pattern_key, site_id, level
    ORDER BY pattern_key, site_id
    """  # noqa: S608 (a constant)
)
_OWN_EVIDENCE = sa.text(
    f"""
    WITH {_STAGED}
    SELECT pattern_key, count(*) FILTER (WHERE succeeded) AS successes, count(*) FILTER (WHERE NOT succeeded) AS failures
    FROM own GROUP BY pattern_key
    """  # noqa: S608 (a constant)
)


def _served_sites(connection: sa.Connection, keys: Sequence[str], now: dt.datetime) -> dict[str, frozenset[str]]:
    """Return by pattern, for rules in canary or ring, the sites they are delivered to."""
    rules = connection.execute(sa.text(RULE_OF_PATTERN), {"keys": list(keys)}).all()
    staged = [rule for rule in rules if rule.state in ("canary", "ring")]
    if not staged:
        return {}
    sites = {appliance.site_id for appliance in load_appliances(connection, now)}
    return {
        rule.pattern_key: cohort(rule.rule_id, rule.rule_version, rule.state, sites, rule.rollout_step)
        for rule in staged
    }


def load_pattern_evidence(
    connection: sa.Connection, batch: Batch, policy: Policy, keys: Sequence[str] | None = None
) -> list[PatternEvidence]:
    """Return the evidence of every undecided pattern (or of `keys`), as the gates ask for it, in order of key."""
    candidates = connection.execute(
        sa.text(
            f"WITH standing AS ({RULE_OF_PATTERN.replace('= ANY(:keys)', 'IS NOT NULL')}) "  # noqa: S608 (a constant)
            "SELECT c.*, r.rule_id AS standing_rule, r.state AS rule_state, r.state_at AS rule_state_at, r.rule_version, "
            "r.rollout_step, "
            "CASE WHEN r.state = 'shadow' THEN ("
            "  SELECT count(*) FROM episodes AS e WHERE e.level <> 'L1' AND e.incident_type = c.incident_type "
            "  AND e.platform = c.platform AND e.executions > 0 AND e.first_at >= r.state_at) ELSE 0 END AS would_fires, "
            "CASE WHEN r.state IN ('canary', 'ring') THEN ("
            "  SELECT min(v.occurred_at) FROM rule_events AS v WHERE v.rule_id = r.rule_id "
            "  AND v.rule_version = r.rule_version AND v.to_state = 'canary') "
            "ELSE greatest(c.first_at, ("
            "  SELECT max(v.occurred_at) FROM rule_events AS v "
            "  WHERE v.kind = 'readmitted' AND v.definition ->> 'pattern_key' = c.pattern_key)) END AS observed_since "
            "FROM pattern_candidates AS c LEFT JOIN standing AS r ON r.pattern_key = c.pattern_key "
            "WHERE CASE WHEN CAST(:keys AS text[]) IS NOT NULL THEN c.pattern_key = ANY(CAST(:keys AS text[])) "
            "  ELSE coalesce(r.state, 'none') IN ('none', 'proposed', 'shadow', 'canary', 'ring') "
            "       AND (coalesce(c.status, 'pending') IN ('pending', 'approved') "
            "            OR r.state IN ('canary', 'ring') "
            "            OR (r.state IN ('proposed', 'shadow') AND c.status = 'promoted')) END "
            "ORDER BY c.pattern_key"
        ),
        {"keys": None if keys is None else list(keys)},
    ).all()
    rows = {row.pattern_key: row for row in candidates}
    served = _served_sites(connection, list(rows), batch.now)
    few = [
        key for key, reached in served.items() if policy.rollout is not None and len(reached) < policy.rollout.own_sites
    ]
    settled_before = batch.now - RECURRENCE
    own = {
        row.pattern_key: row
        for row in connection.execute(_OWN_EVIDENCE, {"keys": list(rows), "settled_before": settled_before})
    }
    sites: dict[str, list[SiteEvidence]] = defaultdict(list)
    for row in connection.execute(
        _SITE_EVIDENCE,
        {
            "keys": list(rows),
            "host_cap": policy.evidence.episodes_per_host,
            "site_cap": policy.evidence.episodes_per_site,
            "settled_before": settled_before,
            "beside": few,
            "served": json.dumps(
                [{"pattern_key": key, "site_id": site} for key in few for site in sorted(served[key])]
            ),
        },
    ):
        sites[row.pattern_key].append(SiteEvidence(row.site_id, row.successes, row.failures, row.hosts, row.level))
    active = connection.execute(
        sa.text("SELECT site_id, agent_version, capabilities FROM appliances WHERE status <> 'retired'")
    ).all()
    active_sites = len({row.site_id for row in active})
    healthy = connection.execute(
        sa.text(
            "SELECT r.rule_id, r.incident_pattern, r.platform, r.pattern_key, s.rated_rate FROM l1_rules AS r "
            "LEFT JOIN rule_scorecard AS s ON s.rule_id = r.rule_id WHERE r.enabled ORDER BY r.rule_id"
        )
    ).all()
    acts: dict[str, list[Any]] = defaultdict(list)
    for act in connection.execute(
        sa.text(
            "SELECT subject_id, act, actor, reason FROM human_acts "
            "WHERE subject_kind = 'pattern' AND act IN ('approve', 'reject') ORDER BY act_id"
        )
    ):
        acts[act.subject_id].append(act)
    readmissions: dict[str, int] = {
        row.pattern_key: row.n
        for row in connection.execute(
            sa.text(
                "SELECT definition ->> 'pattern_key' AS pattern_key, count(*) AS n FROM rule_events "
                "WHERE kind = 'readmitted' AND definition ->> 'pattern_key' IS NOT NULL GROUP BY 1"
            )
        )
    }
    paused = {
        row.subject_id: row.actor
        for row in connection.execute(
            sa.text(
                "SELECT DISTINCT ON (subject_id) subject_id, act, actor FROM human_acts "
                "WHERE subject_kind = 'rule' AND act IN ('pause', 'resume') ORDER BY subject_id, act_id DESC"
            )
        )
        if row.act == "pause"
    }
    # Once expired, a pattern stays parked at its stage and attempt until somebody approves it after that.
    parked = {
        (row.subject_id, row.stage, row.attempt)
        for row in connection.execute(
            sa.text(
                "SELECT d.subject_id, d.evidence ->> 'stage' AS stage, (d.evidence ->> 'attempt')::int AS attempt "
                "FROM promotion_decisions AS d WHERE d.subject_kind = 'pattern' AND d.verdict = 'expired' "
                "AND d.policy_name = :policy AND NOT EXISTS (SELECT 1 FROM human_acts AS a WHERE a.act = 'approve' "
                "  AND a.subject_id = d.subject_id AND a.acted_at > d.decided_at)"
            ),
            {"policy": policy.name},
        )
    }
    verdicts: dict[str, str] = {
        row.gate: row.verdict
        for row in connection.execute(
            sa.text("SELECT gate, verdict FROM gate_verdicts WHERE batch_id = :batch"), {"batch": batch.batch_id}
        )
    }
    early = [verdicts.get(gate) for gate in EARLY_GATES]
    checks_green = None if None in early else all(v == "pass" for v in early)

    evidence = []
    for key, row in rows.items():
        capable = (
            None
            if not active
            else sum(
                served_action(row.runbook_id or "", row.platform, a.agent_version, a.capabilities).ok for a in active
            )
            / len(active)
        )
        shadowed = tuple(
            h.rule_id
            for h in healthy
            if row.incident_type in incident_types(h.incident_pattern)
            and h.platform in (None, row.platform)  # a rule of unknown platform might stand on any
            and h.pattern_key != key
            and is_healthy(h.rated_rate, policy)
        )
        stage = row.rule_state or "none"
        attempt = max(row.rule_version or 1, 1 + readmissions.get(key, 0))
        evidence.append(
            PatternEvidence(
                pattern_key=key,
                incident_type=row.incident_type,
                runbook_id=row.runbook_id or "",
                platform=row.platform,
                occurrences=row.executions,
                successes=row.raw_successes,
                excluded=row.excluded,
                unverified=row.unverified,
                runbook_problem=row.runbook_problem,
                is_disruptive=bool(row.is_disruptive),
                category=row.category,
                conditions=conditions_of(row.incident_type),
                matched_incidents=row.type_episodes,
                shadowed_rules=shadowed,
                capable_share=capable,
                selected_incidents=row.chosen_episodes,
                type_incidents=row.type_episodes,
                sites=tuple(sites[key]),
                active_sites=active_sites,
                stage=stage,
                would_fires=row.would_fires,
                shadow_days=0.0
                if stage != "shadow"
                else max((batch.now - row.rule_state_at).total_seconds() / 86400, 0.0),
                attempt=attempt,
                approvers=_approvers(acts[key]),
                rejected_by=acts[key][-1].actor if acts[key] and acts[key][-1].act == "reject" else None,
                checks_green=checks_green,
                days_observed=None
                if row.observed_since is None
                else max((batch.now - row.observed_since).total_seconds() / 86400, 0.0),
                first_at=row.first_at.isoformat() if row.first_at else None,
                last_at=row.last_at.isoformat() if row.last_at else None,
                parked=(key, stage, attempt) in parked,
                step=row.rollout_step,
                step_days=max((batch.now - row.rule_state_at).total_seconds() / 86400, 0.0)
                if stage in ("canary", "ring")
                else 0.0,
                own_successes=own[key].successes if key in own else 0,
                own_failures=own[key].failures if key in own else 0,
                served_sites=len(served.get(key, ())),
                paused_by=paused.get(row.standing_rule),
            )
        )
    return evidence


def _approvers(acts: Sequence[Any]) -> tuple[str, ...]:
    """Return who approves, each once, in order of time: a rejection ends the approvals before it."""
    names: dict[str, None] = {}
    for act in acts:
        if act.act == "reject":
            names.clear()
        else:
            names[act.actor] = None
    return tuple(names)


def load_rule_evidence(
    connection: sa.Connection, rule_ids: Sequence[str] | None = None, policy: Policy | None = None
) -> list[RuleEvidence]:
    """Return the evidence of every rule in service (or of `rule_ids`), as the gates ask for it, in order of id.

    With a policy, rated episodes of promoted rules are those of their version outside quarantined scopes, and CUSUM
    and alarms are filled in; else they are those of all time.
    """
    rows = connection.execute(
        sa.text(
            "SELECT s.*, r.incident_pattern, flywheel_runbook_problem(r.runbook_id, r.platform) AS runbook_problem "
            "FROM l1_rules AS r JOIN rule_scorecard AS s ON s.rule_id = r.rule_id "
            "WHERE CASE WHEN CAST(:ids AS text[]) IS NULL THEN r.state NOT IN ('quarantined', 'retired') "
            "           ELSE r.rule_id = ANY(CAST(:ids AS text[])) END ORDER BY r.rule_id"
        ),
        {"ids": None if rule_ids is None else list(rule_ids)},
    ).all()
    found = [
        RuleEvidence(
            rule_id=row.rule_id,
            rule_version=row.rule_version,
            incident_type=", ".join(sorted(incident_types(row.incident_pattern))),
            runbook_id=row.runbook_id,
            platform=row.platform,
            source=row.source,
            state=row.state,
            runbook_problem=row.runbook_problem,
            matches=row.matches,
            successes=row.raw_successes,
            failures=row.raw_failures,
            rated_successes=row.successful_episodes,
            rated_failures=row.rated_episodes - row.successful_episodes,
        )
        for row in rows
    ]
    return found if policy is None else _with_scopes(connection, found, policy)


def _with_scopes(connection: sa.Connection, rules: list[RuleEvidence], policy: Policy) -> list[RuleEvidence]:
    watched = [
        rule.rule_id
        for rule in rules
        if rule.state in ENABLED_STATES and not (rule.source == "builtin" and policy.demotion.spare_builtin)
    ]
    c = policy.demotion.cusum
    # Built-in rules that the policy spares have most of the volume; nothing would come of their CUSUM.
    scopes = load_scopes(connection, policy, watched) if watched else {}
    alarmed = [rule_id for rule_id in watched if any(s.w_peak >= c.quarantine_at for s in scopes.get(rule_id, ()))]
    attributed = attribute_rules(connection, alarmed, c)
    present = []
    for rule in rules:
        figures = scopes.get(rule.rule_id, ())
        fleet = next((s for s in figures if s.kind == "fleet"), None)
        if rule.rule_id in watched:
            alarm = attributed.get(rule.rule_id)
            out = alarm.scopes if alarm else ()
            rule = replace(
                rule,
                rated_successes=fleet.episodes - fleet.failures if fleet else 0,
                rated_failures=fleet.failures if fleet else 0,
                scopes=figures,
                alarms=out,
                fleet_alarm=alarm.fleet if alarm else None,
            )
        elif rule.state in ("proposed", "shadow"):
            # No machine runs this version yet: what a version before it did speaks of other content.
            rule = replace(rule, rated_successes=0, rated_failures=0)
        present.append(rule)
    return present


def decision_hash(decision: Decision, policy: Policy) -> str:
    """Return the sha256 over verdict, target, policy and each gate's verdict: what makes a decision another one.

    Observed figures are left out on purpose: a pattern that is held for the same reason on one more execution is
    still the same decision; its evidence of that moment stays in the first row, the present one in `explain`.
    """
    content = [
        decision.verdict,
        decision.target_state,
        policy.policy_hash,
        [(gate.gate, gate.verdict) for gate in decision.gates],
    ]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def _store(
    connection: sa.Connection,
    batch: Batch,
    policy: Policy,
    subject_kind: Literal["pattern", "rule"],
    decisions: Sequence[tuple[str, Decision, Any]],
) -> list[Decided]:
    latest = {
        row.subject_id: row
        for row in connection.execute(
            sa.text(
                "SELECT DISTINCT ON (subject_id) subject_id, decision_id, decision_hash FROM promotion_decisions "
                "WHERE subject_kind = :kind ORDER BY subject_id, decision_id DESC"
            ),
            {"kind": subject_kind},
        )
    }
    stored: list[Decided] = []
    confirmed: list[int] = []
    for subject_id, decision, evidence in decisions:
        digest = decision_hash(decision, policy)
        before = latest.get(subject_id)
        # An actionable decision is always a row of its own batch: its evidence is what the certificate speaks of.
        acts = decision.verdict in ("promote", "advance", "quarantine_scope")
        fresh = before is None or before.decision_hash != digest or acts
        if before is not None and not fresh:
            confirmed.append(before.decision_id)
            stored.append(Decided(before.decision_id, subject_kind, subject_id, False, decision, *_cusum(evidence)))
            continue
        decision_id = connection.execute(
            sa.insert(tables.promotion_decisions)
            .values(
                batch_id=batch.batch_id,
                confirmed_batch_id=batch.batch_id,
                run_id=batch.run_id,
                subject_kind=subject_kind,
                subject_id=subject_id,
                policy_name=policy.name,
                policy_hash=policy.policy_hash,
                verdict=decision.verdict,
                reason=decision.reason,
                gates=plain(decision.gates),
                evidence=plain(evidence),
                decision_hash=digest,
            )
            .returning(tables.promotion_decisions.c.decision_id)
        ).scalar_one()
        stored.append(Decided(decision_id, subject_kind, subject_id, True, decision, *_cusum(evidence)))
    if confirmed:
        connection.execute(
            # What a later batch confirmed meanwhile stays confirmed by it: this batch was overtaken.
            sa.text(
                "UPDATE promotion_decisions SET confirmed_batch_id = :batch "
                "WHERE decision_id = ANY(:ids) AND confirmed_batch_id <= :batch"
            ),
            {"batch": batch.batch_id, "ids": confirmed},
        )
    return stored


def _cusum(evidence: Any) -> tuple[tuple[ScopeAlarm, ...], tuple[ScopeFigure, ...]]:
    return (evidence.alarms, evidence.scopes) if isinstance(evidence, RuleEvidence) else ((), ())


def decide_patterns(connection: sa.Connection, batch: Batch) -> list[Decided]:
    """Decide every pattern that is not promoted or rejected, under the batch's policy; store and return the decisions."""
    policy = load_policy(batch.policy_name)
    decisions = []
    for evidence in load_pattern_evidence(connection, batch, policy):
        decisions.append((evidence.pattern_key, decide_pattern(evidence, policy), evidence))
    connection.execute(
        sa.text("UPDATE refresh_batches SET decided_at = clock_timestamp() WHERE batch_id = :id"),
        {"id": batch.batch_id},
    )
    return _store(connection, batch, policy, "pattern", decisions)


def decide_rules(connection: sa.Connection, batch: Batch) -> list[Decided]:
    """Decide for every rule in service whether it stays, under the batch's policy; store and return the decisions."""
    policy = load_policy(batch.policy_name)
    decisions = [
        (evidence.rule_id, decide_rule(evidence, policy), replace(evidence, scopes=evidence.scopes[:SCOPES_ON_RECORD]))
        for evidence in load_rule_evidence(connection, policy=policy)
    ]
    advance_checkpoints(connection, policy, batch.now)
    return _store(connection, batch, policy, "rule", decisions)


def rule_of_pattern(connection: sa.Connection, key: str) -> tuple[str, str, int]:
    """Return (rule id, state, version) of the rule that stands for this pattern; of the one to be made, state none."""
    known = connection.execute(sa.text(RULE_OF_PATTERN), {"keys": [key]}).one_or_none()
    return (known.rule_id, known.state, known.rule_version) if known else (rule_id_of_pattern(key), "none", 1)
