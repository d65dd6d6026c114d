"""Cells: recomputing a cell model's rows for the touched cells, with the model's own SELECT.

Belongs here: the query text for a scope and the write of its differences. Does not belong here: which cells
are touched (`aggregates/refresh.py`), locking, and what a model computes.

The scope is given by temporary tables of the session: `scope_input(site_id text, day date)`, the days of
telemetry to read, sites as written; `scope_days(site_id text, day date)`, `scope_months(site_id text, month date)`
and `scope_sites(site_id text)`, the cells to set. Put them there, and ANALYZE them, before calling `recompute`.
"""

# ruff: noqa: S608 (identifiers come from checked model headers; there are no values in this SQL)
from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import sqlalchemy as sa
from sqlalchemy.exc import DBAPIError, IntegrityError

from flywheel_pipeline.sql_models.loader import TELEMETRY, ModelGraph, SqlModel, columns_read, telemetry_columns
from flywheel_pipeline.sql_models.relations import drop_indexes, execute, quote, restore_indexes

SCHEMA = "public"  # named, since a CTE of the same name stands in front

# So many new or changed rows make the planner's statistics worth renewing within the refresh: the next cell
# model reads these rows before autovacuum could see them.
ANALYZE_FROM_ROWS = 10_000
# Fewer rows than this join well enough without statistics, which cost more than they save.
PLANNED_FROM_ROWS = 1_000

# A table is read by index up to the point where that touches so much of it that one scan is cheaper.
SCANNED_ROWS_PER_LOOK = 100
ROW_BYTES = 200

# lock_not_available, insufficient_privilege (another role owns the table), dependent_objects_still_exist and
# undefined_object (somebody made a foreign key to the table, or named its key anew).
_NOT_TO_BE_TAKEN = frozenset({"55P03", "42501", "2BP01", "42704"})


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


@dataclass(frozen=True)
class Scope:
    """Which rows of a cell model to set: a temporary table and its columns, all of them in the model's key.

    Columns beyond those of the cell narrow a roll-up to the keys whose inputs changed: a row of it depends on input
    rows of the same key alone.
    """

    table: str
    columns: tuple[str, ...]


def scope_of(model: SqlModel) -> Scope:
    """The whole cells in scope, for this kind of cell."""
    tables = {"day": "scope_days", "month": "scope_months", "site": "scope_sites"}
    return Scope(tables[model.cell or "site"], model.scope_columns)


def shared_views(graph: ModelGraph) -> list[SqlModel]:
    """The views over telemetry, and over nothing else that has cells, that several cell models read."""
    paths = [graph.inlined_path(model) for model in graph if model.materialized == "cell"]
    return [
        view
        for view in graph
        if view.materialized == "view"
        and sum(view in path for path in paths) > 1
        and all(below.materialized == "view" for below in graph.inlined_path(view))
    ]


def view_query(graph: ModelGraph, view: SqlModel, telemetry: str) -> str:
    """Give the SELECT of a view of `shared_views` over a table that holds the rows of `scope_input`.

    The view's own text stands in it word for word, as in `cell_query`; only what the cell models read of it is computed.
    """
    bodies = [*graph.inlined_path(view), view]
    ctes = [_telemetry_rows(bodies, telemetry), *(f"{body.name} AS (\n{body.sql}\n)" for body in bodies)]
    columns = ", ".join(quote(column) for column in view_columns(graph, view))
    return "WITH " + ",\n".join(ctes) + f"\nSELECT {columns} FROM {view.name}"


def view_columns(graph: ModelGraph, view: SqlModel) -> list[str]:
    """The columns of a view that cell models read, and what stands between them and it."""
    readers = {
        reader.name: reader
        for model in graph
        if model.materialized == "cell"
        for reader in (*graph.inlined_path(model), model)
    }
    return columns_read(readers.values(), view.name, view.columns)


def cell_query(
    graph: ModelGraph,
    model: SqlModel,
    *,
    everything: bool = False,
    scope: Scope | None = None,
    telemetry: str | None = None,
    views: Mapping[str, str] | None = None,
) -> str:
    """Give the SQL that computes a cell model's rows for the cells in scope.

    The model's own text stands in it word for word, and so does each view on the way to its inputs. They
    are CTEs, and the CTEs before them carry the names of the inputs: telemetry with the rows of
    `scope_input` only, upstream cell models with the rows of this model's cells only. So a model is written
    and read as one plain SELECT over everything, and computes any part of it.

    Args:
        graph: all models.
        model: a model of `materialized: cell`.
        everything: no scope at all: the model's SELECT as it stands.
        scope: the rows to compute; None takes the whole cells in scope.
        telemetry: a temporary table that holds the rows of `scope_input` already; None reads them from the log.
        views: by the name of a view of `shared_views`, a temporary table that holds the rows of its `view_query`.

    Returns:
        A SELECT of the model's columns in the declared order.

    Raises:
        ModelError: the model is not a cell model.
    """
    if model.cell is None:
        model.refuse(f"{model.name} is a {model.materialized}; only cell models are computed by cells.")
    if everything:
        return model.sql
    scope = scope or scope_of(model)
    path = graph.inlined_path(model)
    bodies = [m for m in (*path, model) if m.materialized == "view" or m is model]
    ctes: list[str] = []
    if any(TELEMETRY in m.dependencies for m in bodies):
        if telemetry is not None:
            ctes.append(_telemetry_rows(bodies, telemetry))
        else:
            columns = _telemetry_columns(bodies)
            ctes.append(
                f"{TELEMETRY} AS (\n"
                f"SELECT {columns}\nFROM {SCHEMA}.{TELEMETRY} AS t\n"
                "JOIN (SELECT DISTINCT site_id, day FROM scope_input) AS s\n"
                "  ON t.site_id = s.site_id\n"
                "  AND t.event_at >= (s.day::timestamp AT TIME ZONE 'UTC')\n"
                "  AND t.event_at < ((s.day + 1)::timestamp AT TIME ZONE 'UTC')\n)"
            )
    for upstream in path:
        if views is not None and upstream.name in views:
            ctes.append(f"{upstream.name} AS NOT MATERIALIZED (\nSELECT v.* FROM {views[upstream.name]} AS v\n)")
        elif upstream.materialized == "view":
            ctes.append(f"{upstream.name} AS (\n{upstream.sql}\n)")
        else:
            ctes.append(f"{upstream.name} AS (\n{_upstream_rows(upstream, scope)}\n)")
    ctes.append(f"{model.name} AS (\n{model.sql}\n)")
    return "WITH " + ",\n".join(ctes) + f"\nSELECT m.* FROM {model.name} AS m\nWHERE {_in_scope('m', scope)}"


def _telemetry_columns(bodies: list[SqlModel]) -> str:
    return ", ".join(f"t.{quote(column)}" for column in telemetry_columns(bodies)) or "t.id"


def _telemetry_rows(bodies: list[SqlModel], telemetry: str) -> str:
    return f"{TELEMETRY} AS NOT MATERIALIZED (\nSELECT {_telemetry_columns(bodies)} FROM {telemetry} AS t\n)"


def _upstream_rows(upstream: SqlModel, scope: Scope) -> str:
    shared = tuple(column for column in scope.columns if column in upstream.key)
    if "month" in scope.columns and "month" not in upstream.key and "day" in upstream.key:
        same = " AND ".join(f"u.{column} = s.{column}" for column in shared)
        return (
            f"SELECT u.* FROM {SCHEMA}.{upstream.name} AS u\n"
            f"JOIN (SELECT DISTINCT {', '.join((*shared, 'month'))} FROM {scope.table}) AS s\n"
            f"  ON {same} AND u.day >= s.month AND u.day < (s.month + interval '1 month')::date"
        )
    return f"SELECT u.* FROM {SCHEMA}.{upstream.name} AS u\nWHERE {_in_scope('u', Scope(scope.table, shared))}"


def take_empty(connection: sa.Connection, models: Sequence[SqlModel], *, locked: Sequence[str] = ()) -> bool:
    """Take these tables for oneself, to the end of the transaction, and drop their keys and indexes, if all are empty.

    For many rows: a row that goes into each index by itself costs three times what it costs to build the indexes when
    all rows are there (263,000 episodes: 1.9 s against 0.6 s). Readers of these tables, which have nothing to read, wait
    for the commit. Nobody is waited for, so that nothing can deadlock: where somebody reads one of the tables, or has
    written to one of `locked`, or an index may not be dropped, nothing is taken and all rows go in one by one.

    Args:
        connection: an open transaction that holds the refresh lock; each model is passed to `recompute` in it.
        models: cell models.
        locked: further tables that the transaction will write to, which nobody else then writes to.

    Returns:
        Whether they were taken.
    """
    tables = {model.name: f"{SCHEMA}.{model.name}" for model in models}
    filled = " OR ".join(f"EXISTS (SELECT 1 FROM {table})" for table in tables.values())
    if not tables or execute(connection, f"SELECT {filled}").scalar_one():
        return False
    try:
        with connection.begin_nested():
            for names, mode in ((list(locked), "EXCLUSIVE"), (list(tables.values()), "ACCESS EXCLUSIVE")):
                if names:
                    execute(connection, f"LOCK TABLE {', '.join(names)} IN {mode} MODE NOWAIT")
            for model in models:
                drop_indexes(connection, model)
    except DBAPIError as error:
        if getattr(error.orig, "sqlstate", None) not in _NOT_TO_BE_TAKEN:
            raise
        return False
    return True


def recompute(
    connection: sa.Connection,
    graph: ModelGraph,
    model: SqlModel,
    *,
    everything: bool = False,
    scope: Scope | None = None,
    telemetry: str | None = None,
    views: Mapping[str, str] | None = None,
    changed: str | None = None,
    taken: bool = False,
    computed: str | None = None,
) -> CellCounts:
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
            model of cell day in a database from which telemetry was purged.
        scope: the rows to set; None takes the whole cells in scope.
        telemetry: see `cell_query`.
        views: see `cell_query`.
        changed: a temporary table to create and fill with the key of every row that was written.
        taken: by `take_empty`: the table gets its key and indexes again after the rows.
        computed: a SELECT from `m` that gives the rows, where somebody else computed them; None computes them here.

    Returns:
        Rows inserted, updated, deleted, and found as they should be, of the cells in scope.

    Raises:
        ModelError: the SELECT gives two rows with one key, or a null in the key.
    """
    query = computed or cell_query(graph, model, everything=everything, scope=scope, telemetry=telemetry, views=views)
    table = f"{SCHEMA}.{model.name}"
    names = ", ".join(quote(column) for column in model.columns)
    if changed is not None:
        key = ", ".join(quote(column) for column in model.key)
        execute(connection, f"CREATE TEMP TABLE {changed} ON COMMIT DROP AS SELECT {key} FROM {table} WITH NO DATA")
    try:
        empty = not connection.exec_driver_sql(f"SELECT EXISTS (SELECT 1 FROM {table})").scalar_one()
        if empty:
            # In the order of the key the indexes grow at their end: 1.1 s for 176,000 rule days, in any order 1.9 s.
            ordered = f"{query}\nORDER BY {', '.join(f'm.{quote(column)}' for column in model.key)}"
            if everything:
                ordered = query
            inserted = _write(connection, model, f"INSERT INTO {table} AS t ({names})\n{ordered}", changed)
            if taken:
                restore_indexes(connection, model)
            _renew_statistics(connection, model, inserted)
            return CellCounts(inserted, 0, 0, 0)
        return _write_differences(connection, model, query, None if everything else scope or scope_of(model), changed)
    except IntegrityError as error:
        diagnosis = getattr(error.orig, "diag", None)
        detail = getattr(diagnosis, "message_detail", None) or str(error.orig)
        model.refuse(
            f"the rows do not fit the key ({', '.join(model.key)}): {detail}",
            hint="The SELECT must give one row per key, with no null in it.",
        )


def _write(connection: sa.Connection, model: SqlModel, statement: str, changed: str | None) -> int:
    """Run an INSERT, UPDATE or DELETE of table `t`, note the keys it wrote in `changed`, return how many."""
    if changed is None:
        return execute(connection, statement).rowcount
    key = ", ".join(f"t.{quote(column)}" for column in model.key)
    return execute(
        connection,
        f"WITH written AS (\n{statement}\nRETURNING {key}\n)\nINSERT INTO {changed} SELECT * FROM written",
    ).rowcount


def _write_differences(
    connection: sa.Connection, model: SqlModel, query: str, scope: Scope | None, changed: str | None
) -> CellCounts:
    """Compare the computed rows with those that stand, by key, and write where they differ.

    Rows that stand are found again by their address (ctid): nobody else writes this table under the refresh lock.
    """
    table = f"{SCHEMA}.{model.name}"
    result, differing = f"pg_temp.{quote(f'result_{model.name}')}", f"pg_temp.{quote(f'differing_{model.name}')}"
    columns = [quote(column) for column in model.columns]
    values = [quote(column) for column in model.columns if column not in model.key]
    key = ", ".join(quote(column) for column in model.key)
    names = ", ".join(columns)
    standing = _standing_rows(connection, model, scope)

    execute(connection, f"DROP TABLE IF EXISTS {result}, {differing}")
    rows = execute(connection, f"CREATE TEMP TABLE {result[8:]} ON COMMIT DROP AS\n{query}").rowcount
    if rows >= PLANNED_FROM_ROWS:
        execute(connection, f"ANALYZE {result} ({key})")
    before = execute(connection, f"SELECT count(*) FROM ({standing.format(columns='1 AS one')}) AS t").scalar_one()
    same = "true"
    if values:
        same = (
            f"ROW({', '.join(f't.{column}' for column in values)}) IS NOT DISTINCT FROM "
            f"ROW({', '.join(f'r.{column}' for column in values)})"
        )
    first = quote(model.key[0])
    differ = execute(
        connection,
        f"CREATE TEMP TABLE {differing[8:]} ON COMMIT DROP AS\n"
        f"SELECT t.standing_at, r.{first} IS NULL AS gone, {', '.join(f'r.{column}' for column in columns)}\n"
        f"FROM ({standing.format(columns='t.ctid AS standing_at, t.*')}) AS t\n"
        f"FULL JOIN {result} AS r ON {' AND '.join(f'r.{quote(c)} = t.{quote(c)}' for c in model.key)}\n"
        f"WHERE r.{first} IS NULL OR t.{first} IS NULL OR NOT ({same})",
    ).rowcount
    gone = new = 0
    if differ:
        kinds = execute(
            connection,
            f"SELECT count(*) FILTER (WHERE gone) AS gone, count(*) FILTER (WHERE standing_at IS NULL) AS fresh\n"
            f"FROM {differing}",
        ).one()
        gone, new = int(kinds.gone), int(kinds.fresh)
    if differ >= PLANNED_FROM_ROWS:
        execute(connection, f"ANALYZE {differing} (standing_at, gone)")
    deleted = updated = inserted = 0
    if gone:
        deleted = _write(
            connection,
            model,
            f"DELETE FROM {table} AS t USING {differing} AS d WHERE t.ctid = d.standing_at AND d.gone",
            changed,
        )
    if differ > gone + new:
        updated = _write(
            connection,
            model,
            f"UPDATE {table} AS t SET {', '.join(f'{column} = d.{column}' for column in values)}\n"
            f"FROM {differing} AS d WHERE t.ctid = d.standing_at AND NOT d.gone",
            changed,
        )
    if new:
        inserted = _write(
            connection,
            model,
            f"INSERT INTO {table} AS t ({names})\nSELECT {names} FROM {differing} WHERE standing_at IS NULL",
            changed,
        )
    kept = before - deleted
    if kept + inserted != rows:
        # Two new rows of one key break the primary key above; two of a row that was there show only here.
        model.refuse(
            f"the rows do not fit the key ({', '.join(model.key)}): {rows} rows were computed for "
            f"{kept + inserted} keys.",
            hint="The SELECT must give one row per key, with no null in it.",
        )
    execute(connection, f"DROP TABLE {result}, {differing}")
    _renew_statistics(connection, model, inserted + updated + deleted)
    return CellCounts(inserted=inserted, updated=updated, deleted=deleted, unchanged=kept - updated)


def _standing_rows(connection: sa.Connection, model: SqlModel, scope: Scope | None) -> str:
    """Give a SELECT of `{columns}` of the rows `t` that stand in the scope.

    By index, one look per cell, where the scope is a small part of the table: the planner would rather scan it.
    """
    source = f"SELECT {{columns}} FROM {SCHEMA}.{model.name} AS t"
    if scope is None:
        return source
    few = execute(
        connection,
        f"SELECT (SELECT count(*) FROM {scope.table}) * {SCANNED_ROWS_PER_LOOK} "
        f"< pg_relation_size('{SCHEMA}.{model.name}') / {ROW_BYTES}",
    ).scalar_one()
    if not few:
        return f"{source} WHERE {_in_scope('t', scope)}"
    listed = ", ".join(scope.columns)
    match = " AND ".join(f"t.{column} = s.{column}" for column in scope.columns)
    return (
        f"SELECT l.* FROM (SELECT DISTINCT {listed} FROM {scope.table}) AS s\n"
        f"CROSS JOIN LATERAL ({source} WHERE {match} OFFSET 0) AS l"
    )


def _renew_statistics(connection: sa.Connection, model: SqlModel, written: int) -> None:
    """Of what is joined, grouped and looked up; of the figures autovacuum makes them after the commit."""
    if written >= ANALYZE_FROM_ROWS:
        columns = dict.fromkeys(column for columns in (model.key, *model.indexes) for column in columns)
        execute(connection, f"ANALYZE {SCHEMA}.{model.name} ({', '.join(quote(column) for column in columns)})")


def _in_scope(alias: str, scope: Scope) -> str:
    left = ", ".join(f"{alias}.{column}" for column in scope.columns)
    return f"({left}) IN (SELECT {', '.join(scope.columns)} FROM {scope.table})"
