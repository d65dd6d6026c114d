"""`flywheel report` and `flywheel export`: the offline page, and the auditor's files."""

from __future__ import annotations

import datetime as dt
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from flywheel_pipeline.cli.terminal import open_database, out, print_json, progress

if TYPE_CHECKING:
    from flywheel_pipeline.report.snapshot import Period

JSON = typer.Option(False, "--json", help="Print one JSON document.")
FROM = typer.Option(None, "--from", formats=["%Y-%m-%d"], help="First day, UTC, included; else from the beginning.")
TO = typer.Option(None, "--to", formats=["%Y-%m-%d"], help="Last day, UTC, included; else to the end.")
exports = typer.Typer(help="What an auditor takes away: files with a manifest of their hashes.", no_args_is_help=True)


def register(app: typer.Typer) -> None:
    """Add these commands."""
    app.command("report")(report)
    app.add_typer(exports, name="export")


def _period(since: dt.datetime | None, until: dt.datetime | None) -> Period:
    from flywheel_pipeline.report.snapshot import Period

    return Period(since.date() if since else None, until.date() if until else None)


def report(
    rule: str = typer.Argument("", help="A rule id: its history instead of the state of the whole."),
    file: Path = typer.Option(..., "--out", help="The HTML file to write; an earlier one is replaced."),
    since: dt.datetime | None = FROM,
    until: dt.datetime | None = TO,
    json: bool = JSON,
) -> None:
    """Write a report as one HTML file that needs no network and prints well. Read-only, in one snapshot."""
    from flywheel_pipeline.report.build import write_report

    period = _period(since, until)
    with progress("reading") as bar:
        found = write_report(
            open_database(),
            file,
            rule=rule or None,
            period=period,
            progress=lambda what: bar.update(bar.task_ids[0], description=what),
        )
    if json:
        print_json(asdict(found))
        return
    out.print(
        f"{file}: {found.title}, {found.sections} sections, {found.bytes / 1e3:,.0f} kB in {found.duration_seconds:.1f} s.",
        soft_wrap=True,
        markup=False,
    )


@exports.command("audit")
def audit(
    directory: Path = typer.Option(..., "--out", help="The directory to write; it must be empty or not there."),
    since: dt.datetime | None = FROM,
    until: dt.datetime | None = TO,
    force: bool = typer.Option(False, "--force", help="Replace an earlier export in that directory."),
    json: bool = JSON,
) -> None:
    """Export decisions, ledger, certificates and human acts as Parquet with a manifest; the same rows give the same bytes."""
    from flywheel_pipeline.report.audit import export

    period = _period(since, until)
    with progress("exporting") as bar:
        found = export(
            open_database(),
            directory,
            period,
            force=force,
            progress=lambda what: bar.update(bar.task_ids[0], description=what),
        )
    if json:
        print_json(asdict(found))
        return
    for name, rows in found.rows.items():
        out.print(f"  {name:28} {rows:>9,} rows")
    out.print(f"{found.directory}: {found.bytes / 1e3:,.0f} kB, {period}.", soft_wrap=True, markup=False)
    out.print(f"SHA-256 of its manifest: {found.manifest_sha256}", soft_wrap=True)
    out.print("Note it elsewhere: `flywheel export verify DIR --sha256 …` then finds out a changed manifest too.")


@exports.command("verify")
def verify(
    directory: Path = typer.Argument(..., help="A directory that `flywheel export audit` wrote."),
    sha256: str = typer.Option("", "--sha256", help="SHA-256 of the manifest, as noted when it was exported."),
    json: bool = JSON,
) -> None:
    """Hold an export against its manifest and recompute its certificates, without a database. Exit 1 if anything differs."""
    from flywheel_pipeline.report.audit import verify as run

    found = run(directory, expected=sha256 or None)
    if json:
        print_json({"whole": not found.problems, **asdict(found)})
    else:
        for problem in found.problems:
            out.print(f"  ✗ {problem}", markup=False, soft_wrap=True)
        out.print(
            f"{len(found.problems)} differences."
            if found.problems
            else f"Whole: {found.rows:,} rows as the manifest says, {found.certificates:,} certificates recompute to their verdicts.",
            soft_wrap=True,
        )
        out.print(f"SHA-256 of its manifest: {found.manifest_sha256}", soft_wrap=True)
    if found.problems:
        raise typer.Exit(1)
