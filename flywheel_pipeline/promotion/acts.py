"""Human acts: approve, reject, quarantine, lift, re-admit, retire, pause, resume, abort, freeze, thaw. One function
behind CLI and Dagster jobs.

Belongs here: what people do to rules and patterns, signed with actor and reason. Does not belong here: automatic
decisions. An approval promotes nothing by itself: it is evidence that the next batch's gates read.

A pause stops the rollout of a rule at its step: it advances no further, keeps what it serves, and is still demoted. An
abort backs out of the rollout: the rule leaves every manifest and is quarantined, so it comes back as a new version
only; of a rule that serves the whole fleet the rollout is over, there is nothing left to abort.
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
from flywheel_pipeline.promotion.apply import lock_promotion, quarantine_scope, quarantine_with_copies
from flywheel_pipeline.promotion.decide import incident_types, rule_of_pattern
from flywheel_pipeline.promotion.ledger import RuleEvent, append_events

Act = Literal[
    "approve", "reject", "quarantine", "lift", "readmit", "retire", "pause", "resume", "abort", "freeze", "thaw"
]
PATTERN_ACTS = frozenset({"approve", "reject"})
ROLLOUT_ACTS = frozenset({"pause", "resume", "abort"})
RULE_ACTS = frozenset({"quarantine", "lift", "readmit", "retire"}) | ROLLOUT_ACTS
IN_ROLLOUT = frozenset({"proposed", "shadow", "canary", "ring"})


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
    scope: tuple[str, str] | None = None,
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
        scope: for quarantine and lift, the part of the fleet as (`site` or `agent_version`, value); without it a
            quarantine is of the whole rule. A lift needs one: a whole rule is re-admitted instead.

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
    _check_scope(what, scope)
    if not subjects:
        raise UsageError(f"{what} needs at least one subject.", hint=f"flywheel {what} ID … --actor NAME --reason TEXT")
    reports = []
    for subject in subjects:
        try:
            with engine.begin() as connection:
                lock_promotion(connection)
                if what in PATTERN_ACTS:
                    message = _on_pattern(connection, what, subject, actor, reason)
                elif scope is not None:
                    message = _on_scope(connection, what, subject, actor, reason, scope)
                elif what in ROLLOUT_ACTS:
                    message = _on_rollout(connection, what, subject, actor, reason)
                else:
                    message = _on_rule(connection, what, subject, actor, reason, dict(change or {}))
            reports.append(ActReport(subject, True, message))
        except FlywheelError as error:
            reports.append(ActReport(subject, False, f"{error} {error.hint or ''}".strip()))
        except sa.exc.DBAPIError as error:
            # The padlock's own words: the database refused the step.
            reports.append(ActReport(subject, False, str(error.orig).splitlines()[0]))
    return reports


def scope_of(site: str, agent_version: str) -> tuple[str, str] | None:
    """Return the scope that these two options name, None for neither.

    Raises:
        UsageError: both are given.
    """
    if site and agent_version:
        raise UsageError("Name a site or an agent version, not both.", hint="Run it twice for both.")
    return ("site", site) if site else ("agent_version", agent_version) if agent_version else None


def _check_scope(what: str, scope: tuple[str, str] | None) -> None:
    if scope is None:
        if what == "lift":
            raise UsageError(
                "lift needs the site or the agent version that it is for.",
                hint="Add --site SITE or --agent-version VERSION; a whole rule comes back by `flywheel readmit`.",
            )
        return
    if what not in ("quarantine", "lift"):
        raise UsageError(f"{what} knows no site and no agent version.")
    if scope[0] not in ("site", "agent_version") or not scope[1].strip():
        raise UsageError("A scope is a site or an agent version, by name.", hint="Add --site or --agent-version.")


def _on_scope(
    connection: sa.Connection, what: str, rule_id: str, actor: str, reason: str, scope: tuple[str, str]
) -> str:
    kind, value = scope
    where = f"site {value}" if kind == "site" else f"agents {value}"
    known = connection.execute(
        sa.text(
            "SELECT EXISTS (SELECT 1 FROM appliances WHERE site_id = :v) OR EXISTS (SELECT 1 FROM sites WHERE site_id = :v) "
            "OR EXISTS (SELECT 1 FROM rule_site_stats WHERE site_id = :v)"
            if kind == "site"
            else "SELECT EXISTS (SELECT 1 FROM appliances WHERE coalesce(nullif(agent_version, ''), 'unknown') = :v) "
            "OR EXISTS (SELECT 1 FROM telemetry_daily_volume WHERE agent_version = :v)"
        ),
        {"v": value},
    ).scalar_one()
    if not known and what == "quarantine":
        raise FlywheelError(f"Nothing is known of {where}.", hint="A mistyped name would protect nobody.")
    batch = open_batch(connection, f"act:{uuid.uuid4()}")
    quarantine_scope(connection, rule_id, kind, value, actor=actor, reason=reason, batch=batch, lift=what == "lift")
    _record(connection, what, "rule", rule_id, actor, f"{where}: {reason}")
    write_manifests(connection, batch.batch_id)
    state = connection.execute(sa.text("SELECT state FROM l1_rules WHERE rule_id = :id"), {"id": rule_id}).scalar_one()
    if what == "lift":
        return f"no longer quarantined at {where}; its CUSUM there begins anew"
    return f"quarantined at {where}; elsewhere it stays {state}"


def _on_rollout(connection: sa.Connection, what: str, rule_id: str, actor: str, reason: str) -> str:
    state = connection.execute(
        sa.text("SELECT state FROM l1_rules WHERE rule_id = :id FOR UPDATE"), {"id": rule_id}
    ).scalar_one_or_none()
    if state is None:
        raise FlywheelError(f"There is no rule {rule_id}.", hint="`flywheel status` lists the rules.")
    if state not in IN_ROLLOUT:
        raise FlywheelError(
            f"Rule {rule_id} is {state}: it is in no rollout.",
            hint="`flywheel quarantine` takes a rule out of service." if state == "fleet" else None,
        )
    if what == "abort":
        batch = open_batch(connection, f"act:{uuid.uuid4()}")
        _record(connection, what, "rule", rule_id, actor, reason)
        out = quarantine_with_copies(
            connection, rule_id, actor=actor, reason=f"rollout aborted in the {state}: {reason}", batch=batch
        )
        write_manifests(connection, batch.batch_id)
        return "aborted: quarantined, out of every manifest" + _and_copies(out)
    paused = connection.execute(
        sa.text(
            "SELECT act FROM human_acts WHERE subject_kind = 'rule' AND subject_id = :id AND act IN ('pause', 'resume') "
            "ORDER BY act_id DESC LIMIT 1"
        ),
        {"id": rule_id},
    ).scalar_one_or_none()
    if (paused == "pause") == (what == "pause"):
        raise FlywheelError(f"The rollout of {rule_id} is {'paused already' if what == 'pause' else 'not paused'}.")
    _record(connection, what, "rule", rule_id, actor, reason)
    if what == "pause":
        return f"paused in the {state}: it goes no further, and is still demoted if it fails"
    return f"resumed in the {state}; the next run decides"


def _and_copies(out: Sequence[str]) -> str:
    return "" if len(out) < 2 else ", and its copies " + ", ".join(out[1:])


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
    if what == "quarantine" and rule.state not in ("quarantined", "retired"):
        out = quarantine_with_copies(connection, rule_id, actor=actor, reason=reason, batch=batch)
        write_manifests(connection, batch.batch_id)
        return f"{to_state}, version {version}" + _and_copies(out)
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
