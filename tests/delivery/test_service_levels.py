"""What is late, unanswered, adrift or refused is listed with its age, and the checks warn at their service level."""

from __future__ import annotations

import base64
from datetime import timedelta
from typing import Any

import pytest
import sqlalchemy as sa
from fleet_database import NOON, Fleet

from flywheel_pipeline.aggregates.refresh import refresh
from flywheel_pipeline.delivery import service_levels
from flywheel_pipeline.delivery.progress import MAX_PLOT_BYTES, STATES, Progress, plot_progress, rollout_progress
from flywheel_pipeline.delivery.publish import acknowledge_command, queue_commands, take_commands, write_manifests
from flywheel_pipeline.delivery.quality import agents_run_what_they_claim

HOUR = timedelta(hours=1)
RULE = "RB-AUTO-FIREWALL"
A, B = "site-a-01", "site-b-01"


def publish(fleet: Fleet, at: Any = NOON) -> None:
    """Publish at a moment at which both appliances checked in just now."""
    fleet.conn.execute(sa.text("UPDATE appliances SET last_checkin = :at"), {"at": at})
    batch = fleet.batch(at)
    write_manifests(fleet.conn, batch)
    queue_commands(fleet.conn, batch)


def rows(fleet: Fleet, query: str) -> list[tuple[Any, ...]]:
    return [tuple(row) for row in fleet.conn.execute(sa.text(query))]


def desired(fleet: Fleet, appliance_id: str) -> str:
    return str(
        fleet.conn.execute(
            sa.text("SELECT manifest_hash FROM rule_manifests WHERE appliance_id = :a"), {"a": appliance_id}
        ).scalar_one()
    )


def test_every_command_ends_acknowledged_failed_expired_or_superseded(fleet: Fleet) -> None:
    fleet.appliance("site-c-01")
    fleet.appliance("site-d-01")
    fleet.rule(RULE)
    publish(fleet)
    [done] = take_commands(fleet.conn, A, NOON)
    acknowledge_command(fleet.conn, A, done.id, NOON)
    [refused] = take_commands(fleet.conn, B, NOON)
    acknowledge_command(fleet.conn, B, refused.id, NOON, failure="disk full")
    fleet.change_appliance("site-c-01", status="offline")
    fleet.change_appliance("site-d-01", status="retired")
    publish(fleet, NOON + 25 * HOUR)
    assert fleet.commands() == [
        (A, RULE, 1, "acknowledged"),
        (B, RULE, 1, "failed"),
        ("site-c-01", RULE, 1, "expired"),
        ("site-d-01", RULE, 1, "superseded"),
    ]
    reasons = dict(rows(fleet, "SELECT appliance_id, status_reason FROM appliance_commands"))
    assert reasons[B] == "disk full"
    assert reasons["site-c-01"] == "not fetched in time"
    assert service_levels.commands_are_settled_in_time(fleet.conn).passed


def test_a_command_that_nobody_answers_is_queued_again_and_warned_of_by_its_true_age(fleet: Fleet) -> None:
    fleet.rule(RULE)
    for hours in (0, 25, 50):
        publish(fleet, NOON + hours * HOUR)
        take_commands(fleet.conn, A, NOON + hours * HOUR)
        [command] = take_commands(fleet.conn, B, NOON + hours * HOUR) or [None]
        if command is not None:
            acknowledge_command(fleet.conn, B, command.id, NOON + hours * HOUR)
    found = service_levels.commands_are_settled_in_time(fleet.conn, within_hours=48)
    assert not found.passed
    assert (found.offenders, found.sample[0]["appliance_id"], found.sample[0]["age_hours"]) == (1, A, 50.0)
    assert found.figures["acknowledged"] == 1
    assert service_levels.commands_are_settled_in_time(fleet.conn, within_hours=51).passed


def test_a_refused_withdrawal_is_warned_of_until_the_rule_is_gone(fleet: Fleet) -> None:
    fleet.rule(RULE)
    publish(fleet)
    take_commands(fleet.conn, A, NOON)
    fleet.quarantine(RULE)
    publish(fleet, NOON + HOUR)
    [command] = take_commands(fleet.conn, A, NOON + HOUR)
    acknowledge_command(fleet.conn, A, command.id, NOON + HOUR, failure="rule file is read-only")
    found = service_levels.commands_are_settled_in_time(fleet.conn)
    assert "rule file is read-only" in found.sentence
    fleet.change_appliance(A, reported_manifest_hash=desired(fleet, A), state_reported_at=NOON + 2 * HOUR)
    publish(fleet, NOON + 2 * HOUR)
    assert service_levels.commands_are_settled_in_time(fleet.conn).passed


def test_never_delivered_and_never_executed_are_two_lists_with_their_age(fleet: Fleet) -> None:
    fleet.rule(RULE, created_at=NOON)
    publish(fleet)
    [command] = take_commands(fleet.conn, A, NOON + 2 * HOUR)
    acknowledge_command(fleet.conn, A, command.id, NOON + 3 * HOUR)
    publish(fleet, NOON + 23 * HOUR)
    refresh(fleet.conn)
    listed = "SELECT appliance_id, problem, live, age_hours FROM overdue_deployments ORDER BY appliance_id"
    assert rows(fleet, listed) == [(A, "never_executed", True, 21.0), (B, "never_delivered", True, 23.0)]
    assert service_levels.promoted_rules_are_delivered_in_time(fleet.conn, within_hours=23).passed
    late = service_levels.promoted_rules_are_delivered_in_time(fleet.conn, within_hours=22)
    assert (late.offenders, late.sample[0]["appliance_id"]) == (1, B)
    assert late.figures["promoted_to_delivered_p50_hours"] == 2.0

    idle = service_levels.delivered_rules_are_executed_in_time(fleet.conn, within_hours=20)
    assert [row["rule_id"] for row in idle.sample] == [RULE]
    assert idle.figures["delivered_to_executed_p95_hours"] is None
    fleet.execution("e1", started_at=NOON + 8 * HOUR, appliance_id=A)
    refresh(fleet.conn)
    done = service_levels.delivered_rules_are_executed_in_time(fleet.conn, within_hours=20)
    assert done.passed
    assert done.figures["delivered_to_executed_p50_hours"] == 6.0
    assert rows(fleet, listed) == [(B, "never_delivered", True, 23.0)]


def test_an_appliance_that_nobody_hears_of_is_listed_and_not_warned_of(fleet: Fleet) -> None:
    fleet.rule(RULE, created_at=NOON)
    publish(fleet)
    publish(fleet, NOON + 200 * HOUR)
    fleet.conn.execute(sa.text("UPDATE appliances SET last_checkin = :at"), {"at": NOON})
    assert {row[0] for row in rows(fleet, "SELECT live FROM overdue_deployments")} == {False}
    assert service_levels.promoted_rules_are_delivered_in_time(fleet.conn).passed
    assert service_levels.appliances_run_what_they_should(fleet.conn).passed


def test_drift_is_told_apart_dated_from_its_beginning_and_ends_with_the_report(fleet: Fleet) -> None:
    fleet.rule(RULE)
    publish(fleet)
    fleet.change_appliance(A, reported_manifest_hash=desired(fleet, A), state_reported_at=NOON)
    publish(fleet, NOON + HOUR)
    fleet.appliance("site-c-01")
    listed = "SELECT appliance_id, drift, drift_hours, never_delivered FROM appliance_drift ORDER BY appliance_id"
    assert rows(fleet, listed)[:2] == [(A, "in_step", None, 1), (B, "unreported", 1.0, 1)]
    assert rows(fleet, listed)[2][:2] == ("site-c-01", "no_manifest")

    # The manifest changes every ten hours; the appliance follows never. Its age is that of the first one.
    for step in range(3):
        fleet.rule(f"RB-AUTO-{step}", incident_pattern={"incident_type": f"type_{step}"})
        publish(fleet, NOON + (10 + 10 * step) * HOUR)
    assert rows(fleet, listed)[0][:3] == (A, "differs", 20.0)
    found = service_levels.appliances_run_what_they_should(fleet.conn, within_hours=25)
    assert [row["appliance_id"] for row in found.sample] == [B]
    assert (found.figures["differs"], found.figures["in_step"]) == (1, 0)
    assert service_levels.appliances_run_what_they_should(fleet.conn, within_hours=19).offenders == 3

    for appliance_id in (A, B):
        fleet.change_appliance(
            appliance_id, reported_manifest_hash=desired(fleet, appliance_id), state_reported_at=NOON + 31 * HOUR
        )
    publish(fleet, NOON + 31 * HOUR)
    assert {row[1] for row in rows(fleet, listed)[:2]} == {"in_step"}


def test_a_service_level_is_read_from_the_settings(fleet: Fleet, monkeypatch: pytest.MonkeyPatch) -> None:
    fleet.rule(RULE, created_at=NOON)
    publish(fleet)
    publish(fleet, NOON + 5 * HOUR)
    assert service_levels.promoted_rules_are_delivered_in_time(fleet.conn).passed
    monkeypatch.setenv("FLYWHEEL_DELIVER_WITHIN_HOURS", "4")
    assert service_levels.promoted_rules_are_delivered_in_time(fleet.conn).offenders == 2
    assert service_levels.appliances_run_what_they_should(fleet.conn).offenders == 2
    monkeypatch.setenv("FLYWHEEL_SETTLE_WITHIN_HOURS", "4")
    assert service_levels.commands_are_settled_in_time(fleet.conn).offenders == 2


def refuses(fleet: Fleet, form: str = "run_windows_runbook", **values: Any) -> None:
    fleet.execution(
        f"refused-{form}-{values.get('agent_version')}",
        appliance_id=values.pop("appliance_id", A),
        success=False,
        error_message=f"Unknown action: {form}:RB-WIN-SEC-001",
        **values,
    )
    refresh(fleet.conn)


def actions(fleet: Fleet, appliance_id: str = A) -> list[str]:
    found = fleet.conn.execute(
        sa.text("SELECT rules FROM rule_manifests WHERE appliance_id = :a"), {"a": appliance_id}
    ).scalar_one()
    return [entry["actions"][0] for entry in found if entry["id"] == RULE]


def test_unknown_action_opens_a_finding_that_takes_the_form_away_until_the_release_changes(fleet: Fleet) -> None:
    fleet.rule(RULE)
    publish(fleet)
    assert actions(fleet) == ["run_windows_runbook:RB-WIN-SEC-001"]
    assert agents_run_what_they_claim(fleet.conn).passed

    refuses(fleet, agent_version="1.0.70")
    listed = "SELECT appliance_id, action_form, open_on, claimed_by, rule_ids FROM capability_findings"
    assert rows(fleet, listed) == [(A, "run_windows_runbook", [A], "version", [RULE])]
    found = agents_run_what_they_claim(fleet.conn)
    assert (found.passed, found.offenders) == (False, 1)
    assert "upgrade the agent" in found.sentence
    publish(fleet, NOON + HOUR)
    assert actions(fleet) == ["run_runbook:RB-WIN-SEC-001"], "an older equivalent form is served instead"

    refuses(fleet, "run_runbook", agent_version="1.0.70")
    publish(fleet, NOON + 2 * HOUR)
    assert actions(fleet) == []
    [reason] = rows(
        fleet,
        "SELECT w ->> 'reason' FROM rule_manifests, jsonb_array_elements(withheld) AS w "
        f"WHERE appliance_id = '{A}' AND w ->> 'rule_id' = '{RULE}'",
    )
    assert "answered `Unknown action: run_runbook`" in reason[0]

    fleet.change_appliance(A, agent_version="1.0.71")
    assert agents_run_what_they_claim(fleet.conn).passed
    publish(fleet, NOON + 3 * HOUR)
    assert actions(fleet) == ["run_windows_runbook:RB-WIN-SEC-001"]


def test_an_old_agent_that_refuses_what_it_never_claimed_contradicts_nothing(fleet: Fleet) -> None:
    refuses(fleet, site_id="site-b", appliance_id=B, agent_version="1.0.56")
    assert rows(fleet, "SELECT open_on, claimed_by FROM capability_findings") == [([B], None)]
    found = agents_run_what_they_claim(fleet.conn)
    assert (found.passed, found.figures["open_findings"]) == (True, 1)


def test_a_refusal_that_names_no_appliance_counts_for_all_of_its_site_and_no_other(fleet: Fleet) -> None:
    fleet.appliance("site-a-02")
    refuses(fleet, appliance_id="unknown", agent_version="1.0.70")
    assert rows(fleet, "SELECT open_on FROM capability_findings") == [([A, "site-a-02"],)]


def test_only_manifests_that_change_are_rewritten_and_each_content_is_stored_once(fleet: Fleet) -> None:
    for number in range(4):
        fleet.appliance(f"site-x{number}-01", agent_version="1.0.30" if number == 3 else "1.0.70")
    fleet.rule(RULE)
    publish(fleet)
    hashes = rows(fleet, "SELECT content_hash, count(*) FROM rule_manifests GROUP BY 1 ORDER BY 2")
    assert [count for _, count in hashes] == [1, 1, 4]
    assert len(rows(fleet, "SELECT content_hash FROM manifest_contents")) == 3
    last = fleet.batch(NOON + HOUR)
    fleet.rule("RB-AUTO-SSH", "LIN-SSH-001", platform="linux", incident_pattern={"incident_type": "ssh_config"})
    fleet.change_appliance("site-x3-01", agent_version="1.0.20")
    report = write_manifests(fleet.conn, last)
    assert (report.written, report.unchanged) == (6, 0)
    report = write_manifests(fleet.conn, fleet.batch(NOON + HOUR))
    assert (report.written, report.unchanged) == (0, 6)
    fleet.change_appliance("site-x0-01", agent_version="1.0.69")
    report = write_manifests(fleet.conn, fleet.batch(NOON + 2 * HOUR))
    assert (report.written, report.unchanged) == (1, 5)
    stamps = "SELECT appliance_id FROM rule_manifests WHERE batch_id = (SELECT max(batch_id) FROM refresh_batches)"
    assert rows(fleet, stamps) == [("site-x0-01",)]
    kept = {row[0] for row in rows(fleet, "SELECT content_hash FROM manifest_contents")}
    used = rows(fleet, "SELECT content_hash, commanded_hash FROM rule_manifests")
    assert kept == {h for row in used for h in row}, (
        "what commands were last brought in line with stays until they follow"
    )
    assert len(kept) > len({row[0] for row in used})


def test_progress_counts_every_pair_once_by_stage_and_release(fleet: Fleet) -> None:
    fleet.appliance("site-c-01", agent_version="1.0.30")
    fleet.rule(RULE)
    publish(fleet)
    take_commands(fleet.conn, A, NOON)
    found = rollout_progress(fleet.conn)
    assert [(p.stage, p.agent_version, p.pairs) for p in found] == [
        ("fleet", "1.0.30", 1),
        ("fleet", "1.0.56", 1),
        ("fleet", "1.0.70", 1),
    ]
    assert [next(s for s in STATES if p.counts[s]) for p in found] == ["withheld", "queued", "delivered"]


def test_the_plot_of_progress_is_a_png_within_its_size_however_many_groups_there_are() -> None:
    groups = [
        Progress(stage, f"1.0.{n}", {state: (7 * n + i) % 11 for i, state in enumerate(STATES)})
        for stage in ("canary", "ring", "fleet")
        for n in range(1, 13)
    ]
    uri = plot_progress(groups)
    kind, _, image = uri.partition(",")
    assert kind == "data:image/png;base64"
    assert base64.b64decode(image).startswith(b"\x89PNG")
    assert len(uri) <= MAX_PLOT_BYTES
    with pytest.raises(ValueError, match="at least one rule"):
        plot_progress([])
