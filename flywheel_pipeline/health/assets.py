"""Dagster assets of the health room: where every CUSUM stands, which rules and scopes leave service, and why."""

from collections import Counter
from collections.abc import Iterator
from typing import Any

import dagster as dg
import sqlalchemy as sa

from flywheel_pipeline.aggregates.assets import model_specs
from flywheel_pipeline.aggregates.batches import open_batch
from flywheel_pipeline.database.resource import FlywheelDatabase
from flywheel_pipeline.promotion.apply import apply_quarantines
from flywheel_pipeline.promotion.decide import decide_rules
from flywheel_pipeline.sql_models.assets import materialization_metadata, table_metadata
from flywheel_pipeline.sql_models.loader import ModelGraph
from flywheel_pipeline.sql_models.metadata import markdown_table

OWNER = ["team:data-platform"]
# Views over every episode of every rule in service: counting their rows would cost more than the run.
NOT_COUNTED = ("rule_episodes", "cusum_steps", "rule_cusum")


def build_demotion_asset(graph: ModelGraph) -> dg.AssetsDefinition:
    """Build the multi-asset that decides which rules stay in service, and where."""

    @dg.multi_asset(
        name="demote",
        specs=[
            *model_specs(graph, ("health",)),
            dg.AssetSpec(
                "rule_quarantines",
                group_name="health",
                deps=["rule_scorecard", "rule_cusum"],
                description=(
                    "Rules that this batch took out of service, with the reason; they leave every manifest in the same "
                    "transaction. Stands before the promotion gates on purpose: a failed gate or a freeze stops "
                    "promotion, never this."
                ),
                owners=OWNER,
                kinds={"python", "postgres"},
            ),
            dg.AssetSpec(
                "scope_quarantines",
                group_name="health",
                deps=["rule_cusum"],
                description=(
                    "The append-only record of which site or agent release a rule is kept from, and of every lift by a "
                    "person. The rule keeps its state elsewhere."
                ),
                owners=OWNER,
                kinds={"postgres", "table"},
                metadata=table_metadata("scope_quarantines"),
            ),
        ],
        can_subset=False,
    )
    def demote(context: dg.AssetExecutionContext, database: FlywheelDatabase) -> Iterator[dg.MaterializeResult[None]]:
        with database.engine.begin() as connection:
            batch = open_batch(connection, context.run.run_id)
            decided = decide_rules(connection, batch)
            applied = apply_quarantines(connection, batch, decided)
        verdicts = Counter(item.decision.verdict for item in decided)
        shown: list[dict[str, Any]] = [
            {"rule": d.subject_id, "verdict": d.decision.verdict, "reason": d.decision.reason}
            for d in decided
            if d.decision.verdict != "keep"
        ]
        with database.engine.connect() as connection:
            for model in graph.models.values():
                if model.room == "health":
                    metadata = (
                        {"sql": dg.MetadataValue.md(f"```sql\n{model.sql}\n```")}
                        if model.name in NOT_COUNTED
                        else materialization_metadata(connection, model)
                    )
                    yield dg.MaterializeResult(asset_key=model.name, metadata=metadata)
            events = connection.execute(sa.text("SELECT count(*) FROM scope_quarantines")).scalar_one()
            scopes = [
                dict(row)
                for row in connection.execute(
                    sa.text(
                        "SELECT rule_id AS rule, scope_kind AS scope, scope_value AS value, actor, reason "
                        "FROM quarantined_scopes ORDER BY since DESC, rule_id LIMIT 50"
                    )
                ).mappings()
            ]
        yield dg.MaterializeResult(
            asset_key="rule_quarantines",
            metadata={
                "rules": len(decided),
                "quarantined": sum(what == "quarantined" for _, what in applied.moved),
                "quarantined_scopes": sum(what != "quarantined" for _, what in applied.moved),
                **{f"verdict_{verdict}": count for verdict, count in sorted(verdicts.items())},
                "not_kept": dg.MetadataValue.md(markdown_table(shown[:50])),
            },
        )
        yield dg.MaterializeResult(
            asset_key="scope_quarantines",
            metadata={
                "dagster/row_count": events,
                "in_force": dg.MetadataValue.md(markdown_table(scopes)),
            },
        )

    return demote
