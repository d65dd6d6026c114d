"""`flywheel db`: the schema, the URL, the embedded server."""

from __future__ import annotations

import datetime as dt
from dataclasses import asdict

import typer

from flywheel_pipeline.cli.terminal import err, open_database, out, print_json, print_table, progress
from flywheel_pipeline.errors import SchemaMismatch

app = typer.Typer(help="The database: schema, URL, embedded server.", no_args_is_help=True)


@app.command()
def upgrade(json: bool = typer.Option(False, "--json", help="Print the changes as JSON.")) -> None:
    """Bring the schema to this release: migrations, triggers, SQL models, seeds, Dagster's tables. A second run changes nothing."""
    from flywheel_pipeline.database.dagster_home import make_dagster_storage
    from flywheel_pipeline.database.migrate import upgrade as run

    engine = open_database(upgraded=False)
    with progress("upgrading the schema"):
        changes = list(run(engine, progress=None).changes)
        if make_dagster_storage(engine):
            changes.append("the tables of Dagster")
    if json:
        print_json({"changes": changes})
    elif changes:
        for change in changes:
            out.print(f"  {change}", markup=False)
        out.print(f"{len(changes)} changes.")
    else:
        out.print("The schema is up to date; nothing changed.")


@app.command()
def check(json: bool = typer.Option(False, "--json", help="Print the differences as JSON.")) -> None:
    """Name every difference between the live schema and the declared one; exit 4 if there is any."""
    from flywheel_pipeline.database.drift import check as differences

    found = [asdict(difference) for difference in differences(open_database(upgraded=False))]
    if json:
        print_json({"differences": found})
    elif found:
        columns = {"object": "object", "problem": "problem", "expected": "declared", "found": "live"}
        print_table(f"{len(found)} differences", found, columns)
    else:
        out.print("The live schema equals the declared one.")
    if found:
        raise typer.Exit(SchemaMismatch.exit_code)


@app.command()
def roles(json: bool = typer.Option(False, "--json", help="Print the roles as JSON.")) -> None:
    """Show the least-privilege roles, who has each, and what differs from the declared grants; exit 4 if anything does."""
    from flywheel_pipeline.database.roles import states

    with open_database().connect() as connection:
        found = [asdict(state) for state in states(connection)]
    wrong = [state for state in found if not state["exists"] or state["missing"] or state["surplus"]]
    if json:
        print_json({"roles": found})
    else:
        shown = [{**state, "members": ", ".join(state["members"]) or None} for state in found]
        columns = {
            "role": "role",
            "members": "who has it",
            "missing": "missing",
            "surplus": "surplus",
            "meaning": "what for",
        }
        print_table("Roles", shown, columns)
        out.print(
            "A login gets one by `GRANT flywheel_reader TO somebody`; an administrator makes logins."
            if not wrong
            else f"{len(wrong)} roles are not as declared: `flywheel db upgrade`, by an owner who may create roles, sets them.",
            soft_wrap=True,
        )
    if wrong:
        raise typer.Exit(SchemaMismatch.exit_code)


@app.command()
def url(
    show_password: bool = typer.Option(
        False, "--show-password", help="Print the password and every option too, as psql takes it."
    ),
) -> None:
    """Print the URL of the database in use, without its secrets, starting the embedded server if need be."""
    from flywheel_pipeline.database.engine import libpq_url, resolve_url, shown_url

    found = resolve_url()
    out.file.write((libpq_url(found) if show_password else shown_url(found)) + "\n")


@app.command()
def stop() -> None:
    """Stop the embedded server; its data stay."""
    from flywheel_pipeline.database.embedded import EmbeddedServer
    from flywheel_pipeline.database.settings import get_settings

    server = EmbeddedServer(get_settings().home)
    if server.is_running():
        server.stop()
        out.print("Stopped.")
    else:
        out.print("It was not running.")


@app.command()
def purge(
    before: dt.datetime = typer.Argument(
        ..., formats=["%Y-%m-%d"], help="Delete telemetry of days before this one (UTC)."
    ),
    actor: str = typer.Option(..., "--actor", help="Who decides this."),
    yes: bool = typer.Option(False, "--yes", help="Do not ask."),
    json: bool = typer.Option(False, "--json", help="Print what was deleted as JSON."),
) -> None:
    """Delete old telemetry; its figures stay in the aggregates, sealed. Where FLYWHEEL_ARCHIVE_URL is set, only what it holds.

    Rejects that were decided more than FLYWHEEL_REJECT_DAYS ago go too, whatever the day; open ones stay.
    """
    from flywheel_pipeline.aggregates.refresh import purge as run
    from flywheel_pipeline.archive.configured import configured_archive
    from flywheel_pipeline.database.settings import get_settings
    from flywheel_pipeline.telemetry.rejects import purge as purge_rejects

    archive = configured_archive()
    keep_days = get_settings().reject_days
    decided = f"rejects decided more than {keep_days} days ago"
    if not yes:
        typer.confirm(
            f"Delete all telemetry of days before {before.date()}, and {decided}, for ever?", abort=True, err=True
        )
    engine = open_database()
    with progress("verifying and purging" if archive else "purging"):
        days = run(engine, before=before.date(), actor=actor, archive=archive)
        with engine.begin() as connection:
            rejects = purge_rejects(connection, keep_days=keep_days, actor=actor)
    if json:
        print_json(
            {
                "before": before.date(),
                "rows": sum(days.values()),
                "days": {str(day): rows for day, rows in days.items()},
                "rejects": {"keep_days": keep_days, **asdict(rejects)},
            }
        )
        return
    kept = "their figures and the archive stay" if archive else "their figures stay"
    out.print(f"Purged {sum(days.values()):,} rows of {len(days)} days; {kept}.")
    out.print(
        f"Purged {rejects.accepted + rejects.discarded:,} {decided}: {rejects.accepted:,} accepted, "
        f"{rejects.discarded:,} discarded; open ones stay.",
        soft_wrap=True,
    )


@app.command()
def env() -> None:
    """Print the exports for running dagster by hand: eval "$(flywheel db env)"."""
    import shlex

    from flywheel_pipeline.database.dagster_home import dagster_environment, write_dagster_home
    from flywheel_pipeline.database.engine import resolve_url
    from flywheel_pipeline.database.settings import get_settings

    settings = get_settings()
    database = resolve_url(settings)
    write_dagster_home(settings, database)
    for name, value in dagster_environment(settings, database).items():
        out.file.write(f"export {name}={shlex.quote(value)}\n")
    err.print("The URL may hold a password: do not paste this anywhere.", style="dim")
