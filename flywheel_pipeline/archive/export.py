"""The export of a day: one snapshot, files with new names, sums that must agree, and at last the manifest.

Belongs here: the export of one day and of all that wait for it. Does not belong here: how rows come out (`stream.py`), how
files are written (`parquet.py`), which days wait (`days.py`).

A day is exported while nobody else exports or purges (a lock on `day_versions` that no writer of telemetry asks for), in
one REPEATABLE READ snapshot in which no cell of the day waits in the outbox. What is written must agree with PostgreSQL's own
count of rows, sum of ids and count of values by column in that snapshot; only then is the manifest published. A process
killed before that leaves the old day whole, and files that no manifest names.
"""

from __future__ import annotations

import datetime as dt
import secrets
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.compute as pc
import sqlalchemy as sa

from flywheel_pipeline import __version__
from flywheel_pipeline.archive import columns, days
from flywheel_pipeline.archive.errors import NothingToArchive, NotRepresentable
from flywheel_pipeline.archive.layout import SCHEMA_VERSION, TABLES, Archive, DayManifest, Table
from flywheel_pipeline.archive.parquet import ParquetFiles, write_batches
from flywheel_pipeline.archive.stream import day_batches, snapshot_reader
from flywheel_pipeline.database.limits import broken_off
from flywheel_pipeline.errors import ArchiveError

Progress = Callable[[dt.date, int, int], None]
_SUM = pa.decimal128(38)  # a sum of 64-bit integers wraps in silence


@dataclass(frozen=True)
class DayExport:
    """What was written of one day. `replaced`: an older export of it was exchanged."""

    day: dt.date
    generation: str
    rows: int
    corrections: int
    files: int
    bytes: int
    seconds: float
    replaced: bool


@dataclass(frozen=True)
class ExportReport:
    """The days that were exported, and why others in the asked range were not."""

    exported: tuple[DayExport, ...]
    left: Mapping[dt.date, str]

    @property
    def rows(self) -> int:
        """Executions written."""
        return sum(day.rows for day in self.exported)


def export_due(
    engine: sa.Engine,
    archive: Archive,
    *,
    today: dt.date,
    after_days: int,
    from_day: dt.date | None = None,
    to_day: dt.date | None = None,
    again: bool = False,
    progress: Progress | None = None,
) -> ExportReport:
    """Export every closed day that the archive does not hold as it is now.

    Args:
        engine: the database.
        archive: where to.
        today: the UTC day by which days are young.
        after_days: full days that pass after a day's end before it is closed.
        from_day: the first day looked at; None: of all.
        to_day: the last day looked at, included.
        again: export also days that are up to date.
        progress: called with (day, rows written, rows in all) while a day is written.

    Raises:
        ArchiveError: the first day that could not be exported; those before it are.
    """
    with engine.connect() as connection:
        states = days.day_states(connection, archive, today=today, after_days=after_days)
    chosen = [
        state
        for state in states
        if (from_day is None or state.day >= from_day) and (to_day is None or state.day <= to_day)
    ]
    exported, left = [], {}
    for state in chosen:
        if state.waits or (again and state.state is days.State.ARCHIVED):
            exported.append(export_day(engine, archive, state.day, progress=progress))
        elif state.state is not days.State.ARCHIVED:
            left[state.day] = state.reason
    return ExportReport(tuple(exported), left)


def export_day(engine: sa.Engine, archive: Archive, day: dt.date, *, progress: Progress | None = None) -> DayExport:
    """Export one day, whatever its age, and publish it.

    Raises:
        NothingToArchive: its telemetry was purged, or cells of it wait in the outbox.
        NotRepresentable: a row holds a value that no column of the archive can hold.
        ArchiveUnreachable: the file system refused a file.
        ArchiveError: what was written does not add up to what PostgreSQL counted.
        DatabaseUnavailable: the database broke it off; the archive holds what it held before.
    """
    begun = time.monotonic()
    days.give_version(engine, day)
    with (
        broken_off("export", "The archive holds a whole day, the one before or this one; export again."),
        engine.connect().execution_options(isolation_level="REPEATABLE READ") as connection,
        connection.begin(),
    ):
        days.exclude_others(connection)  # before the snapshot: what the one before did is seen
        version = _version(connection, day)
        control = {table: _control(connection, table, day) for table in TABLES}
        snapshot = connection.exec_driver_sql("SELECT pg_export_snapshot()").scalar_one()
        generation = f"{dt.datetime.now(dt.UTC):%Y%m%dT%H%M%SZ}-{secrets.token_hex(4)}"
        files = []
        with archive.reaching():
            replaced = archive.fs.exists(archive.full_path(archive.manifest_path(day)))
        with snapshot_reader(engine.url, snapshot) as reader:
            for table in TABLES:
                batches = _agreeing(day_batches(reader, table, day, control[table]), table, day, control[table])
                made = ParquetFiles(
                    archive,
                    archive.day_folder(table, day),
                    table,
                    generation,
                    columns.schema(table),
                    {"schema_version": str(SCHEMA_VERSION), "day": day.isoformat(), "generation": generation},
                )
                write_batches(
                    made, batches, _counting(progress if table == "executions" else None, day, control[table])
                )
                files += made.files
        manifest = DayManifest(
            schema_version=SCHEMA_VERSION,
            day=day,
            generation=generation,
            rows=control["executions"]["rows"],
            files=tuple(files),
            day_version=version,
            exported_at=dt.datetime.now(dt.UTC),
            exported_by=f"flywheel {__version__}",
            columns={table: columns.described(table) for table in TABLES},
            control={table: control[table] for table in TABLES},
        )
        connection.exec_driver_sql("SELECT 1")  # it still has its lock: nobody has exported or purged meanwhile
        archive.publish(manifest)
    return DayExport(
        day,
        generation,
        manifest.rows,
        manifest.rows_of("corrections"),
        len(files),
        manifest.total_bytes,
        time.monotonic() - begun,
        replaced,
    )


def _version(connection: sa.Connection, day: dt.date) -> str:
    row = connection.execute(
        sa.text(
            "SELECT v.version::text AS version, EXISTS (SELECT FROM sealed_days AS s WHERE s.day = v.day) AS sealed, "
            "(SELECT count(*) FROM touched_cells AS c WHERE c.day = v.day) AS waiting FROM day_versions AS v WHERE v.day = :day"
        ),
        {"day": day},
    ).one()
    if row.sealed:
        raise NothingToArchive(
            f"The telemetry of {day} was purged, so there is nothing to export.",
            hint="The archive keeps what it holds of it.",
        )
    if row.waiting:
        raise NothingToArchive(
            f"{row.waiting} outbox rows of {day} wait for a refresh, so the day is not closed.",
            hint="Run `flywheel run`, then export again.",
        )
    return str(row.version)


def _control(connection: sa.Connection, table: Table, day: dt.date) -> dict[str, int]:
    found = connection.exec_driver_sql(columns.control_query(table, day)).mappings().one()
    sums = {name: int(value) for name, value in found.items()}
    if sums.pop("odd"):
        execution = connection.exec_driver_sql(columns.unrepresentable_query(table, day)).scalar_one()
        raise NotRepresentable(
            f"The row {execution} of {day} holds NaN for an amount, or a time outside the years 1 to 9999: no file can hold it exactly.",
            hint="Correct that row, then export again.",
        )
    return sums


def _agreeing(
    batches: Iterator[pa.RecordBatch], table: Table, day: dt.date, control: Mapping[str, int]
) -> Iterator[pa.RecordBatch]:
    """Pass the batches on, and refuse the day where they do not add up to what PostgreSQL counted."""
    found = dict.fromkeys(control, 0)
    for batch in batches:
        found["rows"] += batch.num_rows
        found["ids"] += int(pc.sum(batch.column("id").cast(_SUM)).as_py() or 0)
        for name in columns.nullable_columns(table):
            found[name] += batch.num_rows - batch.column(name).null_count
        yield batch
    differing = {name: (control[name], found[name]) for name in control if control[name] != found[name]}
    if differing:
        name, (counted, written) = next(iter(differing.items()))
        raise ArchiveError(
            f"The {table} of {day} do not add up: PostgreSQL counts {counted} for {name}, the files hold {written}.",
            hint="Nothing was published; the archive holds what it held before. Export again, and report it should it stay.",
        )


def _counting(progress: Progress | None, day: dt.date, control: Mapping[str, int]) -> Callable[[int], None]:
    written = 0

    def seen(rows: int) -> None:
        nonlocal written
        written += rows
        if progress is not None:
            progress(day, written, control["rows"])

    return seen
