"""The one refresh: take the outbox, widen it, recompute every cell model for those cells, set the counters.

Belongs here: incremental refresh, backfill, rebuild (all the same code with other cells) and the sealing of
purged days. Does not belong here: what a model computes (`dbt_like_sql/`).

Exact whatever the order of commits: a row and its outbox entry commit together, the entry is taken before the row is
read, and the recompute sets rows, it never adds to them. One advisory lock, taken in a statement of its own before
the first read, keeps two refreshes from writing back an older snapshot; who changes aliases or class rules holds it too.
The log is read once, by one statement, so that all models are of one moment.
"""

from __future__ import annotations

import datetime as dt
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import sqlalchemy as sa

from flywheel_pipeline.archive.days import exclude_others
from flywheel_pipeline.archive.layout import Archive
from flywheel_pipeline.archive.retention import require_archived, verify_before
from flywheel_pipeline.errors import FlywheelError, SchemaMismatch
from flywheel_pipeline.health.demotion import drop_changed_checkpoints, drop_checkpoints_of_scope
from flywheel_pipeline.sql_models.cells import CellCounts, Scope, recompute, shared_views, take_empty, view_query
from flywheel_pipeline.sql_models.loader import ModelGraph, SqlModel, load_models, telemetry_columns
from flywheel_pipeline.sql_models.relations import execute
from flywheel_pipeline.sql_models.sync import stale_models

if TYPE_CHECKING:
    from flywheel_pipeline.engines.work import Computation

CHUNK_CELLS = 20_000
# From so many site-days on, empty tables are filled before their indexes are made.
BULK_CELLS = 1_000
# One refresh at a time, so it may take memory: sorts and hashes of a thousand site-days stay off the disk. The planner
# has no statistics on the views inside and would price their work so high that compiling it seems worth while.
# Statistics within a refresh need to tell ten rows from a million; the default of 100 made them a seventh of a rebuild.
_SETTINGS = "SET LOCAL work_mem = '64MB'; SET LOCAL default_statistics_target = 20"
# The log is read by index up to the point where that touches so much of it that one scan is cheaper. Measured: a
# site-day costs about what 500 rows of a sequential scan do; a row takes about 300 bytes.
_SCANNED_ROWS_PER_CELL = 500
_ROW_BYTES = 300


@dataclass(frozen=True)
class RefreshReport:
    """What one refresh did. `cells` counts site-days recomputed, `remaining` outbox cells left for the next.

    `newest_arrival_at`: when the newest row arrived; None where no row of these site-days came since they were counted last.
    """

    cells: int
    remaining: int
    models: dict[str, CellCounts] = field(default_factory=dict)
    seconds_by_model: dict[str, float] = field(default_factory=dict)
    counters_changed: int = 0
    duration_seconds: float = 0.0
    newest_arrival_at: dt.datetime | None = None

    @property
    def rows_written(self) -> int:
        """Rows inserted, updated or deleted over all models."""
        return sum(c.inserted + c.updated + c.deleted for c in self.models.values())


def lock_refresh(connection: sa.Connection) -> None:
    """Wait for the refresh lock; it is held to the end of the transaction."""
    connection.exec_driver_sql("SELECT flywheel_lock_refresh()")


_TAKE_ALL = "DELETE FROM touched_cells RETURNING site_id, day"
_TAKE_SOME = (
    "DELETE FROM touched_cells WHERE (site_id, day) IN "
    "(SELECT DISTINCT site_id, day FROM touched_cells ORDER BY site_id, day LIMIT {limit}) RETURNING site_id, day"
)
# A row of day D decides whether a success of D - 1 held for 24 hours: the day before is recomputed with it.
# A site's rows count under today's name: the cell of every name it may resolve to is recomputed.
_SCOPE_DAYS = """
CREATE TEMP TABLE scope_days ON COMMIT DROP AS
SELECT DISTINCT n.site_id::text AS site_id, (c.day - b.back)::date AS day
FROM scope_taken AS c
CROSS JOIN (VALUES (0), (1)) AS b (back)
CROSS JOIN LATERAL (
  SELECT c.site_id UNION SELECT a.site_id FROM site_aliases AS a WHERE a.alias = c.site_id
) AS n (site_id)
WHERE NOT EXISTS (SELECT 1 FROM sealed_days AS s WHERE s.day = (c.day - b.back)::date AND {closed})
"""
# With an archive, a purged day is as open as another, if the archive has it and the day after, which decides what held.
_SEALED = "true"
_SEALED_WITHOUT_ARCHIVE = (
    "(s.archived_generation IS NULL "
    "OR EXISTS (SELECT 1 FROM sealed_days AS n WHERE n.day = s.day + 1 AND n.archived_generation IS NULL))"
)
_SCOPE_INPUT = """
CREATE TEMP TABLE scope_input ON COMMIT DROP AS
SELECT DISTINCT n.site_id::text AS site_id, (c.day + f.forward)::date AS day
FROM scope_days AS c
CROSS JOIN (VALUES (0), (1)) AS f (forward)
CROSS JOIN LATERAL (
  SELECT c.site_id UNION SELECT a.alias FROM site_aliases AS a WHERE a.site_id = c.site_id
) AS n (site_id)
"""
_SCOPE_MONTHS = """
CREATE TEMP TABLE scope_months ON COMMIT DROP AS
SELECT DISTINCT site_id, date_trunc('month', day::timestamp)::date AS month FROM scope_days
"""
_SCOPE_SITES = "CREATE TEMP TABLE scope_sites ON COMMIT DROP AS SELECT DISTINCT site_id FROM scope_days"
# OFFSET 0 keeps the planner on the index, one look per site-day: it has no idea how few rows a day is.
_READ_BY_INDEX = """
CREATE TEMP TABLE scope_telemetry ON COMMIT DROP AS
SELECT r.* FROM scope_input AS s
CROSS JOIN LATERAL (
  SELECT {columns} FROM public.execution_telemetry AS t
  WHERE t.site_id = s.site_id
    AND t.event_at >= (s.day::timestamp AT TIME ZONE 'UTC') AND t.event_at < ((s.day + 1)::timestamp AT TIME ZONE 'UTC')
  OFFSET 0
) AS r
"""
_READ_BY_SCAN = """
CREATE TEMP TABLE scope_telemetry ON COMMIT DROP AS
SELECT {columns} FROM public.execution_telemetry AS t
JOIN scope_input AS s ON s.site_id = t.site_id AND s.day = (t.event_at AT TIME ZONE 'UTC')::date
"""
_PURGED_DAYS = """
WITH logged AS (
  SELECT (event_at AT TIME ZONE 'UTC')::date AS day, count(*) AS rows FROM execution_telemetry
  WHERE event_at < CAST(:before AS timestamp) AT TIME ZONE 'UTC' GROUP BY 1
),
counted AS (
  SELECT day, sum(n)::bigint AS rows
  FROM (
    SELECT day, sum(executions) AS n FROM telemetry_daily_volume WHERE day < :before GROUP BY day
    UNION ALL
    SELECT day, count(*) FROM telemetry_violations WHERE day < :before AND problem = 'skewed_clock' GROUP BY day
  ) AS c
  GROUP BY day
)
SELECT l.day, l.rows, coalesce(c.rows, 0) AS counted FROM logged AS l LEFT JOIN counted AS c USING (day) ORDER BY l.day
"""
_CELLS_OF = """
WITH names AS (
  SELECT CAST(:site AS text) AS site_id
  UNION SELECT alias FROM site_aliases WHERE site_id = :site
),
cells AS (
  SELECT site_id, (event_at AT TIME ZONE 'UTC')::date AS day FROM execution_telemetry
  WHERE (CAST(:site AS text) IS NULL OR site_id IN (SELECT site_id FROM names))
    AND (CAST(:from_day AS date) IS NULL OR event_at >= CAST(:from_day AS timestamp) AT TIME ZONE 'UTC')
    AND (CAST(:to_day AS date) IS NULL
         OR event_at < CAST(:to_day AS timestamp) AT TIME ZONE 'UTC' + interval '1 day')
  UNION
  SELECT site_id, day FROM episodes
  WHERE (CAST(:site AS text) IS NULL OR site_id IN (SELECT site_id FROM names))
    AND (CAST(:from_day AS date) IS NULL OR day >= :from_day)
    AND (CAST(:to_day AS date) IS NULL OR day <= :to_day)
)
"""
_VOLUME = "telemetry_daily_volume"
# Before the recompute: the newest arrival of what was read, if these site-days had not seen it yet. A rebuild, or another
# alias, touches site-days in which nothing is new. An arrival that no clock shows is listed as skewed, and is none.
_ARRIVED = """
SELECT n.newest
FROM (
  SELECT max(created_at) AS newest FROM scope_telemetry
  WHERE chaos_campaign_id IS NULL AND tags @> '{"synthetic": true}' IS NOT TRUE AND created_at < '9999-12-31'
) AS n
WHERE n.newest > coalesce(
  (SELECT max(v.last_arrival_at) FROM scope_input AS s JOIN telemetry_daily_volume AS v USING (site_id, day)), '-infinity')
"""
_COUNTERS = """
UPDATE l1_rules AS r
SET match_count = s.matches, success_count = s.successes, failure_count = s.failures, updated_at = clock_timestamp()
FROM (
  SELECT r.rule_id,
         coalesce(sum(t.executions), 0)::bigint AS matches,
         coalesce(sum(t.raw_successes), 0)::bigint AS successes,
         coalesce(sum(t.raw_failures), 0)::bigint AS failures
  FROM l1_rules AS r
  LEFT JOIN rule_site_stats AS t ON t.rule_id = r.rule_id
  GROUP BY r.rule_id
) AS s
WHERE s.rule_id = r.rule_id
  AND (r.match_count, r.success_count, r.failure_count) IS DISTINCT FROM (s.matches, s.successes, s.failures)
"""


def refresh(
    connection: sa.Connection,
    graph: ModelGraph | None = None,
    *,
    batch_id: int | None = None,
    max_cells: int | None = None,
    whole_rollups: bool = False,
    progress: Callable[[str], None] | None = None,
    computation: Computation | None = None,
) -> RefreshReport:
    """Recompute the cells in the outbox, within the caller's transaction.

    Args:
        connection: an open transaction of level READ COMMITTED; nothing is visible to others before it commits.
        graph: the SQL models; None loads them.
        batch_id: the batch to stamp as refreshed.
        max_cells: take at most so many outbox cells, in order of site and day; None takes all.
        whole_rollups: add up every key of the touched months and sites, as a rebuild does, so that rows that
            somebody else changed are set right; else only keys whose days were written.
        progress: called with the name of each model before it is recomputed.
        computation: another engine that computes the models of cell day, and the archive it reads; None: PostgreSQL does.
            The lock is held while it computes.

    Returns:
        Counts per model. A refresh with nothing in the outbox writes nothing but the counters' correction, if any.

    Raises:
        SchemaMismatch: the database holds other models than this code, or the transaction keeps an old snapshot.
    """
    started = time.monotonic()
    graph = graph or load_models()
    lock_refresh(connection)
    _refuse_what_would_corrupt(connection, graph)
    connection.exec_driver_sql(_SETTINGS)
    cells = _take(connection, graph, max_cells, computation)
    views: dict[str, str] = {}
    computed: dict[str, str] = {}
    newest = None
    if cells and computation is not None:
        from flywheel_pipeline.engines.work import compute_scope

        computed = compute_scope(connection, graph, computation, progress)
    elif cells:
        views = _read_shared_views(connection, graph)
        newest = connection.exec_driver_sql(_ARRIVED).scalar() if _VOLUME in graph.models else None
    models = [model for model in graph if model.materialized == "cell"]
    taken = cells >= BULK_CELLS and take_empty(connection, models, locked=("l1_rules", "cusum_checkpoints"))
    counts: dict[str, CellCounts] = {}
    seconds: dict[str, float] = {}
    # Whose written keys a roll-up will ask for: where whole roll-ups are added up, nobody asks.
    followed = {
        upstream.name for m in models for upstream in _cells_below(graph, m) if m.cell != "day" and not whole_rollups
    }
    episodes = "episodes" in {m.name for m in models}
    if episodes and not whole_rollups:
        followed.add("episodes")  # checkpoints of health follow them
    for model in models:
        if progress is not None:
            progress(model.name)
        begun = time.monotonic()
        counts[model.name] = CellCounts(0, 0, 0, 0)
        scope = None if whole_rollups or model.cell == "day" else _changed_keys(connection, graph, model)
        if cells:
            counts[model.name] = recompute(
                connection,
                graph,
                model,
                scope=scope,
                telemetry="pg_temp.scope_telemetry",
                views=views,
                changed=f"changed_{model.name}" if model.name in followed else None,
                taken=taken,
                computed=computed.get(model.name),
            )
        seconds[model.name] = time.monotonic() - begun
    if cells and "episodes" in followed:
        drop_changed_checkpoints(connection)
    elif cells and episodes and counts["episodes"].written:
        drop_checkpoints_of_scope(connection)
    changed = connection.exec_driver_sql(_COUNTERS).rowcount
    _drop_scope(connection, graph)
    remaining = 0
    if max_cells is not None:
        remaining = pending_cells(connection)
    report = RefreshReport(cells, remaining, counts, seconds, changed, time.monotonic() - started, newest)
    if batch_id is not None:
        connection.execute(
            sa.text(
                "UPDATE refresh_batches SET refreshed_at = clock_timestamp(), cells_refreshed = :cells, "
                "rows_written = :rows, refresh_seq = (SELECT coalesce(max(refresh_seq), 0) + 1 FROM refresh_batches) "
                "WHERE batch_id = :batch_id"
            ),
            {"cells": cells, "rows": report.rows_written, "batch_id": batch_id},
        )
    return report


def _refuse_what_would_corrupt(connection: sa.Connection, graph: ModelGraph) -> None:
    # An older snapshot would be written back; so would the figures of an older release that still runs.
    level = connection.exec_driver_sql("SELECT current_setting('transaction_isolation')").scalar_one()
    if level != "read committed":
        raise SchemaMismatch(
            f"A refresh needs a transaction of isolation level read committed; this one is {level}.",
            hint="Open it with engine.begin().",
        )
    other = stale_models(connection, graph)
    if other:
        raise SchemaMismatch(
            f"The database was made with other SQL models than this program has: {', '.join(other[:5])}.",
            hint="Run `flywheel db upgrade`, or restart this process if another release upgraded the database.",
        )


def _take(
    connection: sa.Connection, graph: ModelGraph, max_cells: int | None, computation: Computation | None = None
) -> int:
    """Take outbox cells, widen them to the scope, and read the scope's telemetry; return the site-days to set.

    Where another engine computes, it reads the telemetry itself.
    """
    archived = computation is not None and computation.archive is not None
    _drop_scope(connection, graph)
    take = _TAKE_ALL if max_cells is None else _TAKE_SOME.format(limit=int(max_cells))
    connection.exec_driver_sql("CREATE TEMP TABLE scope_taken (site_id text, day date) ON COMMIT DROP")
    connection.exec_driver_sql(
        f"WITH taken AS ({take}) INSERT INTO scope_taken SELECT DISTINCT site_id, day FROM taken"  # noqa: S608
    )
    scope_days = _SCOPE_DAYS.format(closed=_SEALED_WITHOUT_ARCHIVE if archived else _SEALED)
    for statement in (scope_days, _SCOPE_INPUT, _SCOPE_MONTHS, _SCOPE_SITES):
        connection.exec_driver_sql(statement)
    cells = int(connection.exec_driver_sql("SELECT count(*) FROM scope_days").scalar_one())
    if cells:
        for table in ("scope_days", "scope_input", "scope_months", "scope_sites"):
            connection.exec_driver_sql(f"ANALYZE {table}")
    if cells and computation is None:
        names = telemetry_columns(list(graph))
        few = connection.execute(
            sa.text(
                "SELECT (SELECT count(*) FROM scope_input) * :rows_per_cell "
                "< pg_relation_size('public.execution_telemetry') / :row_bytes"
            ),
            {"rows_per_cell": _SCANNED_ROWS_PER_CELL, "row_bytes": _ROW_BYTES},
        ).scalar_one()
        columns = ", ".join(f"t.{name}" for name in names)
        if few:
            connection.exec_driver_sql(_READ_BY_INDEX.format(columns=columns))
        else:
            # A loop over the site's index would read the whole site for each of its days: 60 s for 1 M rows, not 1.
            connection.exec_driver_sql("SET LOCAL enable_nestloop = off")
            connection.exec_driver_sql(_READ_BY_SCAN.format(columns=columns))
            connection.exec_driver_sql("SET LOCAL enable_nestloop TO DEFAULT")
        connection.exec_driver_sql("ANALYZE scope_telemetry")
    return cells


def _read_shared_views(connection: sa.Connection, graph: ModelGraph) -> dict[str, str]:
    """Compute what several models read once for all of them; give the temporary tables by the views' names."""
    tables = {view.name: f"scope_view_{view.name}" for view in shared_views(graph)}
    # The planner takes every tenth row for an error signature of its own, and would sort the log to merge it with them.
    connection.exec_driver_sql("SET LOCAL enable_mergejoin = off")
    for name, table in tables.items():
        query = view_query(graph, graph.models[name], "pg_temp.scope_telemetry")
        execute(connection, f"CREATE TEMP TABLE {table} ON COMMIT DROP AS\n{query}")
        connection.exec_driver_sql(f"ANALYZE {table}")
    connection.exec_driver_sql("SET LOCAL enable_mergejoin TO DEFAULT")
    return {name: f"pg_temp.{table}" for name, table in tables.items()}


def _drop_scope(connection: sa.Connection, graph: ModelGraph) -> None:
    """Drop the temporary tables of a refresh: the transaction may hold another one."""
    names = ["scope_taken", "scope_days", "scope_input", "scope_months", "scope_sites", "scope_telemetry"]
    names += [f"scope_view_{view.name}" for view in shared_views(graph)]
    names += [f"{kind}_{model.name}" for model in graph if model.cell for kind in ("changed", "keys", "landed")]
    connection.exec_driver_sql("DROP TABLE IF EXISTS " + ", ".join(f"pg_temp.{name}" for name in names))


def _cells_below(graph: ModelGraph, model: SqlModel) -> list[SqlModel]:
    return [m for m in graph.inlined_path(model) if m.materialized == "cell"]


def _changed_keys(connection: sa.Connection, graph: ModelGraph, model: SqlModel) -> Scope | None:
    """Return the keys of this roll-up whose inputs this refresh has written; None where they cannot be told."""
    below = _cells_below(graph, model)
    derived = {"month": "date_trunc('month', day::timestamp)::date AS month"}
    columns = tuple(
        column for column in model.key if all(column in m.key or (column == "month" and "day" in m.key) for m in below)
    )
    if not below or not set(model.scope_columns) <= set(columns):
        return None
    table = f"keys_{model.name}"
    parts = [
        f"SELECT {', '.join(c if c in m.key else derived[c] for c in columns)} FROM changed_{m.name}"  # noqa: S608
        for m in below
    ]
    if not connection.execute(
        sa.text("SELECT to_regclass(:name) IS NOT NULL"), {"name": f"pg_temp.changed_{below[0].name}"}
    ).scalar_one():
        return None
    connection.exec_driver_sql(f"CREATE TEMP TABLE {table} ON COMMIT DROP AS {' UNION '.join(parts)}")
    connection.exec_driver_sql(f"ANALYZE {table}")
    return Scope(table, columns)


def pending_cells(connection: sa.Connection) -> int:
    """Count the distinct site-days that wait in the outbox."""
    return int(
        connection.exec_driver_sql(
            "SELECT count(*) FROM (SELECT DISTINCT site_id, day FROM touched_cells) AS c"
        ).scalar_one()
    )


def touch(
    connection: sa.Connection,
    *,
    site: str | None = None,
    from_day: dt.date | None = None,
    to_day: dt.date | None = None,
) -> int:
    """Put the cells of these sites and days (both ends included) into the outbox; return how many.

    Cells come from telemetry and from the aggregates, so a cell whose rows are gone is recomputed to nothing. A site
    is named as today; its old names are touched with it.
    """
    return int(
        connection.execute(
            sa.text(
                _CELLS_OF + "INSERT INTO touched_cells (site_id, day, written) SELECT site_id, day, false FROM cells"  # noqa: S608
            ),
            {"site": site, "from_day": from_day, "to_day": to_day},
        ).rowcount
    )


def cells_by_day(
    connection: sa.Connection,
    *,
    site: str | None = None,
    from_day: dt.date | None = None,
    to_day: dt.date | None = None,
) -> dict[dt.date, int]:
    """Count by day the cells that `touch` would touch, in order of the days."""
    rows = connection.execute(
        sa.text(_CELLS_OF + "SELECT day, count(*) AS cells FROM cells GROUP BY day ORDER BY day"),  # noqa: S608
        {"site": site, "from_day": from_day, "to_day": to_day},
    )
    return {row.day: row.cells for row in rows}


def rebuild(
    engine: sa.Engine,
    *,
    site: str | None = None,
    from_day: dt.date | None = None,
    to_day: dt.date | None = None,
    chunk_cells: int = CHUNK_CELLS,
    progress: Callable[[int, int], None] | None = None,
) -> list[RefreshReport]:
    """Recompute cells from the log: touch them, then refresh in chunks, each its own transaction.

    Safe to interrupt: what is not yet done stays in the outbox and the next refresh takes it. `progress` is called
    with (cells done, cells in all). Where no cell table holds a row, their readers wait for the first chunk's commit.
    """
    graph = load_models()
    with engine.begin() as connection:
        touch(connection, site=site, from_day=from_day, to_day=to_day)
        total = pending_cells(connection)
    reports: list[RefreshReport] = []
    # Writers may touch cells as fast as we take them: after as many chunks as there were, one takes what is left.
    chunks = math.ceil(total / chunk_cells)
    while not reports or reports[-1].remaining:
        with engine.begin() as connection:
            size = chunk_cells if len(reports) < chunks else None
            reports.append(refresh(connection, graph, max_cells=size, whole_rollups=True))
        if progress is not None:
            progress(max(total - reports[-1].remaining, 0), total)
    return reports


def purge(engine: sa.Engine, *, before: dt.date, actor: str, archive: Archive | None = None) -> dict[dt.date, int]:
    """Delete the telemetry of days before `before` (UTC); their figures stay in the cells, sealed.

    The last day is kept whole, so no open recurrence window loses its rows. A row of a sealed day that comes later is
    refused (`flywheel_refuse_days`). Where an archive is set, a day goes only if the archive holds it, every byte of it
    verified, as it is in the database.

    Returns:
        Rows deleted by day.

    Raises:
        FlywheelError: cells of those days wait in the outbox, or rows of them were never counted.
        NotSafelyArchived: a day is not in the archive, not whole there, or was corrected since.
    """
    verified = {}
    if archive is not None:
        with engine.connect() as connection:
            verified = verify_before(connection, archive, before)
    with engine.begin() as connection:
        if archive is not None:
            exclude_others(connection)
        lock_refresh(connection)
        # From here to commit no writer can add a row that would be deleted uncounted.
        connection.exec_driver_sql("LOCK TABLE execution_telemetry IN SHARE ROW EXCLUSIVE MODE")
        waiting = connection.execute(
            sa.text("SELECT count(*) FROM touched_cells WHERE day <= :before"), {"before": before}
        ).scalar_one()
        if waiting:
            raise FlywheelError(
                f"{waiting} outbox rows of days up to {before} wait for a refresh, so purging would lose them.",
                hint="Run `flywheel rebuild` or `flywheel run`, then purge again.",
            )
        found = connection.execute(sa.text(_PURGED_DAYS), {"before": before}).all()
        uncounted = [row for row in found if row.rows != row.counted]
        if uncounted:
            first = uncounted[0]
            raise FlywheelError(
                f"{first.rows} rows of {first.day} are in the log and {first.counted} in the aggregates, so purging would lose some.",
                hint=f"Run `flywheel rebuild --from {first.day} --to {uncounted[-1].day}`, then purge again.",
            )
        if archive is not None:
            require_archived(connection, archive, before, verified, {row.day: row.rows for row in found})
        for row in found:
            generation = verified[row.day].generation if archive is not None else None
            connection.execute(
                sa.text(
                    "INSERT INTO sealed_days (day, rows_purged, actor, archived_generation) "
                    "VALUES (:day, :rows, :actor, :generation)"
                ),
                {"day": row.day, "rows": row.rows, "actor": actor, "generation": generation},
            )
        connection.execute(
            sa.text("DELETE FROM execution_telemetry WHERE event_at < CAST(:before AS timestamp) AT TIME ZONE 'UTC'"),
            {"before": before},
        )
        # Only this deletion touched these cells, and sealed cells are not recomputed.
        connection.execute(sa.text("DELETE FROM touched_cells WHERE day < :before"), {"before": before})
    return {row.day: row.rows for row in found}
