"""A change touches the cells that it may change, and no others; old rows are read anew and never rewritten."""

from __future__ import annotations

import datetime as dt
from typing import Any

import pytest
import sqlalchemy as sa
from exactness import assert_exact, graph
from telemetry_rows import NOON, insert, row

from flywheel_pipeline.aggregates.quality import attributed_plus_unresolved_is_all
from flywheel_pipeline.aggregates.refresh import refresh
from flywheel_pipeline.errors import SchemaMismatch
from flywheel_pipeline.telemetry.aliases import add_rule_alias, add_site_alias
from flywheel_pipeline.telemetry.intake import post_execution
from flywheel_pipeline.telemetry.quality import no_skewed_clocks

DAY = dt.timedelta(days=1)
Cells = set[tuple[str, dt.date]]


def touched(connection: sa.Connection) -> Cells:
    return {tuple(cell) for cell in connection.exec_driver_sql("SELECT site_id, day FROM touched_cells")}


def one(connection: sa.Connection, query: str) -> Any:
    return connection.execute(sa.text(query)).scalar_one()


@pytest.fixture
def fleet(engine: sa.Engine) -> sa.Engine:
    """Failures of two kinds on two sites over three days, all of them counted."""
    with engine.begin() as connection:
        insert(
            connection,
            [
                row(at=NOON + DAY * day, site_id=site, success=False, error_message=error, runbook_id=rule)
                for site, day, error, rule in [
                    ("site-a", 0, "Odd thing 1", "L1-SSH-001"),
                    ("site-a", 1, "verify failed", "RB-AUTO-OLD"),
                    ("site-b", 1, "odd thing 2", "RB-AUTO-OLD"),
                    ("site-b", 2, None, "L1-SSH-001"),
                ]
            ],
        )
        refresh(connection, graph())
    return engine


ODD = {("site-a", NOON.date()), ("site-b", NOON.date() + DAY)}
VERIFY = {("site-a", NOON.date() + DAY)}


@pytest.mark.parametrize(
    ("steps", "expected"),
    [
        (["insert"], ODD),
        (["insert", "UPDATE outcome_class_rules SET description = 'clearer' WHERE rule_name = 'odd'"], set()),
        (["insert", "UPDATE outcome_class_rules SET pattern = 'verify%' WHERE rule_name = 'odd'"], ODD | VERIFY),
        (["insert", "UPDATE outcome_class_rules SET outcome_class = 'suppressed' WHERE rule_name = 'odd'"], ODD),
        (["insert", "UPDATE outcome_class_rules SET enabled = false WHERE rule_name = 'odd'"], ODD),
        (["insert", "DELETE FROM outcome_class_rules WHERE rule_name = 'odd'"], ODD),
        (
            [
                "insert",
                "UPDATE outcome_class_rules SET enabled = false WHERE rule_name = 'odd'",
                "UPDATE outcome_class_rules SET pattern = 'verify%' WHERE rule_name = 'odd'",
            ],
            set(),
        ),
    ],
)
def test_a_class_rule_touches_exactly_the_cells_it_may_change(
    fleet: sa.Engine, steps: list[str], expected: Cells
) -> None:
    added = (
        "INSERT INTO outcome_class_rules (rule_name, outcome_class, field, pattern, description) "
        "VALUES ('odd', 'unreachable', 'error_message', 'ODD thing%', 'of a test')"
    )
    for number, step in enumerate(steps):
        with fleet.begin() as connection:
            connection.execute(sa.text(added if step == "insert" else step))
            if number == len(steps) - 1:
                assert touched(connection) == expected
            refresh(connection, graph())
    assert_exact(fleet)


def test_a_rule_alias_added_later_moves_old_rows_to_the_rule_without_rewriting_them(fleet: sa.Engine) -> None:
    where = "SELECT string_agg(ctid::text || xmin::text, ' ' ORDER BY id) FROM execution_telemetry"
    count = "SELECT match_count FROM l1_rules WHERE rule_id = 'L1-SSH-001'"
    unresolved = "SELECT count(*) FROM unresolved_rule_ids"
    with fleet.begin() as connection:
        before = one(connection, where)
        assert (one(connection, count), one(connection, unresolved)) == (2, 1)
        add_rule_alias(connection, "RB-AUTO-OLD", "L1-SSH-001", None, NOON + DAY * 2, actor="test", reason="cut at 8")
        assert touched(connection) == {("site-a", NOON.date() + DAY), ("site-b", NOON.date() + DAY)}
        refresh(connection, graph())
        assert (one(connection, count), one(connection, unresolved)) == (4, 0)
        assert one(connection, where) == before
        assert one(connection, "SELECT count(*) FROM execution_corrections") == 0
        assert attributed_plus_unresolved_is_all(connection).passed
    assert_exact(fleet)


def test_a_site_alias_touches_both_names_on_the_days_of_its_time_alone(fleet: sa.Engine) -> None:
    second = NOON.date() + DAY
    with fleet.begin() as connection:
        add_site_alias(connection, "site-a", "site-new", NOON + DAY, None, actor="test", reason="renamed")
        assert touched(connection) == {("site-a", second), ("site-new", second)}
        refresh(connection, graph())
        sites = "SELECT string_agg(DISTINCT site_id, ' ' ORDER BY site_id) FROM rule_site_stats"
        assert one(connection, sites) == "site-a site-b site-new"
        connection.exec_driver_sql("UPDATE site_aliases SET reason = 'merged'")
        assert touched(connection) == set()
        connection.exec_driver_sql("DELETE FROM site_aliases")
        refresh(connection, graph())
        assert one(connection, sites) == "site-a site-b"
    assert_exact(fleet)


def test_a_row_that_moves_touches_where_it_was_and_where_it_is(fleet: sa.Engine) -> None:
    with fleet.begin() as connection:
        connection.execute(
            sa.text(
                "UPDATE execution_telemetry SET site_id = 'site-c', started_at = :at WHERE error_message = 'Odd thing 1'"
            ),
            {"at": NOON + 5 * DAY},
        )
        assert touched(connection) == {("site-a", NOON.date()), ("site-c", NOON.date() + 5 * DAY)}
        refresh(connection, graph())
    assert_exact(fleet)


def outcomes(connection: sa.Connection) -> dict[tuple[str, dt.date], str]:
    found = connection.exec_driver_sql("SELECT site_id, day, string_agg(outcome, ' ') FROM episodes GROUP BY 1, 2")
    return {(site, day): outcome for site, day, outcome in found}


def test_a_row_of_the_next_day_undoes_the_success_of_the_day_before(engine: sa.Engine) -> None:
    first, second = NOON.date(), NOON.date() + DAY
    with engine.begin() as connection:
        insert(connection, [row()])
        refresh(connection, graph())
        assert outcomes(connection) == {("site-a", first): "success"}
        insert(connection, [row(at=NOON + DAY)])  # 24 hours later to the microsecond: still within the window
        assert touched(connection) == {("site-a", second)}
        refresh(connection, graph())
        assert outcomes(connection) == {("site-a", first): "failure", ("site-a", second): "success"}
    assert_exact(engine)


def test_a_late_success_is_judged_by_the_next_day_that_is_there_already(engine: sa.Engine) -> None:
    with engine.begin() as connection:
        insert(connection, [row(at=NOON + DAY)])
        refresh(connection, graph())
        insert(connection, [row()])
        refresh(connection, graph())
        assert outcomes(connection)[("site-a", NOON.date())] == "failure"
    assert_exact(engine)


def test_rows_of_both_names_of_a_site_count_together_whichever_comes_first(engine: sa.Engine) -> None:
    with engine.begin() as connection:
        add_site_alias(connection, "site-old", "site-a", actor="test", reason="renamed")
        insert(connection, [row()])
        refresh(connection, graph())
        insert(connection, [row(site_id="site-old", hostname="host-2")])
        refresh(connection, graph())
        assert outcomes(connection) == {("site-a", NOON.date()): "success success"}
        insert(connection, [row(hostname="host-3")])
        refresh(connection, graph())
        assert outcomes(connection) == {("site-a", NOON.date()): "success success success"}
    assert_exact(engine)


def test_an_alias_that_is_taken_back_gives_the_rows_back(fleet: sa.Engine) -> None:
    unresolved = "SELECT count(*) FROM unresolved_rule_ids"
    with fleet.begin() as connection:
        add_rule_alias(connection, "RB-AUTO-OLD", "L1-SSH-001", actor="test", reason="cut at 8")
        refresh(connection, graph())
        assert one(connection, unresolved) == 0
        connection.exec_driver_sql("DELETE FROM rule_aliases")
        refresh(connection, graph())
        assert one(connection, unresolved) == 1
    assert_exact(fleet)


def test_truncate_touches_every_cell_and_the_figures_go_to_nothing(fleet: sa.Engine) -> None:
    with fleet.begin() as connection:
        connection.exec_driver_sql("TRUNCATE execution_telemetry")
        assert len(touched(connection)) == 4
        refresh(connection, graph())
        for model in graph():
            if model.cell:
                assert one(connection, f"SELECT count(*) FROM {model.name}") == 0
    assert_exact(fleet)


@pytest.mark.parametrize("day", ["infinity", "-infinity", "294276-12-31", "10000-01-01", "4713-11-24 BC"])
def test_a_day_of_no_calendar_is_refused_and_stops_nobody_else(fleet: sa.Engine, day: str) -> None:
    change = sa.text("UPDATE execution_telemetry SET started_at = CAST(:day AS timestamptz) WHERE id = 1")
    with fleet.connect() as connection, pytest.raises(sa.exc.DataError, match="no day of this calendar"):
        connection.execute(change, {"day": day})
    with fleet.connect() as connection, pytest.raises(sa.exc.DataError, match="no day of this calendar"):
        connection.execute(
            sa.text(
                "INSERT INTO execution_telemetry (execution_id, site_id, runbook_id, hostname, success, started_at) "
                "VALUES ('x', 's', 'r', 'h', true, CAST(:day AS timestamptz))"
            ),
            {"day": day},
        )
    with fleet.begin() as connection:
        insert(connection, [row()])
        refresh(connection, graph())
    assert_exact(fleet)


def test_a_clock_of_1970_is_kept_listed_and_counted_nowhere(fleet: sa.Engine) -> None:
    with fleet.begin() as connection:
        insert(connection, [row(at=dt.datetime(1970, 1, 1, tzinfo=dt.UTC), created_at=NOON)])
        refresh(connection, graph())
        assert one(connection, "SELECT problem FROM telemetry_violations") == "skewed_clock"
        assert one(connection, "SELECT sum(executions) FROM telemetry_daily_volume") == 4
    assert_exact(fleet)


@pytest.mark.parametrize("arrival", ["infinity", "12026-02-02 00:00+00", "-infinity", "0044-03-15 12:00+00 BC"])
def test_an_arrival_that_no_clock_shows_is_listed_and_stops_nobody_else(fleet: sa.Engine, arrival: str) -> None:
    with fleet.begin() as connection:
        arrived = NOON + 9 * DAY
        insert(connection, [row(at=NOON, execution_id="odd"), row(at=NOON, created_at=arrived)])
        connection.execute(
            sa.text("UPDATE execution_telemetry SET created_at = CAST(:at AS timestamptz) WHERE execution_id = 'odd'"),
            {"at": arrival},
        )
    with fleet.begin() as connection:
        report = refresh(connection, graph())
        assert report.newest_arrival_at == arrived
        assert [found["execution_id"] for found in no_skewed_clocks(connection).sample] == ["odd"]
    assert_exact(fleet, python=False)  # Python has no such time


def test_the_same_post_twice_touches_its_cell_once(fleet: sa.Engine) -> None:
    post = {
        "site_id": "site-a",
        "reported_at": NOON.isoformat(),
        "execution": {"execution_id": "p", "hostname": "h", "runbook_id": "L1-SSH-001", "success": True},
    }
    assert post_execution(fleet, post, received_at=NOON).outcome == "inserted"
    with fleet.begin() as connection:
        assert len(touched(connection)) == 1
        refresh(connection, graph())
    assert post_execution(fleet, post, received_at=NOON).outcome == "unchanged"
    with fleet.begin() as connection:
        assert touched(connection) == set()


def test_a_refresh_by_a_program_with_other_models_is_refused(fleet: sa.Engine) -> None:
    with fleet.begin() as connection:
        connection.exec_driver_sql("UPDATE schema_objects SET content_hash = 'newer' WHERE name = 'episodes'")
    with fleet.connect() as connection, pytest.raises(SchemaMismatch, match=r"other SQL models.*episodes"):
        refresh(connection, graph())


def test_a_refresh_with_an_old_snapshot_is_refused(fleet: sa.Engine) -> None:
    old = fleet.connect().execution_options(isolation_level="REPEATABLE READ")
    with old as connection, pytest.raises(SchemaMismatch, match="read committed"):
        refresh(connection, graph())
