"""Dagster assets of the candidates room: observed patterns, written to the production table."""

import time

import dagster as dg

from flywheel_pipeline.aggregates.batches import open_batch
from flywheel_pipeline.candidates.patterns import write_observed
from flywheel_pipeline.database.resource import FlywheelDatabase
from flywheel_pipeline.materialized import data_lag
from flywheel_pipeline.sql_models.assets import relation_metadata, table_metadata

PREVIEW = ("pattern_key", "status", "success_count", "failure_count", "first_seen", "last_seen")


@dg.asset(
    group_name="candidates",
    deps=["pattern_candidates"],
    description=(
        "The production table of patterns: one row per incident type, runbook and platform that L2 used. "
        "New ones start as pending; imported ones keep their success-only counts as history. Only the promotion room "
        "moves a status."
    ),
    owners=["team:data-platform"],
    kinds={"postgres", "table"},
    metadata=table_metadata("patterns"),
)
def patterns(context: dg.AssetExecutionContext, database: FlywheelDatabase) -> dg.MaterializeResult[None]:
    """Upsert the observed patterns."""
    begun = time.monotonic()
    with database.engine.begin() as connection:
        batch = open_batch(connection, context.run.run_id)
        counts = write_observed(connection)
        shown = relation_metadata(connection, "patterns", PREVIEW, newest_by=("last_seen", "pattern_key"))
    return dg.MaterializeResult(
        metadata={
            **shown,
            **{f"rows_{what}": count for what, count in counts.items()},
            **data_lag(batch),
            "duration_seconds": round(time.monotonic() - begun, 3),
        }
    )
