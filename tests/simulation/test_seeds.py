"""The seeds: catalogue, built-in rules and outcome classes hold together and read the replay's errors."""

from __future__ import annotations

import importlib.resources
from typing import Any

import pytest
import sqlalchemy as sa
import yaml

from flywheel_pipeline.database import tables
from flywheel_pipeline.simulation.replay import build_replay
from flywheel_pipeline.simulation.replay_streams import FAILURES

#: The class of each way to fail; None: the rule's own failure, which enters its rate.
CLASS_OF_FAILURE = {
    "no_tpm": "not_applicable",
    "edition": "not_applicable",
    "not_encrypted": "escalated",
    "placeholder": None,
    "no_volumes": "not_applicable",
    "wmi": None,
    "protection_off": None,
    "verify": None,
    "unauthorized": "unreachable",
    "refused": "unreachable",
    "timeout": "unreachable",
    "unknown_action": "agent_unsupported",
    "no_windows_target": "unreachable",
    "no_winrm": "unreachable",
    "no_ssh": "unreachable",
    "linux_target": "unreachable",
    "host_unknown": "unreachable",
    "flapping": "suppressed",
    "backup_store": None,
}


def seed(name: str) -> list[dict[str, Any]]:
    path = importlib.resources.files("flywheel_pipeline.database").joinpath(f"seeds/{name}.yaml")
    rows: list[dict[str, Any]] = yaml.safe_load(path.read_text("utf-8"))
    return rows


@pytest.mark.parametrize(
    ("name", "table"),
    [("runbooks", tables.runbooks), ("outcome_class_rules", tables.outcome_class_rules)],
)
def test_seed_rows_fit_their_table(name: str, table: sa.Table) -> None:
    for row in seed(name):
        assert set(row) <= set(table.c.keys())


def test_the_catalogue_has_51_runbooks_of_three_platforms() -> None:
    rows = seed("runbooks")
    assert len({row["runbook_id"] for row in rows}) == len(rows) == 51
    prefixes = {"windows": "RB-WIN-", "linux": "LIN-", "macos": "MAC-"}
    assert {row["platform"] for row in rows} == set(prefixes)
    assert all(row["runbook_id"].startswith(prefixes[row["platform"]]) for row in rows)


def test_ids_that_only_look_right_are_not_in_the_catalogue() -> None:
    ids = {row["runbook_id"] for row in seed("runbooks")}
    assert not ids & {"RB-WIN-SCREENLOCK-001", "RB-LIN-AUDIT-001"}


def test_every_built_in_rule_names_a_runbook_of_its_platform() -> None:
    catalogue = {row["runbook_id"]: row for row in seed("runbooks")}
    rules = seed("builtin_rules")
    assert len({rule["rule_id"] for rule in rules}) == len(rules) == 21
    for rule in rules:
        assert set(rule) == {"rule_id", "incident_type", "platform", "runbook_id"}
        assert catalogue[rule["runbook_id"]]["platform"] == rule["platform"]
        assert catalogue[rule["runbook_id"]]["enabled"]


def test_the_database_calls_every_built_in_rule_executable(engine: sa.Engine) -> None:
    with engine.connect() as connection:
        for rule in seed("builtin_rules"):
            problem = connection.execute(
                sa.text("SELECT flywheel_runbook_problem(:runbook, :platform)"),
                {"runbook": rule["runbook_id"], "platform": rule["platform"]},
            ).scalar_one()
            assert problem is None, rule["rule_id"]


def test_the_database_refuses_exactly_the_eleven_placeholders_among_the_rules(engine: sa.Engine) -> None:
    rules = build_replay().rules
    with engine.connect() as connection:
        problems = {
            rule["rule_id"]: connection.execute(
                sa.text("SELECT flywheel_runbook_problem(:runbook, :platform)"),
                {"runbook": rule["runbook_id"], "platform": rule["platform"]},
            ).scalar_one()
            for rule in rules
        }
    refused = {rule_id for rule_id, problem in problems.items() if problem is not None}
    assert refused == {rule["rule_id"] for rule in rules if rule["runbook_id"].startswith("AUTO-")}
    assert len(refused) == 11


def test_every_way_to_fail_has_its_class(engine: sa.Engine) -> None:
    assert set(CLASS_OF_FAILURE) == set(FAILURES)
    classify = sa.text(
        "SELECT array_agg(DISTINCT outcome_class) FROM outcome_class_rules WHERE enabled AND CASE field "
        "WHEN 'error_message' THEN :message WHEN 'failure_type' THEN :type ELSE :status END ILIKE pattern"
    )
    with engine.connect() as connection:
        for name, failure in FAILURES.items():
            message = failure.message.format(
                host="nv-linux-01",
                ip="192.168.88.40",
                dns="192.168.88.1:53",
                runbook="RB-WIN-SEC-016",
                incident_type="permissions",
            )
            classes = connection.execute(
                classify,
                {"message": message, "type": failure.failure_type or "", "status": failure.status},
            ).scalar_one()
            expected = CLASS_OF_FAILURE[name]
            assert classes == (None if expected is None else [expected]), name


def test_no_outcome_class_pattern_takes_a_plain_success_or_failure(engine: sa.Engine) -> None:
    with engine.connect() as connection:
        taken = connection.execute(
            sa.text(
                "SELECT rule_name FROM outcome_class_rules WHERE '' ILIKE pattern "
                "OR (field = 'status' AND (SELECT bool_or(s ILIKE pattern) "
                "FROM unnest(ARRAY['success', 'failure', 'partial']) AS s))"
            )
        ).all()
    assert taken == []
