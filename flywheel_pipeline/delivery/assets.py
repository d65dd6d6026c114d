"""Dagster assets of the delivery room: desired state, commands, and who has what."""

from collections.abc import Iterator

import dagster as dg
import sqlalchemy as sa

from flywheel_pipeline.aggregates.batches import open_batch
from flywheel_pipeline.database.resource import FlywheelDatabase
from flywheel_pipeline.delivery.publish import queue_commands, write_manifests
from flywheel_pipeline.sql_models.assets import asset_spec, materialization_metadata, table_metadata
from flywheel_pipeline.sql_models.loader import ModelGraph
from flywheel_pipeline.sql_models.metadata import markdown_table

OWNER = ["team:data-platform"]


def build_delivery_asset(graph: ModelGraph) -> dg.AssetsDefinition:
    """Build the multi-asset that brings manifests and commands to what the registry says."""
    deployments = graph.models["deployments"]

    @dg.multi_asset(
        name="deliver",
        specs=[
            dg.AssetSpec(
                "rule_manifests",
                group_name="delivery",
                deps=["l1_rules", "appliances", "runbooks"],
                description=(
                    "What each appliance should run: one row per appliance, deterministic and hashed. "
                    "Rules that its agent cannot run are withheld and listed with the reason."
                ),
                owners=OWNER,
                kinds={"postgres", "table"},
                metadata=table_metadata("rule_manifests"),
            ),
            dg.AssetSpec(
                "appliance_commands",
                group_name="delivery",
                deps=["rule_manifests"],
                description=(
                    "One sync_promoted_rule command per appliance, rule and version; publishing twice queues none. "
                    "Expired ones are delivered again."
                ),
                owners=OWNER,
                kinds={"postgres", "table"},
                metadata=table_metadata("appliance_commands"),
            ),
            asset_spec(deployments, graph).replace_attributes(
                deps=["appliance_commands", "rule_manifests", "l1_rules"]
            ),
        ],
        can_subset=False,
    )
    def deliver(context: dg.AssetExecutionContext, database: FlywheelDatabase) -> Iterator[dg.MaterializeResult[None]]:
        with database.engine.begin() as connection:
            batch = open_batch(connection, context.run.run_id)
            manifests = write_manifests(connection, batch.batch_id)
            commands = queue_commands(connection, batch.batch_id)
        with database.engine.connect() as connection:
            withheld = (
                connection.execute(
                    sa.text(
                        "SELECT w ->> 'rule_id' AS rule_id, w ->> 'reason' AS reason, count(*) AS appliances "
                        "FROM rule_manifests, jsonb_array_elements(withheld) AS w GROUP BY 1, 2 ORDER BY 1, 2 LIMIT 50"
                    )
                )
                .mappings()
                .all()
            )
            deployed = materialization_metadata(connection, deployments)
        yield dg.MaterializeResult(
            asset_key="rule_manifests",
            metadata={
                "dagster/row_count": manifests.appliances,
                "written": manifests.written,
                "unchanged": manifests.unchanged,
                "rules": manifests.rules,
                "withheld": manifests.withheld,
                "withheld_because": dg.MetadataValue.md(markdown_table([dict(row) for row in withheld])),
            },
        )
        yield dg.MaterializeResult(
            asset_key="appliance_commands",
            metadata={
                "queued": commands.queued,
                "redelivered": commands.redelivered,
                "expired": commands.expired,
                "open": commands.open,
            },
        )
        yield dg.MaterializeResult(asset_key="deployments", metadata=deployed)

    return deliver
