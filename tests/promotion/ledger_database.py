"""A ledger to write into by hand, by plain SQL, as somebody would who does not ask the program.

Belongs here: batches, verdicts, decisions and events as rows. Does not belong here: assertions.
"""

from __future__ import annotations

import itertools
import json
from typing import Any

import sqlalchemy as sa

from flywheel_pipeline.promotion.ledger import content_hash, definition
from flywheel_pipeline.promotion.policy import load_policy

KEY = "firewall~RB-WIN-SEC-001~windows"
RULE = "RB-AUTO-TEST"
_numbers = itertools.count(1)


def content(**changes: Any) -> dict[str, Any]:
    """The definition of a firewall rule that runs the firewall runbook."""
    return definition(
        **{
            "incident_pattern": {"incident_type": "firewall"},
            "runbook_id": "RB-WIN-SEC-001",
            "platform": "windows",
            "source": "promoted",
            "promoted_from_l2": True,
            "pattern_key": KEY,
            **changes,
        }
    )


class Ledger:
    """Rows of the ledger, written in the transaction of `connection`."""

    def __init__(self, connection: sa.Connection) -> None:
        """Write through `connection`."""
        self.connection = connection

    def insert(self, table: str, returning: str, **row: Any) -> Any:
        """Insert one row by plain SQL; values that are dicts or lists are JSON."""
        values = {k: json.dumps(v) if isinstance(v, (dict, list)) else v for k, v in row.items()}
        columns, places = ", ".join(values), ", ".join(f":{c}" for c in values)
        statement = f"INSERT INTO {table} ({columns}) VALUES ({places}) RETURNING {returning}"
        return self.connection.execute(sa.text(statement), values).scalar_one()

    def batch(self, *, refreshed: bool = True, verdict: str | None = "pass") -> int:
        """Open a batch; refreshed, and with this verdict on every required gate, unless said otherwise."""
        number = next(_numbers)
        policy = load_policy("standard")
        batch = self.insert(
            "refresh_batches",
            "batch_id",
            run_id=f"run-{number}",
            policy_name=policy.name,
            policy_hash=policy.policy_hash,
        )
        if refreshed:
            self.connection.execute(
                sa.text(
                    "UPDATE refresh_batches SET refreshed_at = clock_timestamp(), "
                    "refresh_seq = (SELECT coalesce(max(refresh_seq), 0) + 1 FROM refresh_batches) WHERE batch_id = :b"
                ),
                {"b": batch},
            )
        if verdict:
            self.connection.execute(
                sa.text(
                    "INSERT INTO gate_verdicts (batch_id, gate, verdict, sentence) "
                    "SELECT :b, gate, :v, 'by hand' FROM required_gates"
                ),
                {"b": batch, "v": verdict},
            )
        return int(batch)

    def decision(self, batch: int, stage: str, **changes: Any) -> int:
        """Write a decision that takes the pattern's rule one step further from `stage`."""
        evidence = {"stage": stage, "runbook_id": "RB-WIN-SEC-001", "platform": "windows"}
        row = {
            "batch_id": batch,
            "run_id": "by hand",
            "subject_kind": "pattern",
            "subject_id": KEY,
            "policy_name": "standard",
            "policy_hash": load_policy("standard").policy_hash,
            "verdict": "advance",
            "reason": "by hand",
            "gates": [],
            "evidence": evidence,
            "decision_hash": f"{next(_numbers):064d}",
            "confirmed_batch_id": batch,
            **changes,
        }
        return int(self.insert("promotion_decisions", "decision_id", **row))

    def event(self, kind: str, from_state: str, to_state: str, **changes: Any) -> int:
        """Append an event as it is given; nothing that a promotion needs is added."""
        definition_ = changes.get("definition", content())
        row = {
            "rule_id": RULE,
            "rule_version": 1,
            "kind": kind,
            "from_state": from_state,
            "to_state": to_state,
            "definition": definition_,
            "content_hash": content_hash(definition_),
            "actor": "dana",
            "reason": "by hand",
            **changes,
        }
        return int(self.insert("rule_events", "event_id", **row))

    def promotion(self, from_state: str, to_state: str, **changes: Any) -> dict[str, Any]:
        """Return all the columns of a promotion that the padlock accepts, with its batch and decision written."""
        at_once = (from_state, to_state) == ("proposed", "fleet")
        batch = changes.pop("batch", None) or self.batch()
        body = changes.get("definition", content())
        evidence = {"stage": from_state, "runbook_id": body["runbook_id"], "platform": body["platform"]}
        rule = self.state(changes.get("rule_id", RULE))
        if rule is not None and rule.rollout_step is not None:
            evidence["step"] = rule.rollout_step
        verdict = "promote" if at_once else "advance"
        decision = self.decision(batch, from_state, evidence=evidence, verdict=verdict)
        version = changes.get("rule_version", 1)
        row = {
            "kind": "promoted" if at_once else "widened" if from_state == to_state else "advanced",
            "from_state": from_state,
            "to_state": to_state,
            "rule_version": version,
            "definition": body,
            "batch_id": batch,
            "decision_id": decision,
            "certificate": {
                "rule_id": changes.get("rule_id", RULE),
                "rule_version": version,
                "content_hash": content_hash(body),
                "policy_hash": load_policy("standard").policy_hash,
                "target_state": to_state,
                "batch_id": batch,
            },
        }
        return {**row, **changes}

    def step(self, kind: str, from_state: str, to_state: str, **changes: Any) -> int:
        """Take a legal step with all that it needs."""
        if kind in ("promoted", "advanced", "widened"):
            return self.event(**{**self.promotion(from_state, to_state, **changes), "kind": kind})
        return self.event(kind, from_state, to_state, **changes)

    def bring_to(self, state: str, rule_id: str = RULE) -> None:
        """Bring a new rule into this state by legal steps."""
        path = {
            "none": [],
            "proposed": ["proposed"],
            "shadow": ["proposed", "shadow"],
            "canary": ["proposed", "shadow", "canary"],
            "ring": ["proposed", "shadow", "canary", "ring"],
            "fleet": ["proposed", "fleet"],
            "quarantined": ["proposed", "quarantined"],
            "retired": ["proposed", "retired"],
        }[state]
        kinds = {"proposed": "proposed", "quarantined": "quarantined", "retired": "retired"}
        before = "none"
        for after in path:
            advance = "promoted" if (before, after) == ("proposed", "fleet") else "advanced"
            self.step(kinds.get(after, advance), before, after, rule_id=rule_id)
            before = after

    def state(self, rule_id: str = RULE) -> Any:
        """Return the rule's row in the registry, or None."""
        return self.connection.execute(
            sa.text("SELECT * FROM l1_rules WHERE rule_id = :id"), {"id": rule_id}
        ).one_or_none()
