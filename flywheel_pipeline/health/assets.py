"""Dagster assets of the health room: which rules leave service, and why."""

from collections import Counter
from collections.abc import Iterator
from typing import Any

import dagster as dg

from flywheel_pipeline.aggregates.batches import open_batch
from flywheel_pipeline.database.resource import FlywheelDatabase
from flywheel_pipeline.health.stored import kept_attributions, update_attributions
from flywheel_pipeline.promotion.apply import apply_quarantines
from flywheel_pipeline.promotion.decide import decide_rules
from flywheel_pipeline.sql_models.assets import asset_spec, materialization_metadata, table_metadata
from flywheel_pipeline.sql_models.loader import ModelGraph
from flywheel_pipeline.sql_models.metadata import markdown_table

PAGES = 10  # failing rules whose whole answer a materialization shows; all of them stand in the table
MODEL_COST = 3_000.0  # planner cost (tens of ms) above which the cells are not counted on each run
PLOTTED = 3  # of those computed in this run, whose plots it shows; the worst rule's are always there


@dg.asset(
    group_name="health",
    deps=["rule_scorecard"],
    description=(
        "Rules that this batch took out of service, with the reason; they leave every manifest in the same transaction. "
        "Stands before the promotion gates on purpose: a failed gate or a freeze stops promotion, never this."
    ),
    owners=["team:data-platform"],
    kinds={"python", "postgres"},
)
def rule_quarantines(context: dg.AssetExecutionContext, database: FlywheelDatabase) -> dg.MaterializeResult[None]:
    """Decide for every rule in service whether it stays, and quarantine those that must not."""
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
    return dg.MaterializeResult(
        metadata={
            "rules": len(decided),
            "quarantined": len(applied.moved),
            **{f"verdict_{verdict}": count for verdict, count in sorted(verdicts.items())},
            "not_kept": dg.MetadataValue.md(markdown_table(shown[:50])),
        }
    )


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
                owners=["team:data-platform"],
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
        plotted = {*done.computed[:PLOTTED], *done.failing[:1]}
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
            if answer.rule_id in plotted:
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
