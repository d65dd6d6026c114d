"""Dagster checks of the aggregates room."""

from __future__ import annotations

from collections.abc import Mapping

import sqlalchemy as sa

from flywheel_pipeline.aggregates import quality
from flywheel_pipeline.aggregates.batches import Batch
from flywheel_pipeline.checks import Check, check_step, reading
from flywheel_pipeline.quality import Finding

FULL_RECOUNT_TAG = "flywheel/full_recount"


def _recount(engine: sa.Engine, _batch: Batch, tags: Mapping[str, str]) -> Finding:
    return quality.counters_equal_recount(engine, full=tags.get(FULL_RECOUNT_TAG) == "true")


aggregates_checks = check_step(
    "aggregates_checks",
    [
        Check(
            "rule_site_stats",
            "counters_equal_recount",
            "Every counter equals a recount from the log: sampled each run, in full at night. Required for promotion.",
            _recount,
            gate=True,
        ),
        Check(
            "rule_scorecard",
            "attributed_plus_unresolved_is_all",
            "Each L1 execution stands under a known rule or under the unresolved ids.",
            reading(quality.attributed_plus_unresolved_is_all),
        ),
        Check(
            "unresolved_rule_ids",
            "no_unresolved_rule_ids",
            "No L1 telemetry names a rule that the registry does not know.",
            reading(quality.no_unresolved_rule_ids),
            warn=True,
        ),
        Check(
            "rule_scorecard",
            "exclusions_are_few",
            "For no enabled rule are over 20 % of the executions left out of its rate.",
            reading(quality.exclusions_are_few),
            warn=True,
        ),
    ],
)
