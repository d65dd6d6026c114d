"""The contracts of the log and of the catalogue over real rows."""

from __future__ import annotations

from dataclasses import replace
from datetime import timedelta

import pytest
import sqlalchemy as sa
from posts import NOW, post

from flywheel_pipeline.contracts.adapter import judge, judge_contract, read_rows
from flywheel_pipeline.contracts.declared import Expectation, ExpectationResult
from flywheel_pipeline.telemetry.intake import post_execution
from flywheel_pipeline.telemetry.suite import TELEMETRY


def judge_log(engine: sa.Engine) -> dict[str, ExpectationResult]:
    with engine.connect() as connection:
        results, _rows = judge_contract(connection, TELEMETRY, NOW)
    return {result.name: result for result in results}


@pytest.fixture
def telemetry(engine: sa.Engine) -> sa.Engine:
    for number in range(3):
        post_execution(engine, post(f"exec-{number}", agent_version="1.0.56"), received_at=NOW)
    return engine


def test_rows_that_came_by_the_intake_keep_the_suite(telemetry: sa.Engine):
    results = judge_log(telemetry)
    assert len(results) > 20
    assert [result for result in results.values() if not result.passed] == []
    assert all(isinstance(result.passed, bool) for result in results.values())


def test_rows_that_came_past_the_intake_are_counted_and_shown(telemetry: sa.Engine):
    with telemetry.begin() as connection:
        connection.execute(
            sa.text(
                "INSERT INTO execution_telemetry (execution_id, site_id, runbook_id, hostname, success, "
                "resolution_level, started_at, completed_at, duration_seconds, created_at) "
                "VALUES ('bad', ' ', 'RB', 'h', true, 'L9', :start, :end, -5, :start)"
            ),
            {"start": NOW + timedelta(days=2), "end": NOW},
        )
    failing = {name: result for name, result in judge_log(telemetry).items() if not result.passed}
    assert {
        "site_id values to match regex",
        "resolution_level values to be in set",
        "event_at values to be between",
        "completed_at started_at values a to be greater than b",
        "duration_seconds values to be between",
    } <= failing.keys()
    level = failing["resolution_level values to be in set"]
    assert (level.offenders, level.sample, level.severity, level.error) == (
        1,
        ("bad: resolution_level=L9",),
        "critical",
        None,
    )


def test_a_table_without_rows_is_not_called_sound(engine: sa.Engine):
    assert not judge_log(engine)["table row count to be between"].passed


def test_an_expectation_that_cannot_be_judged_is_an_error_and_no_pass(telemetry: sa.Engine):
    with telemetry.connect() as connection:
        frame = read_rows(connection, TELEMETRY)
    broken = Expectation("expect_column_values_to_not_be_null", {"column": "no_such_column"}, "It is not there.")
    (result,) = judge(frame, [broken])
    assert not result.passed
    assert "no_such_column" in (result.error or "")


def test_only_the_latest_rows_are_looked_at(telemetry: sa.Engine):
    with telemetry.connect() as connection:
        frame = read_rows(connection, replace(TELEMETRY, parameters={"rows": 2}))
    assert list(frame["execution_id"]) == ["exec-2", "exec-1"]
