"""Why an engine is not used: one class for each reason, each one sentence and what to do."""

from __future__ import annotations

from typing import ClassVar

from flywheel_pipeline.errors import FlywheelError, ModelError


class EngineError(FlywheelError):
    """An engine could not compute; PostgreSQL holds what it held before."""

    exit_code: ClassVar[int] = 10


class EngineNotInstalled(EngineError):
    """The engine's package, or Java, is not there."""


class EngineUnreachable(EngineError):
    """The Spark master is none, or does not answer."""


class DatabaseNotPortable(EngineError):
    """The database compares or folds text in a way that no engine reproduces."""


class NotPortable(ModelError):
    """A model says something that an engine would compute differently."""
