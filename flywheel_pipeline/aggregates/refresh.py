"""The one refresh: take the outbox, widen it, recompute every cell model for those cells, set the counters.

Belongs here: incremental refresh, backfill, rebuild (all the same code with other cells) and the sealing of
purged days. Does not belong here: what a model computes (`dbt_like_sql/`).

Exact whatever the order of commits: a row and its outbox entry commit together, the entry is taken before the row is
read, and the recompute sets rows, it never adds to them. One advisory lock, taken in a statement of its own before
the first read, keeps two refreshes from writing back an older snapshot.
"""

from __future__ import annotations

import datetime as dt
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import sqlalchemy as sa

from flywheel_pipeline.sql_models.cells import CellCounts, recompute
from flywheel_pipeline.sql_models.loader import ModelGraph, load_models

REFRESH_LOCK = 0x666C7977686C0001  # 'flywhl', lock 1
CHUNK_CELLS = 20_000


@dataclass(frozen=True)
class RefreshReport:
    """What one refresh did. `cells` counts site-days recomputed, `remaining` outbox cells left for the next."""

    cells: int
    remaining: int
    models: dict[str, CellCounts] = field(default_factory=dict)
    seconds_by_model: dict[str, float] = field(default_factory=dict)
    counters_changed: int = 0
    duration_seconds: float = 0.0

    @property
    def rows_written(self) -> int:
        """Rows inserted, updated or deleted over all models."""
        return sum(c.inserted + c.updated + c.deleted for c in self.models.values())


def lock_refresh(connection: sa.Connection) -> None:
    """Wait for the refresh lock; it is held to the end of the transaction."""
    connection.execute(sa.text("SELECT pg_advisory_xact_lock(:key)"), {"key": REFRESH_LOCK})


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
WHERE NOT EXISTS (SELECT 1 FROM sealed_days AS s WHERE s.day = (c.day - b.back)::date)
"""
_SCOPE_INPUT = """
CREATE TEMP TABLE scope_input ON COMMIT DROP AS
SELECT DISTINCT n.site_id::text AS site_id, (c.day + f.forward)::date AS day
FROM scope_days AS c
CROSS JOIN (VALUES (0), (1)) AS f (forward)
CROSS JOIN LATERAL (
  SELECT c.site_id UNION SELECT a.alias FROM site_aliases AS a WHERE a.site_id = c.site_id
) AS n (site_id)
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
    progress: Callable[[str], None] | None = None,
) -> RefreshReport:
    """Recompute the cells in the outbox, within the caller's transaction.

    Args:
        connection: an open transaction; nothing is visible to others before it commits.
        graph: the SQL models; None loads them.
        batch_id: the batch to stamp as refreshed.
        max_cells: take at most so many outbox cells, in order of site and day; None takes all.
        progress: called with the name of each model before it is recomputed.

    Returns:
        Counts per model. A refresh with nothing in the outbox writes nothing but the counters' correction, if any.
    """
    started = time.monotonic()
    graph = graph or load_models()
    lock_refresh(connection)
    for table in ("scope_taken", "scope_days", "scope_input", "scope_sites"):
        connection.exec_driver_sql(f"DROP TABLE IF EXISTS pg_temp.{table}")
    take = _TAKE_ALL if max_cells is None else _TAKE_SOME.format(limit=int(max_cells))
    connection.exec_driver_sql("CREATE TEMP TABLE scope_taken (site_id text, day date) ON COMMIT DROP")
    connection.exec_driver_sql(
        f"WITH taken AS ({take}) INSERT INTO scope_taken SELECT DISTINCT site_id, day FROM taken"  # noqa: S608
    )
    connection.exec_driver_sql(_SCOPE_DAYS)
    connection.exec_driver_sql(_SCOPE_INPUT)
    connection.exec_driver_sql(
        "CREATE TEMP TABLE scope_sites ON COMMIT DROP AS SELECT DISTINCT site_id FROM scope_days"
    )
    for table in ("scope_days", "scope_input", "scope_sites"):
        connection.exec_driver_sql(f"ANALYZE {table}")
    cells = connection.exec_driver_sql("SELECT count(*) FROM scope_days").scalar_one()

    counts: dict[str, CellCounts] = {}
    seconds: dict[str, float] = {}
    for model in graph.models.values():
        if model.materialized != "cell":
            continue
        if progress is not None:
            progress(model.name)
        begun = time.monotonic()
        counts[model.name] = recompute(connection, graph, model) if cells else CellCounts(0, 0, 0, 0)
        seconds[model.name] = time.monotonic() - begun
    changed = connection.exec_driver_sql(_COUNTERS).rowcount
    remaining = 0
    if max_cells is not None:
        remaining = pending_cells(connection)
    report = RefreshReport(cells, remaining, counts, seconds, changed, time.monotonic() - started)
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
                """
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
                INSERT INTO touched_cells (site_id, day) SELECT site_id, day FROM cells
                """
            ),
            {"site": site, "from_day": from_day, "to_day": to_day},
        ).rowcount
    )


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
    with (cells done, cells in all).
    """
    graph = load_models()
    with engine.begin() as connection:
        touch(connection, site=site, from_day=from_day, to_day=to_day)
        total = pending_cells(connection)
    reports: list[RefreshReport] = []
    remaining = total
    while remaining or not reports:
        with engine.begin() as connection:
            report = refresh(connection, graph, max_cells=chunk_cells)
        reports.append(report)
        remaining = report.remaining
        if progress is not None:
            progress(max(total - remaining, 0), total)
    return reports


def purge(engine: sa.Engine, *, before: dt.date, actor: str) -> dict[dt.date, int]:
    """Delete the telemetry of days before `before` (UTC); their figures stay in the cells, sealed.

    The last day is kept whole, so no open recurrence window loses its rows. Refuses while cells of those days wait
    in the outbox or rows of them were never counted.

    Returns:
        Rows deleted by day.

    Raises:
        FlywheelError: a day to purge is not fully aggregated yet.
    """
    from flywheel_pipeline.errors import FlywheelError

    with engine.begin() as connection:
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
        days: dict[dt.date, int] = {
            row.day: row.n
            for row in connection.execute(
                sa.text(
                    "SELECT (event_at AT TIME ZONE 'UTC')::date AS day, count(*) AS n FROM execution_telemetry "
                    "WHERE event_at < CAST(:before AS timestamp) AT TIME ZONE 'UTC' GROUP BY 1 ORDER BY 1"
                ),
                {"before": before},
            )
        }
        for day, rows in days.items():
            connection.execute(
                sa.text(
                    "INSERT INTO sealed_days (day, rows_purged, actor) VALUES (:day, :rows, :actor) "
                    "ON CONFLICT (day) DO UPDATE SET rows_purged = sealed_days.rows_purged + excluded.rows_purged"
                ),
                {"day": day, "rows": rows, "actor": actor},
            )
        connection.execute(
            sa.text("DELETE FROM execution_telemetry WHERE event_at < CAST(:before AS timestamp) AT TIME ZONE 'UTC'"),
            {"before": before},
        )
    return days
