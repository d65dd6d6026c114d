"""The soak, bounded: one fault of each kind that needs no daemon, under writers and pipelines; and what it excuses."""

from __future__ import annotations

from pathlib import Path

import dagster as dg
import pytest
import soak
import sqlalchemy as sa
from fault_lab import refresh_once
from graph_runs import Graph
from telemetry_rows import insert, row

from flywheel_pipeline.database.dagster_home import dagster_environment
from flywheel_pipeline.database.settings import Settings
from flywheel_pipeline.run import dagster_instance
from flywheel_pipeline.sql_models.loader import load_models


@pytest.mark.timeout(300)
def test_a_short_soak_loses_nothing_and_counts_nothing_twice() -> None:
    arguments = soak.parse(["--quick", "--rows", "6000", "--writers", "4"])
    report = soak.soak(arguments, lambda _line: None)
    assert report.differences == []
    assert report.illegal == []
    assert report.unexcused == []
    assert report.left_out.keys() <= {"disk full"}
    assert sum(report.faults.values()) == 17
    assert len(report.faults) >= 16
    assert report.rows >= 5000
    assert report.retries > 0  # the faults did hit writers
    assert report.corrections > 0
    assert report.rejected > 0
    assert sum(report.runs.values()) > 0


def test_counters_that_differ_from_the_recount_are_a_failure_of_the_soak(
    engine: sa.Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with engine.begin() as connection:
        insert(connection, [row()])
    refresh_once(engine, load_models())
    with engine.begin() as connection:
        changed = connection.exec_driver_sql("UPDATE rule_site_stats SET executions = executions + 1").rowcount
    assert changed == 1
    settings = Settings(home=tmp_path)
    for name, value in dagster_environment(settings, engine.url).items():
        monkeypatch.setenv(name, value)
    with dagster_instance(engine.url, settings) as instance:
        said = soak.outcome(Graph(engine, instance).run())
    assert "aggregates_checks" in {step for step, _, _ in said["failures"]}
    assert "check counters_equal_recount" in {line.partition(": ")[0] for line in soak.unexcused(said)}
    # Of a daemon's run, only what it leaves in Dagster's storage is known.
    with engine.connect() as connection:
        assert sorted(soak.failed_checks(connection)) == sorted(said["checks"])


def test_telemetry_that_a_jumping_clock_makes_stale_is_excused(engine: sa.Engine) -> None:
    with dg.DagsterInstance.ephemeral() as instance:
        said = soak.outcome(Graph(engine, instance).run())  # none came yet
    assert [name for name, _ in said["checks"]] == ["telemetry_freshness"]
    assert said["failures"]
    assert soak.unexcused(said) == []


HELD = "dagster._core.definitions.events.Failure: 2 promotions are held: "


@pytest.mark.parametrize(
    ("name", "message", "excused"),
    [
        ("OperationalError", "connection is bad", True),
        ("ProgrammingError", "terminating connection due to administrator command", True),
        ("ProgrammingError", "column does not exist", False),
        ("Failure", HELD + "batch 6 refreshed the aggregates after this batch did; it decides on its own.", True),
        (
            "Failure",
            HELD + "the batch did not pass its gates: counters_equal_recount error, success_floor missing.",
            True,
        ),
        ("Failure", HELD + "the batch did not pass its gates: telemetry_freshness fail.", True),
        ("Failure", HELD + "the batch did not pass its gates: counters_equal_recount fail.", False),
        ("Failure", HELD + "the batch did not pass its gates: telemetry_freshness fail, success_floor fail.", False),
        ("Failure", "terminating connection due to administrator command", False),
        ("DagsterAssetCheckFailedError", "terminating connection due to administrator command", False),
    ],
)
def test_a_failed_step_is_excused_by_what_it_failed_of(name: str, message: str, excused: bool) -> None:
    said = {"success": False, "failures": [["a step", name, message]], "checks": []}
    assert (soak.unexcused(said) == []) is excused


def test_no_sentence_excuses_a_failed_check() -> None:
    said = {"success": False, "failures": [], "checks": [["registry_equals_ledger", "deadlock detected"]]}
    assert soak.unexcused(said) == ["check registry_equals_ledger: deadlock detected"]
