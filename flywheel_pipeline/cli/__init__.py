"""The command `flywheel`. Each command is a thin shell around a function that the tests call without it."""

from flywheel_pipeline.cli.app import main

__all__ = ["main"]
