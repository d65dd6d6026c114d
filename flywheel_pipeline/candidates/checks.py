"""Dagster checks of the candidates room."""

from flywheel_pipeline.candidates import quality
from flywheel_pipeline.checks import Check, check_step, reading

candidates_checks = check_step(
    "candidates_checks",
    [
        Check(
            "pattern_candidates",
            "reported_rates_are_observed",
            "No imported pattern was reported better than telemetry observes; its success-only counts decide nothing.",
            reading(quality.reported_rates_are_observed),
            warn=True,
        ),
    ],
)
