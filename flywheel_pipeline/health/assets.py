"""Dagster assets of the health room: which rules leave service, and why."""

from collections import Counter
from typing import Any

import dagster as dg

from flywheel_pipeline.aggregates.batches import open_batch
from flywheel_pipeline.database.resource import FlywheelDatabase
from flywheel_pipeline.promotion.apply import apply_quarantines
from flywheel_pipeline.promotion.decide import decide_rules
from flywheel_pipeline.sql_models.metadata import markdown_table


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
