"""Arrow into PostgreSQL: record batches through COPY into a table of the caller's own transaction.

Belongs here: the way in. Does not belong here: what happens to the rows then.

CSV, written by Arrow: an ADBC driver has a connection of its own, and these rows must be of the transaction that sets the
cells. Text is always quoted and null never is, so that '' and null stay apart.
"""

from __future__ import annotations

import io
from collections.abc import Iterable
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as pacsv
import sqlalchemy as sa

from flywheel_pipeline.sql_models.relations import execute

_OPTIONS = pacsv.WriteOptions(include_header=False, quoting_style="needed")


def land(connection: sa.Connection, table: str, typed: str, batches: Iterable[pa.RecordBatch]) -> int:
    """Create a temporary table with the columns of the query `typed`, and fill it; return how many rows came.

    The columns of the batches are in the order of the query's. The table goes with the transaction.
    """
    execute(connection, f"CREATE TEMP TABLE {table} ON COMMIT DROP AS {typed} WITH NO DATA")
    driver = connection.connection.driver_connection
    assert driver is not None  # noqa: S101
    rows = 0
    with driver.cursor() as cursor, cursor.copy(f"COPY pg_temp.{table} FROM STDIN (FORMAT csv)") as copy:
        for batch in batches:
            if batch.num_rows:
                copy.write(_csv(batch))
                rows += batch.num_rows
    connection.exec_driver_sql(f"ANALYZE pg_temp.{table}")
    return rows


def _csv(batch: pa.RecordBatch) -> memoryview:
    columns = [_plain(column) for column in batch.columns]
    out = io.BytesIO()
    pacsv.write_csv(pa.RecordBatch.from_arrays(columns, names=batch.schema.names), out, _OPTIONS)
    return out.getbuffer()


def _plain(column: Any) -> Any:
    """A list of times or numbers becomes PostgreSQL's text of an array; no element of it has anything to escape."""
    if not pa.types.is_list(column.type) and not pa.types.is_large_list(column.type):
        return column
    inner = column.type.value_type
    if not (pa.types.is_timestamp(inner) or pa.types.is_integer(inner) or pa.types.is_date(inner)):
        raise TypeError(f"an array of {inner} cannot be landed")
    texts = pc.cast(column, pa.list_(pa.string()))
    return pc.binary_join_element_wise("{", pc.binary_join(texts, ","), "}", "")
