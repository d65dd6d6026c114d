"""Errors that a user can act on, each with the exit code of the command line.

Belongs here: exceptions that reach the terminal or an HTTP sender as one sentence and what to do next.
Does not belong here: programming errors; those stay ordinary exceptions with a traceback.
"""

from __future__ import annotations

from typing import ClassVar


class FlywheelError(Exception):
    """A refusal or failure that explains itself.

    `message` is one sentence on what is wrong; `hint`, if any, says what to do next.
    """

    exit_code: ClassVar[int] = 1

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint


class UsageError(FlywheelError):
    """The command or its arguments make no sense."""

    exit_code: ClassVar[int] = 2


class DatabaseUnavailable(FlywheelError):
    """PostgreSQL cannot be started, reached or used."""

    exit_code: ClassVar[int] = 3


class SchemaMismatch(FlywheelError):
    """The live schema is newer than, or differs from, the one this release declares."""

    exit_code: ClassVar[int] = 4


class RowsRejected(FlywheelError):
    """An import finished; good rows landed, some rows went to the rejects."""

    exit_code: ClassVar[int] = 5


class PortInUse(FlywheelError):
    """Another process listens on the port that was asked for."""

    exit_code: ClassVar[int] = 6


class ModelError(FlywheelError):
    """An SQL model was refused."""

    exit_code: ClassVar[int] = 7


class PolicyError(FlywheelError):
    """A promotion policy was refused."""

    exit_code: ClassVar[int] = 8


class ArchiveError(FlywheelError):
    """The archive of telemetry is not there, not whole, or cannot be read or written."""

    exit_code: ClassVar[int] = 9
