"""Dagster checks of the telemetry room."""

from __future__ import annotations

from flywheel_pipeline.checks import Check, at_batch, check_step, reading
from flywheel_pipeline.health.new_errors import no_new_errors
from flywheel_pipeline.telemetry import quality
from flywheel_pipeline.telemetry.evidence import evidence_agrees
from flywheel_pipeline.telemetry.volume import volume_is_usual

telemetry_checks = check_step(
    "telemetry_checks",
    [
        Check(
            "telemetry_violations",
            "telemetry_contract",
            "No row of the last 7 days breaks the telemetry contract. Required for promotion.",
            at_batch(quality.telemetry_contract),
            gate=True,
        ),
        Check(
            "telemetry_daily_volume",
            "telemetry_freshness",
            "The newest telemetry arrived within 24 hours. Required for promotion.",
            at_batch(quality.telemetry_freshness),
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
            at_batch(quality.agent_releases_report),
            warn=True,
        ),
        Check(
            "telemetry_daily_volume",
            "sites_and_tiers_report",
            "Every site and tier that reported through the week reported in the last 24 hours.",
            at_batch(quality.sites_and_tiers_report),
            warn=True,
        ),
    ],
)

# Questions about a full day, or that read the log itself: at night, with the contracts.
telemetry_nightly_checks = check_step(
    "telemetry_nightly_checks",
    [
        Check(
            "telemetry_daily_volume",
            "volume_is_usual",
            "On the last full day each tier, site and agent release sent about as much as on that weekday before; asked every night.",
            at_batch(volume_is_usual),
            warn=True,
        ),
        Check(
            "executions",
            "no_new_errors",
            "No error class and no error template arrived in the last 24 hours for the first time; asked every night.",
            at_batch(no_new_errors),
            warn=True,
        ),
        Check(
            "executions",
            "evidence_agrees_with_telemetry",
            "No evidence bundle contradicts what telemetry reported, or shows a failure it never did; asked every night.",
            at_batch(evidence_agrees),
            warn=True,
        ),
    ],
)
NIGHTLY_CHECKS = tuple(telemetry_nightly_checks.check_keys)
