"""May a day's telemetry go? Only if the archive holds it whole, unspoilt, and as it is now.

Belongs here: what a purge asks before it deletes. Does not belong here: the purge (`aggregates/refresh.py`).
"""

from __future__ import annotations

import datetime as dt
from collections.abc import Mapping

import sqlalchemy as sa

from flywheel_pipeline.archive.days import not_current
from flywheel_pipeline.archive.errors import NotSafelyArchived
from flywheel_pipeline.archive.layout import Archive, DayManifest
from flywheel_pipeline.database.limits import let_idle
from flywheel_pipeline.errors import ArchiveError


def verify_before(connection: sa.Connection, archive: Archive, before: dt.date) -> dict[dt.date, DayManifest]:
    """Read every byte of the archived days before `before` that have telemetry; return their manifests.

    It takes as long as the files are large, so it is asked before any lock is taken.

    Raises:
        NotSafelyArchived: a day is not in the archive, or not as it was written.
    """
    let_idle(connection)
    days = connection.execute(
        sa.text(
            "SELECT DISTINCT (event_at AT TIME ZONE 'UTC')::date AS day FROM execution_telemetry "
            "WHERE event_at < CAST(:before AS timestamp) AT TIME ZONE 'UTC' ORDER BY day"
        ),
        {"before": before},
    ).scalars()
    found = {}
    for day in days:
        try:
            found[day] = archive.verify(day)
        except ArchiveError as error:
            raise _refusal(before, error.message, error.hint) from error
    return found


def require_archived(
    connection: sa.Connection,
    archive: Archive,
    before: dt.date,
    verified: Mapping[dt.date, DayManifest],
    live_rows: Mapping[dt.date, int],
) -> None:
    """Refuse unless each of these days was verified and is in the database as its manifest has it.

    Args:
        connection: a transaction in which nobody else exports (`days.exclude_others`), nobody writes telemetry and no cell of
            these days waits in the outbox.
        archive: the archive.
        before: the first day that is kept.
        verified: what `verify_before` found.
        live_rows: rows in the database, by day.

    Raises:
        NotSafelyArchived: in one sentence, the first day that is not.
    """
    versions = {
        row.day: row.version
        for row in connection.execute(
            sa.text("SELECT day, version::text AS version FROM day_versions WHERE day < :before"), {"before": before}
        )
    }
    for day, rows in live_rows.items():
        again = f"Run `flywheel archive export --from {day} --to {day}`, then purge again."
        if day not in verified or archive.read_manifest(day).generation != verified[day].generation:
            raise _refusal(before, f"{day} was written or exported while its archive was verified.", "Purge again.")
        problem = not_current(verified[day], versions.get(day), rows)
        if problem is not None:
            raise _refusal(before, f"{day}: {problem}", again)


def _refusal(before: dt.date, why: str, hint: str | None) -> NotSafelyArchived:
    return NotSafelyArchived(
        f"Nothing before {before} was purged, since the archive does not hold all of it. {why}", hint=hint
    )
