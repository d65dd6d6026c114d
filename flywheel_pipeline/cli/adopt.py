"""`flywheel adopt`: taking over the database of the system before; a dry run unless told otherwise, and its undo."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING

import typer

from flywheel_pipeline.cli.terminal import open_database, out, print_json, print_table, progress
from flywheel_pipeline.errors import SchemaMismatch, UsageError

if TYPE_CHECKING:
    from flywheel_pipeline.database.adopt import Adoption

_CHANGES = {"subject": "where", "what": "what", "why": "why"}


def adopt(
    apply: bool = typer.Option(False, "--apply", help="Adopt the database, in one transaction."),
    undo: bool = typer.Option(False, "--undo", help="Give the tables back to the old system, in one transaction."),
    actor: str = typer.Option("", "--actor", help="Who decides this, by name; needed to apply."),
    reason: str = typer.Option("", "--reason", help="Why; auditors read it. Needed to apply."),
    json: bool = typer.Option(False, "--json", help="Print one JSON document."),
) -> None:
    """Adopt a database that holds the old system's tables. Without --apply: list every change and touch nothing.

    Exit 4 if something stands in the way.
    """
    if apply and undo:
        raise UsageError("--apply and --undo exclude each other.")
    if undo:
        _undo(actor, reason, json)
        return
    from flywheel_pipeline.database import adopt as adoption

    engine = open_database(upgraded=False)
    with progress("adopting" if apply else "reading the schema"):
        done = adoption.apply(engine, actor=actor, reason=reason) if apply else adoption.dry_run(engine)
    if json:
        print_json(asdict(done))
    else:
        _print(done)
    if done.obstacles:
        raise typer.Exit(SchemaMismatch.exit_code)


def _undo(actor: str, reason: str, json: bool) -> None:
    from flywheel_pipeline.database import adopt as adoption

    engine = open_database(upgraded=False)
    with progress("giving the tables back"):
        done = adoption.undo(engine, actor=actor, reason=reason)
    if json:
        print_json(asdict(done))
        return
    for line in done.restored:
        out.print(f"  took back  {line}", markup=False, soft_wrap=True)
    for line in done.kept:
        out.print(f"  kept       {line}", markup=False, soft_wrap=True)
    out.print(
        f"The old system's triggers, functions and columns are back. Flywheel's own tables stand in the schema {done.archive}."
    )
    if done.executions_since:
        out.print(f"{done.executions_since:,} executions came since the adoption; the old counters do not hold them.")


def _print(done: Adoption) -> None:
    if not (done.changes or done.obstacles):
        out.print("The database is Flywheel's already; nothing to change.")
        return
    rows = [{**change, "subject": _subject(change)} for change in done.changes]
    print_table(f"{len(rows)} changes" + ("" if done.applied else ", none of them made"), rows, _CHANGES)
    out.print()
    print_table(f"{len(done.left)} things stay as they are", done.left, {"object": "what", "why": "why"})
    for note in done.notes:
        out.print(f"  ! {note}", markup=False, soft_wrap=True)
    if done.obstacles:
        out.print()
        blocked = [{**obstacle, "subject": _subject(obstacle)} for obstacle in done.obstacles]
        print_table(f"{len(blocked)} things stand in the way", blocked, {"subject": "where", "why": "why"})
    if done.applied:
        out.print()
        counters = [{**asdict(line), "differs": "←" if line.differs else ""} for line in done.counters]
        print_table(
            f"{sum(line.differs for line in done.counters)} of {len(counters)} rules had wrong counters",
            counters,
            {
                "rule_id": "rule",
                "state": "state",
                "old_matches": "old matches",
                "matches": "recounted",
                "old_successes": "old successes",
                "successes": "recounted",
                "old_failures": "old failures",
                "failures": "recounted",
                "differs": "",
            },
        )
        out.print(f"\nAdopted. {done.unresolved:,} L1 executions name rules that the registry does not know.")
    elif not done.obstacles:
        out.print("\nNothing was changed. To adopt: flywheel adopt --apply --actor NAME --reason TEXT", markup=False)


def _subject(change: dict[str, str]) -> str:
    return (
        f"{change['table']}.{change['column']}"
        if change["table"] and change["column"]
        else change["table"] or "database"
    )


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("adopt")(adopt)
