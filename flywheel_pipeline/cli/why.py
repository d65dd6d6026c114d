"""`flywheel why RULE`: where, since when and on what a rule fails, and what it would be with each cause fixed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import typer
from rich.markup import escape

from flywheel_pipeline.cli.terminal import open_database, out, print_json, print_table, progress


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("why")(why)


def why(
    rule_id: str = typer.Argument(..., help="A rule id, promoted or built-in."),
    json: bool = typer.Option(False, "--json", help="Print one JSON document."),
) -> None:
    """Say why a rule fails: where, since when, on which hosts, with which errors, and its rate if each cause were fixed."""
    from flywheel_pipeline.health import report
    from flywheel_pipeline.health.attribution import percent
    from flywheel_pipeline.health.why import why as ask

    engine = open_database()
    with progress(f"Reading the executions of {rule_id}"), engine.connect() as connection:
        found = ask(connection, rule_id)
    document = report.as_json(found)
    if json:
        print_json(document)
        return
    out.print(
        f"[bold]{escape(rule_id)}[/]  {found.successes:,} of {found.executions:,} executions succeeded "
        f"({percent(found.rate)}), where it could {percent(found.rated_rate)}; {found.first_day} to {found.last_day}"
    )
    sentence = report.causes_sentence(found)
    out.print(
        escape(sentence or "No site, release, hardware, system or time stands out beyond chance."), soft_wrap=True
    )
    if not found.failures:
        return
    print_causes(document)
    for title, rows in (
        (
            "From the raw to the adjusted rate",
            [
                {
                    "taken out": s.label.replace("_", " ") if s.removed else "",
                    "executions": s.removed or None,
                    "remaining": s.executions,
                    "successes": s.successes,
                    "rate": percent(s.rate),
                }
                for s in found.steps
            ],
        ),
        (
            "Errors",
            [
                {"failures": e.count, "hosts": e.hosts, "class": e.outcome_class, "error": e.template}
                for e in found.templates[:10]
            ],
        ),
    ):
        if rows:
            out.print()
            print_table(title, rows, {key: key for key in rows[0]})
    out.print()
    for line in report.spread_lines(found):
        out.print(escape(line), soft_wrap=True)


def print_causes(document: Mapping[str, Any]) -> None:
    """Print where a rule fails and what fails, each with what to do, from `report.as_json` or a kept answer."""
    from flywheel_pipeline.health import report

    for title, rows in (
        ("Where it fails", report.segment_rows(document)),
        ("What fails", report.family_rows(document)),
    ):
        if not rows:
            continue
        out.print()
        shown = [key for key in rows[0] if key not in ("what to do", "most frequent error", "mostly at step", "sites")]
        print_table(title, rows, {key: key for key in shown})
        for row in rows:
            # A table of so many words would be a column a word wide.
            out.print(escape(f"  {row['cause']}: {row['what to do']}"), soft_wrap=True)
