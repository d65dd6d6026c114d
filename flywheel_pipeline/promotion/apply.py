"""Applying: the one place that turns decisions into ledger events, for promotions and demotions alike.

Belongs here: which events a decision means, in one transaction with the pattern's status and the manifests. Does not
belong here: deciding. The padlock is not here either: the database refuses what this module should not try.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import sqlalchemy as sa

from flywheel_pipeline.aggregates.batches import Batch
from flywheel_pipeline.database import tables
from flywheel_pipeline.delivery.publish import write_manifests
from flywheel_pipeline.errors import FlywheelError
from flywheel_pipeline.health.cusum import evidence_of
from flywheel_pipeline.promotion import certificate as certificates
from flywheel_pipeline.promotion.decide import Decided, conditions_of, load_pattern_evidence, rule_of_pattern
from flywheel_pipeline.promotion.gates import NOT_SERVED, Decision, decide_pattern, within_limit
from flywheel_pipeline.promotion.ledger import RuleEvent, append_events, definition
from flywheel_pipeline.promotion.policy import load_policy
from flywheel_pipeline.quality import unmet_gates

PROMOTION_LOCK = 0x666C7977686C0002  # 'flywhl', lock 2
ACTOR = "flywheel"
_AT_ONCE = {("none", "fleet"), ("proposed", "fleet")}


@dataclass(frozen=True)
class Applied:
    """What one batch applied: (rule id, new state) moved; (subject, reason) held although decided for.

    `gates_unmet`: they are held because the batch did not pass its gates. Other holds (a freeze, the limit of one run,
    evidence that changed meanwhile) are the ordinary course of things.
    """

    moved: tuple[tuple[str, str], ...]
    held: tuple[tuple[str, str], ...]
    gates_unmet: bool = False


def lock_promotion(connection: sa.Connection) -> None:
    """Wait for the promotion lock; two promoters at once promote once."""
    connection.execute(sa.text("SELECT pg_advisory_xact_lock(:key)"), {"key": PROMOTION_LOCK})


def apply_promotions(connection: sa.Connection, batch: Batch) -> Applied:
    """Append the events of this batch's promotions, within the caller's transaction.

    Only the last decision that this very batch took on a pattern counts, and only while every required gate has passed
    in it. The policy limits how many rules that no machine runs yet one run takes a step further, over all calls for
    this batch; those with most evidence come first, the others are held to the next run and say so.
    """
    lock_promotion(connection)
    policy = load_policy(batch.policy_name)
    rows = connection.execute(
        sa.text(
            "SELECT d.* FROM ("
            "  SELECT DISTINCT ON (subject_id) decision_id, subject_id, verdict, reason, evidence ->> 'stage' AS stage, "
            "  (evidence ->> 'step')::int AS step "
            "  FROM promotion_decisions WHERE confirmed_batch_id = :batch AND subject_kind = 'pattern' "
            "  ORDER BY subject_id, decision_id DESC"
            ") AS d WHERE d.verdict IN ('promote', 'advance') "
            "  AND NOT EXISTS (SELECT 1 FROM rule_events AS e WHERE e.decision_id = d.decision_id) "
            "ORDER BY d.decision_id"
        ),
        {"batch": batch.batch_id},
    ).all()
    if not rows:
        return Applied((), ())
    unmet = unmet_gates(connection, batch.batch_id)
    if unmet:
        why = "the batch did not pass its gates: " + ", ".join(f"{gate} {v}" for gate, v in unmet.items())
        return Applied((), tuple((row.subject_id, why) for row in rows), gates_unmet=True)
    overtaken = connection.execute(
        sa.text(
            "SELECT max(b.batch_id) FROM refresh_batches AS b JOIN refresh_batches AS own ON own.batch_id = :batch "
            "WHERE b.refresh_seq > own.refresh_seq"
        ),
        {"batch": batch.batch_id},
    ).scalar_one()
    if overtaken is not None:
        why = f"batch {overtaken} refreshed the aggregates after this batch did; it decides on its own"
        return Applied((), tuple((row.subject_id, why) for row in rows), gates_unmet=True)
    frozen = connection.execute(
        sa.text(
            "SELECT act, actor, reason FROM human_acts WHERE act IN ('freeze', 'thaw') ORDER BY act_id DESC LIMIT 1"
        )
    ).one_or_none()
    if frozen is not None and frozen.act == "freeze":
        why = f"promotion is frozen by {frozen.actor}: {frozen.reason}"
        return Applied((), tuple((row.subject_id, why) for row in rows))

    decided = {row.subject_id: row for row in rows}
    # The certificate speaks of the evidence as of now; a decision it no longer supports is held.
    evidence = {e.pattern_key: e for e in load_pattern_evidence(connection, batch, policy, list(decided))}
    moved: list[tuple[str, str]] = []
    held: list[tuple[str, str]] = []
    due: dict[str, Decision] = {}
    for key, row in decided.items():
        if key not in evidence:
            held.append((key, "its evidence is gone since the decision"))
            continue
        decision = decide_pattern(evidence[key], policy)
        if (evidence[key].stage, evidence[key].step) != (row.stage, row.step):
            held.append((key, f"its rule is {evidence[key].stage} since the decision, which was taken at {row.stage}"))
        elif decision.verdict not in ("promote", "advance") or decision.target_state is None:
            held.append((key, f"its evidence changed since the decision: {decision.reason}"))
        else:
            due[key] = decision
    waiting = [(key, evidence[key].successes) for key in due if evidence[key].stage in NOT_SERVED]
    spent = connection.execute(
        sa.text(
            "SELECT count(*) FROM rule_events WHERE batch_id = :batch AND kind IN ('promoted', 'advanced') "
            "AND from_state IN ('proposed', 'shadow')"
        ),
        {"batch": batch.batch_id},
    ).scalar_one()
    admitted = within_limit(waiting, policy)[: max(policy.limits.promotions_per_run - spent, 0)]
    for key, _ in waiting:
        if key not in admitted:
            held.append((key, f"the policy allows {policy.limits.promotions_per_run} new rules in one run"))
            del due[key]
    for key in sorted(due, key=lambda k: (-evidence[k].successes, k)):
        present, decision = evidence[key], due[key]
        if decision.target_state is None:  # only decisions with a target are due
            raise AssertionError(key)
        rule_id, state, version = rule_of_pattern(connection, key)
        content = definition(
            incident_pattern=conditions_of(present.incident_type),
            runbook_id=present.runbook_id,
            platform=present.platform,
            source="promoted",
            promoted_from_l2=True,
            pattern_key=key,
        )
        if state != "none":
            content = connection.execute(
                sa.text("SELECT definition FROM rule_events WHERE rule_id = :id ORDER BY event_id DESC LIMIT 1"),
                {"id": rule_id},
            ).scalar_one()
        document = certificates.build(
            decision,
            present,
            policy,
            rule_id=rule_id,
            rule_version=version,
            definition=content,
            batch_id=batch.batch_id,
            run_id=batch.run_id,
            decided_at=batch.now,
        )
        step = RuleEvent(
            rule_id=rule_id,
            rule_version=version,
            kind="promoted"
            if (state, decision.target_state) in _AT_ONCE
            else "widened"
            if state == decision.target_state
            else "advanced",
            from_state="proposed" if state == "none" else state,
            to_state=decision.target_state,
            definition=content,
            actor=ACTOR,
            reason=decision.reason,
            decision_id=decided[key].decision_id,
            batch_id=batch.batch_id,
            run_id=batch.run_id,
            certificate=document,
            occurred_at=batch.as_of,
            rollout_step=2 if state == decision.target_state else None,
        )
        events = [step]
        if state == "none":
            proposal = replace(
                step, kind="proposed", from_state="none", to_state="proposed", decision_id=None, certificate=None
            )
            events = [proposal, step]
        append_events(connection, events)
        if decision.target_state in ("canary", "ring", "fleet"):
            connection.execute(
                sa.text(
                    "UPDATE patterns SET status = 'promoted', promoted_at = coalesce(promoted_at, :now), "
                    "promoted_to_rule_id = :rule WHERE pattern_key = :key"
                ),
                {"now": batch.now, "rule": rule_id, "key": key},
            )
        moved.append((rule_id, decision.target_state))
    connection.execute(
        sa.text("UPDATE refresh_batches SET applied_at = clock_timestamp() WHERE batch_id = :id"),
        {"id": batch.batch_id},
    )
    return Applied(tuple(moved), tuple(held))


def apply_quarantines(connection: sa.Connection, batch: Batch, decided: Sequence[Decided]) -> Applied:
    """Take what was decided out of service, and out of every manifest it concerns, in the caller's transaction.

    A rule leaves service as a whole, with every copy of it that is in service; or it leaves a site or a release of the
    agent, and keeps its state elsewhere. Needs no gate and heeds no freeze and no pause: those stop promotion, never
    demotion.
    """
    lock_promotion(connection)
    moved: list[tuple[str, str]] = []
    for item in decided:
        if item.decision.verdict == "quarantine_scope":
            for scope in item.alarms:
                quarantine_scope(
                    connection,
                    item.subject_id,
                    scope.kind,
                    scope.value,
                    actor=ACTOR,
                    reason=scope.sentence,
                    evidence=evidence_of(scope, batch.policy_hash),
                    policy_hash=batch.policy_hash,
                    decision_id=item.decision_id,
                    batch=batch,
                )
                moved.append((item.subject_id, f"quarantined at {scope.kind.replace('_', ' ')} {scope.value}"))
        if item.decision.verdict == "quarantine":
            rules = quarantine_with_copies(
                connection,
                item.subject_id,
                actor=ACTOR,
                reason=item.decision.reason,
                batch=batch,
                decision_id=item.decision_id,
            )
            moved += [(rule_id, "quarantined") for rule_id in rules]
    if moved:
        write_manifests(connection, batch.batch_id)
    return Applied(tuple(moved), ())


def quarantine_scope(
    connection: sa.Connection,
    rule_id: str,
    kind: str,
    value: str,
    *,
    actor: str,
    reason: str,
    batch: Batch,
    evidence: Mapping[str, Any] | None = None,
    policy_hash: str | None = None,
    decision_id: int | None = None,
    lift: bool = False,
) -> None:
    """Append one quarantine of a scope, or its lift, for the rule's present version; manifests are the caller's.

    Raises:
        FlywheelError: there is no such rule.
        sqlalchemy.exc.DBAPIError: the database refuses it: quarantined already, not quarantined, unsigned, retired.
    """
    version = connection.execute(
        sa.text("SELECT rule_version FROM l1_rules WHERE rule_id = :id FOR UPDATE"), {"id": rule_id}
    ).scalar_one_or_none()
    if version is None:
        raise FlywheelError(f"There is no rule {rule_id}.", hint="`flywheel status` lists the rules.")
    connection.execute(
        sa.insert(tables.scope_quarantines).values(
            rule_id=rule_id,
            rule_version=version,
            kind="lifted" if lift else "quarantined",
            scope_kind=kind,
            scope_value=value,
            actor=actor,
            reason=reason,
            evidence=dict(evidence or {}),
            policy_hash=policy_hash,
            decision_id=decision_id,
            batch_id=batch.batch_id,
            run_id=batch.run_id,
            occurred_at=batch.now,
        )
    )


def quarantine_with_copies(
    connection: sa.Connection, rule_id: str, *, actor: str, reason: str, batch: Batch, decision_id: int | None = None
) -> list[str]:
    """Quarantine a rule and every copy of it in service; return their ids, nothing if it is out of service already.

    A copy was promoted or imported with the same pattern, or has the same content. Built-in rules are nobody's copy.
    """
    rule = connection.execute(
        sa.text("SELECT state, pattern_key, content_hash FROM l1_rules WHERE rule_id = :id"), {"id": rule_id}
    ).one()
    if rule.state in ("quarantined", "retired"):
        return []
    rows = connection.execute(
        sa.text(
            "SELECT r.rule_id, r.state, r.rule_version, e.definition FROM l1_rules AS r "
            "JOIN rule_events AS e ON e.event_id = r.last_event_id "
            "WHERE r.rule_id = :id OR (r.source <> 'builtin' AND r.state NOT IN ('quarantined', 'retired') "
            "  AND (r.pattern_key = :pattern OR r.content_hash = :content)) "
            "ORDER BY r.rule_id <> :id, r.rule_id FOR UPDATE OF r"
        ),
        {"id": rule_id, "pattern": rule.pattern_key, "content": rule.content_hash},
    ).all()
    append_events(
        connection,
        [
            RuleEvent(
                rule_id=row.rule_id,
                rule_version=row.rule_version,
                kind="quarantined",
                from_state=row.state,
                to_state="quarantined",
                definition=row.definition,
                actor=actor,
                reason=reason if row.rule_id == rule_id else f"It is a copy of {rule_id}: {reason}",
                decision_id=decision_id,
                batch_id=batch.batch_id,
                run_id=batch.run_id,
                occurred_at=batch.as_of,
            )
            for row in rows
        ],
    )
    return [row.rule_id for row in rows]
