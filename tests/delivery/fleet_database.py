"""Rows that the tests of delivery share: rules through the ledger, appliances, batches."""

from __future__ import annotations

import itertools
from datetime import UTC, datetime, timedelta
from typing import Any

import sqlalchemy as sa

from flywheel_pipeline.promotion.ledger import RuleEvent, append_events, content_hash, definition, import_rules

NOON = datetime(2026, 2, 15, 12, tzinfo=UTC)
_numbers = itertools.count(1)


class Fleet:
    """A database with two sites and no promoted rules yet, and the acts by which a test changes it."""

    def __init__(self, conn: sa.Connection) -> None:
        """Work on `conn`, in its transaction."""
        self.conn = conn

    def batch(self, as_of: datetime | None = NOON) -> int:
        """Open a batch at a given clock (None: the real one); returns its id."""
        row = {"run": f"run-{next(_numbers)}", "as_of": as_of}
        statement = """
            INSERT INTO refresh_batches (run_id, policy_name, policy_hash, as_of)
            VALUES (:run, 'legacy', repeat('0', 64), :as_of) RETURNING batch_id
        """
        return int(self.conn.execute(sa.text(statement), row).scalar_one())

    def appliance(self, appliance_id: str, **changes: Any) -> None:
        """Add an appliance, online and checked in two minutes before noon unless said otherwise."""
        row = {
            "appliance_id": appliance_id,
            "site_id": appliance_id.rsplit("-", 1)[0],
            "agent_version": "1.0.70",
            "last_checkin": NOON - timedelta(minutes=2),
            "status": "online",
            **changes,
        }
        columns, values = ", ".join(row), ", ".join(f":{c}" for c in row)
        self.conn.execute(sa.text(f"INSERT INTO appliances ({columns}) VALUES ({values})"), row)

    def change_appliance(self, appliance_id: str, **changes: Any) -> None:
        """Change columns of an appliance."""
        sets = ", ".join(f"{column} = :{column}" for column in changes)
        self.conn.execute(
            sa.text(f"UPDATE appliances SET {sets} WHERE appliance_id = :id"), {**changes, "id": appliance_id}
        )

    def rule(self, rule_id: str, runbook_id: str = "RB-WIN-SEC-001", **changes: Any) -> None:
        """Import a promoted rule, in service at the whole fleet unless said otherwise."""
        rule = {
            "rule_id": rule_id,
            "incident_pattern": {"incident_type": "firewall"},
            "runbook_id": runbook_id,
            "platform": "windows",
            "enabled": True,
            "created_at": NOON - timedelta(days=1),
            **changes,
        }
        import_rules(self.conn, [rule], actor="importer", reason="taken over for the test")

    def quarantine(self, rule_id: str) -> None:
        """Take a rule out of service."""
        self._event(rule_id, "quarantined", "quarantined")

    def promote_again(self, rule_id: str) -> None:
        """Re-admit a quarantined rule as its next version, with a changed pattern, and promote it."""
        self._event(rule_id, "readmitted", "proposed", incident_pattern={"incident_type": "firewall_status"})
        batch = self.batch()
        self.conn.execute(
            sa.text(
                """
                UPDATE refresh_batches
                SET refreshed_at = now(),
                    refresh_seq = (SELECT coalesce(max(refresh_seq), 0) + 1 FROM refresh_batches)
                WHERE batch_id = :batch
                """
            ),
            {"batch": batch},
        )
        self.conn.execute(
            sa.text(
                """
                INSERT INTO gate_verdicts (batch_id, gate, verdict, sentence)
                SELECT :batch, gate, 'pass', 'the test says so' FROM required_gates
                """
            ),
            {"batch": batch},
        )
        decision = self.conn.execute(
            sa.text(
                """
                INSERT INTO promotion_decisions (batch_id, run_id, subject_kind, subject_id, policy_name,
                  policy_hash, verdict, reason, gates, evidence, decision_hash, confirmed_batch_id)
                VALUES (:batch, 'run', 'rule', :rule, 'legacy', repeat('0', 64), 'promote',
                  'the test says so', '[]', '{}', repeat('0', 64), :batch)
                RETURNING decision_id
                """
            ),
            {"batch": batch, "rule": rule_id},
        ).scalar_one()
        certificate = {"policy_hash": "0" * 64, "batch_id": batch}
        self._event(rule_id, "promoted", "fleet", batch_id=batch, decision_id=decision, certificate=certificate)

    def _event(self, rule_id: str, kind: str, to_state: str, incident_pattern: Any = None, **stamps: Any) -> None:
        rule = self.conn.execute(sa.text("SELECT * FROM l1_rules WHERE rule_id = :r"), {"r": rule_id}).one()
        content = definition(
            incident_pattern=incident_pattern or rule.incident_pattern,
            runbook_id=rule.runbook_id,
            platform=rule.platform,
            source=rule.source,
            promoted_from_l2=rule.promoted_from_l2,
            pattern_key=rule.pattern_key,
            confidence=rule.confidence,
        )
        version = rule.rule_version + (kind == "readmitted")
        if "certificate" in stamps:
            stamps["certificate"] |= {
                "rule_id": rule_id,
                "rule_version": version,
                "content_hash": content_hash(content),
                "target_state": to_state,
            }
        append_events(
            self.conn,
            [
                RuleEvent(
                    rule_id,
                    kind,
                    rule.state,
                    to_state,
                    content,
                    actor="dana",
                    reason="fails on the test bench",
                    rule_version=version,
                    **stamps,
                )
            ],
        )

    def execution(self, execution_id: str, **values: Any) -> None:
        """Report one execution of an L1 rule."""
        row = {
            "execution_id": execution_id,
            "site_id": "site-a",
            "appliance_id": "unknown",
            "runbook_id": "RB-AUTO-FIREWALL",
            "hostname": "ws01",
            "platform": "windows",
            "incident_type": "firewall",
            "started_at": NOON,
            "success": True,
            "resolution_level": "L1",
            "created_at": NOON + timedelta(days=2),
            **values,
        }
        columns, places = ", ".join(row), ", ".join(f":{c}" for c in row)
        self.conn.execute(sa.text(f"INSERT INTO execution_telemetry ({columns}) VALUES ({places})"), row)

    def commands(self, command_type: str = "sync_promoted_rule") -> list[tuple[str, str, int, str]]:
        """All commands of a type as (appliance, rule, version, status)."""
        statement = """
            SELECT appliance_id, rule_id, rule_version, status FROM appliance_commands
            WHERE command_type = :type ORDER BY appliance_id, rule_id, rule_version
        """
        return [tuple(row) for row in self.conn.execute(sa.text(statement), {"type": command_type})]

    def tombstones(self, appliance_id: str) -> list[dict[str, Any]]:
        """What the manifest of an appliance says it must drop."""
        statement = "SELECT tombstones FROM rule_manifests WHERE appliance_id = :id"
        return list(self.conn.execute(sa.text(statement), {"id": appliance_id}).scalar_one())

    def snapshot(self) -> list[Any]:
        """Everything that delivery writes, row versions included."""
        manifests = self.conn.execute(sa.text("SELECT xmin::text, * FROM appliance_manifests ORDER BY appliance_id"))
        commands = self.conn.execute(sa.text("SELECT xmin::text, * FROM appliance_commands ORDER BY id"))
        return [*manifests.all(), *commands.all()]
