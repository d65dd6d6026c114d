"""`flywheel archive`: closed days of telemetry as Parquet, beside PostgreSQL or in its place."""

from __future__ import annotations

import datetime as dt
from dataclasses import asdict

import typer

from flywheel_pipeline.cli.terminal import open_database, out, print_json, print_table, progress
from flywheel_pipeline.errors import ArchiveError

app = typer.Typer(
    help="The archive: closed days of telemetry as Parquet, on a folder or an object store.", no_args_is_help=True
)

_DAY = ["%Y-%m-%d"]


@app.command()
def export(
    from_day: dt.datetime | None = typer.Option(None, "--from", formats=_DAY, help="First day (UTC) to look at."),
    to_day: dt.datetime | None = typer.Option(None, "--to", formats=_DAY, help="Last day, included."),
    again: bool = typer.Option(False, "--again", help="Export days anew that are up to date, too."),
    json: bool = typer.Option(False, "--json", help="Print one JSON document."),
) -> None:
    """Export every closed day that the archive does not hold as it is now; a corrected day is exchanged as a whole."""
    from flywheel_pipeline.archive.configured import require_archive
    from flywheel_pipeline.archive.export import export_due
    from flywheel_pipeline.database.settings import get_settings

    settings = get_settings()
    archive = require_archive(settings)
    with progress("looking for closed days") as bar:
        report = export_due(
            open_database(),
            archive,
            today=dt.datetime.now(dt.UTC).date(),
            after_days=settings.archive_after_days,
            from_day=None if from_day is None else from_day.date(),
            to_day=None if to_day is None else to_day.date(),
            again=again,
            progress=lambda day, rows, of: bar.update(bar.task_ids[0], description=f"{day}: {rows:,} of {of:,} rows"),
        )
    if json:
        left = {day.isoformat(): reason for day, reason in report.left.items()}
        print_json({"archive": archive.shown, "exported": [asdict(day) for day in report.exported], "left": left})
        return
    if report.exported:
        shown = [
            {**asdict(d), "seconds": f"{d.seconds:.1f}", "what": "exchanged" if d.replaced else "new"}
            for d in report.exported
        ]
        columns = {"day": "day", "what": "", "rows": "executions", "corrections": "corrections", "files": "files"}
        print_table(f"Exported to {archive.shown}", shown, {**columns, "bytes": "bytes", "seconds": "seconds"})
    asked = from_day is not None or to_day is not None
    for day, reason in report.left.items() if asked else ():
        out.print(f"{day} was left: {reason}", markup=False, soft_wrap=True)
    out.print(
        f"{len(report.exported)} days with {report.rows:,} executions."
        if report.exported
        else "Nothing to export: the archive holds every closed day as it is now."
        if not (asked and report.left)
        else "Nothing was exported."
    )


@app.command("list")
def list_days(json: bool = typer.Option(False, "--json", help="Print one JSON document.")) -> None:
    """Show each day: whether it is archived as it is now, waits for an export, was corrected since, or was purged."""
    from flywheel_pipeline.archive.configured import require_archive
    from flywheel_pipeline.archive.days import State, day_states
    from flywheel_pipeline.database.settings import get_settings

    settings = get_settings()
    archive = require_archive(settings)
    with progress("reading the archive"), open_database().connect() as connection:
        states = day_states(
            connection, archive, today=dt.datetime.now(dt.UTC).date(), after_days=settings.archive_after_days
        )
    if json:
        print_json({"archive": archive.shown, "days": [asdict(state) for state in states]})
        return
    columns = {
        "day": "day",
        "state": "state",
        "live_rows": "in the database",
        "archived_rows": "archived",
        "corrections": "corrections",
        "archived_bytes": "bytes",
        "reason": "why",
    }
    plain = (State.ARCHIVED, State.DUE)  # the state says it all
    rows = [{**asdict(state), "reason": "" if state.state in plain else state.reason} for state in states]
    print_table(f"The archive {archive.shown}", rows, columns)
    waiting = sum(state.waits for state in states)
    out.print(
        f"{sum(state.archived_rows is not None for state in states)} days archived, {waiting} wait for an export"
        + (": `flywheel archive export`." if waiting else "."),
        markup=False,
    )


@app.command()
def verify(
    from_day: dt.datetime | None = typer.Option(None, "--from", formats=_DAY, help="First day (UTC) to verify."),
    to_day: dt.datetime | None = typer.Option(None, "--to", formats=_DAY, help="Last day, included."),
    json: bool = typer.Option(False, "--json", help="Print one JSON document."),
) -> None:
    """Read every byte of the archive and hold it against the manifests; needs no database. Exit 9 if a day is not whole."""
    from flywheel_pipeline.archive.configured import require_archive

    archive = require_archive(create=False)
    problems: list[dict[str, str]] = []
    days = rows = size = 0
    with progress("verifying") as bar:
        for day in archive.days():
            if (from_day is not None and day < from_day.date()) or (to_day is not None and day > to_day.date()):
                continue
            bar.update(bar.task_ids[0], description=f"verifying {day}")
            try:
                manifest = archive.verify(day)
            except ArchiveError as error:
                problems.append({"day": day.isoformat(), "problem": error.message, "repair": error.hint or ""})
            else:
                days, rows, size = days + 1, rows + manifest.rows, size + manifest.total_bytes
    if json:
        print_json({"archive": archive.shown, "whole_days": days, "rows": rows, "bytes": size, "problems": problems})
    else:
        if problems:
            print_table("Not whole", problems, {"day": "day", "problem": "problem", "repair": "repair"})
        out.print(f"{days} days with {rows:,} executions are as they were written; {len(problems)} are not.")
    if problems:
        raise typer.Exit(ArchiveError.exit_code)


@app.command()
def sweep(
    grace_hours: float = typer.Option(
        24.0, "--grace-hours", min=0, help="Leave what is younger: somebody may read it."
    ),
    dry_run: bool = typer.Option(False, "--dry-run", help="Remove nothing."),
    json: bool = typer.Option(False, "--json", help="Print one JSON document."),
) -> None:
    """Remove files that no manifest names: remains of broken exports, and generations that were exchanged."""
    from flywheel_pipeline.archive.configured import require_archive
    from flywheel_pipeline.archive.sweep import sweep as run

    archive = require_archive()
    with progress("sweeping"):
        found = run(open_database(), archive, grace_hours=grace_hours, dry_run=dry_run)
    if json:
        print_json({"archive": archive.shown, "removed": not dry_run, "files": [asdict(remains) for remains in found]})
        return
    for remains in found:
        out.print(f"  {remains.path}  {remains.bytes:,} bytes", markup=False, soft_wrap=True)
    verb = "could be removed" if dry_run else "removed"
    out.print(f"{len(found)} files with {sum(remains.bytes for remains in found):,} bytes {verb}.")
