"""`flywheel backup` and `flywheel restore`."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import typer
from rich.markup import escape

from flywheel_pipeline.cli.terminal import open_database, out, print_json, progress

JSON = typer.Option(False, "--json", help="Print one JSON document.")


def register(app: typer.Typer) -> None:
    """Add these commands."""
    app.command("backup")(backup)
    app.command("restore")(restore)


def backup(
    file: Path = typer.Argument(..., help="The file to write; its description goes to FILE.json."),
    json: bool = JSON,
) -> None:
    """Dump the whole database, Dagster's storage included, as one consistent snapshot; writers and runs may go on."""
    from flywheel_pipeline.database.backup import backup as run

    with progress("backing up") as bar:
        found = run(
            open_database(upgraded=False), file, progress=lambda what: bar.update(bar.task_ids[0], description=what)
        )
    if json:
        print_json(asdict(found))
        return
    out.print(
        f"{file}: {found.bytes / 1e6:,.1f} MB, {sum(found.rows.values()):,} rows as of {found.taken_at}, "
        f"in {found.duration_seconds:.1f} s. Keep {file.name}.json beside it: a restore is held against it.",
        soft_wrap=True,
        markup=False,
    )


def restore(
    file: Path = typer.Argument(..., help="A file that `flywheel backup` wrote, its description beside it."),
    json: bool = JSON,
) -> None:
    """Restore a backup into an empty database, all of it or nothing, bring it to this release, and examine it."""
    from flywheel_pipeline.database.backup import restore as run
    from flywheel_pipeline.database.migrate import upgrade
    from flywheel_pipeline.doctor import examine

    engine = open_database(upgraded=False)
    with progress("restoring") as bar:

        def tell(what: str) -> None:
            bar.update(bar.task_ids[0], description=what)

        found = run(engine, file, progress=tell)
        changes = upgrade(engine).changes
        broken = [item for item in examine(engine, progress=tell) if not item.finding.passed]
    if json:
        print_json({**asdict(found), "upgrade": list(changes), "broken": [asdict(item) for item in broken]})
    else:
        out.print(
            f"Restored {sum(found.rows.values()):,} rows as of {found.taken_at}; they are those of the description.",
            soft_wrap=True,
        )
        if changes:
            out.print(f"Brought from release {found.release} to this one: {len(changes)} changes.")
        for item in broken:
            out.print(f"[red]✗[/] {item.invariant} {item.statement}: {escape(item.finding.sentence)}", soft_wrap=True)
        out.print(
            "Healthy. What had not been counted when the backup was taken waits in the outbox: `flywheel run` goes on."
            if not broken
            else "`flywheel doctor` shows the rows and the repairs.",
            soft_wrap=True,
        )
    if broken:
        raise typer.Exit(1)
