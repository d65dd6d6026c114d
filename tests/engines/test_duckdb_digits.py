"""DuckDB gives PostgreSQL's figures to the last digit: the golden day, a trap, and rows nobody would send."""

from __future__ import annotations

import json
from datetime import datetime
from typing import Any

import pytest
import sqlalchemy as sa
from digits import PATTERNS, ROWS, differences, write, write_odd_ends
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from flywheel_pipeline.engines.duck import DuckEngine
from flywheel_pipeline.simulation.fleet import lab
from flywheel_pipeline.simulation.fleet.scenario import load_scenario, scenario_names
from flywheel_pipeline.simulation.fleet.stream import FleetStream
from flywheel_pipeline.simulation.replay import GOLDEN, build_replay

_INSERT = """
INSERT INTO execution_telemetry ({columns})
SELECT {columns} FROM jsonb_populate_recordset(null::execution_telemetry, CAST(:rows AS jsonb))
"""


def play_the_golden_day(engine: sa.Engine) -> None:
    """The final version of every execution of 2026-02-15 and before."""
    replay = build_replay()
    latest: dict[str, dict[str, Any]] = {}
    for post in sorted(
        replay.morning_posts + replay.evening_posts, key=lambda p: datetime.fromisoformat(p["reported_at"])
    ):
        told = {"appliance_id": "unknown", **post["execution"], "site_id": post["site_id"]}
        latest[told["execution_id"]] = told | {"reported_at": post["reported_at"], "created_at": post["reported_at"]}
    columns = ", ".join(sorted({column for told in latest.values() for column in told}))
    with engine.begin() as connection:
        connection.execute(sa.text(_INSERT.format(columns=columns)), {"rows": json.dumps(list(latest.values()))})


def test_the_golden_day_is_equal_to_the_last_digit(engine: sa.Engine) -> None:
    play_the_golden_day(engine)
    assert differences(engine, DuckEngine()) == {}
    with engine.connect() as connection:
        counted = connection.exec_driver_sql("SELECT sum(executions) FROM telemetry_daily_volume").scalar_one()
    assert counted == GOLDEN["telemetry"]["rows"]


def test_a_site_that_was_renamed_in_mid_life_is_equal(engine: sa.Engine) -> None:
    lab.run_scenario(engine, FleetStream(load_scenario("renamed_site"), 7))
    assert differences(engine, DuckEngine()) == {}


@pytest.mark.long
@pytest.mark.parametrize("name", [name for name in scenario_names() if name != "renamed_site"])
def test_every_trap_is_equal(engine: sa.Engine, name: str) -> None:
    lab.run_scenario(engine, FleetStream(load_scenario(name), 7))
    assert differences(engine, DuckEngine()) == {}


def test_executions_that_never_end_or_ended_before_christ_are_equal(engine: sa.Engine) -> None:
    write_odd_ends(engine)
    assert differences(engine, DuckEngine()) == {}
    with engine.connect() as connection:
        found = connection.exec_driver_sql(
            "SELECT count(*), count(DISTINCT problem) FROM telemetry_violations WHERE problem = 'bad_duration'"
        ).one()
    assert tuple(found) == (6, 1)  # those that end before they begin


def odd_rows(engine: sa.Engine, rows: list[dict[str, Any]], patterns: list[str]) -> None:
    """Nothing but these rows, class rules with these patterns, and an alias that ends in between."""
    with engine.begin() as connection:
        connection.exec_driver_sql(
            "DELETE FROM execution_telemetry; DELETE FROM outcome_class_rules WHERE rule_name LIKE 'odd%%'"
        )
        connection.exec_driver_sql("DELETE FROM site_aliases; DELETE FROM rule_aliases")
        connection.exec_driver_sql(
            "INSERT INTO site_aliases (alias, site_id, valid_to, actor, reason) "
            "VALUES ('old-name', 'site-b', '2026-02-02 12:00:00.000001+00', 'test', 'test')"
        )
        connection.exec_driver_sql(
            "INSERT INTO rule_aliases (alias, rule_id, actor, reason) VALUES ('RB-AUTO-OLD', 'RB-AUTO-Ä', 'test', 'test')"
        )
        for number, pattern in enumerate(patterns):
            connection.execute(
                sa.text(
                    "INSERT INTO outcome_class_rules (rule_name, outcome_class, field, pattern, description) "
                    "VALUES (:name, :class, :field, :pattern, 'of a test')"
                ),
                {
                    "name": f"odd-{number}",
                    "class": ["suppressed", "not_applicable", "synthetic"][number % 3],
                    "field": ["error_message", "failure_type"][number % 2],
                    "pattern": pattern,
                },
            )
    write(engine, rows)


@settings(max_examples=6, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(rows=ROWS, patterns=st.lists(PATTERNS, max_size=4, unique=True))
def test_time_zones_nulls_ties_and_unicode_are_equal(
    engine: sa.Engine, rows: list[dict[str, Any]], patterns: list[str]
) -> None:
    odd_rows(engine, rows, patterns)
    assert differences(engine, DuckEngine()) == {}


@pytest.mark.long
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(rows=ROWS, patterns=st.lists(PATTERNS, max_size=4, unique=True))
@pytest.mark.timeout(900)
def test_many_more_odd_rows_are_equal(engine: sa.Engine, rows: list[dict[str, Any]], patterns: list[str]) -> None:
    odd_rows(engine, rows, patterns)
    assert differences(engine, DuckEngine()) == {}
