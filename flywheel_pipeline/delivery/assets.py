"""Dagster assets of the delivery room: desired state, commands, and who has what."""

import time
from collections.abc import Iterator

import dagster as dg
import sqlalchemy as sa

from flywheel_pipeline.aggregates.batches import open_batch
from flywheel_pipeline.database.resource import FlywheelDatabase
from flywheel_pipeline.delivery.progress import STATES, plot_progress, rollout_progress
from flywheel_pipeline.delivery.publish import queue_commands, write_manifests
from flywheel_pipeline.materialized import data_lag, kept_plot
from flywheel_pipeline.sql_models.assets import (
    asset_spec,
    materialization_metadata,
    relation_metadata,
    table_metadata,
)
from flywheel_pipeline.sql_models.loader import ModelGraph
from flywheel_pipeline.sql_models.metadata import markdown_table

OWNER = ["team:data-platform"]
MANIFEST_COLUMNS = ("appliance_id", "site_id", "rule_count", "manifest_hash", "built_at", "drift_since")
COMMAND_COLUMNS = ("created_at", "appliance_id", "command_type", "rule_id", "rule_version", "status")


def build_delivery_asset(graph: ModelGraph) -> dg.AssetsDefinition:
    """Build the multi-asset that brings manifests and commands to what the registry says."""
    findings, deployments = graph.models["capability_findings"], graph.models["deployments"]
    drift, overdue = graph.models["appliance_drift"], graph.models["overdue_deployments"]

    @dg.multi_asset(
        name="deliver",
        specs=[
            asset_spec(findings, graph).replace_attributes(deps=["appliance_executions", "appliances"]),
            asset_spec(graph.models["rule_manifests"], graph).replace_attributes(
                deps=["l1_rules", "appliances", "runbooks", "capability_findings"]
            ),
            dg.AssetSpec(
                "appliance_commands",
                group_name="delivery",
                deps=["rule_manifests"],
                description=(
                    "One sync_promoted_rule command per appliance, rule and version, and one withdraw_rule for what it "
                    "was told of and should run no more; publishing twice queues none. Expired ones are delivered again."
                ),
                owners=OWNER,
                kinds={"postgres", "table"},
                metadata=table_metadata("appliance_commands"),
            ),
            asset_spec(deployments, graph).replace_attributes(
                deps=["appliance_commands", "rule_manifests", "l1_rules", "appliance_executions"]
            ),
            asset_spec(overdue, graph).replace_attributes(deps=["deployments", "appliances"]),
            asset_spec(drift, graph).replace_attributes(deps=["appliances", "rule_manifests", "appliance_commands"]),
        ],
        can_subset=False,
    )
    def deliver(context: dg.AssetExecutionContext, database: FlywheelDatabase) -> Iterator[dg.MaterializeResult[None]]:
        begun = time.monotonic()
        with database.engine.begin() as connection:
            batch = open_batch(connection, context.run.run_id)
            manifests = write_manifests(connection, batch.batch_id)
            commands = queue_commands(connection, batch.batch_id)
        with database.engine.connect() as connection:
            withheld = (
                connection.execute(
                    sa.text(
                        "SELECT w ->> 'rule_id' AS rule_id, w ->> 'reason' AS reason, sum(m.appliances)::bigint AS appliances "
                        "FROM (SELECT content_hash, count(*) AS appliances FROM appliance_manifests GROUP BY 1) AS m "
                        "JOIN manifest_contents AS c USING (content_hash), jsonb_array_elements(c.withheld) AS w "
                        "GROUP BY 1, 2 ORDER BY 1, 2 LIMIT 50"
                    )
                )
                .mappings()
                .all()
            )
            shadowed = [
                dict(row)
                for row in connection.execute(
                    sa.text(
                        "SELECT incident_type, platform, winner_id AS wins, loser_id AS behind_it, kind, same_runbook, "
                        "appliances FROM rule_conflicts ORDER BY kind DESC, same_runbook, incident_type, loser_id LIMIT 50"
                    )
                ).mappings()
            ]
            stones = [
                dict(row)
                for row in connection.execute(
                    sa.text(
                        "SELECT s ->> 'rule_id' AS rule_id, s ->> 'version' AS version, s ->> 'reason' AS reason, "
                        "count(*) AS appliances, min(s ->> 'since') AS since "
                        "FROM appliance_manifests, jsonb_array_elements(tombstones) AS s GROUP BY 1, 2, 3 ORDER BY 1, 2, 3 LIMIT 50"
                    )
                ).mappings()
            ]
            progress = rollout_progress(connection)
            manifest_rows = relation_metadata(connection, "rule_manifests", MANIFEST_COLUMNS)
            command_rows = relation_metadata(
                connection, "appliance_commands", COMMAND_COLUMNS, newest_by=("created_at",)
            )
            described = {
                model.name: materialization_metadata(connection, model)
                for model in (findings, deployments, overdue, drift)
            }
        alike = {**data_lag(batch), "duration_seconds": round(time.monotonic() - begun, 3)}
        if progress:
            figures = ", ".join(
                f"{p.stage} {p.agent_version} {' '.join(str(count) for count in p.counts.values())}" for p in progress
            )
            described["deployments"].update(
                kept_plot(
                    context,
                    "deployments",
                    "rollout_progress",
                    f"rollout progress by stage and agent release: {figures}",
                    lambda: plot_progress(progress),
                )
            )
            described["deployments"]["rollout"] = dg.MetadataValue.md(
                markdown_table(
                    [{"stage": p.stage, "agent": p.agent_version, "pairs": p.pairs, **p.counts} for p in progress[:50]]
                )
            )
            for state in STATES:
                described["deployments"][f"pairs_{state}"] = sum(p.counts[state] for p in progress)
        yield dg.MaterializeResult(asset_key="capability_findings", metadata=described["capability_findings"])
        yield dg.MaterializeResult(
            asset_key="rule_manifests",
            metadata={
                **manifest_rows,
                **alike,
                "sql": dg.MetadataValue.md(f"```sql\n{graph.models['rule_manifests'].sql}\n```"),
                "rows_written": manifests.written,
                "rows_unchanged": manifests.unchanged,
                "rules": manifests.rules,
                "withheld": manifests.withheld,
                "tombstones": manifests.tombstones,
                "tombstones_rewritten": manifests.tombstones_rewritten,
                "shadowed": manifests.shadowed,
                "overlaps": manifests.overlaps,
                "conflicts": dg.MetadataValue.md(markdown_table(shadowed)),
                "must_drop": dg.MetadataValue.md(markdown_table(stones)),
                "withheld_because": dg.MetadataValue.md(markdown_table([dict(row) for row in withheld])),
            },
        )
        yield dg.MaterializeResult(
            asset_key="appliance_commands",
            metadata={
                **command_rows,
                **alike,
                "queued": commands.queued,
                "withdrawn": commands.withdrawn,
                "redelivered": commands.redelivered,
                "expired": commands.expired,
                "open": commands.open,
                "waiting_appliances": commands.waiting_appliances,
            },
        )
        for name in ("deployments", "overdue_deployments", "appliance_drift"):
            yield dg.MaterializeResult(asset_key=name, metadata=described[name])

    return deliver
