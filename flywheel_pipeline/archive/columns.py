"""The columns of the archive's files, and the SELECTs that give them: every column of the two tables, typed exactly.

Belongs here: Arrow types from the declared tables and the texts of the queries. Does not belong here: running them.

Exactly means: times as UTC timestamps in microseconds, `numeric` as decimals, jsonb as PostgreSQL's own text of it, and
never a float for what is none. A change of these columns is another `layout.SCHEMA_VERSION`; a test holds them fixed.
"""

from __future__ import annotations

import datetime as dt
from collections.abc import Sequence
from functools import cache
from typing import Final

import pyarrow as pa
import sqlalchemy as sa
from psycopg import sql
from sqlalchemy.dialects import postgresql as pg

from flywheel_pipeline.archive.layout import Table
from flywheel_pipeline.database.tables import execution_corrections, execution_telemetry

DAY: Final = "day"
SOURCES: Final[dict[Table, sa.Table]] = {"executions": execution_telemetry, "corrections": execution_corrections}
#: Columns of which nearly every row has a value of its own: a dictionary would only cost.
UNIQUE_VALUES: Final = frozenset(
    {"id", "execution_id", "started_at", "completed_at", "created_at", "reported_at", "event_at", "corrected_at"}
)
#: Columns by whose smallest and largest value a reader leaves out row groups.
SOUGHT_BY: Final = ("id", "execution_id", "site_id", "event_at", "created_at", "corrected_at")

_FROM: Final[dict[Table, str]] = {
    "executions": "public.execution_telemetry AS t",
    "corrections": "public.execution_corrections AS c JOIN public.execution_telemetry AS t USING (execution_id)",
}
_ALIAS: Final[dict[Table, str]] = {"executions": "t", "corrections": "c"}
# The same days as the cells': (event_at AT TIME ZONE 'UTC')::date, said so that an index on the time helps.
_OF_THE_DAY: Final = (
    "t.event_at >= ({day}::date::timestamp AT TIME ZONE 'UTC') "
    "AND t.event_at < (({day}::date + 1)::timestamp AT TIME ZONE 'UTC')"
)
_FIRST: Final = dt.datetime(1, 1, 1, tzinfo=dt.UTC)
_LAST: Final = dt.datetime(9999, 12, 31, 23, 59, 59, 999999, tzinfo=dt.UTC)


def arrow_type(column: sa.Column[object]) -> pa.DataType:
    """Return the Arrow type that holds every value of a column exactly.

    Raises:
        TypeError: there is none for its type; then the archive's columns need a decision and another schema version.
    """
    kind = column.type
    if isinstance(kind, sa.Numeric) and not isinstance(kind, sa.Float):
        if kind.precision is None or kind.scale is None:
            raise TypeError(f"{column}: a numeric without precision has no exact Arrow type")
        return pa.decimal128(kind.precision, kind.scale)
    for known, arrow in (
        (sa.BigInteger, pa.int64()),
        (sa.Integer, pa.int32()),
        (sa.Float, pa.float64()),
        (sa.Boolean, pa.bool_()),
        (sa.TIMESTAMP, pa.timestamp("us", tz="UTC")),
        (sa.Date, pa.date32()),
        (sa.String, pa.string()),
        (pg.JSONB, pa.string()),
    ):
        if isinstance(kind, known):
            return arrow
    raise TypeError(f"{column}: no Arrow type holds {kind} exactly")


@cache
def schema(table: Table) -> pa.Schema:
    """Return the columns of a table's files: `day` first, then those of the table in PostgreSQL, in its order."""
    fields = [pa.field(DAY, pa.date32(), nullable=False)]
    fields += [
        pa.field(column.name, arrow_type(column), nullable=bool(column.nullable) and column.computed is None)
        for column in SOURCES[table].columns
    ]
    return pa.schema(fields)


def described(table: Table) -> dict[str, str]:
    """Return the Arrow types by column, as a manifest names them."""
    return {field.name: str(field.type) for field in schema(table)}


def rows_query(table: Table, day: dt.date, columns: Sequence[str]) -> str:
    """Return the SELECT of these columns of a day's rows.

    No cast of jsonb to text: what PostgreSQL sends of it is that text, and a cast costs a quarter of its time.
    """
    parts = [sql.SQL("{}.{}").format(sql.SQL(_ALIAS[table]), sql.Identifier(name)) for name in columns]
    return _query(table, day, sql.SQL(", ").join(parts))


def control_query(table: Table, day: dt.date) -> str:
    """Return the SELECT of what a day's files must add up to: `rows`, `ids` (the sum of all ids), `odd` (rows of
    `unrepresentable_query`), then how many values each column holds that may be null, under the column's name.
    """
    alias = sql.SQL(_ALIAS[table])
    parts = [
        sql.SQL("count(*) AS rows"),
        sql.SQL("coalesce(sum({}.id), 0) AS ids").format(alias),  # numeric: two ids may be more than a bigint
        sql.SQL("count(*) FILTER (WHERE {}) AS odd").format(_odd(table)),
        *(
            sql.SQL("count({}.{}) AS {}").format(alias, sql.Identifier(name), sql.Identifier(name))
            for name in nullable_columns(table)
        ),
    ]
    return _query(table, day, sql.SQL(", ").join(parts))


def unrepresentable_query(table: Table, day: dt.date) -> str:
    """Return the SELECT of the first row of a day with a value that no column of the archive holds: NaN in a decimal, a time
    that is infinite or beyond the years 1 to 9999.
    """
    what = sql.SQL("{}.execution_id").format(sql.SQL(_ALIAS[table]))
    return f"{_query(table, day, what)} AND ({_odd(table).as_string(None)}) LIMIT 1"


def _odd(table: Table) -> sql.Composed:
    conditions = []
    for column in SOURCES[table].columns:
        named = sql.SQL("{}.{}").format(sql.SQL(_ALIAS[table]), sql.Identifier(column.name))
        if isinstance(column.type, sa.Numeric) and not isinstance(column.type, sa.Float):
            conditions.append(sql.SQL("{} = 'NaN'").format(named))
        elif isinstance(column.type, sa.TIMESTAMP):
            bounds = (sql.Literal(_FIRST), sql.Literal(_LAST))
            conditions.append(sql.SQL("{} NOT BETWEEN {} AND {}").format(named, *bounds))
    return sql.SQL(" OR ").join(conditions)


def nullable_columns(table: Table) -> tuple[str, ...]:
    """Return the columns that may be null."""
    return tuple(field.name for field in schema(table) if field.nullable)


def _query(table: Table, day: dt.date, what: sql.Composable) -> str:
    condition = sql.SQL(_OF_THE_DAY).format(day=sql.Literal(day.isoformat()))
    query = sql.SQL("SELECT {} FROM {} WHERE {}").format(what, sql.SQL(_FROM[table]), condition)
    return query.as_string(None)
