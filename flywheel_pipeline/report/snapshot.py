"""One snapshot, read-only: what a report or an export says is of one moment, and nothing it does can write.

Belongs here: the transaction and the bounds of the period. Does not belong here: any query.
"""

from __future__ import annotations

import datetime as dt
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import sqlalchemy as sa

from flywheel_pipeline.errors import UsageError


@dataclass(frozen=True)
class Period:
    """Days, UTC, both ends included; None is open.

    Raises:
        UsageError: it ends before it begins.
    """

    since: dt.date | None = None
    until: dt.date | None = None

    def __post_init__(self) -> None:
        if self.since is not None and self.until is not None and self.until < self.since:
            raise UsageError(
                f"The period ends ({self.until}) before it begins ({self.since}).", hint="--from is the earlier day."
            )

    @property
    def bounds(self) -> dict[str, Any]:
        """Bind parameters `since` and `until` (dates or None) of a query."""
        return {"since": self.since, "until": self.until}

    def __str__(self) -> str:
        if self.since is None and self.until is None:
            return "everything on record"
        return f"{self.since or 'the beginning'} to {self.until or 'now'}"


def within_time(column: str) -> str:
    """Return the SQL condition that a TIMESTAMPTZ column of ours lies in the period, by UTC days."""
    return (
        f"(CAST(:since AS date) IS NULL OR {column} >= CAST(:since AS date)::timestamp AT TIME ZONE 'UTC') AND "
        f"(CAST(:until AS date) IS NULL OR {column} < (CAST(:until AS date) + 1)::timestamp AT TIME ZONE 'UTC')"
    )


def within_day(column: str) -> str:
    """Return the SQL condition that a DATE column of ours lies in the period."""
    return (
        f"(CAST(:since AS date) IS NULL OR {column} >= CAST(:since AS date)) AND "
        f"(CAST(:until AS date) IS NULL OR {column} <= CAST(:until AS date))"
    )


@contextmanager
def snapshot(engine: sa.Engine) -> Iterator[sa.Connection]:
    """Open one snapshot in one transaction in which the database refuses every write."""
    with engine.connect().execution_options(isolation_level="REPEATABLE READ") as connection, connection.begin():
        connection.exec_driver_sql("SET TRANSACTION READ ONLY")
        yield connection
