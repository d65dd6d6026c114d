"""Volume against the same weekday, and sources that fall silent."""

from __future__ import annotations

import datetime as dt
import random
from collections.abc import Iterator

import pytest
import sqlalchemy as sa

from flywheel_pipeline.aggregates.refresh import refresh
from flywheel_pipeline.telemetry.quality import sites_and_tiers_report
from flywheel_pipeline.telemetry.volume import judge, usual, volume_is_usual

NOW = dt.datetime(2026, 2, 16, 3, tzinfo=dt.UTC)  # a Monday: Sunday the 15th is judged
SUNDAY = dt.date(2026, 2, 15)
_INSERT = """
INSERT INTO execution_telemetry (execution_id, site_id, runbook_id, hostname, started_at, success, resolution_level,
  agent_version, chaos_campaign_id, created_at)
SELECT format('%s/%s/%s/%s/%s/%s', CAST(:day AS date), CAST(:site AS text), CAST(:level AS text), CAST(:agent AS text), :chaos, n),
  :site, 'R-' || CAST(:level AS text), 'h' || n, CAST(:day AS date) + interval '8 hours', true, :level, :agent,
  CASE WHEN :chaos THEN 'c1' END, CAST(:day AS date) + interval '9 hours'
FROM generate_series(1, :executions) AS n
"""


@pytest.fixture
def conn(engine: sa.Engine) -> Iterator[sa.Connection]:
    with engine.connect() as connection, connection.begin() as transaction:
        connection.exec_driver_sql("SET LOCAL TimeZone = 'UTC'")
        yield connection
        transaction.rollback()


def send(
    conn: sa.Connection,
    weeks_ago: float,
    executions: int,
    *,
    site: str = "site-a",
    level: str = "L1",
    agent: str = "1.0.70",
    chaos: bool = False,
) -> None:
    day = SUNDAY - dt.timedelta(days=round(weeks_ago * 7))
    values = {"day": day, "site": site, "level": level, "agent": agent, "chaos": chaos, "executions": executions}
    conn.execute(sa.text(_INSERT), values)


def usual_weeks(conn: sa.Connection, **source: str) -> None:
    for weeks_ago, executions in ((1, 100), (2, 95), (3, 104), (4, 99)):
        send(conn, weeks_ago, executions, **source)


@pytest.mark.parametrize(
    ("observed", "history", "verdict"),
    [
        (100, [100, 100, 100, 100], "usual"),
        (51, [100, 100, 100, 100], "usual"),
        (49, [100, 100, 100, 100], "low"),
        (0, [100, 100, 100, 100], "low"),
        (201, [100, 100, 100, 100], "high"),
        (100, [0, 100, 100, 5000], "usual"),  # an outage and a burst among the weeks move nothing
        (40, [100, 100, 100, 0], "low"),
        (0, [20, 400, 30, 900], "low"),  # never silent before, however wide the bounds
        (0, [0, 400, 30, 900], "usual"),  # silent now and then
        (0, [19, 19, 19, 19], "not judged"),
        (1, [20, 20, 20, 20], "low"),
        (4, [20, 20, 20, 20], "usual"),
        (0, [100, 100, None, None], "not judged"),
        (0, [100, 100, 100, None], "low"),
        (0, [], "not judged"),
        (0, [0, 0, 0, 0], "not judged"),
    ],
)
def test_a_day_is_judged_by_the_median_of_its_weekdays(observed: int, history: list[int | None], verdict: str) -> None:
    assert judge(observed, history) == verdict


def test_steady_and_scattered_sources_raise_no_alarm() -> None:
    draw = random.Random(20260215)
    alarms = 0
    for _ in range(4000):
        mean = draw.choice((25, 60, 200, 2000))
        days = []
        for _ in range(5):
            rate = draw.gammavariate(20, mean / 20)  # over-dispersed: a standard deviation of 22 % on top of Poisson
            days.append(max(0, round(draw.gauss(rate, rate**0.5))))
        alarms += judge(days[0], days[1:]) in ("low", "high")
    assert alarms / 4000 <= 0.01


def test_bounds_need_three_weeks_and_volume() -> None:
    assert usual([50, 50]) is None
    assert usual([50, 50, 50]) is not None
    assert usual([5, 5, 5, 5]) is None


def test_a_usual_day_passes_and_a_fallen_site_is_named_with_its_weeks(conn: sa.Connection) -> None:
    for site in ("site-a", "site-b", "site-c", "site-d"):
        usual_weeks(conn, site=site)
        send(conn, 0, 98, site=site)
    refresh(conn)
    good = volume_is_usual(conn, NOW)
    assert good.passed, good.sample
    assert good.figures["judged_sources"] == 7  # fleet, L1, one release, four sites
    assert good.figures["executions_of_the_day"] == 392
    conn.execute(sa.text("DELETE FROM execution_telemetry WHERE site_id = 'site-b' AND started_at > '2026-02-15'"))
    refresh(conn)
    finding = volume_is_usual(conn, NOW)
    assert [(o["source"], o["name"], o["executions"], o["usually"]) for o in finding.sample] == [
        ("site", "site-b", 0, 99.5)
    ]
    assert finding.sample[0]["same weekday before"] == "100, 95, 104, 99"
    assert "first site site-b: 0 executions, usually" in finding.sentence
    # Not yet over at one o'clock: the day before is judged.
    assert "Saturday 2026-02-14" in volume_is_usual(conn, NOW - dt.timedelta(hours=2)).sentence


def test_a_release_that_stops_reporting_is_noticed_and_an_upgrade_is_told_from_it(conn: sa.Connection) -> None:
    for site, agent in (("site-a", "1.0.56"), ("site-b", "1.0.70")):
        usual_weeks(conn, site=site, agent=agent)
    for number in range(4):  # enough others that the fleet as a whole stays usual
        usual_weeks(conn, site=f"other-{number}", agent="1.0.74")
        send(conn, 0, 100, site=f"other-{number}", agent="1.0.74")
    send(conn, 0, 101, site="site-a", agent="1.0.71")  # upgraded from 1.0.56
    refresh(conn)
    finding = volume_is_usual(conn, NOW)
    assert [(o["source"], o["name"], o["verdict"]) for o in finding.sample] == [
        ("agent", "1.0.70", "low"),
        ("site", "site-b", "low"),
    ]
    assert finding.figures["upgraded_releases"] == 1
    assert finding.figures["too_little"] == 2


def test_a_burst_is_too_much_and_chaos_rows_are_no_volume(conn: sa.Connection) -> None:
    usual_weeks(conn)
    send(conn, 0, 100)
    send(conn, 0, 500, chaos=True)
    refresh(conn)
    assert volume_is_usual(conn, NOW).passed
    send(conn, 0, 300, level="L2", site="site-z")
    refresh(conn)
    finding = volume_is_usual(conn, NOW)
    assert [(o["source"], o["verdict"]) for o in finding.sample] == [("fleet", "high"), ("agent", "high")]


def test_nothing_to_compare_with_is_said_and_no_figure_is_made_up(conn: sa.Connection) -> None:
    empty = volume_is_usual(conn, NOW)
    assert (empty.passed, empty.figures["executions_of_the_day"], empty.figures["judged_sources"]) == (True, None, 0)
    assert empty.sentence.startswith("Nothing to compare")


def test_a_busy_site_or_tier_silent_for_a_day_is_named_and_a_quiet_one_is_not(conn: sa.Connection) -> None:
    nothing = sites_and_tiers_report(conn, NOW)
    assert (nothing.passed, nothing.figures["oldest_site_hours"]) == (True, None)
    assert "nothing to judge" in nothing.sentence
    for days_ago in range(7):
        send(conn, days_ago / 7, 12)
        send(conn, days_ago / 7, 2, site="quiet") if days_ago > 2 else None
        send(conn, days_ago / 7, 12, site="gone", level="L2") if days_ago > 0 else None
    refresh(conn)
    finding = sites_and_tiers_report(conn, NOW)
    assert {(o["source"], o["name"]) for o in finding.sample} == {("site", "gone"), ("tier", "L2")}
    assert finding.figures["oldest_site_hours"] == 43
    assert "last heard of 2026-02-14 08:00 UTC" in finding.sentence
    send(conn, 0, 1, site="gone", level="L2")
    refresh(conn)
    assert sites_and_tiers_report(conn, NOW).passed
