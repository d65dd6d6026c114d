"""Which unfinished runs the sensor waits for: those whose process lives, by the lock that it holds in the database."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator

import dagster as dg
import pytest
import sqlalchemy as sa
from dagster._core.events import DagsterEvent, DagsterEventType
from fault_lab import FORK, end_with_parent, until

from flywheel_pipeline.build import build_defs
from flywheel_pipeline.database.engine import open_engine
from flywheel_pipeline.database.life import gives_sign, sign_of_life
from flywheel_pipeline.telemetry import sensors
from flywheel_pipeline.telemetry.sensors import (
    SIGN_SECONDS,
    START_SECONDS,
    UNHURRIED_SIGN_SECONDS,
    report_gone_runs,
    runs_at_work,
)

JOB = "pipeline"
LONG_AGO = SIGN_SECONDS + START_SECONDS


@dg.op
def nothing() -> None:
    """Do nothing: only the run's record matters here."""


@dg.job(name=JOB)
def job() -> None:
    """Stand for the pipeline."""
    nothing()


@pytest.fixture
def instance() -> Iterator[dg.DagsterInstance]:
    with dg.DagsterInstance.ephemeral() as made:
        yield made


def run_that_began(instance: dg.DagsterInstance, seconds_ago: float, *, cancelled: bool = False) -> str:
    """Record a run as begun so long ago, by its event in Dagster's own log; return its id."""
    run = instance.create_run_for_job(job, status=dg.DagsterRunStatus.STARTING)
    begun = DagsterEvent(DagsterEventType.RUN_START.value, JOB, message="begun")
    instance.report_dagster_event(begun, run.run_id, timestamp=time.time() - seconds_ago)
    if cancelled:
        found = instance.get_run_by_id(run.run_id)
        assert found is not None
        instance.report_run_canceling(found)
    return run.run_id


def status(instance: dg.DagsterInstance, run_id: str) -> dg.DagsterRunStatus:
    found = instance.get_run_by_id(run_id)
    assert found is not None
    return found.status


def _live(url: sa.URL, run_id: str) -> None:
    end_with_parent()
    with sign_of_life(open_engine(url), run_id):
        time.sleep(600)


@pytest.mark.parametrize("cancelled", [False, True], ids=["started", "being cancelled"])
def test_a_run_is_waited_for_while_its_process_lives_and_no_longer(
    engine: sa.Engine, instance: dg.DagsterInstance, cancelled: bool
) -> None:
    run_id = run_that_began(instance, LONG_AGO, cancelled=cancelled)
    now = dg.DagsterRunStatus.CANCELING if cancelled else dg.DagsterRunStatus.STARTED
    process = FORK.Process(target=_live, args=(engine.url, run_id), daemon=True)
    process.start()
    try:
        until(lambda: gives_sign(engine, run_id), 30, "the run's sign of life")
        assert runs_at_work(instance, engine, (JOB,)) == 1
        assert status(instance, run_id) == now
    finally:
        os.kill(process.pid or 0, signal.SIGKILL)
        process.join()
    until(lambda: not gives_sign(engine, run_id), 30, "the end of its connection")
    assert runs_at_work(instance, engine, (JOB,)) == 0
    assert status(instance, run_id) == dg.DagsterRunStatus.FAILURE
    said = [record.event_log_entry.message for record in instance.get_records_for_run(run_id).records]
    assert any("no longer holds its lock" in message for message in said)
    assert runs_at_work(instance, engine, (JOB,)) == 0  # asked again it is over, and nothing more is reported
    assert len(instance.get_records_for_run(run_id).records) == len(said)


def test_a_run_that_has_just_begun_is_given_time_for_its_sign(engine: sa.Engine, instance: dg.DagsterInstance) -> None:
    run_id = run_that_began(instance, 0)
    assert runs_at_work(instance, engine, (JOB,)) == 1
    assert status(instance, run_id) == dg.DagsterRunStatus.STARTED


def test_a_run_that_was_launched_is_waited_for_until_it_should_have_begun(
    engine: sa.Engine, instance: dg.DagsterInstance, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = instance.create_run_for_job(job, status=dg.DagsterRunStatus.STARTING)
    assert runs_at_work(instance, engine, (JOB,)) == 1
    monkeypatch.setattr(sensors, "START_SECONDS", 0.0)
    assert runs_at_work(instance, engine, (JOB,)) == 0
    assert status(instance, run.run_id) == dg.DagsterRunStatus.STARTING  # Dagster's own monitoring decides about it


def test_a_gone_run_of_any_job_is_reported_where_nobody_else_watches_it(
    engine: sa.Engine, instance: dg.DagsterInstance, monkeypatch: pytest.MonkeyPatch
) -> None:
    fresh = run_that_began(instance, UNHURRIED_SIGN_SECONDS / 2)
    alive = run_that_began(instance, 2 * UNHURRIED_SIGN_SECONDS)
    gone = run_that_began(instance, 2 * UNHURRIED_SIGN_SECONDS)
    cancelled = run_that_began(instance, 2 * UNHURRIED_SIGN_SECONDS, cancelled=True)
    with sign_of_life(engine, alive):
        for name, value in (("FLYWHEEL_RUN_LAUNCHER", "celery"), ("FLYWHEEL_EXECUTOR", "multiprocess")):
            with monkeypatch.context() as patch:
                patch.setenv(name, value)
                report_gone_runs(instance, engine)
            assert status(instance, gone) == dg.DagsterRunStatus.STARTED
        report_gone_runs(instance, engine)
    assert {status(instance, run_id) for run_id in (fresh, alive)} == {dg.DagsterRunStatus.STARTED}
    assert {status(instance, run_id) for run_id in (gone, cancelled)} == {dg.DagsterRunStatus.FAILURE}


def test_every_step_of_every_job_has_its_run_give_the_sign() -> None:
    jobs = build_defs().get_repository_def().get_all_jobs()
    assert len(jobs) > 5
    silent = {
        (found.name, node.name)
        for found in jobs
        for node in found.nodes
        if "database" not in node.definition.required_resource_keys
    }
    assert silent == set()


def test_only_unfinished_runs_of_the_jobs_asked_for_count(engine: sa.Engine, instance: dg.DagsterInstance) -> None:
    run_that_began(instance, 0)
    finished = run_that_began(instance, LONG_AGO)
    found = instance.get_run_by_id(finished)
    assert found is not None
    instance.report_run_canceled(found)
    assert runs_at_work(instance, engine, ("another job",)) == 0
    assert runs_at_work(instance, engine, ("another job", JOB)) == 1
    assert status(instance, finished) == dg.DagsterRunStatus.CANCELED
