from __future__ import annotations

from datetime import datetime, timedelta

import pytest
import sqlalchemy as sa
from fleet_database import NOON, Fleet

from flywheel_pipeline.aggregates.refresh import refresh
from flywheel_pipeline.delivery.publish import (
    Deployment,
    acknowledge_command,
    deployments,
    queue_commands,
    take_commands,
    write_manifests,
)

HOUR = timedelta(hours=1)
RULE = "RB-AUTO-FIREWALL"


def publish(fleet: Fleet, at: datetime = NOON) -> None:
    batch = fleet.batch(at)
    write_manifests(fleet.conn, batch)
    queue_commands(fleet.conn, batch)


def deployment(fleet: Fleet, appliance_id: str = "site-a-01", version: int = 1) -> Deployment:
    refresh(fleet.conn)
    rows = deployments(fleet.conn, rule_id=RULE, appliance_id=appliance_id)
    [found] = [row for row in rows if row.rule_version == version]
    return found


def test_each_step_from_promoted_to_executed_is_a_state_with_its_time(fleet: Fleet) -> None:
    fleet.rule(RULE)
    write_manifests(fleet.conn, batch := fleet.batch())
    row = deployment(fleet)
    assert (row.state, row.wanted, row.command_status) == ("promoted", True, None)
    assert row.promoted_at == NOON - timedelta(days=1)

    queue_commands(fleet.conn, batch)
    row = deployment(fleet)
    assert (row.state, row.command_status, row.queued_at) == ("queued", "pending", NOON)

    [command] = take_commands(fleet.conn, "site-a-01", NOON + HOUR)
    row = deployment(fleet)
    assert (row.state, row.delivered_at, row.acknowledged_at) == ("delivered", NOON + HOUR, None)

    acknowledge_command(fleet.conn, "site-a-01", command.id, NOON + 2 * HOUR)
    row = deployment(fleet)
    assert (row.state, row.acknowledged_at, row.first_executed_at) == ("acknowledged", NOON + 2 * HOUR, None)

    fleet.execution("e1", started_at=NOON + 5 * HOUR, appliance_id="site-a-01")
    fleet.execution("e2", started_at=NOON + 3 * HOUR, appliance_id="site-a-01", success=False)
    row = deployment(fleet)
    assert (row.state, row.first_executed_at) == ("executed", NOON + 3 * HOUR)
    assert deployment(fleet, "site-b-01").state == "queued"


@pytest.mark.parametrize(
    ("what", "values"),
    [
        ("before the delivery", {"started_at": NOON - HOUR}),
        ("of another rule", {"runbook_id": "RB-AUTO-SSH_CONF"}),
        ("at another site", {"site_id": "site-b"}),
        ("on another appliance", {"appliance_id": "site-a-99"}),
        ("of a chaos campaign", {"chaos_campaign_id": "c1"}),
        ("on another level", {"resolution_level": "L2"}),
    ],
)
def test_an_execution_does_not_count(fleet: Fleet, what: str, values: dict[str, object]) -> None:
    fleet.rule(RULE)
    publish(fleet)
    take_commands(fleet.conn, "site-a-01", NOON)
    fleet.execution("e1", **{"started_at": NOON + HOUR, **values})
    assert deployment(fleet).state == "delivered", what


def test_an_execution_without_appliance_counts_for_the_only_one_of_its_site(fleet: Fleet) -> None:
    fleet.rule(RULE)
    publish(fleet)
    take_commands(fleet.conn, "site-a-01", NOON)
    fleet.execution("e1", started_at=NOON + HOUR, appliance_id="unknown")
    assert deployment(fleet).state == "executed"
    fleet.appliance("site-a-02")
    assert deployment(fleet).state == "delivered"
    fleet.change_appliance("site-a-02", status="retired")
    assert deployment(fleet).state == "executed"


def test_a_rule_that_an_agent_cannot_run_is_withheld_with_the_reason(fleet: Fleet) -> None:
    fleet.change_appliance("site-b-01", agent_version="1.0.30")
    fleet.rule(RULE)
    publish(fleet)
    row = deployment(fleet, "site-b-01")
    assert (row.state, row.wanted, row.command_status) == ("withheld", False, None)
    assert row.withheld_reason is not None
    assert "1.0.44" in row.withheld_reason


def test_a_quarantined_rule_stays_listed_as_no_longer_wanted(fleet: Fleet) -> None:
    fleet.rule(RULE)
    publish(fleet)
    take_commands(fleet.conn, "site-a-01", NOON)
    fleet.quarantine(RULE)
    publish(fleet, NOON + HOUR)
    row = deployment(fleet)
    assert (row.state, row.wanted, row.command_status) == ("delivered", False, "superseded")


def test_executions_of_a_new_version_do_not_count_for_the_old_one(fleet: Fleet) -> None:
    fleet.rule(RULE)
    publish(fleet)
    take_commands(fleet.conn, "site-a-01", NOON)
    fleet.quarantine(RULE)
    fleet.promote_again(RULE)
    publish(fleet, NOON + HOUR)
    take_commands(fleet.conn, "site-a-01", NOON + 2 * HOUR)
    fleet.execution("e1", started_at=NOON + 3 * HOUR)
    assert deployment(fleet, version=1).state == "delivered"
    assert deployment(fleet, version=2).state == "executed"


def test_built_in_rules_have_no_deployments(fleet: Fleet) -> None:
    fleet.change_appliance("site-b-01", agent_version="1.0.30")
    publish(fleet)
    assert deployments(fleet.conn) == []


def test_an_appliance_that_is_gone_from_the_register_keeps_its_history(fleet: Fleet) -> None:
    fleet.rule(RULE)
    publish(fleet)
    fleet.conn.execute(sa.text("DELETE FROM appliances WHERE appliance_id = 'site-b-01'"))
    publish(fleet, NOON + HOUR)
    row = deployment(fleet, "site-b-01")
    assert (row.site_id, row.wanted, row.command_status) == (None, False, "superseded")


def test_the_list_is_ordered_filtered_and_limited(fleet: Fleet) -> None:
    fleet.rule(RULE)
    fleet.rule("RB-AUTO-SMB", runbook_id="RB-WIN-SEC-007", incident_pattern={"incident_type": "smb_signing"})
    publish(fleet)
    listed = [(d.rule_id, d.appliance_id) for d in deployments(fleet.conn)]
    assert listed == [
        ("RB-AUTO-FIREWALL", "site-a-01"),
        ("RB-AUTO-FIREWALL", "site-b-01"),
        ("RB-AUTO-SMB", "site-a-01"),
        ("RB-AUTO-SMB", "site-b-01"),
    ]
    assert [d.rule_id for d in deployments(fleet.conn, appliance_id="site-b-01")] == [RULE, "RB-AUTO-SMB"]
    assert len(deployments(fleet.conn, limit=3)) == 3
    assert deployments(fleet.conn, rule_id="RB-AUTO-NONE") == []


def test_the_view_has_one_row_per_rule_version_and_appliance(fleet: Fleet) -> None:
    fleet.rule(RULE)
    publish(fleet)
    for appliance_id in ("site-a-01", "site-b-01"):
        take_commands(fleet.conn, appliance_id, NOON)
        for n in range(3):
            fleet.execution(
                f"{appliance_id}{n}", site_id=appliance_id[:6], started_at=NOON + n * HOUR, hostname=f"h{n}"
            )
    fleet.quarantine(RULE)
    fleet.promote_again(RULE)
    publish(fleet, NOON + HOUR)
    keys = fleet.conn.execute(sa.text("SELECT rule_id, rule_version, appliance_id FROM deployments")).all()
    assert len(keys) == len(set(keys)) == 4
