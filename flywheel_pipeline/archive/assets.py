"""The archive in Dagster: the asset, its check, the job and its nightly schedule.

Belongs here: the glue. Does not belong here: the export (`export.py`) and the question (`quality.py`). Apart from the nightly
pipeline, which the minute path waits for: a first export of a long history may take hours.
"""

import datetime as dt
import time
from collections.abc import Mapping
from typing import Any

import dagster as dg
import sqlalchemy as sa
from dagster._core.definitions.unresolved_asset_job_definition import UnresolvedAssetJobDefinition
from pydantic import Field

from flywheel_pipeline.aggregates.batches import Batch
from flywheel_pipeline.archive.configured import configured_archive
from flywheel_pipeline.archive.quality import archived_and_live_are_all
from flywheel_pipeline.checks import Check, check_step
from flywheel_pipeline.database.resource import FlywheelDatabase
from flywheel_pipeline.database.settings import get_settings
from flywheel_pipeline.quality import Finding
from flywheel_pipeline.sql_models.metadata import markdown_table

ARCHIVE_JOB = "archive_days"
SHOWN_DAYS = 20


class ExportConfig(dg.Config):
    """Which days are looked at; empty: all. Days as YYYY-MM-DD, in UTC, both ends included."""

    from_day: str = Field(default="", description="first day; empty: the first there is")
    to_day: str = Field(default="", description="last day; empty: the last closed one")
    again: bool = Field(default=False, description="export days anew that are up to date, too")


@dg.asset(
    group_name="archive",
    deps=["execution_telemetry", "telemetry_daily_volume"],
    description=(
        "Closed days of telemetry and their corrections as Parquet under FLYWHEEL_ARCHIVE_URL, a folder per day and one manifest "
        "that names its files. Materialized at night: new closed days are added, days that were corrected since are exchanged as "
        "a whole. Purging old telemetry takes only what is here; rebuilds on another engine read it."
    ),
    owners=["team:data-platform"],
    kinds={"parquet", "python"},
)
def telemetry_archive(
    context: dg.AssetExecutionContext, database: FlywheelDatabase, config: ExportConfig
) -> dg.MaterializeResult[None]:
    """Export the days that wait for it."""
    begun = time.monotonic()
    settings = get_settings()
    archive = configured_archive(settings)
    if archive is None:
        context.log.info("No archive is set: FLYWHEEL_ARCHIVE_URL is empty, so nothing is exported.")
        return dg.MaterializeResult(metadata={"archive": "none is set: FLYWHEEL_ARCHIVE_URL is empty"})
    # Imported here: Arrow has no place on the minute path.
    from flywheel_pipeline.archive.export import export_due

    report = export_due(
        database.engine,
        archive,
        today=_today(),
        after_days=settings.archive_after_days,
        from_day=dt.date.fromisoformat(config.from_day) if config.from_day else None,
        to_day=dt.date.fromisoformat(config.to_day) if config.to_day else None,
        again=config.again,
        progress=lambda day, rows, of: context.log.debug(f"{day}: {rows:,} of {of:,} rows"),
    )
    shown = [
        {
            "day": made.day.isoformat(),
            "what": "exchanged" if made.replaced else "new",
            "executions": made.rows,
            "corrections": made.corrections,
            "files": made.files,
            "bytes": made.bytes,
            "seconds": round(made.seconds, 2),
        }
        for made in report.exported
    ]
    context.log.info(f"Exported {len(shown)} days with {report.rows:,} executions to {archive.shown}.")
    metadata: dict[str, Any] = {
        "archive": archive.shown,
        "days_exported": len(shown),
        "days_exchanged": sum(made.replaced for made in report.exported),
        "rows_exported": report.rows,
        "days_archived": len(archive.days()),
        "duration_seconds": round(time.monotonic() - begun, 3),
    }
    if shown:
        metadata["preview"] = dg.MetadataValue.md(markdown_table(shown[-SHOWN_DAYS:]))
    return dg.MaterializeResult(metadata=metadata)


def _today() -> dt.date:
    # Not by the clock of a replay: what is closed is so by the time of day.
    return dt.datetime.now(dt.UTC).date()


def _all_there(engine: sa.Engine, _batch: Batch, _tags: Mapping[str, str]) -> Finding:
    settings = get_settings()
    archive = configured_archive(settings)
    with engine.connect() as connection:
        return archived_and_live_are_all(connection, archive, today=_today(), after_days=settings.archive_after_days)


archive_checks = check_step(
    "archive_checks",
    [
        Check(
            "telemetry_archive",
            "archived_and_live_are_all",
            "For each day the rows in the database, or where those were purged the archived ones, equal what the figures count; asked every night.",
            _all_there,
        )
    ],
)
ARCHIVE_CHECKS = tuple(archive_checks.check_keys)


def build_archive_job() -> UnresolvedAssetJobDefinition:
    """Build the job `archive_days`: the export and its check."""
    return dg.define_asset_job(
        ARCHIVE_JOB,
        selection=dg.AssetSelection.assets(telemetry_archive) | dg.AssetSelection.checks(*ARCHIVE_CHECKS),
        description="Exports closed and corrected days of telemetry to the archive, and checks that nothing is missing.",
        executor_def=dg.in_process_executor,
    )


def build_archive_schedule(job: UnresolvedAssetJobDefinition) -> dg.ScheduleDefinition:
    """Build the nightly schedule of the export, after the nightly run has counted the day."""
    return dg.ScheduleDefinition(
        name="nightly_archive",
        job=job,
        cron_schedule="27 4 * * *",
        execution_timezone="UTC",
        tags={"flywheel/trigger": "nightly"},
        default_status=dg.DefaultScheduleStatus.RUNNING,
        description="Exports closed and corrected days to the archive, where FLYWHEEL_ARCHIVE_URL is set.",
    )
