"""Withdrawn rules: tombstones stand until the appliance has let go, and withdrawals are commands like the others."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import sqlalchemy as sa
from fleet_database import NOON, Fleet
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from flywheel_pipeline.delivery.publish import (
    CommandReport,
    ManifestReport,
    acknowledge_command,
    queue_commands,
    take_commands,
    write_manifests,
)
from flywheel_pipeline.delivery.tombstones import TOMBSTONE_LIFETIME

HOUR = timedelta(hours=1)
RULE = "RB-AUTO-FIREWALL"
A, B = "site-a-01", "site-b-01"


def publish(fleet: Fleet, at: Any = NOON) -> tuple[ManifestReport, CommandReport]:
    batch = fleet.batch(at)
    return write_manifests(fleet.conn, batch), queue_commands(fleet.conn, batch)


def told_and_withdrawn(fleet: Fleet) -> None:
    """The rule was fetched by one of two appliances at noon and is quarantined an hour later."""
    fleet.rule(RULE)
    publish(fleet)
    take_commands(fleet.conn, A, NOON)
    fleet.quarantine(RULE)
    publish(fleet, NOON + HOUR)


def test_only_an_appliance_that_was_told_of_a_rule_is_told_to_drop_it(fleet: Fleet) -> None:
    told_and_withdrawn(fleet)
    assert fleet.tombstones(A) == [
        {
            "rule_id": RULE,
            "version": 1,
            "reason": "quarantined: fails on the test bench",
            "since": "2026-02-15T13:00:00Z",
        }
    ]
    assert fleet.tombstones(B) == []
    assert fleet.commands("withdraw_rule") == [(A, RULE, 1, "pending")]


def test_a_tombstone_is_the_same_however_often_it_is_published(fleet: Fleet) -> None:
    told_and_withdrawn(fleet)
    before = fleet.snapshot()
    manifests, commands = publish(fleet, NOON + 2 * HOUR)
    assert (manifests.written, manifests.tombstones, manifests.tombstones_rewritten, commands.changes) == (0, 1, 0, 0)
    assert fleet.snapshot() == before


def test_it_stands_before_any_command_was_queued_since_a_quarantine_writes_manifests_alone(fleet: Fleet) -> None:
    fleet.rule(RULE)
    publish(fleet)
    take_commands(fleet.conn, A, NOON)
    fleet.quarantine(RULE)
    write_manifests(fleet.conn, fleet.batch(NOON + HOUR))
    assert [stone["rule_id"] for stone in fleet.tombstones(A)] == [RULE]
    assert take_commands(fleet.conn, B, NOON + HOUR) == [], "a rule that left the manifest is told to nobody"


def test_acknowledging_the_withdrawal_removes_it_for_good(fleet: Fleet) -> None:
    told_and_withdrawn(fleet)
    [command] = take_commands(fleet.conn, A, NOON + 2 * HOUR)
    assert (command.command_type, command.params) == ("withdraw_rule", {"rule_id": RULE, "rule_version": 1})
    acknowledge_command(fleet.conn, A, command.id, NOON + 2 * HOUR)
    manifests, _ = publish(fleet, NOON + 3 * HOUR)
    assert (manifests.tombstones, manifests.tombstones_rewritten) == (0, 1)
    assert publish(fleet, NOON + 4 * HOUR)[1].changes == 0


def test_reporting_the_hash_of_the_new_rule_set_removes_it_and_settles_the_withdrawal(fleet: Fleet) -> None:
    told_and_withdrawn(fleet)
    desired = fleet.conn.execute(
        sa.text("SELECT manifest_hash FROM rule_manifests WHERE appliance_id = :a"), {"a": A}
    ).scalar_one()
    fleet.change_appliance(A, reported_manifest_hash=desired, state_reported_at=NOON)
    assert publish(fleet, NOON + 2 * HOUR)[0].tombstones == 1, "a report from before the withdrawal says nothing"
    fleet.change_appliance(A, reported_manifest_hash="0" * 64, state_reported_at=NOON + 2 * HOUR)
    assert publish(fleet, NOON + 3 * HOUR)[0].tombstones == 1, "another rule set may hold anything"
    fleet.change_appliance(A, reported_manifest_hash=desired, state_reported_at=NOON + 2 * HOUR)
    assert publish(fleet, NOON + 4 * HOUR)[0].tombstones == 0
    assert fleet.commands("withdraw_rule") == [(A, RULE, 1, "superseded")]


def test_after_thirty_days_of_silence_it_is_dropped(fleet: Fleet) -> None:
    told_and_withdrawn(fleet)
    last = NOON + HOUR + TOMBSTONE_LIFETIME
    assert publish(fleet, last - HOUR)[0].tombstones == 1
    assert publish(fleet, last)[0].tombstones == 0


def test_a_refused_withdrawal_keeps_its_tombstone(fleet: Fleet) -> None:
    told_and_withdrawn(fleet)
    [command] = take_commands(fleet.conn, A, NOON + 2 * HOUR)
    acknowledge_command(fleet.conn, A, command.id, NOON + 2 * HOUR, failure="rule file is read-only")
    assert publish(fleet, NOON + 3 * HOUR)[0].tombstones == 1
    assert fleet.commands("withdraw_rule") == [(A, RULE, 1, "failed")]


def test_a_new_version_is_a_tombstone_of_the_old_one(fleet: Fleet) -> None:
    told_and_withdrawn(fleet)
    fleet.promote_again(RULE)
    publish(fleet, NOON + 2 * HOUR)
    [stone] = fleet.tombstones(A)
    assert (stone["version"], stone["reason"]) == (1, "replaced by version 2")
    assert stone["since"] == "2026-02-15T13:00:00Z"


def test_a_rule_that_an_upgraded_agent_runs_again_is_no_tombstone_and_can_be_withdrawn_again(fleet: Fleet) -> None:
    fleet.rule(RULE)
    publish(fleet)
    [command] = take_commands(fleet.conn, A, NOON)
    acknowledge_command(fleet.conn, A, command.id, NOON)
    for round_ in range(2):
        at = NOON + (1 + 10 * round_) * HOUR
        fleet.change_appliance(A, agent_version="1.0.30")
        publish(fleet, at)
        [stone] = fleet.tombstones(A)
        assert "older than 1.0.44" in stone["reason"]
        [withdrawal] = take_commands(fleet.conn, A, at + HOUR)
        acknowledge_command(fleet.conn, A, withdrawal.id, at + HOUR)
        publish(fleet, at + 2 * HOUR)
        assert fleet.tombstones(A) == []
        fleet.change_appliance(A, agent_version="1.0.74")
        publish(fleet, at + 3 * HOUR)
        assert fleet.tombstones(A) == []
        assert fleet.commands("withdraw_rule") == [(A, RULE, 1, "superseded")]


def test_no_withdrawal_waits_where_nobody_is_alive_to_fetch_it_but_the_tombstone_stands(fleet: Fleet) -> None:
    fleet.rule(RULE)
    publish(fleet)
    take_commands(fleet.conn, A, NOON)
    fleet.change_appliance(A, status="offline")
    fleet.quarantine(RULE)
    assert publish(fleet, NOON + HOUR)[1].withdrawn == 0
    assert len(fleet.tombstones(A)) == 1
    fleet.change_appliance(A, status="online", last_checkin=NOON + 2 * HOUR)
    assert publish(fleet, NOON + 2 * HOUR)[1].withdrawn == 1


def test_a_retired_appliance_that_comes_back_is_told_what_it_must_drop(fleet: Fleet) -> None:
    fleet.rule(RULE)
    publish(fleet)
    take_commands(fleet.conn, A, NOON)
    fleet.change_appliance(A, status="retired")
    fleet.quarantine(RULE)
    publish(fleet, NOON + HOUR)
    fleet.change_appliance(A, status="online", last_checkin=NOON + 2 * HOUR)
    publish(fleet, NOON + 2 * HOUR)
    assert [stone["rule_id"] for stone in fleet.tombstones(A)] == [RULE]


RULES = {f"RB-AUTO-{n}": runbook for n, runbook in enumerate(("RB-WIN-SEC-001", "RB-WIN-SEC-007", "RB-WIN-SEC-016"))}
acts = st.lists(
    st.one_of(
        st.tuples(st.just("import"), st.sampled_from(sorted(RULES))),
        st.tuples(st.just("quarantine"), st.sampled_from(sorted(RULES))),
        st.tuples(st.just("upgrade"), st.sampled_from(["1.0.30", "1.0.56", "1.0.70"])),
        st.tuples(st.just("status"), st.sampled_from(["online", "offline", "retired"])),
        st.tuples(st.just("fetch"), st.sampled_from([A, B])),
        st.tuples(st.just("answer"), st.booleans()),
        st.tuples(st.just("report"), st.sampled_from([A, B])),
        st.tuples(st.just("write manifests only"), st.none()),
        st.tuples(st.just("wait"), st.sampled_from([1, 25, 800])),
    ),
    max_size=14,
)


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(acts)
def test_after_any_history_commands_and_tombstones_are_what_a_full_look_would_make_them(
    fleet: Fleet, history: list[tuple[str, Any]]
) -> None:
    """The incremental commands against an oracle that knows nothing of contents: manifests, and what was told."""
    with fleet.conn.begin_nested() as savepoint:
        clock, held = NOON, []
        told: set[tuple[str, str, int]] = set()
        for act, what in history:
            states = dict(fleet.conn.execute(sa.text("SELECT rule_id, state FROM l1_rules")).all())
            if act == "import" and what not in states:
                fleet.rule(what, runbook_id=RULES[what], incident_pattern={"incident_type": what})
            elif act == "quarantine" and states.get(what) == "fleet":
                fleet.quarantine(what)
            elif act == "upgrade":
                fleet.change_appliance(B, agent_version=what)
            elif act == "status":
                fleet.change_appliance(B, status=what)
            elif act == "fetch":
                for command in take_commands(fleet.conn, what, clock):
                    held.append((what, command.id))
                    if command.command_type == "sync_promoted_rule":
                        told.add((what, command.params["rule_id"], command.params["rule_version"]))
            elif act == "answer" and held:
                appliance_id, command_id = held.pop()
                acknowledge_command(fleet.conn, appliance_id, command_id, clock, failure=None if what else "no")
            elif act == "report":
                fleet.conn.execute(
                    sa.text(
                        "UPDATE appliances a SET reported_manifest_hash = m.manifest_hash, state_reported_at = :at "
                        "FROM rule_manifests m WHERE m.appliance_id = a.appliance_id AND a.appliance_id = :a"
                    ),
                    {"a": what, "at": clock},
                )
            elif act == "write manifests only":
                write_manifests(fleet.conn, fleet.batch(clock))
                continue
            elif act == "wait":
                clock += what * HOUR
            fleet.conn.execute(sa.text("UPDATE appliances SET last_checkin = :at"), {"at": clock})
            publish(fleet, clock)
        fleet.conn.execute(sa.text("UPDATE appliances SET last_checkin = :at"), {"at": clock})
        publish(fleet, clock)
        before = fleet.snapshot()
        manifests, commands = publish(fleet, clock)
        assert (manifests.written, manifests.removed, manifests.tombstones_rewritten, commands.changes) == (0, 0, 0, 0)
        assert fleet.snapshot() == before

        rows = fleet.conn.execute(sa.text("SELECT appliance_id, rules, tombstones FROM rule_manifests")).all()
        wanted = {(a, r["id"], r["version"]) for a, rules, _ in rows for r in rules if r["source"] != "builtin"}
        stones = {(a, t["rule_id"], t["version"]) for a, _, tombstones in rows for t in tombstones}
        alive = {A} | {
            row.appliance_id
            for row in fleet.conn.execute(sa.text("SELECT appliance_id FROM appliances WHERE status = 'online'"))
        }
        sync = {(a, r, v): status for a, r, v, status in fleet.commands()}
        withdrawals = {(a, r, v): status for a, r, v, status in fleet.commands("withdraw_rule")}
        # Whoever is alive has exactly one standing command for each rule that it should run.
        for key in wanted:
            if key[0] in alive:
                assert sync[key] in ("pending", "delivered", "acknowledged", "failed")
        for key, status in sync.items():
            if status in ("pending", "delivered"):
                assert key in wanted
        # A tombstone is for what was told and must not run; a withdrawal that is open has one.
        assert stones <= told - wanted
        for key, status in withdrawals.items():
            assert key in told
            if status in ("pending", "delivered"):
                assert key in stones
        for key in stones:
            if key[0] in alive:
                assert withdrawals[key] in ("pending", "delivered", "failed")
        savepoint.rollback()
