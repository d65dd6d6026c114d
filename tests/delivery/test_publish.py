from __future__ import annotations

import uuid
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from typing import Any

import pytest
import sqlalchemy as sa
from fleet_database import NOON, Fleet
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from flywheel_pipeline.aggregates.refresh import refresh
from flywheel_pipeline.delivery.manifest import manifest_hash
from flywheel_pipeline.delivery.publish import (
    CommandReport,
    ManifestReport,
    acknowledge_command,
    expire_commands,
    load_rules,
    queue_commands,
    take_commands,
    write_manifests,
)
from flywheel_pipeline.errors import UsageError

HOUR = timedelta(hours=1)
FIREWALL = ("RB-AUTO-FIREWALL", 1)


def publish(fleet: Fleet, at: Any = NOON) -> tuple[ManifestReport, CommandReport]:
    batch = fleet.batch(at)
    return write_manifests(fleet.conn, batch), queue_commands(fleet.conn, batch)


def served(fleet: Fleet, appliance_id: str) -> dict[str, dict[str, Any]]:
    rules = fleet.conn.execute(
        sa.text("SELECT rules FROM rule_manifests WHERE appliance_id = :a"), {"a": appliance_id}
    ).scalar_one()
    return {rule["id"]: rule for rule in rules}


def test_a_promoted_rule_is_in_every_manifest_and_one_command_is_queued_for_each_appliance(
    fleet: Fleet,
) -> None:
    fleet.rule("RB-AUTO-FIREWALL")
    manifests, commands = publish(fleet)
    assert (manifests.appliances, manifests.written, manifests.removed) == (2, 2, 0)
    assert manifests.unservable == ()
    assert (commands.queued, commands.open, commands.waiting_appliances) == (2, 2, 0)
    assert fleet.commands() == [("site-a-01", *FIREWALL, "pending"), ("site-b-01", *FIREWALL, "pending")]
    assert served(fleet, "site-a-01")["RB-AUTO-FIREWALL"]["actions"] == ["run_windows_runbook:RB-WIN-SEC-001"]
    assert served(fleet, "site-b-01")["RB-AUTO-FIREWALL"]["actions"] == ["run_runbook:RB-WIN-SEC-001"]


def test_built_in_rules_are_in_the_manifests_and_no_command_speaks_of_them(fleet: Fleet) -> None:
    manifests, commands = publish(fleet)
    assert manifests.rules == 2 * 21
    assert commands.queued == 0


def test_the_stored_hash_is_that_of_the_stored_rules(fleet: Fleet) -> None:
    fleet.rule("RB-AUTO-FIREWALL", incident_pattern={"incident_type": "pare-feu “é” \\ 火", "check": ["a", 1, None]})
    publish(fleet)
    rows = fleet.conn.execute(sa.text("SELECT manifest_hash, rules, rule_count FROM rule_manifests")).all()
    assert len(rows) == 2
    for row in rows:
        assert row.manifest_hash == manifest_hash(row.rules)
        assert row.rule_count == len(row.rules) == 22


def test_publishing_twice_writes_nothing_more(fleet: Fleet) -> None:
    fleet.rule("RB-AUTO-FIREWALL")
    publish(fleet)
    before = fleet.snapshot()
    manifests, commands = publish(fleet, NOON + HOUR)
    assert (manifests.written, manifests.unchanged, manifests.removed) == (0, 2, 0)
    assert commands.changes == 0
    assert commands.open == 2
    assert fleet.snapshot() == before


def test_only_the_manifests_that_change_are_rewritten(fleet: Fleet) -> None:
    fleet.rule("RB-AUTO-FIREWALL")
    publish(fleet)
    fleet.change_appliance("site-b-01", agent_version="1.0.70")
    manifests, commands = publish(fleet, NOON + HOUR)
    assert (manifests.written, manifests.unchanged) == (1, 1)
    assert commands.changes == 0
    hashes = fleet.conn.execute(sa.text("SELECT DISTINCT manifest_hash FROM rule_manifests")).all()
    assert len(hashes) == 1


def test_parameters_of_a_command_name_the_rule_and_hold_no_time(fleet: Fleet) -> None:
    fleet.rule("RB-AUTO-FIREWALL")
    publish(fleet)
    params = fleet.conn.execute(sa.text("SELECT DISTINCT params FROM appliance_commands")).scalar_one()
    assert params == {"rule_id": "RB-AUTO-FIREWALL", "rule_version": 1}


def test_a_quarantined_rule_leaves_every_manifest_and_its_open_commands_are_superseded(fleet: Fleet) -> None:
    fleet.rule("RB-AUTO-FIREWALL")
    fleet.rule("RB-AUTO-SMB", runbook_id="RB-WIN-SEC-007", incident_pattern={"incident_type": "smb_signing"})
    publish(fleet)
    take_commands(fleet.conn, "site-a-01", NOON)
    fleet.quarantine("RB-AUTO-FIREWALL")
    manifests, commands = publish(fleet, NOON + HOUR)
    assert manifests.written == 2
    # The appliance that was told of it is told to drop it; the other never knew.
    assert (commands.superseded, commands.withdrawn, commands.open) == (2, 1, 3)
    assert fleet.commands("withdraw_rule") == [("site-a-01", *FIREWALL, "pending")]
    assert "RB-AUTO-FIREWALL" not in served(fleet, "site-a-01") | served(fleet, "site-b-01")
    assert fleet.commands() == [
        ("site-a-01", *FIREWALL, "superseded"),
        ("site-a-01", "RB-AUTO-SMB", 1, "delivered"),
        ("site-b-01", *FIREWALL, "superseded"),
        ("site-b-01", "RB-AUTO-SMB", 1, "pending"),
    ]


def test_a_new_version_of_a_rule_is_a_new_command(fleet: Fleet) -> None:
    fleet.rule("RB-AUTO-FIREWALL")
    publish(fleet)
    fleet.quarantine("RB-AUTO-FIREWALL")
    publish(fleet, NOON + HOUR)
    fleet.promote_again("RB-AUTO-FIREWALL")
    _, commands = publish(fleet, NOON + 2 * HOUR)
    assert (commands.queued, commands.superseded) == (2, 0)
    assert fleet.commands() == [
        ("site-a-01", "RB-AUTO-FIREWALL", 1, "superseded"),
        ("site-a-01", "RB-AUTO-FIREWALL", 2, "pending"),
        ("site-b-01", "RB-AUTO-FIREWALL", 1, "superseded"),
        ("site-b-01", "RB-AUTO-FIREWALL", 2, "pending"),
    ]


def test_a_rule_on_a_placeholder_is_kept_out_and_reported_while_others_are_still_withdrawn(
    fleet: Fleet,
) -> None:
    fleet.rule("RB-AUTO-FIREWALL")
    publish(fleet)
    fleet.rule("RB-AUTO-SMB_SIGN", runbook_id="AUTO-SMB_SIGNING", incident_pattern={"incident_type": "smb_signing"})
    fleet.quarantine("RB-AUTO-FIREWALL")
    manifests, commands = publish(fleet, NOON + HOUR)
    assert manifests.unservable == (
        ("RB-AUTO-SMB_SIGN", "AUTO-SMB_SIGNING is a placeholder: no script stands behind it"),
    )
    assert not {"RB-AUTO-SMB_SIGN", "RB-AUTO-FIREWALL"} & set(served(fleet, "site-a-01"))
    assert commands.queued == 0


def test_an_agent_that_cannot_run_a_rule_is_listed_and_gets_no_command_until_it_can(fleet: Fleet) -> None:
    fleet.rule("RB-AUTO-FIREWALL")
    fleet.change_appliance("site-b-01", agent_version="1.0.30")
    manifests, commands = publish(fleet)
    assert manifests.withheld == 1 + 21
    assert commands.queued == 1
    fleet.change_appliance("site-b-01", agent_version="1.0.74")
    manifests, commands = publish(fleet, NOON + HOUR)
    assert manifests.withheld == 0
    assert commands.queued == 1
    fleet.change_appliance("site-b-01", agent_version="1.0.30")
    assert publish(fleet, NOON + 2 * HOUR)[1].superseded == 1
    fleet.change_appliance("site-b-01", agent_version="1.0.74")
    assert publish(fleet, NOON + 3 * HOUR)[1].redelivered == 1
    assert fleet.commands()[1] == ("site-b-01", *FIREWALL, "pending")


@pytest.mark.parametrize(
    "change",
    [
        {"status": "offline"},
        {"last_checkin": NOON - timedelta(days=8)},
        {"last_checkin": None},
    ],
)
def test_no_command_waits_where_nobody_is_alive_to_fetch_it_but_the_manifest_stands(
    fleet: Fleet, change: dict[str, Any]
) -> None:
    fleet.rule("RB-AUTO-FIREWALL")
    fleet.change_appliance("site-b-01", **change)
    manifests, commands = publish(fleet)
    assert manifests.appliances == 2
    assert (commands.queued, commands.waiting_appliances) == (1, 1)
    fleet.change_appliance("site-b-01", status="online", last_checkin=NOON + HOUR)
    assert publish(fleet, NOON + HOUR)[1].queued == 1


def test_a_retired_appliance_loses_its_manifest_and_its_open_commands(fleet: Fleet) -> None:
    fleet.rule("RB-AUTO-FIREWALL")
    publish(fleet)
    fleet.change_appliance("site-b-01", status="retired")
    manifests, commands = publish(fleet, NOON + HOUR)
    assert (manifests.appliances, manifests.removed) == (1, 1)
    assert commands.superseded == 1
    fleet.change_appliance("site-a-01", status="retired")
    assert publish(fleet, NOON + HOUR)[0].removed == 1
    assert fleet.conn.execute(sa.text("SELECT count(*) FROM rule_manifests")).scalar_one() == 0


def test_a_command_that_nobody_fetched_expires_and_is_queued_again_in_the_same_row(fleet: Fleet) -> None:
    fleet.rule("RB-AUTO-FIREWALL")
    publish(fleet)
    take_commands(fleet.conn, "site-a-01", NOON)
    assert publish(fleet, NOON + 23 * HOUR)[1].changes == 0
    _, commands = publish(fleet, NOON + 24 * HOUR)
    assert (commands.expired, commands.redelivered, commands.queued) == (2, 2, 0)
    row = fleet.conn.execute(sa.text("SELECT * FROM appliance_commands WHERE appliance_id = 'site-a-01'")).one()
    assert (row.status, row.delivered_at, row.created_at) == ("pending", None, NOON)
    assert row.expires_at == NOON + 48 * HOUR
    assert row.status_reason == "queued again, was expired"


def test_an_expired_command_of_an_appliance_that_went_silent_stays_expired(fleet: Fleet) -> None:
    fleet.rule("RB-AUTO-FIREWALL")
    publish(fleet)
    fleet.change_appliance("site-b-01", status="offline")
    _, commands = publish(fleet, NOON + 24 * HOUR)
    assert (commands.expired, commands.redelivered) == (2, 1)
    assert fleet.commands()[1] == ("site-b-01", *FIREWALL, "expired")
    assert publish(fleet, NOON + 25 * HOUR)[1].changes == 0


def test_an_appliance_fetches_its_own_commands_once_and_acknowledges_them(fleet: Fleet) -> None:
    fleet.rule("RB-AUTO-FIREWALL")
    publish(fleet)
    [command] = take_commands(fleet.conn, "site-a-01", NOON + HOUR)
    assert command.command_type == "sync_promoted_rule"
    assert take_commands(fleet.conn, "site-a-01", NOON + HOUR) == []
    assert acknowledge_command(fleet.conn, "site-a-01", command.id, NOON + 2 * HOUR)
    assert not acknowledge_command(fleet.conn, "site-a-01", command.id, NOON + 3 * HOUR, failure="late")
    assert fleet.commands() == [("site-a-01", *FIREWALL, "acknowledged"), ("site-b-01", *FIREWALL, "pending")]
    assert publish(fleet, NOON + 72 * HOUR)[1].expired == 1


def test_a_refused_command_stays_failed_with_the_agents_reason(fleet: Fleet) -> None:
    fleet.rule("RB-AUTO-FIREWALL")
    publish(fleet)
    [command] = take_commands(fleet.conn, "site-a-01", NOON)
    assert acknowledge_command(fleet.conn, "site-a-01", command.id, NOON, failure="Unknown action")
    assert publish(fleet, NOON + HOUR)[1].changes == 0
    row = fleet.conn.execute(sa.text("SELECT * FROM appliance_commands WHERE id = :i"), {"i": command.id}).one()
    assert (row.status, row.status_reason, row.acknowledged_at) == ("failed", "Unknown action", None)


def test_an_answer_after_the_expiry_still_counts(fleet: Fleet) -> None:
    fleet.rule("RB-AUTO-FIREWALL")
    publish(fleet)
    [command] = take_commands(fleet.conn, "site-a-01", NOON)
    assert expire_commands(fleet.conn, NOON + 24 * HOUR) == 2
    assert take_commands(fleet.conn, "site-b-01", NOON + 24 * HOUR) == []
    assert acknowledge_command(fleet.conn, "site-a-01", command.id, NOON + 25 * HOUR)
    assert fleet.commands()[0] == ("site-a-01", *FIREWALL, "acknowledged")


def test_an_appliance_cannot_answer_for_another_or_for_nothing(fleet: Fleet) -> None:
    fleet.rule("RB-AUTO-FIREWALL")
    publish(fleet)
    [command] = take_commands(fleet.conn, "site-a-01", NOON)
    with pytest.raises(UsageError, match="site-b-01 has no command"):
        acknowledge_command(fleet.conn, "site-b-01", command.id, NOON)
    with pytest.raises(UsageError):
        acknowledge_command(fleet.conn, "site-a-01", uuid.uuid4(), NOON)


def test_a_renamed_site_counts_under_its_name_of_today(fleet: Fleet) -> None:
    fleet.conn.execute(
        sa.text(
            "INSERT INTO site_aliases (alias, site_id, actor, reason) VALUES ('site-a', 'clinic-a', 'dana', 'renamed')"
        )
    )
    publish(fleet)
    site = fleet.conn.execute(sa.text("SELECT site_id FROM rule_manifests WHERE appliance_id = 'site-a-01'"))
    assert site.scalar_one() == "clinic-a"


def test_an_unknown_batch_is_refused(fleet: Fleet) -> None:
    with pytest.raises(UsageError, match="no batch 4711"):
        write_manifests(fleet.conn, 4711)


def test_a_rule_counts_as_failing_only_if_raw_and_rated_rate_are_low(fleet: Fleet) -> None:
    rows = [
        ("L1-SSH-001", 30, 10, 3),  # raw low, rated low
        ("L1-SUID-001", 30, 25, 2),  # reported as success but unverified: the raw rate is high
        ("L1-NTP-001", 19, 0, 0),  # too few
    ]
    for rule_id, executions, raw, verified in rows:
        fleet.conn.execute(
            sa.text(
                """
                INSERT INTO execution_telemetry (execution_id, site_id, runbook_id, hostname, platform,
                  incident_type, started_at, success, verification_passed, resolution_level, error_message)
                SELECT :rule || n, 'site-a', :rule, 'host-' || n, 'linux', 'x', now(), n <= :raw,
                  CASE WHEN n <= :verified THEN true END, 'L1', CASE WHEN n > :raw THEN 'exit code 1' END
                FROM generate_series(1, :executions) AS n
                """
            ),
            {"rule": rule_id, "executions": executions, "raw": raw, "verified": verified},
        )
    refresh(fleet.conn)
    assert [r.rule_id for r in load_rules(fleet.conn) if r.failing] == ["L1-SSH-001"]


def test_two_publishers_at_once_queue_each_command_once(
    engine: sa.Engine, committed: Callable[[Callable[[Fleet], Any]], Any]
) -> None:
    def prepare(fleet: Fleet) -> list[int]:
        for n in range(20):
            fleet.appliance(f"site-{n}-01")
        fleet.rule("RB-AUTO-FIREWALL")
        return [fleet.batch() for _ in range(4)]

    batches = committed(prepare)

    def one(batch: int) -> int:
        with engine.begin() as conn:
            write_manifests(conn, batch)
            return queue_commands(conn, batch).queued

    with ThreadPoolExecutor(len(batches)) as pool:
        queued = list(pool.map(one, batches))
    assert sorted(queued) == [0, 0, 0, 20]
    assert committed(lambda fleet: len(fleet.commands())) == 20


@pytest.mark.parametrize("act", [write_manifests, queue_commands])
def test_a_publisher_waits_for_the_one_before_so_that_no_older_manifest_lands_on_a_newer_one(
    engine: sa.Engine,
    committed: Callable[[Callable[[Fleet], Any]], Any],
    act: Callable[[sa.Connection, int], Any],
) -> None:
    first, second = committed(lambda fleet: (fleet.batch(), fleet.batch()))
    with engine.begin() as one, engine.connect() as two:
        act(one, first)
        two.execute(sa.text("SET lock_timeout = '200ms'"))
        with pytest.raises(sa.exc.OperationalError, match="lock timeout"):
            act(two, second)


def test_a_thousand_appliances_and_fifty_rules_are_published_within_seconds(fleet: Fleet) -> None:
    fleet.conn.execute(
        sa.text(
            """
            INSERT INTO appliances (appliance_id, site_id, agent_version, last_checkin)
            SELECT 'bulk-' || n, 'site-' || n % 300, '1.0.70', :at FROM generate_series(1, 1000) AS n
            """
        ),
        {"at": NOON},
    )
    for n in range(50):
        fleet.rule(f"RB-AUTO-{n:03}", incident_pattern={"incident_type": f"type_{n}"})
    manifests, commands = publish(fleet)
    assert manifests.written == 1002
    assert commands.queued == 50 * 1002
    assert publish(fleet)[1].changes == 0


acts = st.lists(
    st.one_of(
        st.tuples(st.just("import"), st.integers(0, 3)),
        st.tuples(st.just("quarantine"), st.integers(0, 3)),
        st.tuples(st.just("upgrade"), st.sampled_from(["1.0.30", "1.0.56", "1.0.70"])),
        st.tuples(st.just("status"), st.sampled_from(["online", "offline", "retired"])),
        st.tuples(st.just("fetch"), st.sampled_from(["site-a-01", "site-b-01"])),
        st.tuples(st.just("answer"), st.booleans()),
        st.tuples(st.just("wait"), st.integers(1, 30)),
    ),
    max_size=12,
)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(acts)
def test_after_any_history_publishing_again_queues_nothing_and_manifests_hold_only_rules_in_service(
    fleet: Fleet, history: list[tuple[str, Any]]
) -> None:
    with fleet.conn.begin_nested() as savepoint:
        clock = NOON
        held: list[tuple[str, uuid.UUID]] = []
        for act, what in history:
            rule_id = f"RB-AUTO-{what}"
            states = dict(fleet.conn.execute(sa.text("SELECT rule_id, state FROM l1_rules")).all())
            if act == "import" and rule_id not in states:
                runbook_id = ["RB-WIN-SEC-001", "LIN-SSH-001", "AUTO-X", "RB-WIN-SEC-007"][what]
                fleet.rule(rule_id, runbook_id=runbook_id, platform="linux" if what == 1 else "windows")
            elif act == "quarantine" and states.get(rule_id) == "fleet":
                fleet.quarantine(rule_id)
            elif act == "upgrade":
                fleet.change_appliance("site-b-01", agent_version=what)
            elif act == "status":
                fleet.change_appliance("site-b-01", status=what)
            elif act == "fetch":
                held += [(what, command.id) for command in take_commands(fleet.conn, what, clock)]
            elif act == "answer" and held:
                appliance_id, command_id = held.pop()
                acknowledge_command(fleet.conn, appliance_id, command_id, clock, failure=None if what else "refused")
            elif act == "wait":
                clock += what * HOUR
            fleet.conn.execute(sa.text("UPDATE appliances SET last_checkin = :at"), {"at": clock})
            publish(fleet, clock)
        publish(fleet, clock)
        before = fleet.snapshot()
        manifests, commands = publish(fleet, clock)
        assert (manifests.written, manifests.removed, commands.changes) == (0, 0, 0)
        assert fleet.snapshot() == before
        enabled = fleet.conn.execute(sa.text("SELECT rule_id FROM l1_rules WHERE enabled")).scalars().all()
        rows = fleet.conn.execute(sa.text("SELECT appliance_id, rules FROM rule_manifests")).all()
        for _, rules in rows:
            assert {rule["id"] for rule in rules} <= set(enabled) - {"RB-AUTO-2"}
        wanted = {(a, rule["id"], rule["version"]) for a, rules in rows for rule in rules}
        for appliance_id, rule_id, version, status in fleet.commands():
            if status in ("pending", "delivered"):
                assert (appliance_id, rule_id, version) in wanted
        savepoint.rollback()
