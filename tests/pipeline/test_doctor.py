"""The doctor: healthy on a sound database, and each invariant, broken for real, is named with its rows and a repair."""

from __future__ import annotations

import json

import pytest
import sqlalchemy as sa
from graph_runs import Environment, Flywheel, PlayedDay

from flywheel_pipeline.aggregates.refresh import rebuild
from flywheel_pipeline.doctor import declared_triggers, examine

# How each invariant is broken: past every trigger, as a superuser could, or by what such a superuser leaves behind.
FAULTS: dict[str, tuple[int, str]] = {
    "a counter nudged by hand": (
        1,
        "UPDATE l1_rules SET match_count = match_count + 1 WHERE rule_id = 'RB-AUTO-FIREWALL'",
    ),
    "a cell nudged by hand": (
        1,
        "UPDATE rule_daily_stats SET executions = executions + 1 WHERE (site_id, day, rule_id) = "
        "(SELECT site_id, day, rule_id FROM rule_daily_stats WHERE executions > 0 ORDER BY 1, 2, 3 LIMIT 1)",
    ),
    "a row slipped past the outbox": (
        1,
        "INSERT INTO execution_telemetry (execution_id, site_id, runbook_id, hostname, success, resolution_level, started_at) "
        "SELECT 'slipped', site_id, runbook_id, hostname, success, 'L1', started_at FROM execution_telemetry "
        "WHERE resolution_level = 'L1' ORDER BY id LIMIT 1",
    ),
    "a row deleted past the outbox": (
        1,
        "DELETE FROM execution_telemetry WHERE id = (SELECT min(id) FROM execution_telemetry WHERE resolution_level = 'L2')",
    ),
    "an unknown rule that nobody listed": (
        2,
        "INSERT INTO execution_telemetry (execution_id, site_id, runbook_id, hostname, success, resolution_level, started_at) "
        "SELECT 'unlisted', site_id, 'L1-NOBODY', hostname, success, 'L1', started_at FROM execution_telemetry ORDER BY id LIMIT 1",
    ),
    "a placeholder enabled by hand": (
        3,
        "UPDATE l1_rules SET enabled = true, state = 'fleet' WHERE rule_id = "
        "(SELECT rule_id FROM l1_rules WHERE runbook_id LIKE 'AUTO-%' ORDER BY 1 LIMIT 1)",
    ),
    "a placeholder served": (
        3,
        "UPDATE manifest_entries SET entry = jsonb_set(entry, '{actions}', '[\"run_runbook:AUTO-BITLOCKER_STATUS\"]')",
    ),
    "a rule moved without an event": (4, "UPDATE l1_rules SET state = 'retired' WHERE rule_id = 'RB-AUTO-FIREWALL'"),
    "a promoted pattern whose rule is gone": (
        4,
        "UPDATE patterns SET promoted_to_rule_id = 'RB-AUTO-NOWHERE' WHERE id = "
        "(SELECT min(id) FROM patterns WHERE status = 'promoted')",
    ),
    "an event deleted": (
        4,
        "DELETE FROM rule_events WHERE event_id = (SELECT min(event_id) FROM rule_events WHERE kind = 'proposed')",
    ),
    "a decision without reasons": (
        5,
        "UPDATE promotion_decisions SET gates = '[]' WHERE decision_id = (SELECT min(decision_id) FROM promotion_decisions)",
    ),
    "a certificate touched up": (
        5,
        "UPDATE rule_events SET certificate = jsonb_set(certificate, '{evidence,successes}', '4000') WHERE event_id = "
        "(SELECT min(event_id) FROM rule_events WHERE kind = 'promoted')",
    ),
    "a promotion without certificate": (
        5,
        "UPDATE rule_events SET certificate = NULL WHERE event_id = (SELECT min(event_id) FROM rule_events WHERE kind = 'promoted')",
    ),
    "a blanket re-enable": (6, "UPDATE l1_rules SET enabled = true WHERE source = 'promoted'"),
    "a quarantined rule left in a manifest": (
        6,
        "UPDATE l1_rules SET enabled = false, state = 'quarantined' WHERE rule_id = 'RB-AUTO-FIREWALL'",
    ),
    "a rule served where it is quarantined": (
        6,
        "INSERT INTO scope_quarantines (rule_id, rule_version, kind, scope_kind, scope_value, actor, reason, content_hash) "
        "SELECT r.rule_id, r.rule_version, 'quarantined', 'site', m.site_id, 'Dana', 'it fails here', r.content_hash "
        "FROM l1_rules AS r JOIN rule_manifests AS m ON m.rules @> jsonb_build_array(jsonb_build_object('id', r.rule_id)) "
        "WHERE r.rule_id = 'RB-AUTO-FIREWALL' ORDER BY m.site_id LIMIT 1",
    ),
    "a manifest edited": (
        7,
        "UPDATE manifest_entries SET entry = jsonb_set(entry, '{severity}', '\"low\"')",
    ),
    "a manifest edited, hash included": (
        7,
        "UPDATE manifest_contents SET withheld = '[]', manifest_hash = repeat('0', 64)",
    ),
    "what a manifest withholds edited": (
        7,
        'UPDATE manifest_contents SET withheld = withheld || \'[{"rule_id": "X"}]\'',
    ),
    "a rule struck from the list of a content": (
        7,
        "UPDATE manifest_contents SET rule_ids = '{}', rule_versions = '{}'",
    ),
    "an entry deleted": (
        7,
        "DELETE FROM manifest_entries WHERE entry_id = (SELECT min(entry_id) FROM manifest_entries)",
    ),
    "a content deleted": (
        7,
        "ALTER TABLE appliance_manifests DROP CONSTRAINT appliance_manifests_content_hash_fkey; DELETE FROM manifest_contents",
    ),
    "a command doubled": (
        7,
        "DROP INDEX appliance_commands_rule_key; "
        "INSERT INTO appliance_commands (appliance_id, command_type, params, rule_id, rule_version) "
        "SELECT a, 'sync_promoted_rule', jsonb_build_object('n', n), 'RB-AUTO-FIREWALL', 1 "
        "FROM (VALUES ('site-x-1')) AS v (a), generate_series(1, 2) AS n",
    ),
    "a synthetic row counted as a real one": (
        8,
        "UPDATE telemetry_daily_volume SET synthetic = synthetic + 1 WHERE (site_id, day, level, agent_version) = "
        "(SELECT site_id, day, level, agent_version FROM telemetry_daily_volume ORDER BY 1, 2, 3, 4 LIMIT 1)",
    ),
    "the idempotency key dropped": (
        9,
        "ALTER TABLE execution_telemetry DROP CONSTRAINT execution_telemetry_execution_id_key",
    ),
    "an outcome flipped past the triggers": (
        9,
        "UPDATE execution_telemetry SET success = NOT success WHERE execution_id = "
        "(SELECT execution_id FROM execution_corrections WHERE after ? 'success' ORDER BY id DESC LIMIT 1)",
    ),
    "a view that calls nothing perfect": (
        10,
        "ALTER TABLE l1_rules DROP COLUMN success_rate CASCADE; ALTER TABLE l1_rules ADD COLUMN success_rate double precision DEFAULT 1",
    ),
    "a reject emptied": (
        11,
        "INSERT INTO telemetry_rejects (source, line_number, reason_code, reason, payload, payload_bytes, payload_hash) "
        "VALUES ('file', 1, 'not_json', 'it is no JSON', '', 40, repeat('0', 64))",
    ),
    "an accepted reject lost": (
        11,
        "INSERT INTO telemetry_rejects (source, line_number, reason_code, reason, payload, payload_bytes, payload_hash, status, "
        "execution_id) VALUES ('file', 1, 'not_json', 'it is no JSON', '{}', 2, repeat('0', 64), 'accepted', 'nowhere')",
    ),
    "the outbox trigger switched off": (12, "ALTER TABLE execution_telemetry DISABLE TRIGGER flywheel_touch_inserted"),
    "the padlock dropped": (12, "DROP TRIGGER flywheel_guard_event ON rule_events"),
}


def breaks(engine: sa.Engine, statements: str) -> None:
    with engine.begin() as connection:
        connection.exec_driver_sql("SET LOCAL session_replication_role = replica")
        for statement in statements.split("; "):
            connection.exec_driver_sql(statement, execution_options={"no_parameters": True})


def test_the_played_day_is_healthy_also_when_everything_is_computed_anew(played: PlayedDay) -> None:
    found = examine(played.engine, deep=True)
    assert [item.invariant for item in found] == list(range(1, 13))
    assert {item.invariant: item.finding.sentence for item in found if not item.finding.passed} == {}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_broken_invariant_is_named_with_its_rows_and_the_repair(played_copy: sa.Engine, fault: str) -> None:
    invariant, statements = FAULTS[fault]
    breaks(played_copy, statements)
    (found,) = examine(played_copy, invariants=[invariant])
    assert not found.finding.passed
    assert found.finding.offenders == len(found.finding.sample) or found.finding.offenders > 20
    assert found.finding.sample[0]
    assert found.repair


def test_only_the_deep_examination_sees_a_wrong_episode_and_a_rebuild_mends_it(played_copy: sa.Engine) -> None:
    with played_copy.begin() as connection:
        connection.exec_driver_sql(
            "UPDATE episodes SET outcome = 'success' WHERE ctid = (SELECT ctid FROM episodes WHERE outcome = 'failure' "
            "AND level = 'L1' ORDER BY site_id, day, hostname, rule_id LIMIT 1)"
        )
    assert all(item.finding.passed for item in examine(played_copy, invariants=[1]))
    (found,) = examine(played_copy, invariants=[1], deep=True)
    assert found.finding.sample[0]["problem"] == "episodes differs from its model computed anew"
    rebuild(played_copy)
    assert all(item.finding.passed for item in examine(played_copy, deep=True))


def test_cells_that_wait_in_the_outbox_are_no_fault(played_copy: sa.Engine) -> None:
    with played_copy.begin() as connection:
        connection.exec_driver_sql("UPDATE execution_telemetry SET success = NOT success WHERE mod(id, 100) = 0")
    assert [item.invariant for item in examine(played_copy, deep=True) if not item.finding.passed] == []


def test_the_examination_writes_nothing_and_says_so_to_the_database(played: PlayedDay) -> None:
    def state() -> tuple[object, ...]:
        with played.engine.connect() as connection:
            return tuple(
                connection.exec_driver_sql(
                    "SELECT sum(n_tup_ins), sum(n_tup_upd), sum(n_tup_del) FROM pg_stat_user_tables"
                ).one()
            )

    before = state()
    examine(played.engine)
    assert state() == before


def test_every_trigger_of_the_routines_is_looked_for() -> None:
    triggers = declared_triggers()
    assert ("flywheel_guard_event", "rule_events") in triggers
    assert ("flywheel_touch_truncated", "execution_telemetry") in triggers
    assert len(triggers) >= 20


def test_the_command_prints_what_is_broken_and_exits_with_one(
    played_copy: sa.Engine, played: PlayedDay, environment: Environment, run_command: Flywheel
) -> None:
    with environment(played_copy, played.home):
        healthy = run_command("doctor")
        breaks(played_copy, FAULTS["a blanket re-enable"][1])
        broken = run_command("doctor", "-i", 6)
        machine = run_command("doctor", "--json")
    assert healthy.code == 0
    assert "Healthy." in healthy.out
    assert broken.code == 1
    assert "Repair: " in broken.out
    assert "1 of 1 invariants are broken." in broken.out
    assert machine.code == 1
    document = json.loads(machine.out)
    assert document["healthy"] is False
    assert {item["invariant"] for item in document["invariants"] if not item["finding"]["passed"]} >= {6}
