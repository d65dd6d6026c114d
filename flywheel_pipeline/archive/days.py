"""Which days are closed, which the archive holds as they are now, and which were corrected since.

Belongs here: the state of each day, by database and archive. Does not belong here: the export itself.

A day's telemetry has a version (`day_versions`). Whoever takes written cells of the day out of the outbox gives it another
one, in the same transaction (a trigger). So a day is as the export saw it if, and only if, its version is the one in the
manifest and no written cell of it waits. That holds whatever the order of commits: a row's outbox entry commits with the row,
and leaves only together with the new version.
"""

from __future__ import annotations

import datetime as dt
from dataclasses import dataclass
from enum import StrEnum

import sqlalchemy as sa

from flywheel_pipeline.archive.errors import DayNotArchived
from flywheel_pipeline.archive.layout import Archive, DayManifest
from flywheel_pipeline.database.limits import let_idle
from flywheel_pipeline.errors import ArchiveError


class State(StrEnum):
    """Where a day stands. DUE, CORRECTED and BROKEN days wait for an export."""

    OPEN = "open"
    WAITING = "waiting"
    DUE = "due"
    ARCHIVED = "archived"
    CORRECTED = "corrected"
    BROKEN = "broken"
    SEALED = "sealed"
    LOST = "lost"
    PURGED = "purged"


@dataclass(frozen=True)
class DayState:
    """One day. `live_rows` are in PostgreSQL, `archived_rows` in the archive (None: it holds none that can be read).

    `reason` says in one sentence why it is in its state; `counted_rows` is what the aggregates count for it.
    """

    day: dt.date
    state: State
    reason: str
    live_rows: int
    counted_rows: int
    archived_rows: int | None
    purged_rows: int | None
    archived_bytes: int | None = None
    generation: str | None = None
    corrections: int | None = None

    @property
    def waits(self) -> bool:
        """Whether an export of it is due."""
        return self.state in (State.DUE, State.CORRECTED, State.BROKEN)


# One statement, so one snapshot.
_DAYS = """
WITH logged AS (
  SELECT (event_at AT TIME ZONE 'UTC')::date AS day, count(*) AS rows FROM execution_telemetry GROUP BY 1
),
counted AS (
  SELECT day, sum(n)::bigint AS rows
  FROM (
    SELECT day, sum(executions) AS n FROM telemetry_daily_volume GROUP BY day
    UNION ALL SELECT day, count(*) FROM telemetry_violations WHERE problem = 'skewed_clock' GROUP BY day
  ) AS c
  GROUP BY day
),
waiting AS (SELECT day, count(*) AS cells FROM (SELECT DISTINCT site_id, day FROM touched_cells) AS c GROUP BY day),
named AS (
  SELECT day FROM logged UNION SELECT day FROM counted UNION SELECT day FROM waiting UNION SELECT day FROM sealed_days
  UNION SELECT unnest(CAST(:archived AS date[]))
)
SELECT day, coalesce(l.rows, 0) AS live, coalesce(c.rows, 0) AS counted, coalesce(w.cells, 0) AS waiting,
       s.rows_purged, s.archived_generation, v.version::text AS version
FROM named LEFT JOIN logged AS l USING (day) LEFT JOIN counted AS c USING (day) LEFT JOIN waiting AS w USING (day)
LEFT JOIN sealed_days AS s USING (day) LEFT JOIN day_versions AS v USING (day)
ORDER BY day
"""


def day_states(
    connection: sa.Connection, archive: Archive | None, *, today: dt.date, after_days: int
) -> list[DayState]:
    """Return every day that has telemetry, figures or an archive, in order.

    Args:
        connection: the database.
        archive: None: no archive is set; then no day is looked up there.
        today: the UTC day by which days are young.
        after_days: full days that pass after a day's end before it is closed.

    Raises:
        ArchiveUnreachable: the file system did not answer.
    """
    let_idle(connection)
    archived = archive.days() if archive is not None else []
    rows = connection.execute(sa.text(_DAYS), {"archived": archived}).all()
    closed_before = today - dt.timedelta(days=after_days)
    return [_state(row, archive, closed_before) for row in rows]


def _state(row: sa.Row[tuple[object, ...]], archive: Archive | None, closed_before: dt.date) -> DayState:
    manifest: DayManifest | None = None
    broken: ArchiveError | None = None
    if archive is not None:
        try:
            manifest = archive.manifest(row.day)
        except DayNotArchived:
            pass
        except ArchiveError as error:
            broken = error
    state, reason = _judge(row, manifest, broken, closed_before)
    return DayState(
        row.day,
        state,
        reason,
        row.live,
        row.counted,
        None if manifest is None else manifest.rows,
        row.rows_purged,
        None if manifest is None else manifest.total_bytes,
        None if manifest is None else manifest.generation,
        None if manifest is None else manifest.rows_of("corrections"),
    )


def _judge(
    row: sa.Row[tuple[object, ...]], manifest: DayManifest | None, broken: ArchiveError | None, closed_before: dt.date
) -> tuple[State, str]:
    if row.rows_purged is not None:
        return _judge_sealed(row, manifest, broken)
    if row.day >= closed_before:
        return State.OPEN, "It is too young to be closed."
    if row.waiting:
        return State.WAITING, f"{row.waiting} cells of it wait for a refresh."
    if broken is not None:
        return State.BROKEN, broken.message
    if manifest is None:
        return State.DUE, "It is closed and not archived."
    problem = not_current(manifest, row.version, row.live)
    return (State.CORRECTED, problem) if problem else (State.ARCHIVED, "The archive holds it as it is now.")


def _judge_sealed(
    row: sa.Row[tuple[object, ...]], manifest: DayManifest | None, broken: ArchiveError | None
) -> tuple[State, str]:
    if row.archived_generation is None:
        return (
            State.PURGED,
            f"It was purged without an archive: its {row.rows_purged:,} rows live on in the figures alone.",
        )
    if broken is not None:
        return State.LOST, broken.message
    if manifest is None:
        return State.LOST, "It was purged after it was archived, and no archive that is set holds it."
    if manifest.generation != row.archived_generation or manifest.rows != row.rows_purged:
        return (
            State.LOST,
            f"The archive holds {manifest.rows:,} rows of generation {manifest.generation}; "
            f"{row.rows_purged:,} of generation {row.archived_generation} were purged.",
        )
    return State.SEALED, "Its telemetry lies in the archive alone."


def not_current(manifest: DayManifest, version: str | None, live_rows: int) -> str | None:
    """Return why a day's manifest is not of its telemetry as it is now, in one sentence; None where it is.

    No cell of the day may wait in the outbox; who asks looks at that in the same snapshot.
    """
    if manifest.day_version != version:
        return f"Its telemetry changed after it was exported at {manifest.exported_at:%Y-%m-%d %H:%M} UTC."
    if manifest.rows != live_rows:
        return f"The archive holds {manifest.rows:,} rows of it and the database {live_rows:,}: some were written past the outbox."
    return None


def give_version(engine: sa.Engine, day: dt.date) -> None:
    """See to it that a day has a version: days from before there were versions have none until they are exported."""
    with engine.begin() as connection:
        connection.execute(sa.text("INSERT INTO day_versions (day) VALUES (:day) ON CONFLICT DO NOTHING"), {"day": day})


def exclude_others(connection: sa.Connection) -> None:
    """Keep exports, sweeps and purges out to the end of the transaction, waiting for one at work; writers and refreshes go on.

    It takes no snapshot: said first in a transaction, whatever the one before committed is seen. The transaction may stand idle:
    ended while the archive is written or swept, it would let others in.
    """
    let_idle(connection)
    connection.exec_driver_sql("LOCK TABLE day_versions IN SHARE UPDATE EXCLUSIVE MODE")
