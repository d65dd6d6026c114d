"""A rebuild from nothing fills the tables before it makes their indexes, and drops checkpoints without noting keys."""

from __future__ import annotations

import datetime as dt
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import sqlalchemy as sa
from exactness import assert_exact, graph
from telemetry_rows import NOON, insert, row

from flywheel_pipeline.aggregates import refresh as refreshing
from flywheel_pipeline.aggregates.refresh import rebuild, refresh

CELLS = [model.name for model in graph() if model.cell]
DAY = dt.date(2026, 2, 2)


@pytest.fixture
def counted(engine: sa.Engine, monkeypatch: pytest.MonkeyPatch) -> sa.Engine:
    """Executions of two rules on three sites and days, counted; many enough for a rebuild to fill empty tables."""
    with engine.begin() as connection:
        insert(
            connection,
            [
                row(
                    at=NOON + dt.timedelta(days=n % 3),
                    site_id=f"site-{n % 4}",
                    runbook_id=f"L1-R-{n % 2}",
                    success=n % 5 > 0,
                )
                for n in range(48)
            ],
        )
        refresh(connection, graph())
    monkeypatch.setattr(refreshing, "BULK_CELLS", 4)
    return engine


def tables(engine: sa.Engine) -> tuple[dict[str, list[str]], list[tuple[object, ...]]]:
    """All rows of all cell tables, and their keys and indexes as the catalogue has them."""
    with engine.connect() as connection:
        rows = {name: sorted(map(repr, connection.exec_driver_sql(f"SELECT * FROM {name}"))) for name in CELLS}
        indexes = connection.execute(
            sa.text(
                "SELECT i.indrelid::regclass::text, pg_get_indexdef(i.indexrelid), pg_get_constraintdef(c.oid), i.indisvalid "
                "FROM pg_index AS i LEFT JOIN pg_constraint AS c ON c.conindid = i.indexrelid AND c.contype = 'p' "
                "WHERE i.indrelid::regclass::text = ANY(:names) ORDER BY 1, 2"
            ),
            {"names": CELLS},
        )
        return rows, [tuple(index) for index in indexes]


def empty(engine: sa.Engine) -> None:
    with engine.begin() as connection:
        connection.exec_driver_sql(f"TRUNCATE {', '.join(CELLS)}")


@contextmanager
def keys_made(engine: sa.Engine) -> Iterator[list[str]]:
    """The statements that give a table its key."""
    seen: list[str] = []

    def note(_c: object, _cursor: object, statement: str, *_rest: object) -> None:
        if "ADD CONSTRAINT" in statement:
            seen.append(statement)

    sa.event.listen(engine, "before_cursor_execute", note)
    yield seen
    sa.event.remove(engine, "before_cursor_execute", note)


def test_empty_tables_are_filled_first_and_have_their_indexes_afterwards(counted: sa.Engine) -> None:
    right = tables(counted)
    assert len(right[1]) > len(CELLS)
    empty(counted)
    with keys_made(counted) as made:
        rebuild(counted)
    assert len(made) == len(CELLS)
    assert tables(counted) == right
    assert_exact(counted)
    with keys_made(counted) as made:
        assert sum(report.rows_written for report in rebuild(counted)) == 0
    assert made == []


@pytest.mark.parametrize(
    "busy",
    [
        "SELECT count(*) FROM episodes",
        "UPDATE l1_rules SET updated_at = updated_at",
        "LOCK TABLE cusum_checkpoints IN ROW EXCLUSIVE MODE",
    ],
)
def test_a_rebuild_waits_for_nobody_who_uses_these_tables(counted: sa.Engine, busy: str) -> None:
    right = tables(counted)
    empty(counted)
    with counted.begin() as other, keys_made(counted) as made:
        other.exec_driver_sql("SET LOCAL lock_timeout = '10s'")
        other.exec_driver_sql(busy)
        with counted.begin() as connection:
            # The counters stand already: a rebuild that writes them waits for whoever holds their rows, as ever.
            connection.exec_driver_sql("SET LOCAL lock_timeout = '10s'")
            connection.exec_driver_sql("SELECT flywheel_touch_all()")
            refresh(connection, graph(), whole_rollups=True)
    assert made == []
    assert tables(counted) == right


def test_a_foreign_key_on_a_cell_table_is_no_obstacle(counted: sa.Engine) -> None:
    right = tables(counted)
    empty(counted)
    with counted.begin() as connection:
        connection.exec_driver_sql(
            "CREATE TABLE notes (site_id text, rule_id text, FOREIGN KEY (site_id, rule_id) REFERENCES rule_site_stats)"
        )
    rebuild(counted)
    assert tables(counted) == right


def checkpoints(engine: sa.Engine) -> set[tuple[str, dt.date]]:
    with engine.connect() as connection:
        rows = connection.exec_driver_sql("SELECT rule_id, (until AT TIME ZONE 'UTC')::date FROM cusum_checkpoints")
        return {(rule_id, until) for rule_id, until in rows}


def put_checkpoints(engine: sa.Engine, *of: tuple[str, dt.date]) -> None:
    with engine.begin() as connection:
        connection.exec_driver_sql("DELETE FROM cusum_checkpoints")
        connection.execute(
            sa.text(
                "INSERT INTO cusum_checkpoints VALUES "
                "('p', :rule, 1, 'fleet', 'all', CAST(:until AS timestamp) AT TIME ZONE 'UTC', 9, 1, 0.5)"
            ),
            [{"rule": rule, "until": until} for rule, until in of],
        )


def test_checkpoints_stand_where_no_episode_before_them_changed(counted: sa.Engine) -> None:
    later = DAY + dt.timedelta(days=2)
    all_of_them = {("L1-R-0", later), ("L1-R-1", later), ("L1-R-2", DAY)}
    put_checkpoints(counted, *all_of_them)
    rebuild(counted)
    assert checkpoints(counted) == all_of_them, "a rebuild that writes no episode deletes no checkpoint"

    with counted.begin() as connection:
        connection.exec_driver_sql(
            f"UPDATE episodes SET outcome = 'success' WHERE rule_id = 'L1-R-0' AND day = '{DAY}'"
        )
    rebuild(counted, from_day=DAY + dt.timedelta(days=1))
    assert checkpoints(counted) == {("L1-R-2", DAY)}, "the day before the first one asked for is recomputed too"

    put_checkpoints(counted, *all_of_them)
    with counted.begin() as connection:
        insert(connection, [row(at=NOON, site_id="site-9", runbook_id="L1-R-0")])
        refresh(connection, graph())
    assert checkpoints(counted) == all_of_them - {("L1-R-0", later)}, "a refresh knows whose episodes it wrote"


def test_a_rebuild_from_nothing_leaves_no_checkpoint_behind_it(counted: sa.Engine) -> None:
    put_checkpoints(counted, ("L1-R-0", DAY + dt.timedelta(days=2)))
    empty(counted)
    rebuild(counted)
    assert checkpoints(counted) == set()
