"""Dagster assets of the health room: where every CUSUM stands, which rules and scopes leave service, and why."""

import time
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

import dagster as dg
import sqlalchemy as sa

from flywheel_pipeline.aggregates.assets import model_specs
from flywheel_pipeline.aggregates.batches import Batch, open_batch
from flywheel_pipeline.database.resource import FlywheelDatabase
from flywheel_pipeline.health.stored import Kept, kept_attributions, update_attributions
from flywheel_pipeline.health.trend import alarm_state, cusum_by_day, cusum_by_hour, plot_trend, rate_by_day
from flywheel_pipeline.materialized import data_lag, kept_plot
from flywheel_pipeline.promotion.apply import apply_quarantines
from flywheel_pipeline.promotion.decide import Decided, decide_rules
from flywheel_pipeline.promotion.policy import load_policy
from flywheel_pipeline.sql_models.assets import (
    COUNT_COST_LIMIT,
    PREVIEW_ROWS,
    asset_spec,
    materialization_metadata,
    relation_metadata,
    table_metadata,
)
from flywheel_pipeline.sql_models.loader import ModelGraph
from flywheel_pipeline.sql_models.metadata import markdown_table

OWNER = ["team:data-platform"]
PAGES = 10  # failing rules whose whole answer a materialization shows; all of them stand in the table
MODEL_COST = 3_000.0  # planner cost (tens of ms) above which the cells are not counted on each run
ATTRIBUTION = ("rule_failure_cells",)  # models of this room that the attribution materializes
# Views over every episode of every rule in service: counting their rows would cost more than the run.
NOT_COUNTED = ("rule_episodes", "cusum_steps", "rule_cusum")
NEWEST_SCOPES = ("occurred_at", "rule_id", "kind", "scope_kind", "scope_value", "actor", "reason")


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
        begun = time.monotonic()
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
                    limit = 0.0 if model.name in NOT_COUNTED else COUNT_COST_LIMIT
                    metadata = materialization_metadata(connection, model, cost_limit=limit)
                    if model.name == "rule_cusum":
                        metadata.update(_cusum_metadata(context, connection, batch, decided))
                    yield dg.MaterializeResult(asset_key=model.name, metadata=metadata)
            events = relation_metadata(connection, "scope_quarantines", NEWEST_SCOPES, newest_by=("event_id",))
            scopes = [
                dict(row)
                for row in connection.execute(
                    sa.text(
                        "SELECT rule_id AS rule, scope_kind AS scope, scope_value AS value, actor, reason "
                        "FROM quarantined_scopes ORDER BY since DESC, rule_id LIMIT 50"
                    )
                ).mappings()
            ]
        alike = {**data_lag(batch), "duration_seconds": round(time.monotonic() - begun, 3)}
        yield dg.MaterializeResult(
            asset_key="rule_quarantines",
            metadata={
                "rules": len(decided),
                "quarantined": sum(what == "quarantined" for _, what in applied.moved),
                "quarantined_scopes": sum(what != "quarantined" for _, what in applied.moved),
                **{f"verdict_{verdict}": count for verdict, count in sorted(verdicts.items())},
                "preview": dg.MetadataValue.md(markdown_table(shown[:PREVIEW_ROWS])),
                "not_kept": dg.MetadataValue.md(markdown_table(shown[:50])),
                **alike,
            },
        )
        yield dg.MaterializeResult(
            asset_key="scope_quarantines",
            metadata={
                **events,
                "rows_inserted": sum(what != "quarantined" for _, what in applied.moved),
                "in_force": dg.MetadataValue.md(markdown_table(scopes)),
                **alike,
            },
        )

    return demote


def _cusum_metadata(
    context: dg.AssetExecutionContext, connection: sa.Connection, batch: Batch, decided: Sequence[Decided]
) -> dict[str, Any]:
    """Where the CUSUMs stand, as they were just decided upon, and the rule with the highest W over time."""
    c = load_policy(batch.policy_name).demotion.cusum
    by_w = sorted(
        ((scope, item.subject_id) for item in decided for scope in item.scopes),
        key=lambda found: (-found[0].w, found[1], found[0].kind, found[0].value),
    )
    fleets = [(scope, rule_id) for scope, rule_id in by_w if scope.kind == "fleet"]
    states = Counter(alarm_state(scope.w_peak, c) for scope, _ in by_w)
    metadata: dict[str, Any] = {
        "rules_watched": len(fleets),
        "scopes_warned": states["warned"],
        "scopes_alarmed": states["alarmed"],
        "preview": dg.MetadataValue.md(
            markdown_table(
                [
                    {"rule": rule_id, "scope": s.kind, "value": s.value, "w": s.w, "highest w": s.w_peak}
                    | {"episodes": s.episodes, "failures": s.failures}
                    for s, rule_id in by_w[:PREVIEW_ROWS]
                ]
            )
        ),
    }
    if fleets:
        worst, rule_id = fleets[0]
        metadata["highest_w"] = worst.w

        def draw() -> str:
            points = cusum_by_hour(connection, rule_id, batch.policy_hash) or cusum_by_day(connection, rule_id, c)
            return plot_trend(f"{rule_id}: success rate and CUSUM", rate_by_day(connection, rule_id), points, c)

        words = f"success rate and CUSUM of {rule_id}, {alarm_state(worst.w_peak, c)}"
        metadata.update(kept_plot(context, "rule_cusum", "worst_rule", words, draw))
    return metadata


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
        lag = data_lag(batch)
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
            **lag,
            "causes_named": sum(len(k.result["segments"]) for k in ordered),
            "preview": dg.MetadataValue.md(_table_of(ordered[:PREVIEW_ROWS], 200)),
            "rules": dg.MetadataValue.md(_table_of(ordered[:50], 400)),
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


def _table_of(kept: Sequence[Kept], longest_cell: int) -> str:
    return markdown_table(
        [
            {
                "rule": k.rule_id,
                "executions": k.result["executions"],
                "rate": f"{k.result['rate']:.1%}",
                "why": k.sentence or "nothing stands out beyond chance",
                "as of": f"{k.computed_at:%Y-%m-%d %H:%M}",
            }
            for k in kept
        ],
        ["rule", "executions", "rate", "why", "as of"],
        longest_cell=longest_cell,
    )


def _metadata_key(rule_id: str) -> str:
    return "".join(c if c.isalnum() or c in "-_." else "_" for c in rule_id)
