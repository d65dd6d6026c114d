"""Rebuild and backfill by an engine: days of cells at a time, each in one transaction under the refresh lock.

Belongs here: which days go together, and cells that only the archive knows of. Does not belong here: the refresh itself,
which sets the cells as ever (`aggregates/refresh.py`).
"""

from __future__ import annotations

import datetime as dt
from collections.abc import Callable, Iterable

import pyarrow.compute as pc
import pyarrow.parquet as pq
import sqlalchemy as sa

from flywheel_pipeline.aggregates.refresh import CHUNK_CELLS, RefreshReport, cells_by_day, lock_refresh, refresh, touch
from flywheel_pipeline.archive.layout import Archive
from flywheel_pipeline.database.limits import broken_off, let_idle
from flywheel_pipeline.engines.work import Computation
from flywheel_pipeline.sql_models.loader import load_models

_LIMIT = (
    "These days' cells are as they were, those before them are done. Where it is a limit, lift it for this login "
    "(ALTER ROLE … SET statement_timeout = 0), then rebuild again."
)
_SEALED = """
SELECT day FROM sealed_days
WHERE archived_generation IS NOT NULL
  AND (CAST(:from_day AS date) IS NULL OR day >= :from_day) AND (CAST(:to_day AS date) IS NULL OR day <= :to_day)
ORDER BY day
"""
_TOUCH = """
INSERT INTO touched_cells (site_id, day, written)
SELECT s.site_id, :day, false FROM unnest(CAST(:sites AS text[])) AS s (site_id)
WHERE CAST(:site AS text) IS NULL OR s.site_id = :site
   OR EXISTS (SELECT FROM site_aliases AS a WHERE a.site_id = :site AND a.alias = s.site_id)
"""


def rebuild(
    engine: sa.Engine,
    computation: Computation,
    *,
    site: str | None = None,
    from_day: dt.date | None = None,
    to_day: dt.date | None = None,
    chunk_cells: int = CHUNK_CELLS,
    progress: Callable[[int, int], None] | None = None,
) -> list[RefreshReport]:
    """Recompute cells by another engine, days in order; purged days too where the archive holds them.

    Each chunk is a transaction: what is interrupted is not done, and what was done stays. Unlike a rebuild by PostgreSQL
    nothing waits in the outbox meanwhile, where the next minute's refresh would take it.

    Args:
        engine: the database.
        computation: the engine, and the archive it reads.
        site: only this site, by its name of today.
        from_day: the first UTC day.
        to_day: the last UTC day, included.
        chunk_cells: days are put together up to so many site-days. The minute's refresh waits for a chunk: at 90 executions
            a site-day these are 1.8 million rows, and a minute of DuckDB.
        progress: called with (cells done, cells in all).

    Raises:
        EngineError, NotPortable: the engine cannot be used, or failed.
        ArchiveError: the archive is not whole.
        DatabaseUnavailable: the database broke it off; the chunk's cells are as they were.
    """
    graph = load_models()
    computation.check(graph)
    with engine.connect() as connection:
        days = cells_by_day(connection, site=site, from_day=from_day, to_day=to_day)
        sealed = set(_sealed_days(connection, computation.archive, from_day, to_day))
    for day in sealed:
        days.setdefault(day, 1)
    total, done = sum(days.values()), 0
    reports: list[RefreshReport] = []
    for chunk in _chunks(sorted(days), days, chunk_cells):
        with broken_off("rebuild", _LIMIT), engine.begin() as connection:
            lock_refresh(connection)
            touch_days(connection, computation.archive, chunk[0], chunk[-1], site=site)
            reports.append(refresh(connection, graph, whole_rollups=True, computation=computation))
        done += sum(days[day] for day in chunk)
        if progress is not None:
            progress(done, total)
    return reports


def touch_days(
    connection: sa.Connection, archive: Archive | None, from_day: dt.date, to_day: dt.date, *, site: str | None = None
) -> int:
    """Touch the cells of these days, those of purged days by what the archive has of them too; return how many."""
    let_idle(connection)
    touched = touch(connection, site=site, from_day=from_day, to_day=to_day)
    for day in _sealed_days(connection, archive, from_day, to_day):
        assert archive is not None  # noqa: S101
        sites: set[str] = set()
        for file in archive.manifest(day).files("executions"):
            with archive.reaching(), archive.fs.open(archive.full_path(file.path), "rb") as stream:
                sites.update(pc.unique(pq.read_table(stream, columns=["site_id"]).column(0)).to_pylist())
        touched += connection.execute(sa.text(_TOUCH), {"day": day, "sites": sorted(sites), "site": site}).rowcount
    return touched


def _sealed_days(
    connection: sa.Connection, archive: Archive | None, from_day: dt.date | None, to_day: dt.date | None
) -> list[dt.date]:
    if archive is None:
        return []
    return list(connection.execute(sa.text(_SEALED), {"from_day": from_day, "to_day": to_day}).scalars())


def _chunks(days: Iterable[dt.date], cells: dict[dt.date, int], size: int) -> list[list[dt.date]]:
    chunks: list[list[dt.date]] = []
    filled = 0
    for day in days:
        if not chunks or filled + cells[day] > size:
            chunks.append([])
            filled = 0
        chunks[-1].append(day)
        filled += cells[day]
    return chunks
