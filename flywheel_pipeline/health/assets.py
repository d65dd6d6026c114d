"""Dagster assets of the health room: where every CUSUM stands, which rules and scopes leave service, and why."""

from collections import Counter
from collections.abc import Iterator
from typing import Any

import dagster as dg
import sqlalchemy as sa

from flywheel_pipeline.aggregates.assets import model_specs
from flywheel_pipeline.aggregates.batches import open_batch
from flywheel_pipeline.database.resource import FlywheelDatabase
from flywheel_pipeline.health.stored import kept_attributions, update_attributions
from flywheel_pipeline.promotion.apply import apply_quarantines
from flywheel_pipeline.promotion.decide import decide_rules
from flywheel_pipeline.sql_models.assets import asset_spec, materialization_metadata, table_metadata
from flywheel_pipeline.sql_models.loader import ModelGraph
from flywheel_pipeline.sql_models.metadata import markdown_table

OWNER = ["team:data-platform"]
# Views over every episode of every rule in service: counting their rows would cost more than the run.
PAGES = 10  # failing rules whose whole answer a materialization shows; all of them stand in the table
MODEL_COST = 3_000.0  # planner cost (tens of ms) above which the cells are not counted on each run
ATTRIBUTION = ("rule_failure_cells",)  # models of this room that the attribution materializes
NOT_COUNTED = ("rule_episodes", "cusum_steps", "rule_cusum")


def build_demotion_asset(graph: ModelGraph) -> dg.AssetsDefinition:
    """Build the multi-asset that decides which rules stay in service, and where."""

    @dg.multi_asset(
        name="demote",
        specs=[
            *(spec for spec in model_specs(graph, ("health",)) if spec.key.to_user_string() not in ATTRIBUTION),
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
                if model.room == "health" and model.name not in ATTRIBUTION:
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


def build_attribution_asset(graph: ModelGraph) -> dg.AssetsDefinition:
    """Build the multi-asset that says why each failing rule fails."""
    cells = graph.models["rule_failure_cells"]

    @dg.multi_asset(
        name="attribution",
        specs=[
            asset_spec(cells, graph),
            dg.AssetSpec(
                "failure_attribution",
                group_name="health",
                deps=["rule_failure_cells", "rule_scorecard", "episodes"],
                description=(
                    "Why each failing rule fails: where (site, agent release, hardware, system, time) with its rate if each "
                    "cause were fixed, what (causes by error, from the raw to the adjusted rate), since when, on how many "
                    "hosts, and a narrower condition that holds on sites held out of the search.\n\n"
                    "Computed only for rules that fail, when their evidence changed. It decides nothing. Hosts are counted, "
                    "never named."
                ),
                owners=OWNER,
                kinds={"python", "postgres", "table"},
                metadata={**table_metadata("rule_attributions")},
            ),
        ],
        can_subset=False,
    )
    def attribution(
        context: dg.AssetExecutionContext, database: FlywheelDatabase
    ) -> Iterator[dg.MaterializeResult[None]]:
        with database.engine.begin() as connection:
            batch = open_batch(connection, context.run.run_id)
            done = update_attributions(connection, batch_id=batch.batch_id)
        with database.engine.connect() as connection:
            kept = kept_attributions(connection, done.failing)
            model = materialization_metadata(connection, cells, cost_limit=MODEL_COST)
        ordered = [kept[rule_id] for rule_id in done.failing if rule_id in kept]
        metadata: dict[str, Any] = {
            "dagster/row_count": len(ordered),
            "failing_rules": len(done.failing),
            "computed": len(done.computed),
            "no_longer_failing": len(done.dropped),
            "duration_seconds": round(done.seconds, 3),
            "causes_named": sum(len(k.result["segments"]) for k in ordered),
            "rules": dg.MetadataValue.md(
                markdown_table(
                    [
                        {
                            "rule": k.rule_id,
                            "executions": k.result["executions"],
                            "rate": f"{k.result['rate']:.1%}",
                            "why": k.sentence or "nothing stands out beyond chance",
                            "as of": f"{k.computed_at:%Y-%m-%d %H:%M}",
                        }
                        for k in ordered[:50]
                    ],
                    ["rule", "executions", "rate", "why", "as of"],
                    longest_cell=400,
                )
            ),
        }
        for answer in ordered[:PAGES]:
            name = _metadata_key(answer.rule_id)
            metadata[f"why {name}"] = dg.MetadataValue.md(answer.page)
            if answer.plots:
                metadata[f"plot {name}"] = dg.MetadataValue.md(
                    "\n\n".join(f"![{what} of {name}]({uri})" for what, uri in sorted(answer.plots.items()))
                )
        context.log.info(
            f"{len(done.failing)} failing rules, {len(done.computed)} attributed anew in {done.seconds:.2f} s."
        )
        yield dg.MaterializeResult(asset_key="rule_failure_cells", metadata=model)
        yield dg.MaterializeResult(asset_key="failure_attribution", metadata=metadata)

    return attribution


def _metadata_key(rule_id: str) -> str:
    return "".join(c if c.isalnum() or c in "-_." else "_" for c in rule_id)
