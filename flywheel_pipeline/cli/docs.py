"""`flywheel docs`: pages made from the data."""

from __future__ import annotations

import datetime as dt

import typer

from flywheel_pipeline.cli.terminal import err, open_database, out, progress
from flywheel_pipeline.errors import FlywheelError

app = typer.Typer(help="Pages made from the data, readable offline.", no_args_is_help=True)


@app.callback()
def _group() -> None:
    """Pages made from the data, readable offline."""


@app.command()
def data(
    build: bool = typer.Option(False, "--build", help="Judge every contract now and write the pages first."),
) -> None:
    """Print where the Data Docs stand: what each table promises, and whether it holds. Exit 1 if never built."""
    from flywheel_pipeline.contracts.data_docs import data_docs_folder, judge_all, write_data_docs

    index = data_docs_folder() / "index.html"
    if build:
        now = dt.datetime.now(dt.UTC)
        engine = open_database()
        with progress("judging every contract"):
            judged = judge_all(engine, now)
        write_data_docs(judged, index.parent, at=now)
        for item in judged:
            said = f"{item.broken} of {len(item.results)} broken" if item.broken else f"all {len(item.results)} hold"
            err.print(f"  {item.contract.asset:22} {said}, over {item.rows:,} rows")
    if not index.exists():
        raise FlywheelError(
            "The Data Docs were not built yet.",
            hint="`flywheel docs data --build` builds them now; the job build_data_docs does every night.",
        )
    out.file.write(f"{index}\n")
