"""The same day judged by `standard`: what the sequential test says of its rules, and what it leaves in service."""

from __future__ import annotations

import dagster as dg
import sqlalchemy as sa
from graph_runs import Graph

from flywheel_pipeline.aggregates.batches import activate_policy
from flywheel_pipeline.promotion import evalue
from flywheel_pipeline.promotion.decide import load_rule_evidence
from flywheel_pipeline.simulation.replay import EVENING_AS_OF

VERDICTS = {
    "RB-AUTO-FIREWALL": "promote",
    "RB-AUTO-SSH_CONF": "inconclusive",
    "RB-AUTO-AUDIT_PO": "reject",
    "RB-AUTO-BACKUP_S": "reject",
    "RB-AUTO-BITLOCKE": "reject",
}


def test_standard_passes_firewall_waits_for_ssh_and_takes_the_failing_rules_out(played_copy: sa.Engine) -> None:
    with played_copy.begin() as connection:
        activate_policy(
            connection, "standard", actor="dana", reason="the day judged by today's policy", as_of=EVENING_AS_OF
        )
        found = {rule.rule_id: rule for rule in load_rule_evidence(connection, list(VERDICTS))}
    bare = {
        rule_id: evalue.verdict(rule.rated_successes, rule.rated_failures, 0.90, 0.05)
        for rule_id, rule in found.items()
    }
    assert bare == VERDICTS
    ssh = found["RB-AUTO-SSH_CONF"]
    assert evalue.needed_clean(ssh.rated_successes, ssh.rated_failures, 0.90, 0.05) == 23
    firewall = found["RB-AUTO-FIREWALL"]
    # 166 of 166 executions were reported healed; four of their host-days drifted again within 24 hours.
    assert (firewall.successes, firewall.failures, firewall.rated_failures) == (166, 0, 4)

    with dg.DagsterInstance.ephemeral() as instance:
        assert Graph(played_copy, instance).run().success
    with played_copy.connect() as connection:
        states = {
            row.rule_id: row.state
            for row in connection.execute(
                sa.text("SELECT rule_id, state FROM l1_rules WHERE rule_id = ANY(:ids)"), {"ids": list(VERDICTS)}
            )
        }
        decided = {
            row.subject_id: row
            for row in connection.execute(
                sa.text(
                    "SELECT DISTINCT ON (subject_id) subject_id, verdict, reason FROM promotion_decisions "
                    "WHERE subject_kind = 'rule' ORDER BY subject_id, decision_id DESC"
                )
            )
        }
        served = set(
            connection.execute(
                sa.text("SELECT DISTINCT e ->> 'id' FROM rule_manifests, jsonb_array_elements(rules) AS e")
            ).scalars()
        )
    # The audit policy fails at one clinic alone, whose own CUSUM has not alarmed yet: the rule is warned of, not taken
    # from the sites where it heals.
    assert decided["RB-AUTO-AUDIT_PO"].verdict == "warn"
    assert "lakeside-family-clinic" in decided["RB-AUTO-AUDIT_PO"].reason
    refuted = {rule_id for rule_id, verdict in VERDICTS.items() if verdict == "reject"} - {"RB-AUTO-AUDIT_PO"}
    assert {rule_id for rule_id, state in states.items() if state == "quarantined"} == refuted
    assert not served & refuted
    assert set(VERDICTS) - refuted <= served
