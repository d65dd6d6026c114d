"""How bad a failing rule is: since when, how often, warning or error."""

from __future__ import annotations

import datetime as dt
from collections.abc import Iterator

import pytest
import sqlalchemy as sa

from flywheel_pipeline.aggregates.refresh import refresh
from flywheel_pipeline.health.checks import no_failing_rules
from flywheel_pipeline.health.severity import Streak, streaks

RULE = "L1-FIREWALL-001"
LAST = dt.date(2026, 2, 15)
_INSERT = """
INSERT INTO execution_telemetry (execution_id, site_id, runbook_id, hostname, platform, incident_type, started_at,
  success, verification_passed, resolution_level, created_at)
SELECT format('%s-%s-%s-%s', CAST(:rule AS text), CAST(:days_ago AS int), CAST(:success AS boolean), n), 'site-a', :rule,
  'ws-' || n % 9, 'windows', 'firewall', CAST(:at AS timestamptz) + n * interval '1 second', :success, :success, 'L1',
  CAST(:at AS timestamptz) + interval '1 hour'
FROM generate_series(1, :executions) AS n
"""


@pytest.fixture
def conn(engine: sa.Engine) -> Iterator[sa.Connection]:
    with engine.connect() as connection, connection.begin() as transaction:
        yield connection
        transaction.rollback()


def day(conn: sa.Connection, days_ago: int, successes: int, failures: int, rule: str = RULE) -> None:
    """What the rule did on one day; refreshed with `done`."""
    at = dt.datetime.combine(LAST - dt.timedelta(days=days_ago), dt.time(8), dt.UTC)
    for success, executions in ((True, successes), (False, failures)):
        conn.execute(
            sa.text(_INSERT),
            {"rule": rule, "days_ago": days_ago, "at": at, "success": success, "executions": executions},
        )


def test_a_rule_fails_since_the_day_after_the_last_week_that_kept_the_floor(conn: sa.Connection) -> None:
    for days_ago in range(40, 20, -1):
        day(conn, days_ago, 10, 0)
    for days_ago in range(20, -1, -1):
        day(conn, days_ago, 0, 10)
    refresh(conn)
    # Of the seven days up to the third bad one 40 of 70 succeeded, up to the fourth 30 of 70: half is the floor.
    found = streaks(conn, [RULE])[RULE]
    assert found == Streak(RULE, LAST - dt.timedelta(days=17), 18, 180)
    assert found.severe


def test_a_good_day_of_two_executions_ends_no_streak(conn: sa.Connection) -> None:
    for days_ago in (9, 8, 7, 6, 4, 3, 2, 1, 0):
        day(conn, days_ago, 0, 4)
    day(conn, 5, 2, 0)
    refresh(conn)
    assert streaks(conn, [RULE])[RULE] == Streak(RULE, LAST - dt.timedelta(days=9), 10, 36)


def test_a_rule_that_recovered_has_no_streak_and_its_check_says_so_as_a_warning(conn: sa.Connection) -> None:
    for days_ago in range(40, 30, -1):
        day(conn, days_ago, 0, 150)
    day(conn, 0, 30, 0)
    refresh(conn)
    assert streaks(conn, [RULE]) == {}
    finding = no_failing_rules(conn)
    assert (finding.passed, finding.severe) == (False, False)
    assert finding.sentence.endswith("It kept the floor in its last week.")


@pytest.mark.parametrize(
    ("days", "failures", "severe"),
    [(6, 999, False), (7, 99, False), (7, 100, True), (1, 999, False), (1, 1000, True), (400, 99, False)],
)
def test_volume_and_age_make_the_severity(days: int, failures: int, severe: bool) -> None:
    assert Streak(RULE, LAST, days, failures).severe is severe


def test_the_check_warns_first_and_is_an_error_after_a_week_of_a_hundred_failures(conn: sa.Connection) -> None:
    assert no_failing_rules(conn).passed
    day(conn, 8, 5, 20)
    refresh(conn)
    young = no_failing_rules(conn)
    assert (young.passed, young.severe) == (False, False)
    assert f"Failing since {LAST - dt.timedelta(days=8)}, 1 day, 20 failures." in young.sentence
    for days_ago in range(7, -1, -1):
        day(conn, days_ago, 0, 10)
    refresh(conn)
    old = no_failing_rules(conn)
    assert (old.passed, old.severe) == (False, True)
    assert f"Failing since {LAST - dt.timedelta(days=8)}, 9 days, 100 failures." in old.sentence
    assert old.sample[0]["severity"] == "error"
    assert (old.figures["longest_failing_days"], old.figures["failures_of_failing_rules"]) == (9, 100)
