"""Dagster checks of the promotion room."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import sqlalchemy as sa

from flywheel_pipeline.aggregates.batches import Batch
from flywheel_pipeline.checks import Check, Question, check_step, reading
from flywheel_pipeline.promotion import quality
from flywheel_pipeline.quality import Finding


def _of_batch(question: Callable[[sa.Connection, Batch], Finding]) -> Question:
    def ask(engine: sa.Engine, batch: Batch, _tags: Mapping[str, str]) -> Finding:
        with engine.connect() as connection:
            return question(connection, batch)

    return ask


promotion_gates = check_step(
    "promotion_gates",
    [
        Check(
            "promotion_decisions",
            "executable_runbooks_only",
            "Each rule to be enabled runs an executable runbook of the catalogue, for its platform. Required for promotion.",
            _of_batch(quality.executable_runbooks_only),
            gate=True,
        ),
        Check(
            "promotion_decisions",
            "success_floor",
            "Each pattern to be promoted meets the policy's success floor, recounted from the log. Required for promotion.",
            _of_batch(quality.success_floor),
            gate=True,
        ),
    ],
)

registry_checks = check_step(
    "registry_checks",
    [
        Check(
            "l1_rules",
            "registry_equals_ledger",
            "l1_rules equals the fold of rule_events.",
            reading(quality.registry_equals_ledger),
        ),
        Check(
            "l1_rules",
            "no_placeholder_enabled",
            "Every enabled rule runs an executable runbook.",
            reading(quality.no_placeholder_enabled),
        ),
        Check(
            "l1_rules",
            "patterns_and_rules_reconcile",
            "Every promoted pattern has its own rule, and every promoted rule its own promoted pattern.",
            reading(quality.patterns_and_rules_reconcile),
            warn=True,
        ),
    ],
)
