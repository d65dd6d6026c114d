"""Retention of Dagster's own run records: some 600 KB of event log a run, without bound unless somebody deletes.

A fleet that reports all day makes up to 8,600 runs in it (docs/growth.md): FLYWHEEL_RUN_DAYS says how many days of them stay.
"""

import datetime as dt

import dagster as dg

from flywheel_pipeline.database.settings import get_settings

FINISHED = [dg.DagsterRunStatus.SUCCESS, dg.DagsterRunStatus.FAILURE, dg.DagsterRunStatus.CANCELED]


class RunRetention(dg.Config):
    """How long finished runs are kept; None: as FLYWHEEL_RUN_DAYS says."""

    keep_days: int | None = None


def delete_old_runs(instance: dg.DagsterInstance, *, keep_days: int, batch: int = 500) -> int:
    """Delete finished runs older than `keep_days` with their event logs; return how many."""
    before = dt.datetime.now(dt.UTC) - dt.timedelta(days=keep_days)
    deleted = 0
    while True:
        runs = instance.get_run_records(dg.RunsFilter(statuses=FINISHED, updated_before=before), limit=batch)
        for record in runs:
            instance.delete_run(record.dagster_run.run_id)
            deleted += 1
        if len(runs) < batch:
            return deleted


def build_housekeeping_job() -> dg.JobDefinition:
    """Build the job `housekeeping`."""

    # The database is not asked: by it the run gives its sign of life, as every run does.
    @dg.op(required_resource_keys={"database"})
    def delete_runs(context: dg.OpExecutionContext, config: RunRetention) -> None:
        keep_days = get_settings().run_days if config.keep_days is None else config.keep_days
        deleted = delete_old_runs(context.instance, keep_days=keep_days)
        context.log.info(f"Deleted {deleted} finished runs older than {keep_days} days.")

    @dg.job(executor_def=dg.in_process_executor, description="Deletes finished runs older than FLYWHEEL_RUN_DAYS (30).")
    def housekeeping() -> None:
        delete_runs()

    return housekeeping
