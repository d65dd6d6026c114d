"""Writing a report: one snapshot, one page, one file that appears when it is whole.

Belongs here: putting the rooms of the report together. Does not belong here: what stands in it.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import sqlalchemy as sa

from flywheel_pipeline import __version__
from flywheel_pipeline.errors import UsageError
from flywheel_pipeline.report.overview import overview
from flywheel_pipeline.report.page import render
from flywheel_pipeline.report.rule import rule_page
from flywheel_pipeline.report.snapshot import Period, snapshot


@dataclass(frozen=True)
class Report:
    """What was written."""

    file: str
    title: str
    sections: int
    bytes: int
    duration_seconds: float


def write_report(
    engine: sa.Engine,
    file: Path,
    *,
    rule: str | None = None,
    period: Period | None = None,
    progress: Callable[[str], None] | None = None,
) -> Report:
    """Write the report on the whole, or on one rule, to a file; an earlier one is replaced.

    Args:
        engine: the database, at the schema of this release; nothing is written to it.
        file: the HTML file.
        rule: a rule id; None for the whole.
        period: days, UTC, of what happened; states are those of now.
        progress: called with each step before it is done.

    Raises:
        UsageError: the file's directory does not exist, or the file is a directory.
        FlywheelError: there is no such rule.
    """
    begun = time.monotonic()
    file = file.expanduser().resolve()
    if not file.parent.is_dir():
        raise UsageError(f"The directory {file.parent} does not exist.", hint="Create it, or name another file.")
    if file.is_dir():
        raise UsageError(f"{file} is a directory.", hint="Name a file in it, such as report.html.")
    period = period or Period()
    with snapshot(engine) as connection:
        taken = connection.exec_driver_sql(
            "SELECT to_char(now() AT TIME ZONE 'UTC', 'YYYY-MM-DD HH24:MI'), current_database()"
        ).one()
        facts = {"As of": f"{taken[0]} UTC", "Database": taken[1], "Release": __version__}
        if progress is not None:
            progress("reading and drawing")
        page = overview(connection, period, facts) if rule is None else rule_page(connection, rule, period, facts)
    text = render(page)
    partial = file.with_name(f".{file.name}.partial-{os.getpid()}")
    try:
        partial.write_text(text, "utf-8", newline="\n")
        partial.replace(file)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    return Report(str(file), page.title, len(page.sections), len(text.encode()), time.monotonic() - begun)
