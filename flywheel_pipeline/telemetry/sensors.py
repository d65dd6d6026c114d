"""The sensor on new telemetry: no cursor to lose, the outbox is the state.

A tick waits inside itself on the outbox's NOTIFY for up to 20 seconds, which cuts insert-to-run to a few seconds. The
NOTIFY is a hint: of writers that commit at once only one sends it, and the outbox is asked first, last and every two
seconds.
"""

import time

import dagster as dg
import psycopg
import sqlalchemy as sa

from flywheel_pipeline.aggregates.refresh import pending_cells
from flywheel_pipeline.database.engine import libpq_url
from flywheel_pipeline.database.life import gives_sign
from flywheel_pipeline.database.resource import FlywheelDatabase
from flywheel_pipeline.database.settings import get_settings

WAIT_SECONDS = 20.0
LOOK_SECONDS = 2.0
RETRY_AFTER_SECONDS = 30.0
# A run that has begun gives its sign of life within a second, and one that was launched begins within six. What is
# older than this and gives none was killed with the process that would have reported it.
SIGN_SECONDS = 10.0
UNHURRIED_SIGN_SECONDS = 60.0  # of runs that the minute path does not wait for
START_SECONDS = 30.0
START_ELSEWHERE_SECONDS = {"celery": 60.0, "k8s": 300.0}  # a process on another host, a pod with its image
UNFINISHED = [
    dg.DagsterRunStatus.QUEUED,
    dg.DagsterRunStatus.NOT_STARTED,
    dg.DagsterRunStatus.STARTING,
    dg.DagsterRunStatus.STARTED,
    dg.DagsterRunStatus.CANCELING,
]


def runs_at_work(instance: dg.DagsterInstance, engine: sa.Engine, job_names: tuple[str, ...]) -> int:
    """Count the unfinished runs of these jobs; report those as failed whose process is gone.

    Dagster's run retries take a run from there. One that never began is left to Dagster's own monitoring, and is no
    longer waited for: should it begin after all, two runs at once do no harm. One in Dagster's own queue will begin.
    """
    at_work, start_seconds = 0, START_ELSEWHERE_SECONDS.get(get_settings().run_launcher, START_SECONDS)
    for name in job_names:
        for record in instance.get_run_records(dg.RunsFilter(job_name=name, statuses=UNFINISHED), limit=10):
            run, now = record.dagster_run, time.time()
            if run.status == dg.DagsterRunStatus.QUEUED:
                at_work += 1
            elif record.start_time is None:
                at_work += now - record.create_timestamp.timestamp() < start_seconds
            elif now - record.start_time < SIGN_SECONDS or gives_sign(engine, run.run_id):
                at_work += 1
            else:
                _report_gone(instance, run.run_id)
    return at_work


def report_gone_runs(instance: dg.DagsterInstance, engine: sa.Engine) -> None:
    """Report the begun runs of any job as failed whose process is gone, so that Dagster's run retries take them up.

    For runs that are one process of this host, which nobody else watches: a backfill would otherwise wait for a killed one
    for as long as a run may take. Celery's and Kubernetes' runs are watched by their launchers, and a run whose steps are
    processes of their own gives no sign between two of them.
    """
    settings = get_settings()
    if (settings.run_launcher, settings.executor) != ("default", "in_process"):
        return
    begun = dg.RunsFilter(statuses=[dg.DagsterRunStatus.STARTED, dg.DagsterRunStatus.CANCELING])
    for record in instance.get_run_records(begun, limit=100):
        age = time.time() - (record.start_time or time.time())
        if age > UNHURRIED_SIGN_SECONDS and not gives_sign(engine, record.dagster_run.run_id):
            _report_gone(instance, record.dagster_run.run_id)


def _report_gone(instance: dg.DagsterInstance, run_id: str) -> None:
    found = instance.get_run_by_id(run_id)
    if found is not None and not found.is_finished:
        instance.report_run_failed(
            found,
            "The process of this run is gone: it no longer holds its lock in the database. What it had "
            "not committed is undone; nothing is lost, the next run does it.",
        )


def waiting_acts(connection: sa.Connection) -> int:
    """Count the approvals, thaws and resumptions that no batch has decided with yet."""
    return int(
        connection.execute(
            sa.text(
                "SELECT count(*) FROM human_acts WHERE act IN ('approve', 'thaw', 'resume') AND acted_at > "
                "coalesce((SELECT max(opened_at) FROM refresh_batches WHERE refreshed_at IS NOT NULL), '-infinity')"
            )
        ).scalar_one()
    )


def waiting_work(engine: sa.Engine) -> tuple[int, int]:
    """Return (site-days in the outbox, human acts that no batch has decided with yet)."""
    with engine.connect() as connection:
        return pending_cells(connection), waiting_acts(connection)


def wait_for_work(engine: sa.Engine, seconds: float) -> tuple[int, int]:
    """Return (waiting site-days, waiting human acts) as soon as there are any, or (0, 0) after `seconds`."""
    deadline = time.monotonic() + seconds
    with psycopg.connect(libpq_url(engine.url), autocommit=True) as listener:
        listener.execute("LISTEN flywheel_telemetry")
        while True:
            # Asked after LISTEN, so that a commit between the two cannot be missed.
            cells, acts = waiting_work(engine)
            left = deadline - time.monotonic()
            if cells or acts or left <= 0:
                return cells, acts
            for _ in listener.notifies(timeout=min(left, LOOK_SECONDS), stop_after=1):
                pass


def build_telemetry_sensor(job_name: str, *, others: tuple[str, ...] = ()) -> dg.SensorDefinition:
    """Build the sensor that runs the job of this name when the outbox is not empty, or an approval waits, and no run of it, or of `others`, is unfinished."""

    @dg.sensor(
        name="new_telemetry",
        job_name=job_name,
        minimum_interval_seconds=1,
        default_status=dg.DefaultSensorStatus.RUNNING,
        description="Runs the pipeline within seconds of new telemetry. Skips with numbers while nothing waits.",
    )
    def new_telemetry(context: dg.SensorEvaluationContext, database: FlywheelDatabase) -> dg.RunRequest | dg.SkipReason:
        def busy() -> int:
            return runs_at_work(context.instance, database.engine, (job_name, *others))

        report_gone_runs(context.instance, database.engine)
        # A run at work is waited for inside the tick too: the next tick may be five seconds away.
        deadline = time.monotonic() + WAIT_SECONDS
        while unfinished := busy():
            if time.monotonic() >= deadline:
                return dg.SkipReason(
                    f"{unfinished} unfinished run of {job_name}; {waiting_work(database.engine)[0]} site-days wait for it."
                )
            time.sleep(0.25)
        cells, acts = wait_for_work(database.engine, max(deadline - time.monotonic(), 0.0))
        if not cells and not acts:
            return dg.SkipReason(
                f"0 site-days in the outbox and 0 undecided approvals for {WAIT_SECONDS:.0f} s: nothing new."
            )
        if unfinished := busy():
            return dg.SkipReason(f"{unfinished} unfinished run of {job_name} will take the {cells} waiting site-days.")
        last = context.instance.get_run_records(dg.RunsFilter(job_name=job_name), limit=1)
        if last and last[0].dagster_run.status == dg.DagsterRunStatus.FAILURE and last[0].end_time is not None:
            # What failed will mostly fail again: a broken refresh is not tried every few seconds.
            age = time.time() - last[0].end_time
            if age < RETRY_AFTER_SECONDS:
                return dg.SkipReason(
                    f"The last run failed {age:.0f} s ago; {cells} site-days and {acts} approvals are tried again in "
                    f"{RETRY_AFTER_SECONDS - age:.0f} s."
                )
        return dg.RunRequest(
            tags={
                "flywheel/trigger": "new_telemetry" if cells else "human_act",
                "flywheel/waiting_cells": str(cells),
                "flywheel/waiting_acts": str(acts),
            }
        )

    return new_telemetry
