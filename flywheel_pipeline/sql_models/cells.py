"""Cells: recomputing a cell model's rows for the touched cells, with the model's own SELECT.

Belongs here: the query text for a scope and the write of its differences. Does not belong here: which cells
are touched (`aggregates/refresh.py`), locking, and what a model computes.

The scope is given by temporary tables of the session: `scope_input(site_id text, day date)`, the days of
telemetry to read, sites as written; `scope_days(site_id text, day date)` and `scope_sites(site_id text)`,
the cells to set. Put them there, and ANALYZE them, before calling `recompute`.
"""

# ruff: noqa: S608 (identifiers come from checked model headers; there are no values in this SQL)
from __future__ import annotations

from dataclasses import dataclass

import sqlalchemy as sa
from sqlalchemy.exc import IntegrityError

from flywheel_pipeline.sql_models.loader import TELEMETRY, ModelGraph, SqlModel, telemetry_columns
from flywheel_pipeline.sql_models.relations import execute, quote

SCHEMA = "public"  # named, since a CTE of the same name stands in front

# So many new or changed rows make the planner's statistics worth renewing within the refresh: the next cell
# model reads these rows before autovacuum could see them.
ANALYZE_FROM_ROWS = 10_000


@dataclass(frozen=True)
class CellCounts:
    """What a recompute did to a cell model's table, in rows."""

    inserted: int
    updated: int
    deleted: int
    unchanged: int

    @property
    def written(self) -> int:
        """Rows inserted, updated or deleted."""
        return self.inserted + self.updated + self.deleted


def cell_query(
    graph: ModelGraph,
    model: SqlModel,
    *,
    day_scope: str = "scope_days",
    everything: bool = False,
) -> str:
    """Give the SQL that computes a cell model's rows for the cells in scope.

    The model's own text stands in it word for word, and so does each view on the way to its inputs. They
    are CTEs, and the CTEs before them carry the names of the inputs: telemetry with the rows of
    `scope_input` only, upstream cell models with the rows of this model's cells only. So a model is written
    and read as one plain SELECT over everything, and computes any part of it.

    Args:
        graph: all models.
        model: a model of `materialized: cell`.
        day_scope: name of the temporary table of (site_id, day) cells.
        everything: no scope at all: the model's SELECT as it stands.

    Returns:
        A SELECT of the model's columns in the declared order.

    Raises:
        ModelError: the model is not a cell model.
    """
    if model.cell is None:
        model.refuse(f"{model.name} is a {model.materialized}; only cell models are computed by cells.")
    if everything:
        return model.sql
    scope_table = day_scope if model.cell == "day" else "scope_sites"
    path = graph.inlined_path(model)
    bodies = [m for m in (*path, model) if m.materialized == "view" or m is model]
    ctes: list[str] = []
    if any(TELEMETRY in m.dependencies for m in bodies):
        columns = ", ".join(f"t.{quote(column)}" for column in telemetry_columns(bodies)) or "t.id"
        ctes.append(
            f"{TELEMETRY} AS (\n"
            f"SELECT {columns}\nFROM {SCHEMA}.{TELEMETRY} AS t\n"
            "JOIN (SELECT DISTINCT site_id, day FROM scope_input) AS s\n"
            "  ON t.site_id = s.site_id\n"
            "  AND t.event_at >= (s.day::timestamp AT TIME ZONE 'UTC')\n"
            "  AND t.event_at < ((s.day + 1)::timestamp AT TIME ZONE 'UTC')\n)"
        )
    for upstream in path:
        if upstream.materialized == "view":
            ctes.append(f"{upstream.name} AS (\n{upstream.sql}\n)")
        else:
            shared = [column for column in model.scope_columns if column in upstream.scope_columns]
            ctes.append(
                f"{upstream.name} AS (\nSELECT u.* FROM {SCHEMA}.{upstream.name} AS u\n"
                f"WHERE {_in_scope('u', shared, scope_table)}\n)"
            )
    ctes.append(f"{model.name} AS (\n{model.sql}\n)")
    scoped = _in_scope("m", list(model.scope_columns), scope_table)
    return "WITH " + ",\n".join(ctes) + f"\nSELECT m.* FROM {model.name} AS m\nWHERE {scoped}"


def recompute(connection: sa.Connection, graph: ModelGraph, model: SqlModel, *, everything: bool = False) -> CellCounts:
    """Set a cell model's rows for the cells in scope, and write only what differs.

    Computes the rows into a temporary table, deletes rows of these cells that are no longer computed,
    updates those that differ and inserts the new ones, within the caller's transaction. A second recompute
    of the same cells writes nothing, not even a row lock; that is why this is no INSERT ... ON CONFLICT DO
    UPDATE, which locks each row it meets, and a lock is a write.

    The caller holds the refresh lock: two recomputes of one cell at a time could write back an older
    snapshot.

    Args:
        connection: an open transaction in which the scope tables exist.
        graph: all models.
        model: a model of `materialized: cell`.
        everything: recompute all cells from all of telemetry, and drop every row not computed. Not for a
            database from which telemetry was purged.

    Returns:
        Rows inserted, updated, deleted, and found as they should be, of the cells in scope.

    Raises:
        ModelError: the SELECT gives two rows with one key, or a null in the key.
    """
    query = cell_query(graph, model, everything=everything)
    table = f"{SCHEMA}.{model.name}"
    columns = [quote(column) for column in model.columns]
    names = ", ".join(columns)
    try:
        empty = not connection.exec_driver_sql(f"SELECT EXISTS (SELECT 1 FROM {table})").scalar_one()
        if empty:
            inserted = execute(connection, f"INSERT INTO {table} ({names})\n{query}").rowcount
            _renew_statistics(connection, table, inserted)
            return CellCounts(inserted, 0, 0, 0)
        return _write_differences(connection, model, query, table, everything)
    except IntegrityError as error:
        diagnosis = getattr(error.orig, "diag", None)
        detail = getattr(diagnosis, "message_detail", None) or str(error.orig)
        model.refuse(
            f"the rows do not fit the key ({', '.join(model.key)}): {detail}",
            hint="The SELECT must give one row per key, with no null in it.",
        )


def _write_differences(
    connection: sa.Connection, model: SqlModel, query: str, table: str, everything: bool
) -> CellCounts:
    result = f"pg_temp.{quote(f'result_{model.name}')}"
    scope_table = "scope_days" if model.cell == "day" else "scope_sites"
    scoped = "true" if everything else _in_scope("t", list(model.scope_columns), scope_table)
    columns = [quote(column) for column in model.columns]
    values = [quote(column) for column in model.columns if column not in model.key]
    same_key = " AND ".join(f"r.{quote(column)} = t.{quote(column)}" for column in model.key)
    names = ", ".join(columns)

    execute(connection, f"DROP TABLE IF EXISTS {result}")
    rows = execute(connection, f"CREATE TEMP TABLE {result[8:]} ON COMMIT DROP AS\n{query}").rowcount
    execute(connection, f"ANALYZE {result} ({', '.join(quote(column) for column in model.key)})")
    before = execute(connection, f"SELECT count(*) FROM {table} AS t WHERE {scoped}").scalar_one()
    deleted = execute(
        connection,
        f"DELETE FROM {table} AS t WHERE {scoped}\nAND NOT EXISTS (SELECT 1 FROM {result} AS r WHERE {same_key})",
    ).rowcount
    updated = 0
    if values:
        updated = execute(
            connection,
            f"UPDATE {table} AS t SET {', '.join(f'{column} = r.{column}' for column in values)}\n"
            f"FROM {result} AS r WHERE {same_key}\n"
            f"AND ROW({', '.join(f't.{column}' for column in values)}) IS DISTINCT FROM "
            f"ROW({', '.join(f'r.{column}' for column in values)})",
        ).rowcount
    inserted = execute(
        connection,
        f"INSERT INTO {table} ({names})\nSELECT {names} FROM {result} AS r\n"
        f"WHERE NOT EXISTS (SELECT 1 FROM {table} AS t WHERE {same_key})",
    ).rowcount
    kept = before - deleted
    if kept + inserted != rows:
        # Two new rows of one key break the primary key above; two of a row that was there show only here.
        model.refuse(
            f"the rows do not fit the key ({', '.join(model.key)}): {rows} rows were computed for "
            f"{kept + inserted} keys.",
            hint="The SELECT must give one row per key, with no null in it.",
        )
    execute(connection, f"DROP TABLE {result}")
    _renew_statistics(connection, table, inserted + updated + deleted)
    return CellCounts(inserted=inserted, updated=updated, deleted=deleted, unchanged=kept - updated)


def _renew_statistics(connection: sa.Connection, table: str, written: int) -> None:
    if written >= ANALYZE_FROM_ROWS:
        execute(connection, f"ANALYZE {table}")


def _in_scope(alias: str, columns: list[str], scope_table: str) -> str:
    left = ", ".join(f"{alias}.{column}" for column in columns)
    return f"({left}) IN (SELECT {', '.join(columns)} FROM {scope_table})"
