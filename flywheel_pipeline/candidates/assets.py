"""Dagster assets of the candidates room: observed patterns, written to the production table."""

import dagster as dg

from flywheel_pipeline.candidates.patterns import write_observed
from flywheel_pipeline.database.resource import FlywheelDatabase
from flywheel_pipeline.sql_models.assets import table_metadata


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
def patterns(database: FlywheelDatabase) -> dg.MaterializeResult[None]:
    """Upsert the observed patterns."""
    with database.engine.begin() as connection:
        counts = write_observed(connection)
        total = connection.exec_driver_sql("SELECT count(*) FROM patterns").scalar_one()
    return dg.MaterializeResult(metadata={"dagster/row_count": total, **counts})
