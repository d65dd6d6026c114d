"""Why is this promoted, why is that held, why does it fail? The whole answer for one rule or pattern.

Belongs here: gathering the gates on the present evidence, the ledger and the causes. Does not belong here: printing.
"""

from __future__ import annotations

from typing import Any

import sqlalchemy as sa

from flywheel_pipeline.aggregates.batches import Batch, policy_in_force
from flywheel_pipeline.errors import FlywheelError
from flywheel_pipeline.health.demotion import load_scopes
from flywheel_pipeline.health.failing_rules import failures_of
from flywheel_pipeline.health.stored import kept_attributions
from flywheel_pipeline.promotion import evalue
from flywheel_pipeline.promotion.decide import load_pattern_evidence, load_rule_evidence
from flywheel_pipeline.promotion.gates import Decision, decide_pattern, decide_rule, is_high_risk
from flywheel_pipeline.promotion.plain import plain
from flywheel_pipeline.promotion.policy import Policy, load_policy


def current_batch(connection: sa.Connection) -> Batch:
    """Return the last refreshed batch, under the policy in force now: explaining opens no batch of its own."""
    activation = policy_in_force(connection)
    row = connection.execute(
        sa.text(
            "SELECT batch_id, run_id FROM refresh_batches WHERE refreshed_at IS NOT NULL ORDER BY refresh_seq DESC LIMIT 1"
        )
    ).one_or_none()
    return Batch(
        batch_id=row.batch_id if row else 0,
        run_id=row.run_id if row else "",
        policy_name=activation.policy_name,
        policy_hash=load_policy(activation.policy_name).policy_hash,
        as_of=activation.as_of,
        refreshed=row is not None,
    )


def _ladder(
    policy: Policy, incident_type: str, successes: int, failures: int, attempt: int, *, high_risk: bool
) -> list[dict[str, Any]]:
    """Each stage's test on these episodes, with the clean episodes still needed."""
    if policy.kind != "sequential":
        return []
    rows = []
    for stage in ("canary", "ring", "fleet"):
        gate = policy.stage_gate(stage, incident_type, high_risk=high_risk)
        alpha = evalue.spent_alpha(gate.alpha, attempt)
        rows.append(
            {
                "stage": stage,
                "floor": gate.floor,
                "alpha": round(alpha, 6),
                "log_e": evalue.log_e(successes, failures, gate.floor),
                "verdict": evalue.verdict(successes, failures, gate.floor, alpha),
                "more_clean": evalue.needed_clean(successes, failures, gate.floor, alpha),
            }
        )
    return rows


def explain(engine: sa.Engine, subject: str) -> dict[str, Any]:
    """Explain one rule (by id) or pattern (by key, or by id) on the evidence of now, under the policy in force.

    Returns:
        JSON types: subject_id, subject_kind, policy, state, summary, decision {verdict, reason}, gates in order,
        ladder, evidence, events of the ledger, decisions on record, failures by error template; of a rule also why it fails
        as last attributed (`flywheel why` computes it anew), cusum (W by scope, highest first), quarantined_scopes and
        rollout {step, since, served_sites, paused_by}.

    Raises:
        FlywheelError: there is no such rule or pattern.
    """
    with engine.connect() as connection:
        return explain_in(connection, subject)


def explain_in(connection: sa.Connection, subject: str) -> dict[str, Any]:
    """Explain as `explain` does, in the caller's transaction: a report says all of one moment."""
    batch = current_batch(connection)
    policy = load_policy(batch.policy_name)
    rule = (
        connection.execute(sa.text("SELECT * FROM l1_rules WHERE rule_id = :s"), {"s": subject})
        .mappings()
        .one_or_none()
    )
    if rule is not None:
        return _rule(connection, policy, dict(rule))
    pattern = (
        connection.execute(
            sa.text(
                "SELECT * FROM patterns WHERE pattern_key = :s OR pattern_id = :s OR pattern_signature = :s LIMIT 1"
            ),
            {"s": subject},
        )
        .mappings()
        .one_or_none()
    )
    if pattern is None:
        unresolved = connection.execute(
            sa.text("SELECT executions FROM unresolved_rule_ids WHERE rule_id = :s"), {"s": subject}
        ).one_or_none()
        if unresolved is not None:
            raise FlywheelError(
                f"{subject} stands in {unresolved.executions} executions and in no registry.",
                hint="If it is another name of a known rule: flywheel aliases add-rule.",
            )
        raise FlywheelError(f"There is no rule or pattern {subject}.", hint="`flywheel status` lists them.")
    return _pattern(connection, batch, policy, dict(pattern))


def _events(connection: sa.Connection, rule_id: str | None) -> list[dict[str, Any]]:
    return [
        dict(row)
        for row in connection.execute(
            sa.text(
                "SELECT to_char(occurred_at AT TIME ZONE 'UTC', 'YYYY-MM-DD HH24:MI') AS at, kind, from_state, to_state, "
                "rule_version, actor, reason, decision_id, batch_id, run_id FROM rule_events WHERE rule_id = :id ORDER BY event_id"
            ),
            {"id": rule_id},
        ).mappings()
    ]


def _decisions(connection: sa.Connection, kind: str, subject: str | None) -> list[dict[str, Any]]:
    return [
        dict(row)
        for row in connection.execute(
            sa.text(
                "SELECT decision_id, to_char(decided_at AT TIME ZONE 'UTC', 'YYYY-MM-DD HH24:MI') AS at, verdict, reason, "
                "policy_name, left(policy_hash, 12) AS policy_hash, batch_id FROM promotion_decisions "
                "WHERE subject_kind = :kind AND subject_id = :id ORDER BY decision_id"
            ),
            {"kind": kind, "id": subject},
        ).mappings()
    ]


def _document(policy: Policy, kind: str, subject: str, state: str, summary: str, **more: Any) -> dict[str, Any]:
    document: dict[str, Any] = {
        "subject_id": subject,
        "subject_kind": kind,
        "policy": policy.name,
        "state": state,
        "summary": summary,
        "decision": None,
        "gates": [],
        "ladder": [],
        "evidence": None,
        "events": [],
        "decisions": [],
        "failures": [],
        "why": None,
        "cusum": [],
        "quarantined_scopes": [],
        "rollout": None,
    }
    return {**document, **more}


def _said(decision: Decision) -> dict[str, Any]:
    return {"verdict": decision.verdict, "target_state": decision.target_state, "reason": decision.reason}


def _rule(connection: sa.Connection, policy: Policy, rule: dict[str, Any]) -> dict[str, Any]:
    evidence = load_rule_evidence(connection, [rule["rule_id"]], policy)[0]
    decision = decide_rule(evidence, policy)
    rate = (
        "no matches yet"
        if not rule["match_count"]
        else f"{rule['success_count']:,} of {rule['match_count']:,} matches succeeded ({rule['success_rate']:.0%})"
    )
    if rule["state"] == "quarantined":
        summary = f"Quarantined by {rule['state_actor']}: {rule['state_reason']} {rate}."
    elif rule["enabled"]:
        summary = f"In service ({rule['state']}), runs {rule['runbook_id']}; {rate}. It was brought there by {rule['state_actor']}: {rule['state_reason']}"
    else:
        summary = f"{rule['state'].capitalize()}, not in service; {rate}. {rule['state_actor']}: {rule['state_reason']}"
    kept_from = _quarantined_scopes(connection, rule["rule_id"])
    if kept_from:
        named = ", ".join(q["scope_value"] for q in kept_from[:5]) + (" …" if len(kept_from) > 5 else "")
        summary += (
            f" It is quarantined in {len(kept_from)} part{'s' if len(kept_from) > 1 else ''} of the fleet: {named}."
        )
    rollout = _rollout(connection, rule)
    if rollout is not None and rollout["paused_by"]:
        summary += f" Its rollout is paused by {rollout['paused_by']}."
    runbook = connection.execute(
        sa.text("SELECT is_disruptive, category FROM runbooks WHERE runbook_id = :id"), {"id": rule["runbook_id"]}
    ).one_or_none()
    causes = failures_of(connection, [rule["rule_id"]]).get(rule["rule_id"], [])
    return _document(
        policy,
        "rule",
        rule["rule_id"],
        rule["state"],
        summary,
        decision=_said(decision),
        gates=plain(decision.gates),
        ladder=_ladder(
            policy,
            evidence.incident_type,
            evidence.rated_successes,
            evidence.rated_failures,
            1,
            high_risk=is_high_risk(
                bool(runbook and runbook.is_disruptive), runbook.category if runbook else None, policy
            ),
        ),
        evidence=plain(evidence),
        events=_events(connection, rule["rule_id"]),
        decisions=_decisions(connection, "rule", rule["rule_id"]),
        failures=[{"template": c.template, "count": c.count, "outcome_class": c.outcome_class} for c in causes[:10]],
        why=_why(connection, rule["rule_id"]),
        cusum=[
            {"scope": s.kind, "value": s.value, "episodes": s.episodes, "failures": s.failures, "w": s.w}
            for s in (evidence.scopes or load_scopes(connection, policy, [rule["rule_id"]]).get(rule["rule_id"], ()))
        ],
        quarantined_scopes=kept_from,
        rollout=rollout,
    )


def _quarantined_scopes(connection: sa.Connection, rule_id: str) -> list[dict[str, Any]]:
    return [
        dict(row)
        for row in connection.execute(
            sa.text(
                "SELECT scope_kind, scope_value, origin_rule_id, actor, reason, evidence, "
                "to_char(since AT TIME ZONE 'UTC', 'YYYY-MM-DD HH24:MI') AS at "
                "FROM quarantined_scopes WHERE rule_id = :id ORDER BY scope_kind, scope_value"
            ),
            {"id": rule_id},
        ).mappings()
    ]


def _rollout(connection: sa.Connection, rule: dict[str, Any]) -> dict[str, Any] | None:
    """Where a rule in canary or ring stands; None of any other."""
    if rule["state"] not in ("canary", "ring"):
        return None
    paused = connection.execute(
        sa.text(
            "SELECT act, actor FROM human_acts WHERE subject_kind = 'rule' AND subject_id = :id "
            "AND act IN ('pause', 'resume') ORDER BY act_id DESC LIMIT 1"
        ),
        {"id": rule["rule_id"]},
    ).one_or_none()
    served = connection.execute(
        sa.text(
            "SELECT count(DISTINCT m.site_id) FROM manifest_entries AS e "
            "JOIN manifest_contents AS c ON c.entry_ids @> ARRAY[e.entry_id] "
            "JOIN appliance_manifests AS m ON m.content_hash = c.content_hash WHERE e.rule_id = :id"
        ),
        {"id": rule["rule_id"]},
    ).scalar_one()
    return {
        "step": rule["rollout_step"],
        "since": rule["state_at"].isoformat() if rule["state_at"] else None,
        "served_sites": served,
        "paused_by": paused.actor if paused is not None and paused.act == "pause" else None,
    }


def _why(connection: sa.Connection, rule_id: str) -> dict[str, Any] | None:
    """The kept attribution of a failing rule; None where it does not fail, or no run has seen it fail yet."""
    kept = kept_attributions(connection, [rule_id]).get(rule_id)
    if kept is None:
        return None
    return {"as_of": kept.computed_at.isoformat(), "sentence": kept.sentence, **kept.result}


def _pattern(connection: sa.Connection, batch: Batch, policy: Policy, pattern: dict[str, Any]) -> dict[str, Any]:
    key = pattern["pattern_key"]
    history = (
        f"{pattern['success_count']} of {pattern['occurrences']} were reported by the stream that knew successes only"
    )
    if key is None:
        return _document(
            policy,
            "pattern",
            pattern["pattern_id"],
            pattern["status"],
            f"{pattern['status'].capitalize()}; imported without a key of its own, so it can never be promoted. {history}.",
        )
    evidence = load_pattern_evidence(connection, batch, policy, [key])[0]
    decision = decide_pattern(evidence, policy)
    if pattern["status"] == "promoted":
        summary = f"Promoted to {pattern['promoted_to_rule_id']} at {pattern['promoted_at']:%Y-%m-%d %H:%M} UTC."
    elif pattern["status"] == "rejected":
        summary = f"Rejected. {decision.reason}"
    else:
        summary = {
            "promote": "To be promoted by the next run.",
            "advance": f"To be advanced to {decision.target_state} by the next run.",
        }.get(
            decision.verdict,
            f"{'Rejected by its evidence' if decision.verdict == 'reject' else decision.verdict.capitalize()}: {decision.reason}",
        )
    if pattern["source"] == "imported":
        summary += f" ({history}.)"
    s, f = evidence.rated
    return _document(
        policy,
        "pattern",
        key,
        pattern["status"],
        summary,
        decision=_said(decision),
        gates=plain(decision.gates),
        ladder=_ladder(
            policy,
            evidence.incident_type,
            s,
            f,
            evidence.attempt,
            high_risk=is_high_risk(evidence.is_disruptive, evidence.category, policy),
        ),
        evidence=plain(evidence),
        events=_events(connection, pattern["promoted_to_rule_id"]),
        decisions=_decisions(connection, "pattern", key),
    )
