"""The sensor on new telemetry: no cursor to lose, the outbox is the state.

A tick waits inside itself on the outbox's NOTIFY for up to 20 seconds, which cuts insert-to-run to a few seconds. The
NOTIFY is a hint: the outbox is asked first and last, so a lost one costs an interval and no data.
"""

import time

import dagster as dg
import psycopg
import sqlalchemy as sa

from flywheel_pipeline.database.resource import FlywheelDatabase

WAIT_SECONDS = 20.0
UNFINISHED = [
    dg.DagsterRunStatus.QUEUED,
    dg.DagsterRunStatus.NOT_STARTED,
    dg.DagsterRunStatus.STARTING,
    dg.DagsterRunStatus.STARTED,
    dg.DagsterRunStatus.CANCELING,
]


def waiting_cells(engine: sa.Engine) -> int:
    """Count the distinct site-days in the outbox."""
    with engine.connect() as connection:
        return int(
            connection.execute(
                sa.text("SELECT count(*) FROM (SELECT DISTINCT site_id, day FROM touched_cells) AS c")
            ).scalar_one()
        )


def wait_for_telemetry(engine: sa.Engine, seconds: float) -> int:
    """Return the number of waiting cells as soon as there are any, or 0 after `seconds`."""
    deadline = time.monotonic() + seconds
    url = engine.url.set(drivername="postgresql").render_as_string(hide_password=False)
    with psycopg.connect(url, autocommit=True) as listener:
        listener.execute("LISTEN flywheel_telemetry")
        while True:
            # Asked after LISTEN, so that a commit between the two cannot be missed.
            if cells := waiting_cells(engine):
                return cells
            left = deadline - time.monotonic()
            if left <= 0:
                return 0
            for _ in listener.notifies(timeout=left, stop_after=1):
                pass


def build_telemetry_sensor(job_name: str, *, others: tuple[str, ...] = ()) -> dg.SensorDefinition:
    """Build the sensor that runs the job of this name when the outbox is not empty and no run of it, or of `others`, is unfinished."""

    @dg.sensor(
        name="new_telemetry",
        job_name=job_name,
        minimum_interval_seconds=1,
        default_status=dg.DefaultSensorStatus.RUNNING,
        description="Runs the pipeline within seconds of new telemetry. Skips with numbers while nothing waits.",
    )
    def new_telemetry(context: dg.SensorEvaluationContext, database: FlywheelDatabase) -> dg.RunRequest | dg.SkipReason:
        def busy() -> int:
            return sum(
                len(context.instance.get_runs(dg.RunsFilter(job_name=name, statuses=UNFINISHED), limit=10))
                for name in (job_name, *others)
            )

        if unfinished := busy():
            return dg.SkipReason(
                f"{unfinished} unfinished run of {job_name}; {waiting_cells(database.engine)} site-days wait for it."
            )
        cells = wait_for_telemetry(database.engine, WAIT_SECONDS)
        if not cells:
            return dg.SkipReason(f"0 site-days in the outbox for {WAIT_SECONDS:.0f} s: nothing new.")
        if unfinished := busy():
            return dg.SkipReason(f"{unfinished} unfinished run of {job_name} will take the {cells} waiting site-days.")
        return dg.RunRequest(tags={"flywheel/trigger": "new_telemetry", "flywheel/waiting_cells": str(cells)})

    return new_telemetry
