"""Commands of the telemetry room: import, rejects, aliases; and the rebuild of aggregates."""

from __future__ import annotations

import datetime as dt
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any, Literal, cast

import typer

from flywheel_pipeline.cli.terminal import err, open_database, out, print_json, print_table, progress
from flywheel_pipeline.errors import RowsRejected, UsageError

rejects = typer.Typer(help="Rows that were refused: raw payload, line and reason.", no_args_is_help=True)
aliases = typer.Typer(
    help="Names of rules and sites that changed: old rows are read anew, never rewritten.", no_args_is_help=True
)
JSON = typer.Option(False, "--json", help="Print one JSON document.")


def register(app: typer.Typer) -> None:
    """Add this room's commands."""
    app.command("import")(import_)
    app.command("rebuild")(rebuild)
    app.add_typer(rejects, name="rejects")
    app.add_typer(aliases, name="aliases")


def import_(
    file: Path = typer.Argument(..., help="NDJSON (.ndjson, .jsonl), CSV or Parquet."),
    source: str = typer.Option("", "--source", help="Name of the source in rejects; default: the file's name."),
    json: bool = JSON,
) -> None:
    """Import telemetry from a file. Bad rows go to the rejects with line and reason; good rows land. Exit 5 if any was rejected."""
    from flywheel_pipeline.telemetry.intake import import_file

    engine = open_database()
    with progress(f"importing {file.name}") as bar:

        def show(rows: int, share: float) -> None:
            bar.update(bar.task_ids[0], description=f"importing {file.name}: {rows:,} rows, {share:.0%}")

        report = import_file(engine, file, source=source or file.name, progress=show)
    if json:
        print_json(_report(report))
    else:
        out.print(
            f"{report.read:,} rows read: {report.inserted:,} new, {report.corrected:,} corrections, "
            f"{report.unchanged:,} known already, {report.rejected:,} rejected."
        )
        if report.rejected:
            print_table(
                "Rejected",
                [{"reason": reason, "rows": rows} for reason, rows in report.reasons.items()],
                {"reason": "reason", "rows": "rows"},
            )
            out.print("`flywheel rejects list` shows them, `flywheel rejects retry` re-drives them after a fix.")
    if report.rejected:
        raise typer.Exit(RowsRejected.exit_code)


def _report(report: Any) -> dict[str, Any]:
    # Not asdict: it makes a Counter of pairs out of a Counter.
    return {field.name: getattr(report, field.name) for field in fields(report)}


def _words(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{count} {reason}" for reason, count in value.items()) or "none"
    return str(value)


def rebuild(
    site: str = typer.Option("", "--site", help="Only this site, by its name of today."),
    from_: dt.datetime | None = typer.Option(None, "--from", formats=["%Y-%m-%d"], help="First UTC day."),
    to: dt.datetime | None = typer.Option(None, "--to", formats=["%Y-%m-%d"], help="Last UTC day."),
    engine_name: str = typer.Option(
        "", "--engine", help="Who computes: postgres, duckdb or spark; default postgres (FLYWHEEL_ENGINE)."
    ),
    json: bool = JSON,
) -> None:
    """Recompute aggregates, all or some: from the log, or by another engine over archive and log. Safe to interrupt."""
    from flywheel_pipeline.aggregates.refresh import rebuild as run
    from flywheel_pipeline.engines.choose import chosen_computation

    if from_ and to and from_ > to:
        raise UsageError("--from is after --to.", hint="Both ends are included; swap them.")
    computation = chosen_computation(engine_name or None)
    engine = open_database()
    with progress("rebuilding") as bar:

        def show(done: int, total: int) -> None:
            bar.update(bar.task_ids[0], description=f"rebuilding: {done:,} of {total:,} site-days", completed=done)

        days: dict[str, Any] = {
            "site": site or None,
            "from_day": from_.date() if from_ else None,
            "to_day": to.date() if to else None,
            "progress": show,
        }
        if computation is None:
            reports = run(engine, **days)
        else:
            from flywheel_pipeline.engines.rebuild import rebuild as run_elsewhere

            reports = run_elsewhere(engine, computation, **days)
    if site and not any(r.cells for r in reports):
        raise UsageError(
            f"There is nothing of a site {site} in these days.",
            hint="Name the site as it is called today, and days that have telemetry.",
        )
    totals: dict[str, Any] = {
        "cells": sum(r.cells for r in reports),
        "rows_written": sum(r.rows_written for r in reports),
        "counters_changed": sum(r.counters_changed for r in reports),
        "duration_seconds": sum(r.duration_seconds for r in reports),
    }
    if json:
        print_json(totals)
    else:
        out.print(
            f"Recomputed {totals['cells']:,} site-days in {totals['duration_seconds']:.1f} s: "
            f"{totals['rows_written']:,} rows and {totals['counters_changed']:,} counters changed."
        )


@rejects.command("list")
def list_(
    status: str = typer.Option("open", "--status", help="open, accepted or discarded."),
    limit: int = typer.Option(50, "--limit", min=1, help="At most so many."),
    json: bool = JSON,
) -> None:
    """List rejected rows, newest first."""
    from flywheel_pipeline.telemetry.rejects import list_rejects

    if status not in ("open", "accepted", "discarded"):
        raise UsageError(f"No reject is {status}.", hint="--status takes open, accepted or discarded.")
    with open_database().connect() as connection:
        rows = list_rejects(connection, cast(Literal["open", "accepted", "discarded"], status), limit)
    documents = [{**asdict(row), "payload": _payload(row)} for row in rows]
    if json:
        print_json(documents)
    else:
        print_table(
            f"{len(documents)} {status} rejects",
            documents,
            {
                "id": "id",
                "source": "source",
                "line_number": "line",
                "reason_code": "code",
                "reason": "reason",
                "times_seen": "seen",
            },
        )


def _payload(row: Any) -> str:
    return bytes(row.payload[:2000]).decode("utf-8", "replace")


@rejects.command("retry")
def retry_(
    ids: list[int] | None = typer.Argument(None, help="Ids of rejects; none: all open ones."),
    json: bool = JSON,
) -> None:
    """Drive rejected rows through the intake again, after a fix."""
    from flywheel_pipeline.telemetry.rejects import retry

    report = retry(open_database(), ids or None)
    document = _report(report)
    if json:
        print_json(document)
    else:
        out.print(", ".join(f"{key.replace('_', ' ')}: {_words(value)}" for key, value in document.items()) + ".")


@rejects.command("discard")
def discard_(ids: list[int] = typer.Argument(..., help="Ids of rejects.")) -> None:
    """Close rejected rows for good; their payload stays on record until a purge."""
    from flywheel_pipeline.telemetry.rejects import discard

    with open_database().begin() as connection:
        out.print(f"Discarded {discard(connection, ids)} rejects.")


def _stamp(value: dt.datetime | None) -> dt.datetime | None:
    return value.replace(tzinfo=dt.UTC) if value else None


def _add(
    kind: str,
    alias: str,
    name: str,
    valid_from: dt.datetime | None,
    valid_to: dt.datetime | None,
    actor: str,
    reason: str,
) -> None:
    from flywheel_pipeline.telemetry import aliases as store

    add = store.add_rule_alias if kind == "rule" else store.add_site_alias
    with open_database().begin() as connection:
        add(
            connection,
            alias,
            name,
            valid_from=_stamp(valid_from),
            valid_to=_stamp(valid_to),
            actor=actor,
            reason=reason,
        )
    out.print(f"{kind} {alias} reads as {name} from the next refresh on; its old rows are re-attributed.")
    err.print("`flywheel run` refreshes now.", style="dim")


_FORMATS = ["%Y-%m-%d", "%Y-%m-%dT%H:%M:%S"]


@aliases.command("add-rule")
def add_rule(
    alias: str = typer.Argument(..., help="The id that telemetry names."),
    rule_id: str = typer.Argument(..., help="The rule it stands for."),
    valid_from: dt.datetime | None = typer.Option(
        None, "--from", formats=_FORMATS, help="Event time, UTC; default: always."
    ),
    valid_to: dt.datetime | None = typer.Option(
        None, "--to", formats=_FORMATS, help="Event time, UTC; default: for ever."
    ),
    actor: str = typer.Option(..., "--actor", help="Who decides this."),
    reason: str = typer.Option(..., "--reason", help="Why."),
) -> None:
    """Read one rule id as another."""
    _add("rule", alias, rule_id, valid_from, valid_to, actor, reason)


@aliases.command("add-site")
def add_site(
    alias: str = typer.Argument(..., help="The name that telemetry carries."),
    site_id: str = typer.Argument(..., help="The site's name of today."),
    valid_from: dt.datetime | None = typer.Option(
        None, "--from", formats=_FORMATS, help="Event time, UTC; default: always."
    ),
    valid_to: dt.datetime | None = typer.Option(
        None, "--to", formats=_FORMATS, help="Event time, UTC; default: for ever."
    ),
    actor: str = typer.Option(..., "--actor", help="Who decides this."),
    reason: str = typer.Option(..., "--reason", help="Why."),
) -> None:
    """Read one site id as another."""
    _add("site", alias, site_id, valid_from, valid_to, actor, reason)


@aliases.command("list")
def list_aliases(json: bool = JSON) -> None:
    """List the aliases of rules and sites."""
    import sqlalchemy as sa

    with open_database().connect() as connection:
        rows = [
            dict(row)
            for row in connection.execute(
                sa.text(
                    "SELECT 'rule' AS kind, alias, rule_id AS stands_for, valid_from::text, valid_to::text, actor, reason FROM rule_aliases "
                    "UNION ALL SELECT 'site', alias, site_id, valid_from::text, valid_to::text, actor, reason FROM site_aliases "
                    "ORDER BY 1, 2, 4"
                )
            ).mappings()
        ]
    if json:
        print_json(rows)
    else:
        print_table(
            f"{len(rows)} aliases",
            rows,
            {
                "kind": "kind",
                "alias": "alias",
                "stands_for": "stands for",
                "valid_from": "from",
                "valid_to": "to",
                "actor": "by",
                "reason": "because",
            },
        )
