"""Dagster assets of the telemetry room: the production tables that others write, visible upstream of the graph."""

from __future__ import annotations

import dagster as dg

from flywheel_pipeline.sql_models.assets import table_metadata

OWNER = ["team:data-platform"]


def _table(name: str, group: str, description: str) -> dg.AssetSpec:
    return dg.AssetSpec(
        name,
        group_name=group,
        description=description,
        owners=OWNER,
        kinds={"postgres", "table"},
        metadata=table_metadata(name),
    )


external_tables = [
    _table(
        "execution_telemetry",
        "telemetry",
        "One row per healing attempt, written by appliances through the intake or by plain SQL; the one truth. "
        "Statement triggers put each touched site-day into the outbox touched_cells in the writer's own transaction.",
    ),
    _table(
        "runbooks",
        "telemetry",
        "The catalogue of executable scripts, one row per runbook and platform. What is not in it is never served.",
    ),
    _table("appliances", "telemetry", "One row per appliance, with its agent release: who can run what."),
]
