"""The benchmark of engines compares rows, not counts of rows: a wrong figure in one of them stops it."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import sqlalchemy as sa

from flywheel_pipeline.aggregates import refresh
from flywheel_pipeline.archive.export import export_due
from flywheel_pipeline.archive.layout import Archive
from flywheel_pipeline.engines.duck import DuckEngine
from flywheel_pipeline.engines.work import Computation

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
import bench_engines
from fleet import load


@pytest.fixture
def archive(engine: sa.Engine, tmp_path: Path) -> Archive:
    """Two days of the benchmark's fleet, archived, and their cells by PostgreSQL."""
    load(engine, 2_000)
    folder = Archive.open(tmp_path, create=True)
    export_due(engine, folder, today=bench_engines.TODAY, after_days=0)
    bench_engines.empty(engine)
    refresh.rebuild(engine)
    return folder


def test_the_hand_written_query_is_held_to_every_row(
    engine: sa.Engine, archive: Archive, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert bench_engines.differing(engine, archive) == {}
    query = bench_engines.BY_HAND["telemetry_daily_volume"]
    wrong = query.replace("count(*) AS executions", "count(*) + 1 AS executions")
    assert wrong != query
    monkeypatch.setitem(bench_engines.BY_HAND, "telemetry_daily_volume", wrong)
    with engine.connect() as connection:
        rows = connection.exec_driver_sql("SELECT count(*) FROM telemetry_daily_volume").scalar_one()
    assert rows > 0
    assert bench_engines.differing(engine, archive) == {"telemetry_daily_volume": 2 * rows}  # as many, each another


def test_a_rebuild_that_left_another_figure_is_an_error(engine: sa.Engine, archive: Archive) -> None:
    right = bench_engines.contents(engine)
    assert bench_engines.rebuilt(engine, Computation(DuckEngine(), archive), right) > 0
    count, _, content = right["episodes"].partition(" ")
    wrong = {**right, "episodes": f"{count} {int(content) + 1}"}
    with pytest.raises(AssertionError, match="duckdb and PostgreSQL differ in episodes"):
        bench_engines.rebuilt(engine, Computation(DuckEngine(), archive), wrong)
