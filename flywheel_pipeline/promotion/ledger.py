"""The ledger: the one place that applies. Every change of a rule's state is an event appended here.

Belongs here: building definitions and appending events. Does not belong here: deciding, and the padlock itself, which
is the database's (`database/routines/30_ledger.sql`): it refuses illegal edges, unsigned events, and promotions whose
gates did not pass, whoever writes.
"""

from __future__ import annotations

import datetime as dt
import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import sqlalchemy as sa

from flywheel_pipeline.database import tables

ENABLED_STATES = frozenset({"canary", "ring", "fleet"})


def definition(
    *,
    incident_pattern: Any,
    runbook_id: str | None,
    platform: str | None,
    source: str,
    promoted_from_l2: bool,
    pattern_key: str | None = None,
    confidence: float | None = None,
    severity: str | None = None,
) -> dict[str, Any]:
    """Return the content of a rule as the ledger stores and hashes it."""
    content = {
        "incident_pattern": incident_pattern,
        "runbook_id": runbook_id,
        "platform": platform,
        "source": source,
        "promoted_from_l2": promoted_from_l2,
        "pattern_key": pattern_key,
        "confidence": None if confidence is None else _decimal(confidence),
    }
    if severity is not None:
        content["severity"] = severity
    return content


def _decimal(value: float) -> str:
    """Print a number with four decimals, or with as many as it has: it must read back as itself."""
    text = f"{value:.4f}"
    return text if float(text) == value else repr(value)


def _jsonb_text(value: Any) -> str:
    """Print a value as PostgreSQL prints jsonb: keys by length then bytes, ', ' and ': ', text unescaped."""
    if isinstance(value, Mapping):
        keys = sorted(value, key=lambda k: (len(k.encode()), k.encode()))
        return "{" + ", ".join(f"{_jsonb_text(k)}: {_jsonb_text(value[k])}" for k in keys) + "}"
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(_jsonb_text(v) for v in value) + "]"
    if isinstance(value, float):
        raise TypeError("a rule's definition holds no floating point numbers: write them as text")
    return json.dumps(value, ensure_ascii=False)


def content_hash(content: Mapping[str, Any]) -> str:
    """Return the sha256 of a rule's definition; equal to `flywheel_content_hash` in the database.

    Raises:
        TypeError: the definition holds a float, whose text the two sides might print differently.
    """
    return hashlib.sha256(_jsonb_text(content).encode()).hexdigest()


@dataclass(frozen=True)
class RuleEvent:
    """One step of a rule's life, as it is appended to `rule_events`."""

    rule_id: str
    kind: str
    from_state: str
    to_state: str
    definition: Mapping[str, Any]
    actor: str
    reason: str
    rule_version: int = 1
    decision_id: int | None = None
    batch_id: int | None = None
    run_id: str | None = None
    certificate: Mapping[str, Any] | None = None
    occurred_at: dt.datetime | None = field(default=None)
    rollout_step: int | None = None


def append_events(connection: sa.Connection, events: Iterable[RuleEvent]) -> list[int]:
    """Append events in order; return their ids. The database checks each and folds it into `l1_rules`.

    Raises:
        sqlalchemy.exc.DBAPIError: the database refused an event; its message says why. Nothing of the caller's
            transaction is kept then.
    """
    ids = []
    for event in events:
        values: dict[str, Any] = {
            "rule_id": event.rule_id,
            "rule_version": event.rule_version,
            "kind": event.kind,
            "from_state": event.from_state,
            "to_state": event.to_state,
            "definition": dict(event.definition),
            "content_hash": _hash(event.definition),
            "actor": event.actor,
            "reason": event.reason,
            "decision_id": event.decision_id,
            "batch_id": event.batch_id,
            "run_id": event.run_id,
            "certificate": None if event.certificate is None else dict(event.certificate),
        }
        if values["certificate"] is None:
            values["certificate"] = sa.null()
        if event.rollout_step is not None:
            values["rollout_step"] = event.rollout_step
        if event.occurred_at is not None:
            values["occurred_at"] = event.occurred_at
        statement = sa.insert(tables.rule_events).values(**values).returning(tables.rule_events.c.event_id)
        ids.append(int(connection.execute(statement).scalar_one()))
    return ids


def _hash(content: Mapping[str, Any]) -> str | sa.ColumnElement[str]:
    """Hash here, or have PostgreSQL hash a definition with floats in it, as imported match conditions may have."""
    try:
        return content_hash(content)
    except TypeError:
        return sa.func.flywheel_content_hash(sa.cast(dict(content), tables.rule_events.c.definition.type))


def register_builtin(connection: sa.Connection, rules: Sequence[Mapping[str, Any]]) -> int:
    """Register the built-in rules that the registry does not know yet; return how many were new.

    Each rule needs rule_id, incident_type, platform and runbook_id.
    """
    known = set(connection.execute(sa.text("SELECT rule_id FROM l1_rules")).scalars())
    events = [
        RuleEvent(
            rule_id=rule["rule_id"],
            kind="registered",
            from_state="none",
            to_state="fleet",
            definition=definition(
                incident_pattern={"incident_type": rule["incident_type"]},
                runbook_id=rule["runbook_id"],
                platform=rule["platform"],
                source="builtin",
                promoted_from_l2=False,
            ),
            actor="flywheel",
            reason="a built-in rule that agents ship with",
        )
        for rule in rules
        if rule["rule_id"] not in known
    ]
    return len(append_events(connection, events))


def import_rules(connection: sa.Connection, rules: Sequence[Mapping[str, Any]], *, actor: str, reason: str) -> int:
    """Take over the rules of the system before, as they stood; return how many were new.

    Each rule needs rule_id, incident_pattern, runbook_id, enabled; platform, pattern_key, source, confidence and
    created_at where known. Enabled rules are imported as fleet, the others as quarantined. A rule is known once the
    ledger holds it: on an adopted database it stands in l1_rules before.
    """
    known = set(connection.execute(sa.text("SELECT DISTINCT rule_id FROM rule_events")).scalars())
    events = [
        RuleEvent(
            rule_id=rule["rule_id"],
            kind="imported",
            from_state="none",
            to_state="fleet" if rule["enabled"] else "quarantined",
            definition=definition(
                incident_pattern=rule["incident_pattern"],
                runbook_id=rule["runbook_id"],
                platform=rule.get("platform"),
                source=rule.get("source", "promoted"),
                promoted_from_l2=bool(rule.get("promoted_from_l2", True)),
                pattern_key=rule.get("pattern_key"),
                confidence=rule.get("confidence"),
            ),
            actor=actor,
            reason=reason,
            occurred_at=rule.get("created_at"),
        )
        for rule in rules
        if rule["rule_id"] not in known
    ]
    return len(append_events(connection, events))


def fold(events: Iterable[Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """Fold ledger rows, in event order, into {rule_id: {state, enabled, rule_version, content_hash, ...}}.

    The independent twin of the database's fold: the reconciliation compares `l1_rules` with it.
    """
    rules: dict[str, dict[str, Any]] = {}
    for event in events:
        rules[event["rule_id"]] = {
            "state": event["to_state"],
            "enabled": event["to_state"] in ENABLED_STATES,
            "rule_version": event["rule_version"],
            "content_hash": event["content_hash"],
            "runbook_id": event["definition"]["runbook_id"],
            "incident_pattern": event["definition"]["incident_pattern"],
            "last_event_id": event["event_id"],
            "rollout_step": event["rollout_step"],
        }
    return rules
