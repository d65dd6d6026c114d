"""Flywheel: execution telemetry to promoted L1 rules, exact, explainable and fail-closed."""

__version__ = "0.1.0"
