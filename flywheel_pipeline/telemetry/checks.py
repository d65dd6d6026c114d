"""Dagster checks of the telemetry room."""

from __future__ import annotations

from collections.abc import Mapping

import sqlalchemy as sa

from flywheel_pipeline.aggregates.batches import Batch
from flywheel_pipeline.checks import Check, check_step, reading
from flywheel_pipeline.quality import Finding
from flywheel_pipeline.telemetry import quality


def _contract(engine: sa.Engine, batch: Batch, _tags: Mapping[str, str]) -> Finding:
    with engine.connect() as connection:
        return quality.telemetry_contract(connection, batch.now)


def _freshness(engine: sa.Engine, batch: Batch, _tags: Mapping[str, str]) -> Finding:
    with engine.connect() as connection:
        return quality.telemetry_freshness(connection, batch.now)


def _releases(engine: sa.Engine, batch: Batch, _tags: Mapping[str, str]) -> Finding:
    with engine.connect() as connection:
        return quality.agent_releases_report(connection, batch.now)


telemetry_checks = check_step(
    "telemetry_checks",
    [
        Check(
            "telemetry_violations",
            "telemetry_contract",
            "No row of the last 7 days breaks the telemetry contract. Required for promotion.",
            _contract,
            gate=True,
        ),
        Check(
            "telemetry_daily_volume",
            "telemetry_freshness",
            "The newest telemetry arrived within 24 hours. Required for promotion.",
            _freshness,
            gate=True,
        ),
        Check(
            "telemetry_violations",
            "no_skewed_clocks",
            "Every row has a credible event time.",
            reading(quality.no_skewed_clocks),
            warn=True,
        ),
        Check(
            "telemetry_violations",
            "no_open_rejects",
            "No rejected row waits to be retried or discarded.",
            reading(quality.no_open_rejects),
            warn=True,
        ),
        Check(
            "telemetry_daily_volume",
            "agent_releases_report",
            "Every agent release that reported through the week reported in the last 24 hours.",
            _releases,
            warn=True,
        ),
    ],
)
