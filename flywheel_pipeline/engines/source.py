"""Where an engine's rows come from: archived files for days that the archive holds as they are, PostgreSQL for all others.

Belongs here: that choice, the export of live days on the fly, the snapshot of small tables, and how the database folds
case. Does not belong here: the archive's own rules (`archive/`), and the engines.

All of it is read in the caller's transaction, which holds the refresh lock: aliases and class rules cannot change before
it commits, and a row that is written meanwhile has its outbox entry, which the next refresh takes.
"""

from __future__ import annotations

import datetime as dt
import io
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.csv as pacsv
import pyarrow.parquet as pq
import sqlalchemy as sa

from flywheel_pipeline.archive.columns import arrow_type
from flywheel_pipeline.archive.errors import DayNotArchived
from flywheel_pipeline.archive.layout import Archive, ArchiveFile
from flywheel_pipeline.database import tables
from flywheel_pipeline.engines.dialects import Casing
from flywheel_pipeline.engines.errors import DatabaseNotPortable, EngineError
from flywheel_pipeline.engines.plan import TIME_COLUMNS, Plan

#: Above that, a table is none to carry to an engine with every job.
REFERENCE_ROWS = 1_000_000

_DAYS = """
SELECT d.day, s.day IS NOT NULL AS sealed, s.archived_generation, v.version::text AS version
FROM (SELECT DISTINCT day FROM scope_input) AS d
LEFT JOIN sealed_days AS s USING (day) LEFT JOIN day_versions AS v USING (day)
ORDER BY d.day
"""
_LIVE = """
COPY (
  SELECT {columns} FROM public.execution_telemetry AS t
  JOIN scope_live AS s ON s.site_id = t.site_id AND s.day = (t.event_at AT TIME ZONE 'UTC')::date
) TO STDOUT (FORMAT csv)
"""
_FIRST, _LAST = "'0001-01-01 00:00+00'::timestamptz", "'9999-12-31 23:59:59.999999+00'::timestamptz"
_ODD = "odd"
_BLOCK_BYTES = 8 << 20
_INSTEAD = "Correct that row, or compute these days with FLYWHEEL_ENGINE=postgres."
_FOLDED = """
SELECT string_agg(chr(i), '' ORDER BY i), string_agg({fold}(chr(i)), '' ORDER BY i)
FROM generate_series(1, 131071) AS i WHERE i NOT BETWEEN 55296 AND 57343 AND {fold}(chr(i)) <> chr(i)
"""


def archived_files(connection: sa.Connection, archive: Archive | None) -> tuple[tuple[ArchiveFile, ...], list[dt.date]]:
    """Return the files of the days of `scope_input` that the archive holds as they are, and the days to read live.

    Raises:
        EngineError: a day was purged after it was archived, and the archive in use does not hold that export.
        ArchiveError: its manifest or a file of it is lost, broken, or from a newer release.
    """
    files: list[ArchiveFile] = []
    live: list[dt.date] = []
    held = frozenset(archive.days()) if archive is not None else frozenset()
    for row in connection.exec_driver_sql(_DAYS):
        if row.sealed and (row.archived_generation is None or archive is None):
            continue  # not in scope itself: the day after one of no telemetry, of which nothing can be read
        if row.day not in held and not row.sealed:
            live.append(row.day)
            continue
        assert archive is not None  # noqa: S101
        try:
            manifest = archive.manifest(row.day)
        except DayNotArchived:
            if row.sealed:
                raise
            live.append(row.day)
            continue
        if row.sealed and manifest.generation != row.archived_generation:
            raise EngineError(
                f"The archive {archive.shown} holds generation {manifest.generation} of {row.day}; "
                f"generation {row.archived_generation} was purged.",
                hint="Restore that manifest and its files.",
            )
        if row.sealed or manifest.day_version == row.version:
            files += manifest.files("executions")
        else:
            live.append(row.day)
    return tuple(files), live


def export_live(connection: sa.Connection, days: Iterable[dt.date], plan: Plan, target: Path) -> int:
    """Write the rows of the site-days of `scope_input` on these days to one Parquet file; return how many.

    Nothing is written where there are none. A time beyond the years 1 to 9999 is given as the first or last moment of them
    where no model tells the difference.

    Raises:
        EngineError: a row holds a value that no engine reads as PostgreSQL does, or that is too long for one.
    """
    connection.exec_driver_sql("CREATE TEMP TABLE scope_live (site_id text, day date) ON COMMIT DROP")
    connection.execute(
        sa.text("INSERT INTO scope_live SELECT DISTINCT site_id, day FROM scope_input WHERE day = ANY(:days)"),
        {"days": list(days)},
    )
    connection.exec_driver_sql("ANALYZE scope_live")
    columns, declared = plan.telemetry, tables.execution_telemetry.columns
    kinds = {name: pa.timestamp("us") if name in TIME_COLUMNS else arrow_type(declared[name]) for name in columns}
    parts, odd = [], []
    for name in columns:
        parts.append(_within(f"t.{name}") if name in TIME_COLUMNS else f"t.{name}")
        if name in TIME_COLUMNS - plan.compared:
            odd.append(f"WHEN t.{name} NOT BETWEEN {_FIRST} AND {_LAST} THEN '{name} '")
        elif pa.types.is_decimal(kinds[name]):
            odd.append(f"WHEN t.{name} = 'NaN' THEN '{name} '")
    # Empty but for such a row, of which it has the column and the name: seen in passing, for a byte a row.
    parts.append(f"CASE {' '.join(odd)} END || t.execution_id" if odd else "NULL")
    driver = connection.connection.driver_connection
    assert driver is not None  # noqa: S101
    rows = 0
    connection.exec_driver_sql("SET LOCAL enable_nestloop = off")
    with driver.cursor() as cursor, cursor.copy(_LIVE.format(columns=", ".join(parts))) as copy:
        stream = io.BufferedReader(_Chunks(iter(copy)), 1 << 20)
        if stream.peek(1):
            try:
                rows = _write(stream, kinds, target)
            except pa.ArrowInvalid as error:
                said = str(error).splitlines()[0].rstrip(".")
                if "straddling" in said:  # Arrow's word for a row that is longer than a block
                    said = f"one is longer than {_BLOCK_BYTES >> 20} MB"
                raise EngineError(
                    f"Rows of these days cannot be handed to an engine: {said}.", hint=_INSTEAD
                ) from error
    connection.exec_driver_sql("SET LOCAL enable_nestloop TO DEFAULT")
    connection.exec_driver_sql("DROP TABLE pg_temp.scope_live")
    return rows


def _write(stream: Any, kinds: dict[str, pa.DataType], target: Path) -> int:
    reader = pacsv.open_csv(
        stream,
        pacsv.ReadOptions(column_names=[*kinds, _ODD], block_size=_BLOCK_BYTES),
        pacsv.ParseOptions(newlines_in_values=True),
        pacsv.ConvertOptions(
            column_types={**kinds, _ODD: pa.string()},
            null_values=[""],
            true_values=["t"],
            false_values=["f"],
            strings_can_be_null=True,
            quoted_strings_can_be_null=False,
        ),
    )
    rows = 0
    with pq.ParquetWriter(target, pa.schema(list(kinds.items())), compression="zstd") as writer:
        for batch in reader:
            odd = batch.column(_ODD).drop_null()
            if len(odd):
                column, _, execution = odd[0].as_py().partition(" ")
                what = "NaN" if pa.types.is_decimal(kinds[column]) else "a time outside the years 1 to 9999"
                raise EngineError(f"The row {execution} has {what} for {column}, which no engine holds.", hint=_INSTEAD)
            writer.write_batch(batch.select(list(kinds)))
            rows += batch.num_rows
    return rows


class _Chunks(io.RawIOBase):
    """The blocks of a COPY as a file that is read once."""

    def __init__(self, chunks: Iterable[memoryview | bytes]) -> None:
        self._chunks = iter(chunks)
        self._rest = b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        while not self._rest:
            chunk = next(self._chunks, None)
            if chunk is None:
                return 0
            self._rest = bytes(chunk)
        size = min(len(buffer), len(self._rest))
        buffer[:size] = self._rest[:size]
        self._rest = self._rest[size:]
        return size


def _within(time: str) -> str:
    """A time in UTC without a zone; the first or last moment that can be said for one beyond it, and null for null."""
    return f"(CASE WHEN {time} < {_FIRST} THEN {_FIRST} WHEN {time} > {_LAST} THEN {_LAST} ELSE {time} END AT TIME ZONE 'UTC')"


def reference(connection: sa.Connection, name: str, columns: tuple[str, ...]) -> pa.Table:
    """Return these columns of a small table; times as UTC without a zone, infinity as the first or last that can be said.

    No telemetry is of those two days, so a comparison with it is the same.

    Raises:
        EngineError: the table is not small.
    """
    table = tables.metadata.tables[name]
    kinds = {column: arrow_type(table.columns[column]) for column in columns}
    parts = []
    for column, kind in kinds.items():
        if pa.types.is_timestamp(kind):
            kinds[column] = pa.timestamp("us")
            parts.append(_within(column))
        else:
            parts.append(column)
    found = connection.exec_driver_sql(
        f"SELECT {', '.join(parts)} FROM public.{name} LIMIT {REFERENCE_ROWS + 1}"  # noqa: S608
    ).all()
    if len(found) > REFERENCE_ROWS:
        raise EngineError(
            f"The table {name} has more than {REFERENCE_ROWS:,} rows, too many to carry to an engine.",
            hint="Use FLYWHEEL_ENGINE=postgres.",
        )
    return _arrow(found, kinds)


def scope_table(connection: sa.Connection, name: str) -> pa.Table:
    """Return the site-days of a scope table of the refresh."""
    rows = connection.exec_driver_sql(f"SELECT site_id, day FROM pg_temp.{name}").all()  # noqa: S608
    return _arrow(rows, {"site_id": pa.string(), "day": pa.date32()})


def _arrow(rows: Iterable[sa.Row[tuple[object, ...]]], kinds: dict[str, pa.DataType]) -> pa.Table:
    columns = list(zip(*rows, strict=True)) or [()] * len(kinds)
    return pa.table({name: pa.array(values, kind) for (name, kind), values in zip(kinds.items(), columns, strict=True)})


def database_casing(connection: sa.Connection) -> Casing:
    """Return how this database folds case, character by character.

    Raises:
        DatabaseNotPortable: it folds by more than single characters (ICU), or is not in UTF-8.
    """
    provider = connection.exec_driver_sql(
        "SELECT datlocprovider::text AS provider, to_jsonb(d) ->> 'datlocale' AS locale, "
        "current_setting('server_encoding') AS encoding FROM pg_database AS d WHERE datname = current_database()"
    ).one()
    if provider.encoding != "UTF8" or provider.provider == "i" or provider.locale == "PG_UNICODE_FAST":
        raise DatabaseNotPortable(
            "This database folds the case of text by rules over more than one character, which no other engine has.",
            hint="Use FLYWHEEL_ENGINE=postgres, or a database with a libc or C.UTF-8 locale, in UTF-8.",
        )
    folded = []
    for fold in ("lower", "upper"):
        given, wanted = connection.exec_driver_sql(_FOLDED.format(fold=fold)).one()
        ascii_part = (
            "".join(a for a in given if a.isascii()),
            "".join(b for a, b in zip(given, wanted, strict=False) if a.isascii()),
        )
        letters = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
        usual = (letters, letters.lower()) if fold == "lower" else (letters.lower(), letters)
        if len(given) != len(wanted) or ascii_part != usual:
            raise DatabaseNotPortable(
                f"This database's {fold}() changes letters in a way that no other engine does.",
                hint="Use FLYWHEEL_ENGINE=postgres.",
            )
        folded.append((given, wanted))
    return Casing(lower=folded[0], upper=folded[1])
