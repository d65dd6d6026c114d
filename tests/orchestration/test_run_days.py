"""How long Dagster's finished runs stay: as the setting says, or as one launch of the job says."""

from __future__ import annotations

import datetime as dt
from typing import Any

import dagster as dg
import pytest
from dagster._core.storage.runs.schema import RunsTable

from flywheel_pipeline.database.housekeeping import build_housekeeping_job
from flywheel_pipeline.database.resource import FlywheelDatabase


@dg.job
def nothing() -> None:
    """A run with nothing in it."""


@pytest.mark.parametrize(
    ("setting", "config", "left"),
    [
        (None, {}, [2, 20]),
        ("5", {}, [2]),
        ("5", {"ops": {"delete_runs": {"config": {"keep_days": 25}}}}, [2, 20]),
    ],
)
def test_finished_runs_stay_as_many_days_as_the_setting_says(
    setting: str | None, config: dict[str, Any], left: list[int], monkeypatch: pytest.MonkeyPatch, database_url: str
) -> None:
    if setting is not None:
        monkeypatch.setenv("FLYWHEEL_RUN_DAYS", setting)
    with dg.DagsterInstance.ephemeral() as instance:
        runs = {}
        for age in (2, 20, 40):
            runs[age] = nothing.execute_in_process(instance=instance).run_id
            at = dt.datetime.now(dt.UTC) - dt.timedelta(days=age)
            with instance.run_storage.connect() as connection:  # type: ignore[attr-defined]
                connection.execute(
                    RunsTable.update()
                    .where(RunsTable.c.run_id == runs[age])
                    .values(update_timestamp=at.replace(tzinfo=None))
                )
        job = build_housekeeping_job()
        resources = {"database": FlywheelDatabase(url=database_url)}
        assert job.execute_in_process(instance=instance, run_config=config, resources=resources).success
        assert [age for age, run_id in runs.items() if instance.has_run(run_id)] == left
