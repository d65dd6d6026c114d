"""The alerts in the asset graph: their table, and the check that they arrive."""

from __future__ import annotations

import dagster as dg

from flywheel_pipeline.checks import Check, check_step, reading
from flywheel_pipeline.health.alerting.quality import alerts_are_delivered
from flywheel_pipeline.sql_models.assets import table_metadata

alerts_table = dg.AssetSpec(
    "alerts",
    group_name="health",
    description=(
        "One row per check, job, rule, pattern and daemon that can alert, with its state as last told. "
        "Written by the sensor `alerts` and by the watchers outside the daemon, each change once."
    ),
    owners=["team:data-platform"],
    kinds={"postgres", "table"},
    metadata=table_metadata("alerts"),
)

alert_checks = check_step(
    "alert_checks",
    [
        Check(
            "alerts",
            "alerts_are_delivered",
            "No alert waits for its receiver for longer than five minutes; channels that do not answer stand in the table.",
            reading(alerts_are_delivered),
            warn=True,
        )
    ],
)
