"""The Typer application: its groups, and the one place where errors become messages and exit codes.

Exit codes: 0 done · 1 failed or a figure is off · 2 usage · 3 database · 4 schema · 5 rows rejected · 6 port in use ·
7 SQL model refused · 8 policy refused · 9 archive · 10 engine.
"""

from __future__ import annotations

import sys
from typing import NoReturn

import typer

from flywheel_pipeline import __version__
from flywheel_pipeline.cli import (
    acts,
    adopt,
    alerts,
    api,
    appliance,
    archive,
    backup,
    database,
    docs,
    doctor,
    node,
    pipeline,
    promotion,
    report,
    telemetry,
    why,
)
from flywheel_pipeline.cli.terminal import err
from flywheel_pipeline.errors import FlywheelError

app = typer.Typer(
    name="flywheel",
    help="Execution telemetry to promoted L1 rules: exact, explainable, fail-closed.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
    epilog=(
        "Exit codes: 0 done, 1 failed or a figure is off, 2 usage, 3 database, 4 schema, 5 some rows rejected, "
        "6 port in use, 7 SQL model refused, 8 policy refused, 9 the archive is missing or not whole, "
        "10 the engine cannot be used."
    ),
)


def _version(value: bool) -> None:
    if value:
        typer.echo(__version__)
        raise typer.Exit


@app.callback()
def root(
    version: bool = typer.Option(False, "--version", callback=_version, is_eager=True, help="Print the version."),
) -> None:
    """Execution telemetry to promoted L1 rules: exact, explainable, fail-closed."""


pipeline.register(app)
appliance.register(pipeline.simulate)
telemetry.register(app)
promotion.register(app)
why.register(app)
acts.register(app)
adopt.register(app)
doctor.register(app)
backup.register(app)
app.add_typer(alerts.app, name="alerts")
api.register(app)
node.register(app)
report.register(app)
app.add_typer(archive.app, name="archive")
app.add_typer(database.app, name="db")
app.add_typer(docs.app, name="docs")


def main() -> None:
    """Run the command line; a FlywheelError, or a right that the login lacks, becomes one sentence, a hint and its exit code."""
    try:
        app(prog_name="flywheel")
    except FlywheelError as error:
        _end(error)
    except BrokenPipeError:
        sys.exit(1)
    except Exception as error:
        from flywheel_pipeline.database.engine import login_in_use
        from flywheel_pipeline.database.refusals import refused

        refusal = refused(error, login_in_use())
        if refusal is None:
            raise
        _end(refusal)


def _end(error: FlywheelError) -> NoReturn:
    err.print(f"[bold red]Error:[/] {_escaped(error.message)}", soft_wrap=True)
    if error.hint:
        err.print(_escaped(error.hint), soft_wrap=True)
    sys.exit(error.exit_code)


def _escaped(text: str) -> str:
    return text.replace("[", r"\[")
