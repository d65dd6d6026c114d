"""`flywheel doctor`: the invariants of the house, examined from outside."""

from __future__ import annotations

from dataclasses import asdict

import typer

from flywheel_pipeline.cli.terminal import open_database, out, print_json, print_table, progress


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("doctor")(doctor)


def doctor(
    invariant: list[int] = typer.Option([], "--invariant", "-i", min=1, max=12, help="Examine only these; repeatable."),
    deep: bool = typer.Option(False, "--deep", help="Also compute every aggregate anew and compare it row by row."),
    json: bool = typer.Option(False, "--json", help="Print one JSON document."),
) -> None:
    """Examine the twelve invariants, read-only and in one snapshot; name what breaks each, and the repair. Exit 1 if one is broken."""
    from flywheel_pipeline.doctor import examine

    engine = open_database()
    with progress("examining") as bar:
        found = examine(
            engine,
            invariants=invariant,
            deep=deep,
            progress=lambda statement: bar.update(bar.task_ids[0], description=statement),
        )
    broken = [item for item in found if not item.finding.passed]
    if json:
        print_json({"healthy": not broken, "invariants": [asdict(item) for item in found]})
    else:
        for item in found:
            mark = "[green]✓[/]" if item.finding.passed else "[red]✗[/]"
            out.print(f"  {mark} {item.invariant:2} {item.statement}", soft_wrap=True, highlight=False)
        for item in broken:
            out.print()
            rows = [dict(row) for row in item.finding.sample]
            columns = {key: key.replace("_", " ") for row in rows for key in row}
            shown = [{key: None if value is None else str(value) for key, value in row.items()} for row in rows]
            print_table(f"{item.invariant}. {item.statement}: {item.finding.offenders} offenders", shown, columns)
            out.print(f"Repair: {item.repair}", markup=False, soft_wrap=True)
        out.print("Healthy." if not broken else f"{len(broken)} of {len(found)} invariants are broken.")
    if broken:
        raise typer.Exit(1)
