"""Rebuild, backfill and refresh are one code: the same figures, in any pieces, interrupted or not."""

from __future__ import annotations

import datetime as dt
import random

import dagster as dg
import pytest
import sqlalchemy as sa
from exactness import assert_exact, graph
from telemetry_rows import NOON, insert, row

from flywheel_pipeline.aggregates.assets import build_backfill_asset
from flywheel_pipeline.aggregates.refresh import pending_cells, rebuild, refresh
from flywheel_pipeline.cli import main
from flywheel_pipeline.database.resource import FlywheelDatabase

CELLS = [model for model in graph() if model.cell]
SPOIL = [
    "UPDATE episodes SET executions = executions + 1, outcome = 'success'",
    "DELETE FROM rule_daily_stats WHERE day = '2026-02-03'",
    "UPDATE rule_month_stats SET successes = 99",
    "UPDATE pattern_month_stats SET executions = 0",
    "DELETE FROM rule_site_stats",
    "UPDATE pattern_site_stats SET refired = 7",
    "UPDATE telemetry_daily_volume SET executions = 0",
    "INSERT INTO telemetry_violations VALUES ('site-a', '2026-02-02', 'nobody', 'skewed_clock', 'invented', now())",
    "UPDATE l1_rules SET match_count = 12345",
]


@pytest.fixture
def fleet(engine: sa.Engine) -> sa.Engine:
    """Sixty executions on three sites over four days, counted."""
    pick = random.Random(1)
    with engine.begin() as connection:
        insert(
            connection,
            [
                row(
                    at=NOON + dt.timedelta(days=pick.randrange(4), hours=pick.randrange(12)),
                    site_id=f"site-{pick.choice('abc')}",
                    hostname=f"h{pick.randrange(3)}",
                    success=pick.random() < 0.7,
                    resolution_level=pick.choice(["L1", "L2"]),
                )
                for _ in range(60)
            ],
        )
        refresh(connection, graph())
    return engine


def contents(engine: sa.Engine) -> dict[str, list[tuple[object, ...]]]:
    with engine.connect() as connection:
        found = {
            model.name: sorted(
                (tuple(r) for r in connection.exec_driver_sql(f"SELECT {', '.join(model.columns)} FROM {model.name}")),
                key=repr,
            )
            for model in CELLS
        }
        counters = "SELECT rule_id, match_count, success_count, failure_count FROM l1_rules ORDER BY 1"
        found["l1_rules"] = [tuple(r) for r in connection.exec_driver_sql(counters)]
    return found


def spoil(engine: sa.Engine) -> None:
    with engine.begin() as connection:
        for statement in SPOIL:
            connection.exec_driver_sql(statement)


@pytest.mark.parametrize("chunk_cells", [1, 5, 1000])
def test_a_rebuild_in_any_pieces_sets_right_whatever_somebody_changed(fleet: sa.Engine, chunk_cells: int) -> None:
    right = contents(fleet)
    spoil(fleet)
    assert contents(fleet) != right
    rebuild(fleet, chunk_cells=chunk_cells)
    assert contents(fleet) == right
    assert_exact(fleet)
    assert sum(report.rows_written for report in rebuild(fleet, chunk_cells=chunk_cells)) == 0


def test_the_backfill_of_each_day_sets_the_same_figures(fleet: sa.Engine, database_url: str) -> None:
    right = contents(fleet)
    spoil(fleet)
    backfill = build_backfill_asset(graph())
    written = []
    for day in sorted({cell[1] for cell in right["telemetry_daily_volume"]}):
        result = dg.materialize(
            [backfill],
            partition_key=str(day),
            resources={"database": FlywheelDatabase(url=database_url)},
            instance=dg.DagsterInstance.ephemeral(),
        )
        assert result.success
        (materialization,) = result.asset_materializations_for_node("day_backfill")
        written.append(materialization.metadata["rows_written"].value)
    assert all(rows > 0 for rows in written)
    assert contents(fleet) == right
    assert_exact(fleet)


def test_the_command_rebuilds_a_site_and_its_days_only(
    fleet: sa.Engine, database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = contents(fleet)
    with fleet.begin() as connection:
        connection.exec_driver_sql("UPDATE episodes SET executions = executions + 1")
    monkeypatch.setenv("FLYWHEEL_DATABASE_URL", database_url)
    monkeypatch.setattr(
        "sys.argv", ["flywheel", "rebuild", "--site", "site-a", "--from", "2026-02-03", "--to", "2026-02-03"]
    )
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code in (0, None)
    # The day before is recomputed too: what happened on a day decides whether a success of the day before held.
    repaired = {
        row[:2] for row, before in zip(contents(fleet)["episodes"], right["episodes"], strict=True) if row == before
    }
    assert repaired == {("site-a", dt.date(2026, 2, 2)), ("site-a", dt.date(2026, 2, 3))}


def test_an_interrupted_rebuild_leaves_the_rest_in_the_outbox(fleet: sa.Engine) -> None:
    right = contents(fleet)
    with fleet.begin() as connection:
        connection.exec_driver_sql("UPDATE episodes SET executions = executions + 1")

    def interrupt(done: int, total: int) -> None:
        if done >= 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        rebuild(fleet, chunk_cells=2, progress=interrupt)
    with fleet.connect() as connection:
        assert 0 < pending_cells(connection) <= 8
    with fleet.begin() as connection:
        refresh(connection, graph())
    assert contents(fleet) == right
    assert_exact(fleet)


def test_a_rebuild_ends_while_writers_go_on(fleet: sa.Engine) -> None:
    def write(_done: int, _total: int) -> None:
        with fleet.begin() as connection:
            insert(connection, [row(site_id=f"site-{n}") for n in range(5)])

    reports = rebuild(fleet, chunk_cells=4, progress=write)
    assert len(reports) <= 5
    with fleet.begin() as connection:
        refresh(connection, graph())
    assert_exact(fleet)
