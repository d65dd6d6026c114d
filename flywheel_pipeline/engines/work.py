"""An engine's part of a refresh: everything it reads, its computation, and its rows landed in the same transaction.

Belongs here: that sequence. Does not belong here: which cells are in scope and how they are set (`aggregates/refresh.py`).
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import sqlalchemy as sa

from flywheel_pipeline.archive.layout import Archive
from flywheel_pipeline.database.limits import let_idle
from flywheel_pipeline.engines.dialects import preamble
from flywheel_pipeline.engines.job import ComputeEngine, Job
from flywheel_pipeline.engines.landing import land
from flywheel_pipeline.engines.plan import build_plan
from flywheel_pipeline.engines.source import archived_files, database_casing, export_live, reference, scope_table
from flywheel_pipeline.sql_models.loader import ModelGraph

#: So many sites at most are named to the engine, so that it reads only theirs; of more it reads all.
NAMED_SITES = 50


@dataclass(frozen=True)
class Computation:
    """Who computes, and over which archive; None: every day is read from PostgreSQL."""

    engine: ComputeEngine
    archive: Archive | None = None

    def check(self, graph: ModelGraph) -> None:
        """Refuse whatever would stop it later: before anything is touched.

        Raises:
            EngineError: the engine is missing or does not answer.
            NotPortable: a model cannot be translated faithfully.
        """
        self.engine.check()
        build_plan(graph, self.engine.dialect)


def compute_scope(
    connection: sa.Connection,
    graph: ModelGraph,
    computation: Computation,
    progress: Callable[[str], None] | None = None,
) -> dict[str, str]:
    """Compute the models of cell day for the cells in scope, and land them in temporary tables of this transaction.

    Returns:
        By model, the query that gives its rows, for `sql_models.cells.recompute`.

    Raises:
        EngineError, ArchiveError: nothing is set then; the caller's transaction is to be rolled back.
    """
    let_idle(connection)
    plan = build_plan(graph, computation.engine.dialect)
    scratch = Path(tempfile.mkdtemp(prefix="flywheel-engine-"))
    try:
        files, live_days = archived_files(connection, computation.archive)
        live = scratch / "live.parquet"
        if not live_days or not export_live(connection, live_days, plan, live):
            live = None  # type: ignore[assignment]
        tables = {name: reference(connection, name, columns) for name, columns in plan.references.items()}
        tables["scope_days"] = scope_table(connection, "scope_days")
        read = scope_table(connection, "scope_input").column("site_id").unique().to_pylist()
        job = Job(
            plan=plan,
            preamble=tuple(preamble(plan.dialect, database_casing(connection))),
            archive=computation.archive,
            archived=files,
            live=live,
            tables=tables,
            sites=tuple(sorted(read)) if len(read) <= NAMED_SITES else None,
            scratch=scratch,
        )
        queries = {}
        for step, batches in computation.engine.compute(job):
            if progress is not None:
                progress(f"{step.name} by {computation.engine.name}")
            table = f"landed_{step.name}"
            land(connection, table, step.typed, batches)
            queries[step.name] = f"SELECT m.* FROM ({_over(step.last, table)}) AS m"  # noqa: S608
        return queries
    finally:
        shutil.rmtree(scratch)


def _over(last: str, table: str) -> str:
    return f"WITH landed AS NOT MATERIALIZED (SELECT * FROM pg_temp.{table}) {last}"  # noqa: S608
