"""Dagster assets of the promotion room: decisions, the ledger, and the registry that folds from it."""

import time
from collections import Counter
from collections.abc import Iterator
from typing import Any

import dagster as dg
import sqlalchemy as sa

from flywheel_pipeline.aggregates.batches import open_batch
from flywheel_pipeline.database.resource import FlywheelDatabase
from flywheel_pipeline.materialized import data_lag, kept_plot
from flywheel_pipeline.promotion.apply import apply_promotions
from flywheel_pipeline.promotion.decide import decide_patterns
from flywheel_pipeline.promotion.funnel import plot_funnel, read_funnel
from flywheel_pipeline.sql_models.assets import PREVIEW_ROWS, relation_metadata, table_metadata
from flywheel_pipeline.sql_models.metadata import markdown_table, unlinked

OWNER = ["team:data-platform"]
NEWEST_DECISIONS = ("decision_id", "decided_at", "subject_kind", "subject_id", "verdict", "reason")
NEWEST_EVENTS = ("event_id", "occurred_at", "rule_id", "rule_version", "kind", "from_state", "to_state", "reason")


@dg.asset(
    group_name="promotion",
    deps=[
        "patterns",
        "pattern_candidates",
        "pattern_evidence",
        "rule_site_stats",
        "telemetry_violations",
        "telemetry_daily_volume",
        "rule_quarantines",
    ],
    description=(
        "One row whenever the verdict on a pattern or a rule, or its reasons, change; with policy hash and evidence. "
        "Deciding changes nothing: rule_events applies what was decided, if the gates of the same batch passed."
    ),
    owners=OWNER,
    kinds={"python", "postgres"},
    metadata=table_metadata("promotion_decisions"),
)
def promotion_decisions(context: dg.AssetExecutionContext, database: FlywheelDatabase) -> dg.MaterializeResult[None]:
    """Decide every pattern that waits."""
    begun = time.monotonic()
    with database.engine.begin() as connection:
        batch = open_batch(connection, context.run.run_id)
        decided = decide_patterns(connection, batch)
        shown = relation_metadata(connection, "promotion_decisions", NEWEST_DECISIONS, newest_by=("decision_id",))
    verdicts = Counter(item.decision.verdict for item in decided)
    rows: list[dict[str, Any]] = [
        {"pattern": d.subject_id, "verdict": d.decision.verdict, "reason": d.decision.reason, "new": d.changed}
        for d in decided
    ]
    return dg.MaterializeResult(
        metadata={
            "policy": batch.policy_name,
            "policy_hash": batch.policy_hash[:12],
            "decided": len(decided),
            "changed": sum(item.changed for item in decided),
            **{f"verdict_{verdict}": count for verdict, count in sorted(verdicts.items())},
            "decisions": dg.MetadataValue.md(markdown_table(rows[:50])),
            **shown,
            "rows_inserted": sum(item.changed for item in decided),
            **data_lag(batch),
            "duration_seconds": round(time.monotonic() - begun, 3),
        }
    )


@dg.multi_asset(
    name="apply",
    specs=[
        dg.AssetSpec(
            "rule_events",
            group_name="promotion",
            deps=["promotion_decisions"],
            description=(
                "The ledger: append-only, the only thing that changes a rule. The database refuses illegal steps, and "
                "promotions whose batch did not pass every required gate, whoever writes them."
            ),
            owners=OWNER,
            kinds={"postgres", "table"},
            metadata=table_metadata("rule_events"),
        ),
        dg.AssetSpec(
            "l1_rules",
            group_name="promotion",
            deps=["rule_events", "rule_quarantines"],
            description=(
                "The registry of L1 rules, built-in and promoted: the fold of rule_events, with counters set by the "
                "refresh. Nothing else can write a state."
            ),
            owners=OWNER,
            kinds={"postgres", "table"},
            metadata=table_metadata("l1_rules"),
        ),
    ],
    can_subset=False,
)
def apply(context: dg.AssetExecutionContext, database: FlywheelDatabase) -> Iterator[dg.MaterializeResult[None]]:
    """Append the events of this batch's promotions."""
    begun = time.monotonic()
    with database.engine.begin() as connection:
        batch = open_batch(connection, context.run.run_id)
        applied = apply_promotions(connection, batch)
    for subject, why in applied.held:
        context.log.warning(unlinked(f"Held: {subject}: {why}."))
    with database.engine.connect() as connection:
        events = relation_metadata(connection, "rule_events", NEWEST_EVENTS, newest_by=("event_id",))
        counts = connection.execute(
            sa.text(
                "SELECT count(*) AS rules, count(*) FILTER (WHERE enabled) AS enabled, "
                "count(*) FILTER (WHERE state = 'quarantined') AS quarantined, "
                "count(*) FILTER (WHERE source = 'builtin') AS builtin FROM l1_rules"
            )
        ).one()
        promoted = connection.execute(
            sa.text(
                "SELECT rule_id, state, runbook_id, match_count AS matches, success_rate AS rate, state_reason AS reason "
                "FROM l1_rules WHERE source = 'promoted' ORDER BY match_count DESC, rule_id LIMIT 50"
            )
        ).mappings()
        promoted_rules = [dict(row) for row in promoted]
        funnel = read_funnel(connection)
    alike = {**data_lag(batch), "duration_seconds": round(time.monotonic() - begun, 3)}
    yield dg.MaterializeResult(
        asset_key="rule_events",
        metadata={
            **events,
            **alike,
            "rows_inserted": len(applied.moved),
            "moved": len(applied.moved),
            "held": len(applied.held),
            "moves": dg.MetadataValue.md(markdown_table([{"rule": r, "to": s} for r, s in applied.moved])),
            "held_because": dg.MetadataValue.md(markdown_table([{"subject": s, "why": w} for s, w in applied.held])),
        },
    )
    yield dg.MaterializeResult(
        asset_key="l1_rules",
        metadata={
            "dagster/row_count": counts.rules,
            "enabled": counts.enabled,
            "quarantined": counts.quarantined,
            "builtin": counts.builtin,
            "preview": dg.MetadataValue.md(markdown_table(promoted_rules[:PREVIEW_ROWS])),
            "promoted_rules": dg.MetadataValue.md(markdown_table(promoted_rules)),
            **{label.replace(" ", "_"): count for label, count in funnel.steps},
            **kept_plot(
                context,
                "l1_rules",
                "promotion_funnel",
                "promotion funnel: " + ", ".join(f"{label} {count}" for label, count in funnel.steps),
                lambda: plot_funnel(funnel),
            ),
            **alike,
        },
    )
    if applied.gates_unmet:
        raise dg.Failure(
            description=unlinked(f"{len(applied.held)} promotions are held: {applied.held[0][1]}."),
            metadata={"held": dg.MetadataValue.md(markdown_table([{"subject": s, "why": w} for s, w in applied.held]))},
            allow_retries=False,
        )
