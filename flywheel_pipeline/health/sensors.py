"""The sensor that alerts: every few seconds it records what changed and sends what is due."""

from __future__ import annotations

import time

import dagster as dg

from flywheel_pipeline.database.resource import FlywheelDatabase
from flywheel_pipeline.sql_models.assets import relation_metadata

EVERY_SECONDS = 10
SHOWN = ("alert_key", "state", "severity", "title", "sentence", "last_at", "acknowledged_by")
SAID_EVERY_SECONDS = 3600.0
_LOADED = time.monotonic()


def build_alert_sensor() -> dg.SensorDefinition:
    """Build the sensor `alerts`. It starts no run: each tick is one look, told in numbers.

    Once an hour it says on the asset `alerts` that it looks: the asset's freshness is judged by that.
    """
    said: list[float] = []

    @dg.sensor(
        name="alerts",
        minimum_interval_seconds=EVERY_SECONDS,
        default_status=dg.DefaultSensorStatus.RUNNING,
        description=(
            "Tells a check, job, rule, pattern or daemon that changed its state to the channels of FLYWHEEL_ALERT_URLS, "
            "once each, and when it recovers. Starts no run; a tick says in numbers what it saw and sent."
        ),
    )
    def alerts(context: dg.SensorEvaluationContext, database: FlywheelDatabase) -> dg.SkipReason:
        from flywheel_pipeline.health.alerting.channels import get_alerting
        from flywheel_pipeline.health.alerting.watch import everything, look

        alerting = get_alerting()
        done = look(
            database.engine,
            everything(context.instance, context.repository_def, alerting, watching_seconds=time.monotonic() - _LOADED),
            alerting,
            budget_seconds=20.0,
        )
        if not said or time.monotonic() - said[-1] >= SAID_EVERY_SECONDS:
            with database.engine.connect() as connection:
                rows = relation_metadata(connection, "alerts", SHOWN, newest_by=("last_at",))
            context.instance.report_runless_asset_event(
                dg.AssetMaterialization(
                    "alerts",
                    description=done.sentence,
                    metadata={**rows, "observations": done.observations, "open_alerts": done.open_alerts},
                )
            )
            said[:] = [time.monotonic()]
        return dg.SkipReason(done.sentence)

    return alerts
