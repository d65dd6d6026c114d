"""Human acts: approve, reject, quarantine, re-admit, retire, freeze, thaw. One function behind CLI and Dagster jobs.

Belongs here: what people do to rules and patterns, signed with actor and reason. Does not belong here: automatic
decisions. An approval promotes nothing by itself: it is evidence that the next batch's gates read.
"""

from __future__ import annotations

import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import sqlalchemy as sa

from flywheel_pipeline.aggregates.batches import open_batch
from flywheel_pipeline.candidates.keys import pattern_key
from flywheel_pipeline.database import tables
from flywheel_pipeline.delivery.publish import write_manifests
from flywheel_pipeline.errors import FlywheelError, UsageError
from flywheel_pipeline.promotion.apply import lock_promotion
from flywheel_pipeline.promotion.decide import incident_types, rule_of_pattern
from flywheel_pipeline.promotion.ledger import RuleEvent, append_events

Act = Literal["approve", "reject", "quarantine", "readmit", "retire", "freeze", "thaw"]
PATTERN_ACTS = frozenset({"approve", "reject"})
RULE_ACTS = frozenset({"quarantine", "readmit", "retire"})


@dataclass(frozen=True)
class ActReport:
    """What became of an act on one subject: done, or refused with the reason."""

    subject: str
    done: bool
    message: str


def act(
    engine: sa.Engine,
    what: Act,
    subjects: Sequence[str],
    *,
    actor: str,
    reason: str,
    change: Mapping[str, Any] | None = None,
) -> list[ActReport]:
    """Do one act on several subjects, each atomic: one that is refused leaves the others done.

    Args:
        engine: the database.
        what: the act; freeze and thaw take no subject.
        subjects: pattern keys or pattern ids for approve and reject, rule ids for the rest.
        actor: who decides this; required.
        reason: why; required.
        change: for readmit, the changed parts of the rule (`runbook_id`, `incident_pattern`): a re-admitted rule
            needs new content.

    Raises:
        UsageError: no actor, no reason, or subjects that do not fit the act.
    """
    if what not in get_args(Act):
        raise UsageError(f"There is no act {what}.", hint="The acts are: " + ", ".join(get_args(Act)) + ".")
    if not actor.strip() or not reason.strip():
        raise UsageError(f"To {what} needs an actor and a reason.", hint="Add --actor NAME --reason TEXT.")
    if what in ("freeze", "thaw"):
        if subjects:
            raise UsageError(f"{what} takes no subject: it holds for all promotion.", hint=f"Run `flywheel {what}`.")
        with engine.begin() as connection:
            _record(connection, what, None, None, actor, reason)
        return [ActReport("promotion", True, "frozen" if what == "freeze" else "no longer frozen")]
    if not subjects:
        raise UsageError(f"{what} needs at least one subject.", hint=f"flywheel {what} ID … --actor NAME --reason TEXT")
    reports = []
    for subject in subjects:
        try:
            with engine.begin() as connection:
                lock_promotion(connection)
                if what in PATTERN_ACTS:
                    message = _on_pattern(connection, what, subject, actor, reason)
                else:
                    message = _on_rule(connection, what, subject, actor, reason, dict(change or {}))
            reports.append(ActReport(subject, True, message))
        except FlywheelError as error:
            reports.append(ActReport(subject, False, f"{error} {error.hint or ''}".strip()))
        except sa.exc.DBAPIError as error:
            # The padlock's own words: the database refused the step.
            reports.append(ActReport(subject, False, str(error.orig).splitlines()[0]))
    return reports


def _record(
    connection: sa.Connection, what: str, kind: str | None, subject: str | None, actor: str, reason: str
) -> None:
    connection.execute(
        sa.insert(tables.human_acts).values(act=what, subject_kind=kind, subject_id=subject, actor=actor, reason=reason)
    )


def _on_pattern(connection: sa.Connection, what: str, subject: str, actor: str, reason: str) -> str:
    row = connection.execute(
        sa.text(
            "SELECT pattern_key, status FROM patterns WHERE pattern_key = :s OR pattern_id = :s "
            "ORDER BY pattern_key IS NULL LIMIT 1 FOR UPDATE"
        ),
        {"s": subject},
    ).one_or_none()
    if row is None or row.pattern_key is None:
        raise FlywheelError(
            f"There is no pattern {subject} that could be promoted.", hint="`flywheel status` lists them."
        )
    if row.status == "promoted":
        rule_id, state, _ = rule_of_pattern(connection, row.pattern_key)
        if what == "approve" and state in ("proposed", "shadow", "canary", "ring"):
            # The stages ahead may need a name: small fleets and high-risk runbooks enter the fleet by one.
            _record(connection, what, "pattern", row.pattern_key, actor, reason)
            return f"approved; {rule_id} is {state}, the next run decides with it"
        raise FlywheelError(f"Pattern {subject} is promoted.", hint="Quarantine or retire its rule instead.")
    _record(connection, what, "pattern", row.pattern_key, actor, reason)
    connection.execute(
        sa.text("UPDATE patterns SET status = :status WHERE pattern_key = :key"),
        {"status": "approved" if what == "approve" else "rejected", "key": row.pattern_key},
    )
    return "approved; the next run decides with it" if what == "approve" else "rejected"


def _on_rule(
    connection: sa.Connection, what: str, rule_id: str, actor: str, reason: str, change: dict[str, Any]
) -> str:
    rule = connection.execute(
        sa.text(
            "SELECT r.state, r.rule_version, e.definition FROM l1_rules AS r "
            "JOIN rule_events AS e ON e.event_id = r.last_event_id WHERE r.rule_id = :id"
        ),
        {"id": rule_id},
    ).one_or_none()
    if rule is None:
        raise FlywheelError(f"There is no rule {rule_id}.", hint="`flywheel status` lists the rules.")
    kind, to_state = {
        "quarantine": ("quarantined", "quarantined"),
        "retire": ("retired", "retired"),
        "readmit": ("readmitted", "proposed"),
    }[what]
    content = dict(rule.definition)
    version = rule.rule_version
    if what == "readmit":
        unknown = set(change) - {"runbook_id", "incident_pattern", "platform"}
        if unknown:
            raise UsageError(f"A rule has no {', '.join(sorted(unknown))} to change.")
        content.update(change)
        version += 1
        # The key decides whose evidence promotes the rule: it follows the content, or is none.
        types = sorted(incident_types(content["incident_pattern"]))
        known = len(types) == 1 and content["runbook_id"] and content["platform"]
        content["pattern_key"] = pattern_key(types[0], content["runbook_id"], content["platform"]) if known else None
    batch = open_batch(connection, f"act:{uuid.uuid4()}")
    _record(connection, what, "rule", rule_id, actor, reason)
    append_events(
        connection,
        [
            RuleEvent(
                rule_id=rule_id,
                rule_version=version,
                kind=kind,
                from_state=rule.state,
                to_state=to_state,
                definition=content,
                actor=actor,
                reason=reason,
                batch_id=batch.batch_id,
                run_id=batch.run_id,
                occurred_at=batch.as_of,
            )
        ],
    )
    write_manifests(connection, batch.batch_id)
    return f"{to_state}, version {version}"
