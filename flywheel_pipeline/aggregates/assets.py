"""The refresh as one Dagster step: every SQL model of the telemetry, aggregates and candidates rooms.

One transaction under one lock makes all of them, so they are one multi-asset: there is no moment in which two of
them disagree. Backfills of a day go the same way, through the partitioned asset `day_backfill`.
"""

import datetime as dt
from collections.abc import Iterator

import dagster as dg
from pydantic import Field

from flywheel_pipeline.aggregates.batches import open_batch
from flywheel_pipeline.aggregates.refresh import lock_refresh, refresh, touch
from flywheel_pipeline.database.resource import FlywheelDatabase
from flywheel_pipeline.materialized import data_lag, note_arrival
from flywheel_pipeline.sql_models.assets import asset_spec, materialization_metadata
from flywheel_pipeline.sql_models.loader import ModelGraph

# Registry tables that a model reads while the ledger, downstream, writes them. An asset graph has no cycles, so these
# reads are named in the descriptions and drawn the other way round.
FEEDBACK = frozenset(
    {
        "l1_rules",
        "patterns",
        "outcome_class_rules",
        "rule_aliases",
        "site_aliases",
        "appliance_manifests",
        "appliance_commands",
        "manifest_contents",
        "manifest_entries",
        "refresh_batches",
        "rule_events",
        "scope_quarantines",
        "policy_documents",
        "cusum_checkpoints",
    }
)
REFRESHED_ROOMS = ("telemetry", "aggregates", "candidates")
FIRST_DAY = dt.datetime(2025, 1, 1, tzinfo=dt.UTC)


def model_specs(graph: ModelGraph, rooms: tuple[str, ...]) -> list[dg.AssetSpec]:
    """Return the asset specs of the models of these rooms, without the reads that would close a cycle."""
    specs = []
    for model in graph.models.values():
        if model.room in rooms:
            spec = asset_spec(model, graph)
            deps = [dep for dep in spec.deps if dep.asset_key.to_user_string() not in FEEDBACK]
            specs.append(spec.replace_attributes(deps=deps))
    return specs


def build_refresh_asset(graph: ModelGraph) -> dg.AssetsDefinition:
    """Build the multi-asset that takes the outbox and recomputes the touched cells of every model."""

    @dg.multi_asset(name="refresh", specs=model_specs(graph, REFRESHED_ROOMS), can_subset=False)
    def refresh_models(
        context: dg.AssetExecutionContext, database: FlywheelDatabase
    ) -> Iterator[dg.MaterializeResult[None]]:
        with database.engine.begin() as connection:
            batch = open_batch(connection, context.run.run_id)
            report = refresh(connection, graph, batch_id=batch.batch_id, progress=context.log.debug)
        context.log.info(
            f"Refreshed {report.cells} site-days in {report.duration_seconds:.2f} s: "
            f"{report.rows_written} rows written, {report.counters_changed} counters changed."
        )
        note_arrival(batch, report.newest_arrival_at)
        lag = data_lag(batch)
        if report.newest_arrival_at is not None:
            # The log is written by others: that it grew is seen here, and its freshness is judged by that.
            context.log_event(
                dg.AssetMaterialization(
                    "execution_telemetry",
                    description="Telemetry that arrived since the refresh before was counted.",
                    metadata={
                        "newest_arrival_at": dg.MetadataValue.timestamp(report.newest_arrival_at),
                        "site_days": report.cells,
                        **lag,
                    },
                )
            )
        with database.engine.connect() as connection:
            for model in graph.models.values():
                if model.room in REFRESHED_ROOMS:
                    metadata = materialization_metadata(connection, model, report.models.get(model.name))
                    metadata.update(lag)
                    if model.name in report.seconds_by_model:
                        metadata["duration_seconds"] = dg.MetadataValue.float(
                            round(report.seconds_by_model[model.name], 4)
                        )
                    yield dg.MaterializeResult(asset_key=model.name, metadata=metadata)

    return refresh_models


class BackfillConfig(dg.Config):
    """Who computes this backfill, chosen in the launchpad; unset, FLYWHEEL_ENGINE says."""

    engine: str | None = Field(default=None, description="postgres, duckdb or spark; unset: FLYWHEEL_ENGINE.")


def build_backfill_asset(graph: ModelGraph) -> dg.AssetsDefinition:
    """Build the daily partitioned asset that recomputes all cells of a day, from the log or by another engine."""

    @dg.asset(
        name="day_backfill",
        group_name="aggregates",
        partitions_def=dg.DailyPartitionsDefinition(start_date=FIRST_DAY, timezone="UTC"),
        description=(
            "Recomputes all site-days of one UTC day from the log: select the days here to backfill them. "
            "The same code as the refresh, with other cells; running it twice changes nothing. "
            "The engine named in the config, or FLYWHEEL_ENGINE, computes; purged days come from the archive then."
        ),
        owners=["team:data-platform"],
        kinds={"postgres"},
        deps=["execution_telemetry"],
    )
    def day_backfill(
        context: dg.AssetExecutionContext, config: BackfillConfig, database: FlywheelDatabase
    ) -> dg.MaterializeResult[None]:
        from flywheel_pipeline.engines.choose import chosen_computation, pipes_launcher

        day = dt.date.fromisoformat(context.partition_key)
        computation = chosen_computation(config.engine, launcher=pipes_launcher(context))
        if computation is not None:
            computation.check(graph)
        with database.engine.begin() as connection:
            if computation is None:
                touched = touch(connection, from_day=day, to_day=day)
            else:
                from flywheel_pipeline.engines.rebuild import touch_days

                lock_refresh(connection)
                touched = touch_days(connection, computation.archive, day, day)
            report = refresh(connection, graph, whole_rollups=True, computation=computation)
        return dg.MaterializeResult(
            metadata={
                "engine": computation.engine.name if computation is not None else "postgres",
                "touched_cells": touched,
                "cells": report.cells,
                "rows_written": report.rows_written,
                "duration_seconds": report.duration_seconds,
            }
        )

    return day_backfill
