"""The Dagster code location."""

from flywheel_pipeline.build import build_defs

defs = build_defs()
