"""The state of each alert: observations in, changes of state out, each with its notifications, in one transaction.

Belongs here: the state machine, acknowledgement and escalation. Does not belong here: where observations come from
(`observe`) and how notifications leave (`outbox`). One pass at a time writes: `lock_pass` first.
"""

from __future__ import annotations

import datetime as dt
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import sqlalchemy as sa

from flywheel_pipeline.database import tables
from flywheel_pipeline.errors import UsageError
from flywheel_pipeline.health.alerting.channels import Alerting, Severity

Outcome = Literal["pass", "fail", "error"]
Kind = Literal["check", "run", "quarantine", "candidate", "daemon"]


@dataclass(frozen=True)
class Observation:
    """What was seen of one thing at one time.

    Attributes:
        key: the alert it belongs to, `kind:name`.
        outcome: pass, fail, or error: it could not be evaluated, which alerts like a failure.
        at: when it was so; an observation not newer than the last one folded in changes nothing.
        level: seen by looking now, so that `at` is the time of looking; nothing is written while nothing changes.
        details: statement, observed, required, offenders, offender_count, command, advice, run_id, asset, check, job.
    """

    key: str
    kind: Kind
    outcome: Outcome
    severity: Severity
    at: dt.datetime
    title: str
    sentence: str
    level: bool = False
    details: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Recorded:
    """What a pass changed: counts of transitions."""

    raised: int = 0
    changed: int = 0
    recovered: int = 0
    escalated: int = 0

    @property
    def transitions(self) -> int:
        """All of them."""
        return self.raised + self.changed + self.recovered + self.escalated


def lock_pass(connection: sa.Connection) -> bool:
    """Take the lock of the pass until the transaction ends; False where another pass is at work.

    What is observed under it is newer than all that is recorded, so that two watchers never argue.
    """
    return bool(
        connection.execute(sa.text("SELECT pg_try_advisory_xact_lock(hashtext('flywheel:alerts'))")).scalar_one()
    )


def record(
    connection: sa.Connection, observations: Iterable[Observation], alerting: Alerting, now: dt.datetime
) -> Recorded:
    """Fold observations into the alerts, oldest first, and write an event and its notifications for each change.

    Idempotent: the same observations a second time change nothing.
    """
    counts = {"raised": 0, "changed": 0, "recovered": 0}
    for seen in sorted(observations, key=lambda o: (o.at, o.key)):
        if transition := _fold(connection, seen, alerting, now):
            counts[transition] += 1
    return Recorded(**counts)


def _fold(connection: sa.Connection, seen: Observation, alerting: Alerting, now: dt.datetime) -> str | None:
    alerts = tables.alerts
    row = (
        connection.execute(sa.select(alerts).where(alerts.c.alert_key == seen.key).with_for_update())
        .mappings()
        .one_or_none()
    )
    if row is not None and seen.at <= row["observed_at"]:
        return None
    was_open = row is not None and row["state"] == "open"
    bad = seen.outcome != "pass"
    transition: str | None = None
    if bad and not was_open:
        transition = "raised"
    elif bad and row is not None and row["observed"] != seen.outcome:
        transition = "changed"
    elif was_open and not bad:
        transition = "recovered"
    if transition is None and seen.level and (row is not None or not bad):
        return None
    now_known: dict[str, Any] = {
        "severity": seen.severity,
        "observed": seen.outcome,
        "observed_at": seen.at,
        "title": seen.title,
        "sentence": seen.sentence,
        "details": dict(seen.details),
    }
    if transition == "raised":
        now_known |= {
            "state": "open",
            "first_at": seen.at,
            "last_at": seen.at,
            "times_raised": 1 if row is None else alerts.c.times_raised + 1,
            "acknowledged_by": None,
            "acknowledged_at": None,
            "acknowledged_reason": None,
            "escalated_at": None,
        }
    elif transition is not None:
        now_known |= {"state": "open" if bad else "recovered", "last_at": seen.at}
    if row is None:
        connection.execute(
            sa.insert(alerts).values({"alert_key": seen.key, "kind": seen.kind, "state": "ok", **now_known})
        )
    else:
        connection.execute(sa.update(alerts).where(alerts.c.alert_key == seen.key).values(now_known))
    if transition is None:
        return None
    if transition == "recovered" and row is not None:
        # Of the severity it was raised with: who heard of it hears its end, and quiet hours treat both alike.
        severity: Severity = row["severity"]
        hearing = _who_heard(connection, seen.key, row["first_at"], alerting)
    else:
        severity, hearing = seen.severity, alerting.hearing(seen.severity)
    event = _write_event(connection, seen, transition, severity)
    if event is not None:
        _notify(connection, event, hearing, alerting.not_before(severity, now), now)
    return transition


def _write_event(connection: sa.Connection, seen: Observation, transition: str, severity: Severity) -> int | None:
    return connection.execute(
        sa.text(
            "INSERT INTO alert_events (alert_key, transition, observed, severity, title, sentence, details, occurred_at) "
            "VALUES (:key, :transition, :observed, :severity, :title, :sentence, :details, :at) "
            "ON CONFLICT (alert_key, transition, occurred_at) DO NOTHING RETURNING event_id"
        ).bindparams(sa.bindparam("details", type_=tables.alerts.c.details.type)),
        {
            "key": seen.key,
            "transition": transition,
            "observed": seen.outcome,
            "severity": severity,
            "title": seen.title,
            "sentence": seen.sentence,
            "details": dict(seen.details),
            "at": seen.at,
        },
    ).scalar_one_or_none()


def _notify(
    connection: sa.Connection, event: int, channels: Iterable[str], not_before: dt.datetime, now: dt.datetime
) -> None:
    rows = [
        {"event_id": event, "channel": alias, "not_before": not_before, "next_attempt_at": now, "created_at": now}
        for alias in channels
    ]
    if rows:
        connection.execute(sa.insert(tables.notifications), rows)


def _who_heard(connection: sa.Connection, key: str, since: dt.datetime, alerting: Alerting) -> tuple[str, ...]:
    heard = connection.execute(
        sa.text(
            "SELECT DISTINCT n.channel FROM notifications AS n JOIN alert_events AS e USING (event_id) "
            "WHERE e.alert_key = :key AND e.occurred_at >= :since"
        ),
        {"key": key, "since": since},
    ).scalars()
    known = set(heard)
    return tuple(c.alias for c in alerting.channels if c.alias in known)


def escalate(connection: sa.Connection, alerting: Alerting, now: dt.datetime) -> int:
    """Tell the escalation channels, once per opening, of each alert that nobody acknowledged in time; return how many."""
    alerts = tables.alerts
    due = (
        connection.execute(
            sa.select(alerts)
            .where(
                alerts.c.state == "open",
                alerts.c.acknowledged_at.is_(None),
                alerts.c.escalated_at.is_(None),
                alerts.c.severity != "info",
                alerts.c.first_at <= now - dt.timedelta(minutes=alerting.rules.escalate_after_minutes),
            )
            .order_by(alerts.c.first_at, alerts.c.alert_key)
            .with_for_update()
        )
        .mappings()
        .all()
    )
    for row in due:
        seen = Observation(
            row["alert_key"],
            row["kind"],
            row["observed"],
            row["severity"],
            now,
            row["title"],
            row["sentence"],
            details={**row["details"], "open_since": row["first_at"].isoformat()},
        )
        event = _write_event(connection, seen, "escalated", seen.severity)
        connection.execute(sa.update(alerts).where(alerts.c.alert_key == row["alert_key"]).values(escalated_at=now))
        if event is not None:
            _notify(connection, event, alerting.escalating(), alerting.not_before(seen.severity, now), now)
    return len(due)


def acknowledge(connection: sa.Connection, key: str, *, actor: str, reason: str, now: dt.datetime) -> dict[str, Any]:
    """Note that somebody looks after an open alert: it does not escalate any more, its recovery is still told.

    Raises:
        UsageError: no actor or reason, or no such alert is open.
    """
    if not actor.strip() or not reason.strip():
        raise UsageError("To acknowledge needs an actor and a reason.", hint="Add --actor NAME --reason TEXT.")
    alerts = tables.alerts
    row = (
        connection.execute(sa.select(alerts).where(alerts.c.alert_key == key).with_for_update())
        .mappings()
        .one_or_none()
    )
    if row is None or row["state"] != "open":
        raise UsageError(
            f"No alert {key} is open." if row is None else f"The alert {key} is not open: it is {row['state']}.",
            hint="`flywheel alerts list` shows those that are.",
        )
    if row["acknowledged_at"] is not None:
        raise UsageError(f"The alert {key} was acknowledged by {row['acknowledged_by']} already.")
    connection.execute(
        sa.update(alerts)
        .where(alerts.c.alert_key == key)
        .values(acknowledged_by=actor, acknowledged_at=now, acknowledged_reason=reason)
    )
    connection.execute(
        sa.insert(tables.alert_events).values(
            alert_key=key,
            transition="acknowledged",
            observed=row["observed"],
            severity=row["severity"],
            title=row["title"],
            sentence=row["sentence"],
            details=row["details"],
            actor=actor,
            reason=reason,
            occurred_at=now,
        )
    )
    return {"alert": key, "title": row["title"], "acknowledged_by": actor, "acknowledged_at": now}


def list_alerts(connection: sa.Connection, state: str | None = "open") -> list[dict[str, Any]]:
    """Return the alerts in this state, or with None all that were ever raised; the worst and newest first."""
    alerts = tables.alerts
    query = sa.select(alerts).where(alerts.c.state == state if state else alerts.c.state != "ok")
    order = sa.case({"critical": 0, "warning": 1}, value=alerts.c.severity, else_=2)
    rows = connection.execute(query.order_by(order, alerts.c.last_at.desc(), alerts.c.alert_key)).mappings()
    return [dict(row) for row in rows]
