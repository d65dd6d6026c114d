"""Promoted rules that nobody executed, by the stage where their delivery stopped."""

from __future__ import annotations

from datetime import timedelta

import sqlalchemy as sa
from fleet_database import NOON, Fleet

from flywheel_pipeline.aggregates.refresh import refresh
from flywheel_pipeline.delivery.publish import queue_commands, write_manifests
from flywheel_pipeline.delivery.quality import promoted_rules_are_executed

RULE = "RB-AUTO-FIREWALL"


def test_a_young_rule_is_not_judged_and_an_old_one_that_ran_is_fine(fleet: Fleet) -> None:
    fleet.rule(RULE)
    young = promoted_rules_are_executed(fleet.conn, NOON)
    assert (young.passed, young.figures["rules_judged"]) == (True, 0)
    assert "nothing to judge" in young.sentence
    fleet.execution("e1", runbook_id=RULE)
    refresh(fleet.conn)
    ran = promoted_rules_are_executed(fleet.conn, NOON + timedelta(days=3))
    assert (ran.passed, ran.figures["rules_judged"]) == (True, 1)


def test_an_execution_before_its_version_entered_service_is_none(fleet: Fleet) -> None:
    fleet.rule(RULE)
    fleet.execution("e1", runbook_id=RULE, started_at=NOON - timedelta(days=9), created_at=NOON - timedelta(days=9))
    refresh(fleet.conn)
    assert promoted_rules_are_executed(fleet.conn, NOON + timedelta(days=3)).offenders == 1


def test_chaos_rows_are_no_executions(fleet: Fleet) -> None:
    fleet.rule(RULE)
    fleet.execution("e1", runbook_id=RULE, chaos_campaign_id="c1")
    refresh(fleet.conn)
    assert promoted_rules_are_executed(fleet.conn, NOON + timedelta(days=3)).offenders == 1


def test_each_rule_is_named_with_the_furthest_stage_of_its_delivery(fleet: Fleet) -> None:
    later = NOON + timedelta(days=3)
    fleet.rule(RULE)
    nobody = promoted_rules_are_executed(fleet.conn, later)
    assert (nobody.passed, nobody.sample[0]["furthest"]) == (False, "nobody")
    batch = fleet.batch()
    write_manifests(fleet.conn, batch)
    queue_commands(fleet.conn, batch)
    queued = promoted_rules_are_executed(fleet.conn, later)
    assert (queued.sample[0]["furthest"], queued.figures["stuck_queued"]) == ("queued", 1)
    assert "the appliances do not check in" in queued.sentence
    for stage in ("delivered", "acknowledged"):
        fleet.conn.execute(
            sa.text(
                f"UPDATE appliance_commands SET status = '{stage}', {stage}_at = :at "
                "WHERE rule_id = :rule AND appliance_id = 'site-a-01'"
            ),
            {"at": NOON, "rule": RULE},
        )
        finding = promoted_rules_are_executed(fleet.conn, later)
        assert (finding.sample[0]["rule"], finding.sample[0]["furthest"]) == (RULE, stage)
    assert f"1 of 1 promoted rules were never executed: 1 acknowledged; first {RULE}" in finding.sentence


def test_a_rule_out_of_service_is_not_asked_for(fleet: Fleet) -> None:
    fleet.rule(RULE)
    fleet.quarantine(RULE)
    assert promoted_rules_are_executed(fleet.conn, NOON + timedelta(days=30)).passed
