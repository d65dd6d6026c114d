"""The whole graph on one page: rooms in flow order, one job, one sensor, one nightly schedule.

    telemetry -> aggregates -> candidates -> promotion -> delivery
                     |                          ^
                     +-> health (quarantines) --+
    telemetry -> archive, at night

Nothing here opens a connection: the code location imports in a second, and a missing database is the run's error.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import dagster as dg

from flywheel_pipeline.aggregates.assets import build_backfill_asset, build_refresh_asset
from flywheel_pipeline.aggregates.checks import FULL_RECOUNT_TAG, aggregates_checks
from flywheel_pipeline.archive.assets import (
    ARCHIVE_CHECKS,
    archive_checks,
    build_archive_job,
    build_archive_schedule,
    telemetry_archive,
)
from flywheel_pipeline.asset_page import with_asset_pages
from flywheel_pipeline.candidates.assets import patterns
from flywheel_pipeline.candidates.checks import candidates_checks
from flywheel_pipeline.contracts.defs import (
    CONTRACT_CHECKS,
    build_contracts_job,
    build_data_docs_job,
    build_data_docs_schedule,
    contract_steps,
)
from flywheel_pipeline.database.housekeeping import build_housekeeping_job
from flywheel_pipeline.database.resource import FlywheelDatabase
from flywheel_pipeline.delivery.assets import build_delivery_asset
from flywheel_pipeline.delivery.checks import delivery_checks
from flywheel_pipeline.engines.choose import refuse_unportable
from flywheel_pipeline.health.alerting.assets import alert_checks, alerts_table
from flywheel_pipeline.health.assets import build_attribution_asset, build_demotion_asset
from flywheel_pipeline.health.checks import health_checks
from flywheel_pipeline.health.sensors import build_alert_sensor
from flywheel_pipeline.orchestration.executors import chosen_executor
from flywheel_pipeline.promotion.assets import apply, promotion_decisions
from flywheel_pipeline.promotion.backtest_asset import policy_backtest
from flywheel_pipeline.promotion.checks import promotion_gates, registry_checks
from flywheel_pipeline.promotion.jobs import human_jobs
from flywheel_pipeline.sql_models.loader import load_models
from flywheel_pipeline.telemetry.assets import external_tables
from flywheel_pipeline.telemetry.checks import NIGHTLY_CHECKS, telemetry_checks, telemetry_nightly_checks
from flywheel_pipeline.telemetry.sensors import build_telemetry_sensor

PIPELINE_JOB = "pipeline"
NIGHTLY_JOB = "pipeline_nightly"
CODE_LOCATION = "flywheel"


def build_defs(*, resources: Mapping[str, Any] | None = None) -> dg.Definitions:
    """Return the code location: assets, checks, jobs, sensor and schedules.

    `resources` replaces the database resource, for a test's own database.
    """
    graph = load_models()
    refuse_unportable(graph)
    backfill = build_backfill_asset(graph)
    checks = [
        telemetry_checks,
        telemetry_nightly_checks,
        candidates_checks,
        *contract_steps,
        aggregates_checks,
        promotion_gates,
        registry_checks,
        delivery_checks,
        health_checks,
        alert_checks,
        archive_checks,
    ]
    # Checks are named on their own: a check that nobody selected is silently left out of a job.
    apart = dg.AssetSelection.assets(backfill, telemetry_archive)
    everything = (dg.AssetSelection.all() - apart) | dg.AssetSelection.all_asset_checks()
    pipeline = dg.define_asset_job(
        PIPELINE_JOB,
        selection=everything
        - dg.AssetSelection.checks(*CONTRACT_CHECKS, *NIGHTLY_CHECKS, *ARCHIVE_CHECKS)
        - dg.AssetSelection.assets(policy_backtest),
        description="Telemetry to promoted rules: refresh, check, decide, apply, deliver.",
        executor_def=dg.in_process_executor,
    )
    backfill_job = dg.define_asset_job(
        "backfill_days",
        selection=dg.AssetSelection.assets(backfill),
        description="Recomputes the cells of the chosen days from the log.",
        tags={"flywheel/trigger": "backfill"},
        executor_def=chosen_executor(),
    )
    nightly_job = dg.define_asset_job(
        NIGHTLY_JOB,
        selection=everything,
        description="The pipeline with every counter recounted in full, the contracts, and the backtest.",
        tags={FULL_RECOUNT_TAG: "true"},
        executor_def=dg.in_process_executor,
    )
    nightly = dg.ScheduleDefinition(
        name="nightly",
        job=nightly_job,
        cron_schedule="17 3 * * *",
        execution_timezone="UTC",
        tags={"flywheel/trigger": "nightly"},
        default_status=dg.DefaultScheduleStatus.RUNNING,
        description="The whole graph with every counter recounted in full.",
    )
    housekeeping = build_housekeeping_job()
    data_docs = build_data_docs_job()
    archive_job = build_archive_job()
    retention = dg.ScheduleDefinition(
        name="nightly_housekeeping",
        job=housekeeping,
        cron_schedule="47 3 * * *",
        execution_timezone="UTC",
        tags={"flywheel/trigger": "nightly"},
        default_status=dg.DefaultScheduleStatus.RUNNING,
        description="Deletes old Dagster runs with their event logs; audit facts live in Flywheel's own tables.",
    )
    return dg.Definitions(
        assets=with_asset_pages(
            [
                *external_tables,
                alerts_table,
                build_refresh_asset(graph),
                backfill,
                patterns,
                build_demotion_asset(graph),
                build_attribution_asset(graph),
                promotion_decisions,
                apply,
                policy_backtest,
                build_delivery_asset(graph),
                telemetry_archive,
            ]
        ),
        asset_checks=checks,
        jobs=[
            pipeline,
            nightly_job,
            backfill_job,
            archive_job,
            housekeeping,
            build_contracts_job(),
            data_docs,
            *human_jobs(),
        ],
        schedules=[
            nightly,
            retention,
            build_data_docs_schedule(data_docs),
            build_archive_schedule(archive_job),
        ],
        sensors=[build_telemetry_sensor(PIPELINE_JOB, others=(NIGHTLY_JOB,)), build_alert_sensor()],
        resources=dict(resources or {"database": FlywheelDatabase()}),
        executor=chosen_executor(),
    )
