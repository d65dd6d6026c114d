"""The question about the archive: do archived and live rows add up to what is counted? No Dagster here."""

from __future__ import annotations

import datetime as dt
from collections import Counter

import sqlalchemy as sa

from flywheel_pipeline.archive.days import DayState, State, day_states
from flywheel_pipeline.archive.layout import Archive
from flywheel_pipeline.errors import ArchiveError
from flywheel_pipeline.quality import Finding

REQUIRED = "0 days off"


def archived_and_live_are_all(
    connection: sa.Connection, archive: Archive | None, *, today: dt.date, after_days: int
) -> Finding:
    """For each day the rows in the database, or where those were purged the archived ones, equal what the figures count.

    A day whose telemetry lies in the archive alone must be there, with the size of every file; a day in both with the same rows
    in both. Days that wait for a refresh are left out, days that wait for an export are no offence: the next one takes them.
    """
    try:
        states = day_states(connection, archive, today=today, after_days=after_days)
    except ArchiveError as error:
        return Finding(False, f"{error.message} {error.hint or ''}".strip(), "no answer", REQUIRED, 1)
    rows = Counter(dict.fromkeys(("live", "archived_alone", "purged_unarchived", "all_time"), 0))
    offenders = []
    for state in states:
        if state.state is State.WAITING:
            continue
        rows["live"] += state.live_rows
        rows["all_time"] += state.counted_rows
        if state.purged_rows is not None:
            name = "purged_unarchived" if state.state is State.PURGED else "archived_alone"
            rows[name] += state.purged_rows if state.state is State.PURGED else state.archived_rows or 0
        problem = _problem(state)
        if problem is not None:
            offenders.append({"day": state.day.isoformat(), "problem": problem})
    found = Counter(state.state for state in states)
    where = "no archive is set" if archive is None else f"{found[State.ARCHIVED] + found[State.SEALED]} days archived"
    return Finding(
        passed=not offenders,
        sentence=f"{rows['live']:,} live + {rows['archived_alone']:,} archived + {rows['purged_unarchived']:,} purged "
        f"= {rows['all_time']:,} counted executions; {where}."
        if not offenders
        else f"{len(offenders)} days are off, first {offenders[0]['day']}: {offenders[0]['problem']}",
        observed=f"{len(offenders)} days off",
        required=REQUIRED,
        offenders=len(offenders),
        sample=offenders[:20],
        figures={
            **{f"{name}_rows": count for name, count in rows.items()},
            "archived_days": found[State.ARCHIVED] + found[State.SEALED],
            "days_to_export": sum(state.waits for state in states),
        },
    )


def _problem(state: DayState) -> str | None:
    if state.state in (State.LOST, State.BROKEN):
        return state.reason
    if state.state is State.ARCHIVED and state.archived_rows != state.live_rows:
        return f"{state.archived_rows:,} rows are archived, {state.live_rows:,} are in the database."
    held = state.live_rows if state.purged_rows is None else state.purged_rows + state.live_rows
    if held != state.counted_rows:
        return f"{held:,} rows are there, {state.counted_rows:,} are counted; `flywheel rebuild` counts live ones anew."
    return None
