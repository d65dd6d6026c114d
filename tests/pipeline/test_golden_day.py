"""The day of 2026-02-15 through the whole graph: every figure of the golden table, and nothing twice."""

from __future__ import annotations

import copy
import re
from typing import Any

import dagster as dg
import pytest
import sqlalchemy as sa
from graph_runs import Environment, Flywheel, PlayedDay, state_of

from flywheel_pipeline.asset_page import TEMPO_TAG
from flywheel_pipeline.build import build_defs
from flywheel_pipeline.database.settings import get_settings
from flywheel_pipeline.promotion.certificate import verify
from flywheel_pipeline.promotion.explain import explain
from flywheel_pipeline.run import dagster_instance
from flywheel_pipeline.simulation.replay import (
    CROSSING_PATTERNS,
    GOLDEN,
    GOLDEN_MORNING,
    HELD_PATTERNS,
)
from flywheel_pipeline.simulation.stage import compare
from flywheel_pipeline.sql_models.loader import load_models

#: What a reason must say, by the kind of reason that the replay gives a pattern.
HELD_BECAUSE = {
    "placeholder": "is a placeholder: no script stands behind it.",
    "not_in_catalogue": "is not in the runbook catalogue.",
    "wrong_platform": "is a runbook for linux, the rule is for windows.",
    "too_few_occurrences": "times; 5 are needed.",
    "success_rate": "9 of 14 (64%) executions succeeded; the floor is 90%.",
}


def _rows(engine: sa.Engine, query: str) -> list[dict[str, Any]]:
    with engine.connect() as connection:
        return [dict(row) for row in connection.execute(sa.text(query)).mappings()]


def test_the_morning_stands_as_the_old_system_left_it(played: PlayedDay) -> None:
    assert played.before["rules"].items() >= GOLDEN_MORNING["rules"].items()
    assert played.before["patterns"].items() >= GOLDEN_MORNING["patterns"].items()
    assert played.before["top_rules"] == []
    assert played.before["builtin_rules"] == []
    assert played.before["telemetry"]["rows"] == 0
    assert played.before["telemetry"]["waiting_cells"] > 0
    morning, evening = (part.intake for part in played.parts)
    assert morning.inserted == GOLDEN_MORNING["telemetry"]["rows"]
    assert morning.read > morning.inserted  # late, re-sent and corrected rows are among them
    assert (morning.rejected, evening.rejected) == (0, 0)
    assert (evening.read, evening.inserted) == (4, 4)


def test_the_morning_run_counts_the_morning_quarantines_and_promotes_nothing(played: PlayedDay) -> None:
    assert played.noon["telemetry"].items() >= GOLDEN_MORNING["telemetry"].items()
    assert played.noon["patterns"].items() >= GOLDEN_MORNING["patterns"].items()
    assert (played.noon["rules"]["promoted"], played.noon["rules"]["quarantined"]) == (17, 11)
    crossing = [held["reason"] for held in played.noon["held"] if held["reason"].endswith("times; 5 are needed.")]
    assert len(crossing) == 5  # the three that cross in the evening, and the two that never do


def test_every_figure_of_the_evening_is_golden(played: PlayedDay) -> None:
    lines = compare(played.evening, GOLDEN)
    assert [line for line in lines if not line["ok"]] == []
    assert len(lines) == 42
    rates = {rule["rule_id"]: rule["success_rate"] for rule in played.evening["top_rules"]}
    for rule in GOLDEN["top_rules"]:
        # success_rate of l1_rules is a fraction, as in production.
        assert rates[rule["rule_id"]] == pytest.approx(rule["successes"] / rule["matches"])
    assert [rule["rule_id"] for rule in played.evening["top_rules"]] == [
        rule["rule_id"] for rule in GOLDEN["top_rules"]
    ]


def test_a_wrong_figure_is_told_from_a_right_one(played: PlayedDay) -> None:
    wrong = copy.deepcopy(played.evening)
    wrong["telemetry"]["rows"] += 1
    wrong["top_rules"][0]["successes"] -= 1
    wrong["builtin_rules"] = [rule for rule in wrong["builtin_rules"] if rule["rule_id"] != "L1-SSH-001"]
    off = [line["figure"] for line in compare(wrong, GOLDEN) if not line["ok"]]
    assert "telemetry: rows" in off
    assert "RB-AUTO-BITLOCKE: successes" in off
    assert len(off) == 5  # the missing built-in rule lacks three figures


def test_both_runs_succeed_and_bitlocker_is_the_failing_rule_by_name(played: PlayedDay) -> None:
    for outcome in played.outcomes:
        assert outcome.failures == ()
        assert outcome.success
    checks = {check.name: check for check in played.outcomes[1].checks}
    failing = checks["no_failing_rules"]  # an error and no warning: it fails for days, in thousands of executions
    assert [c.name for c in checks.values() if c.severity == "ERROR" and not c.passed] == ["no_failing_rules"]
    assert not failing.passed
    assert not failing.blocking
    assert "RB-AUTO-BITLOCKE succeeded in 917 of 3,057 executions (30.0 %)" in failing.sentence
    latest = {check["name"]: check["passed"] for check in played.evening["checks"]}
    assert {name: latest[name] for name in checks} == {name: check.passed for name, check in checks.items()}


def test_the_causes_stand_in_the_alert_in_the_check_and_in_the_materialization(played: PlayedDay) -> None:
    url = played.engine.url
    with dagster_instance(url, get_settings()) as instance:
        check = dg.AssetCheckKey(dg.AssetKey("rule_quarantines"), "no_failing_rules")
        [record] = instance.event_log_storage.get_asset_check_execution_history(check, limit=1)
        evaluation = record.evaluation
        event = instance.get_latest_materialization_event(dg.AssetKey("failure_attribution"))
    assert evaluation is not None
    assert event is not None
    assert event.asset_materialization is not None
    five = (
        "cannot have this control",
        "hands over to a person",
        "does not exist",
        "is missing",
        "could not be reached",
    )
    described = evaluation.description or ""
    assert [described.index(words) for words in five] == sorted(described.index(words) for words in five)
    assert "all hosts from 2026-01-18 to 2026-01-24" in described
    shown = {name: value.value for name, value in evaluation.metadata.items()}
    for words in (*five, "all hosts from 2026-01-18", "&lt;hex>", "taken out"):
        assert words in str(shown["why_the_first_fails"])
    assert "](data:image/png;base64," in str(shown["waterfall_of_the_first"])
    made = {name: value.value for name, value in event.asset_materialization.metadata.items()}
    assert made["failing_rules"] == 3
    assert "all hosts from 2026-01-18" in str(made["why RB-AUTO-BITLOCKE"])
    assert str(made["plot RB-AUTO-BITLOCKE"]).count("](data:image/png;base64,") == 2
    hosts = {row["hostname"] for row in _rows(played.engine, "SELECT DISTINCT hostname FROM execution_telemetry")}
    told = f"{described} {shown} {made}"
    assert not [host for host in hosts if re.search(rf"(?<![\w-]){re.escape(host)}(?![\w-])", told, re.IGNORECASE)]


def test_each_materialization_says_how_much_how_long_and_how_late_and_shows_rows(played: PlayedDay) -> None:
    models = load_models().models
    nodes = {node.key: node for node in build_defs().resolve_asset_graph().asset_nodes}
    with dagster_instance(played.engine.url, get_settings()) as instance:
        events = instance.event_log_storage.get_latest_materialization_events(list(nodes))
        kept = [
            {name: value.value for name, value in record.asset_materialization.metadata.items()}
            for record in instance.fetch_materializations(dg.AssetKey("rule_cusum"), limit=2).records
            if record.asset_materialization is not None
        ]
    made: dict[str, dict[str, Any]] = {}
    for key, node in nodes.items():
        event = events.get(key)
        if event is None:
            assert node.tags[TEMPO_TAG] in ("by_hand", "nightly", "watched"), key
            continue
        assert event.asset_materialization is not None
        name = key.to_user_string()
        made[name] = {field: value.value for field, value in event.asset_materialization.metadata.items()}
    assert len(made) >= 35
    for name, shown in made.items():
        if name == "execution_telemetry":  # written by others: no run makes it
            assert shown.keys() == {"newest_arrival_at", "site_days", "data_lag_seconds"}
            continue
        if name != "rule_quarantines":  # no table: what the run did
            rows = shown.get("dagster/row_count", shown.get("row_count_estimate"))
            assert isinstance(rows, int), name
        assert shown["preview"], name
        lines = str(shown["preview"]).splitlines()
        assert len(lines) <= 12, f"{name}: a head, a rule and at most ten rows"
        if name in models:
            assert models[name].sql in str(shown["sql"]), name
        if name not in models or models[name].materialized == "cell":  # a view is made when it is read
            assert shown["duration_seconds"] >= 0, name
            assert 0 <= shown["data_lag_seconds"] < 24 * 3600, name
        if name in models and models[name].materialized == "cell":
            assert {f"rows_{what}" for what in ("inserted", "updated", "deleted", "unchanged")} <= shown.keys(), name
        for field, value in shown.items():
            for uri in re.findall(r"\((data:[^)]*)\)", str(value)):
                assert uri.startswith("data:image/png;base64,"), (name, field)
                assert len(uri) <= 30_000, (name, field)
    funnel = made["l1_rules"]
    assert (
        "patterns seen 56, patterns promoted 46, rules made of them 20, rules in service 9"
        in funnel["promotion_funnel"]
    )
    assert (funnel["patterns_seen"], funnel["rules_in_service"]) == (56, 9)
    # The same rule is the worst, and as bad: the plot of the morning's run still stands, and says when it was drawn.
    assert "success rate and CUSUM of RB-AUTO-BITLOCKE, alarmed" in kept[0]["worst_rule"]
    assert kept[0]["worst_rule_drawn_at"] == kept[1]["worst_rule_drawn_at"]
    assert kept[0]["worst_rule"] == kept[1]["worst_rule"]
    assert funnel["promotion_funnel_drawn_at"] > kept[0]["worst_rule_drawn_at"], "three promotions: drawn anew"


def test_eleven_rules_are_quarantined_each_with_its_placeholder_as_reason(played: PlayedDay) -> None:
    rows = _rows(
        played.engine, "SELECT rule_id, runbook_id, enabled, state_reason FROM l1_rules WHERE state = 'quarantined'"
    )
    assert len(rows) == 11
    for row in rows:
        assert not row["enabled"]
        assert row["runbook_id"].startswith("AUTO-")
        assert row["state_reason"] == f"{row['runbook_id']} is a placeholder: no script stands behind it."
    served = _rows(
        played.engine,
        "SELECT DISTINCT r ->> 'id' AS rule_id FROM rule_manifests, jsonb_array_elements(rules) AS r",
    )
    assert served
    assert not {row["rule_id"] for row in served} & {row["rule_id"] for row in rows}


def test_three_patterns_are_promoted_each_with_a_certificate_that_recomputes(played: PlayedDay) -> None:
    rows = _rows(
        played.engine,
        "SELECT e.rule_id, e.certificate, e.batch_id, e.policy_hash, p.pattern_signature, p.status, r.state, r.enabled "
        "FROM rule_events AS e JOIN l1_rules AS r ON r.rule_id = e.rule_id "
        "JOIN patterns AS p ON p.promoted_to_rule_id = e.rule_id WHERE e.kind = 'promoted' ORDER BY 5",
    )
    assert [row["pattern_signature"] for row in rows] == sorted(CROSSING_PATTERNS)
    for row in rows:
        assert (row["status"], row["state"], row["enabled"]) == ("promoted", "fleet", True)
        assert verify(row["certificate"]) == []
        assert row["certificate"]["policy_hash"] == row["policy_hash"]
        assert row["certificate"]["rule_id"] == row["rule_id"]
        forged = copy.deepcopy(row["certificate"])
        forged["evidence"]["successes"] += 1
        assert verify(forged) != []
    # All five gates stand behind the batch that promoted them.
    batch = {row["batch_id"] for row in rows}
    assert len(batch) == 1
    verdicts = _rows(played.engine, f"SELECT gate, verdict FROM gate_verdicts WHERE batch_id = {batch.pop()}")
    assert len(verdicts) == len(_rows(played.engine, "SELECT gate FROM required_gates"))
    assert {row["verdict"] for row in verdicts} == {"pass"}


def test_the_ten_others_are_held_each_for_its_own_reason(played: PlayedDay) -> None:
    held = {row["pattern"]: row["reason"] for row in played.evening["held"]}
    keys = {
        row["pattern_signature"]: row["pattern_key"]
        for row in _rows(played.engine, "SELECT pattern_signature, pattern_key FROM patterns WHERE status = 'pending'")
    }
    assert keys.keys() == HELD_PATTERNS.keys()
    assert held.keys() == set(keys.values())
    for signature, kind in HELD_PATTERNS.items():
        runbook = signature.rpartition(":")[2]
        reason = held[keys[signature]]
        assert reason.endswith(HELD_BECAUSE[kind])
        if kind in ("placeholder", "not_in_catalogue", "wrong_platform"):
            assert reason.startswith(runbook)
        # `explain` gives the same reason for the pattern, by its old name.
        explained = explain(played.engine, signature)
        assert explained["decision"]["reason"] == reason
        stopped = [gate["verdict"] for gate in explained["gates"] if gate["verdict"] != "pass"]
        # Three sightings are no evidence against a pattern; all other reasons are.
        assert stopped == ["inconclusive" if kind == "too_few_occurrences" else "fail"]


def test_a_second_day_changes_nothing_and_the_command_says_so(
    played: PlayedDay, played_copy: sa.Engine, environment: Environment, run_command: Flywheel
) -> None:
    before = state_of(played_copy)
    with environment(played_copy, played.home):
        answer = run_command("simulate", "replay-2026-02-15")
    assert answer.code == 0
    posts = played.parts[0].intake.read
    assert f"morning: {posts:,} posts read, 0 new, 0 corrections, {posts:,} known, 0 rejected" in answer.err
    assert "evening: 4 posts read, 0 new, 0 corrections, 4 known, 0 rejected" in answer.err
    assert "42 of 42 figures right" in answer.out
    assert "Nothing changed: the day had been played before." in answer.out
    after = state_of(played_copy)
    assert [table for table in before if before[table] != after[table]] == []
