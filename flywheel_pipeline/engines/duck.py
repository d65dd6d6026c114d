"""DuckDB, in this process: for one big machine. The extra `duckdb`.

Belongs here: a session of DuckDB over a job. Does not belong here: anything of another engine.
"""

# ruff: noqa: S608 (names of our own relations; there are no values in this SQL but quoted paths)
from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import pyarrow as pa

from flywheel_pipeline.archive.columns import arrow_type
from flywheel_pipeline.archive.layout import hide
from flywheel_pipeline.database.tables import execution_telemetry
from flywheel_pipeline.engines.dialects import Dialect
from flywheel_pipeline.engines.errors import EngineError, EngineNotInstalled
from flywheel_pipeline.engines.job import Job, telemetry_select
from flywheel_pipeline.engines.plan import Step
from flywheel_pipeline.sql_models.relations import literal, quote

if TYPE_CHECKING:
    import duckdb

BATCH_ROWS = 65_536


class DuckEngine:
    """DuckDB with what memory and cores it finds; what does not fit goes to the scratch folder."""

    name = "duckdb"
    dialect: Dialect = "duckdb"

    def check(self) -> None:
        """Raises EngineNotInstalled where the extra is missing."""
        if importlib.util.find_spec("duckdb") is None:
            raise EngineNotInstalled(
                "The engine duckdb is not installed.",
                hint="Install the extra: pip install 'flywheel-pipeline[duckdb]'.",
            )

    def compute(self, job: Job) -> Iterator[tuple[Step, Iterator[pa.RecordBatch]]]:
        """Compute the steps one after the other; what another step reads stays in the session.

        Raises:
            EngineError: DuckDB failed.
        """
        import duckdb

        with _said(job), duckdb.connect() as session:
            session.execute(f"SET temp_directory = {literal(str(job.scratch))}")
            session.execute("SET preserve_insertion_order = false")
            prepare(session, job)
            read = frozenset().union(*(step.reads for step in job.plan.steps))
            for step in job.plan.steps:
                if not step.lands or step.name in read:
                    session.execute(f"CREATE TEMP TABLE {quote(step.name)} AS\n{step.sql}")
                    if step.lands:
                        yield step, _batches(session, f"SELECT * FROM {quote(step.name)}", job)
                else:
                    yield step, _batches(session, step.sql, job)


@contextmanager
def _said(job: Job) -> Iterator[None]:
    """Say in one sentence what DuckDB says, without what opens the archive: it names files by their whole URL."""
    try:
        yield
    except Exception as error:  # noqa: BLE001 (of any kind: the client of an object store raises its own through DuckDB)
        lines = ("".join(filter(str.isprintable, line)).strip() for line in str(error).splitlines())
        said = next(filter(None, lines), type(error).__name__)
        raise EngineError(
            f"DuckDB could not compute the models: {hide(said, job.secrets).rstrip(' .:')}.",
            hint="Nothing was written; correct that and try again, or use FLYWHEEL_ENGINE=postgres.",
        ) from (None if job.secrets else error)


def prepare(session: duckdb.DuckDBPyConnection, job: Job) -> None:
    """Give a session the relations that the steps read, under their names."""
    for statement in job.preamble:
        session.execute(statement)
    for name, table in job.tables.items():
        session.register(f"arrow_{name}", table)
        session.execute(f"CREATE TEMP TABLE {quote(name)} AS SELECT * FROM {quote(f'arrow_{name}')}")
    if job.archive is not None and not job.archive.is_local:
        session.register_filesystem(job.archive.fs)
    paths = [str(file.local_path or file.url) for file in job.archived]
    parts = []
    columns = telemetry_select(job.plan.telemetry).replace("TIMESTAMP_NTZ", "TIMESTAMP")
    for given in (paths, [str(job.live)] if job.live else []):
        if given:
            listed = ", ".join(literal(path) for path in given)
            parts.append(f"SELECT {columns} FROM read_parquet([{listed}], hive_partitioning = false)")
    if not parts:
        declared = execution_telemetry.columns
        session.register(
            "arrow_nothing", pa.table({n: pa.nulls(0, arrow_type(declared[n])) for n in job.plan.telemetry})
        )
        parts.append(f"SELECT {columns} FROM arrow_nothing")
    source = "\nUNION ALL\n".join(parts)
    wanted = ""
    if job.sites is not None:
        wanted = f"\nWHERE site_id IN ({', '.join(literal(site) for site in job.sites)})"
    session.execute(f"CREATE TEMP VIEW execution_telemetry AS SELECT * FROM (\n{source}\n) AS t{wanted}")


def _batches(session: duckdb.DuckDBPyConnection, query: str, job: Job) -> Iterator[pa.RecordBatch]:
    with _said(job):  # whoever lands the rows runs this, not `compute`
        yield from session.sql(query).to_arrow_reader(BATCH_ROWS)
