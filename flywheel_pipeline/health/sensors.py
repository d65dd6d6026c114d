"""The sensor that alerts: every few seconds it records what changed and sends what is due."""

from __future__ import annotations

import time

import dagster as dg

from flywheel_pipeline.database.resource import FlywheelDatabase

EVERY_SECONDS = 10
_LOADED = time.monotonic()


def build_alert_sensor() -> dg.SensorDefinition:
    """Build the sensor `alerts`. It starts no run: each tick is one look, told in numbers."""

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
        return dg.SkipReason(done.sentence)

    return alerts
