"""A day's rows out of PostgreSQL as Arrow record batches, in a snapshot that somebody else holds.

Belongs here: the Arrow path out of PostgreSQL. Does not belong here: what is done with the batches.

The path is ADBC (Apache Arrow's own driver, over COPY BINARY). Measured on rows of the benchmark's fleet, 44 columns of which
24 are null throughout, zstd Parquet written; CPU seconds of the client for a million rows, and its peak memory:

    ADBC, the columns that hold values    3.3-3.9 s   250 MB, the whole command's imports included
    connectorx, all columns               6-7 s       165 MB
    COPY CSV into pyarrow.csv             7-9 s       250-275 MB
    ADBC, all columns                     7.6-9.5 s   160-210 MB
    pandas read_sql + to_parquet          16.8-26.8 s 3,400-3,600 MB

A null costs ADBC more than a value (1.1 s of 1.9 s went into 24 columns of nothing for 300,000 rows), so columns that are
null throughout the day are not asked for: the control query has counted the values of each anyway. connectorx cannot connect
to a Unix socket, all that the embedded server listens on. CSV keeps no types of its own. The whole export against pandas, by the
clock: `benchmarks/bench_archive.py`.
"""

from __future__ import annotations

import datetime as dt
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Final

import adbc_driver_manager
import adbc_driver_postgresql.dbapi as adbc
import pyarrow as pa
from psycopg import sql
from sqlalchemy import URL

from flywheel_pipeline.archive.columns import DAY, rows_query, schema
from flywheel_pipeline.archive.layout import Table
from flywheel_pipeline.database.engine import libpq_url
from flywheel_pipeline.database.limits import ended
from flywheel_pipeline.errors import DatabaseUnavailable

#: Of a batch as the driver hands it over. Smaller ones cost nothing measurable, larger ones memory.
BATCH_BYTES: Final = 4 << 20
_BATCH_OPTION: Final = "adbc.postgresql.batch_size_hint_bytes"


@contextmanager
def snapshot_reader(url: URL, snapshot: str) -> Iterator[Any]:
    """Connect to the database and take up an exported snapshot; yield the ADBC connection.

    Raises:
        DatabaseUnavailable: the connection failed, at once or in between.
    """
    try:
        with adbc.connect(libpq_url(url)) as connection:
            with connection.cursor() as cursor:
                cursor.execute("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ, READ ONLY")
                cursor.execute(sql.SQL("SET TRANSACTION SNAPSHOT {}").format(sql.Literal(snapshot)).as_string(None))
                cursor.execute("SET LOCAL jit = off")
                # It waits while files are written: `database.limits.let_idle`, on a connection of another driver.
                cursor.execute("SET LOCAL idle_in_transaction_session_timeout = 0")
            yield connection
    except (adbc_driver_manager.OperationalError, adbc_driver_manager.InternalError) as error:
        raise _broken_off(error) from error


def _broken_off(error: Exception) -> DatabaseUnavailable:
    return ended("export", error, "Nothing was changed in the archive; export again.")


def day_batches(connection: Any, table: Table, day: dt.date, control: Mapping[str, int]) -> Iterator[pa.RecordBatch]:
    """Yield a day's rows with all columns of `columns.schema`; `control` says which of them hold values at all.

    Raises:
        DatabaseUnavailable: the connection broke off.
    """
    wanted = schema(table)
    columns = [name for name in wanted.names if name != DAY and control.get(name, 1)]
    with connection.cursor() as cursor:
        cursor.adbc_statement.set_options(**{_BATCH_OPTION: str(BATCH_BYTES)})
        cursor.execute(rows_query(table, day, columns))
        for batch in _read(cursor.fetch_record_batch()):
            yield _completed(batch, wanted, day)


def _read(reader: pa.RecordBatchReader) -> Iterator[pa.RecordBatch]:
    while True:
        try:
            batch = reader.read_next_batch()
        except StopIteration:
            return
        except (OSError, pa.ArrowException) as error:  # in mid-stream the driver speaks through Arrow
            raise _broken_off(error) from error
        yield batch


def _completed(batch: pa.RecordBatch, wanted: pa.Schema, day: dt.date) -> pa.RecordBatch:
    arrays = []
    for field in wanted:
        position = batch.schema.get_field_index(field.name)
        if field.name == DAY:
            arrays.append(pa.repeat(pa.scalar(day, field.type), batch.num_rows))
        elif position < 0:
            arrays.append(pa.nulls(batch.num_rows, field.type))
        else:
            arrays.append(_typed(batch.column(position), field.type))
    return pa.RecordBatch.from_arrays(arrays, schema=wanted)


def _typed(array: Any, kind: pa.DataType) -> Any:
    # The driver hands numeric over as its exact text.
    if isinstance(array, pa.ExtensionArray):
        array = array.storage
    return array if array.type.equals(kind) else array.cast(kind)
