"""What growth costs: the page is what the script renders from its measurements, and its arithmetic is right."""

from __future__ import annotations

import dataclasses
import json
import math
import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "docs"))
import growth

STORED = json.loads(growth.STORED.read_text("utf-8"))
UNITS = growth.Units(**STORED["units"])


def test_the_committed_page_is_what_the_script_renders() -> None:
    assert growth.PAGE.read_text("utf-8") == growth.render(STORED), "run python docs/growth.py"
    other = {**STORED, "units": {**STORED["units"], "heap_bytes_a_row": 1.0}}
    assert growth.render(other) != growth.render(STORED)


def test_the_picture_is_drawn(tmp_path: Path) -> None:
    growth.draw(STORED, tmp_path / "growth.png")
    for picture in (tmp_path / "growth.png", growth.PLOT):
        assert picture.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


def test_every_unit_cost_was_measured_and_is_on_the_page() -> None:
    assert set(growth.UNIT_WORDS) == {field.name for field in dataclasses.fields(growth.Units)}
    page = growth.PAGE.read_text("utf-8")
    for name, words in growth.UNIT_WORDS.items():
        assert f"| {words} | " in page, name
        assert getattr(UNITS, name) >= 0, name
    for name in ("heap_bytes_a_row", "wal_bytes_a_row", "refresh_seconds_a_row", "event_log_bytes_a_run"):
        assert getattr(UNITS, name) > 0, name
    assert f"{STORED['machine']['cores']} cores" in page


#: Round numbers, so that the figures below can be had in the head: 1,000 appliances on 500 sites.
ROUND = growth.Units(
    heap_bytes_a_row=300,
    index_bytes_a_row=100,
    id_index_bytes_a_row=50,
    wal_bytes_a_row=500,
    import_seconds_a_row=0.001,
    aggregate_bytes_a_site_day=1000,
    aggregate_bytes_a_row=10,
    refresh_wal_bytes_a_site_day=200,
    refresh_wal_bytes_a_new_row=700,
    refresh_seconds=0.5,
    refresh_seconds_a_site_day=0.001,
    refresh_seconds_a_row=0.00001,
    rest_of_a_run_seconds=2,
    event_log_bytes_a_run=100_000,
    publish_seconds=1,
    publish_seconds_an_appliance=0.002,
    publish_wal_bytes_an_appliance=1500,
    manifest_bytes_an_appliance=2500,
)


def test_the_arithmetic_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {
        "EXECUTIONS_AN_APPLIANCE_A_DAY": 864,
        "APPLIANCES_A_SITE": 2,
        "PEAK": 2.0,
        "SHORTEST_TICK_SECONDS": 10.0,
        "TELEMETRY_DAYS": 10,
        "AGGREGATE_DAYS": 100,
        "RUN_DAYS": 30,
    }.items():
        monkeypatch.setattr(growth, name, value)
    found = growth.project(ROUND, 864_000)  # ten a second
    assert (found.appliances, found.sites, found.rows_a_second) == (1000, 500, 10)
    assert found.import_cores == pytest.approx(2 * 10 * 0.001)
    assert found.telemetry_gb == pytest.approx(864_000 * 10 * 300 / 1e9)
    assert found.indexes_gb == pytest.approx(864_000 * 10 * 100 / 1e9)
    assert found.id_index_gb == pytest.approx(864_000 * 10 * 50 / 1e9)
    assert found.aggregates_gb == pytest.approx(100 * (500 * 1000 + 864_000 * 10) / 1e9)
    assert found.publish_seconds == pytest.approx(1 + 1000 * 0.002)
    assert (found.publish_wal_gb, found.manifests_gb) == pytest.approx((1000 * 1500 / 1e9, 1000 * 2500 / 1e9))
    assert found.day_rebuild_seconds == pytest.approx(864_000 * 0.00001 + 500 * 0.001)
    held = found.telemetry_gb + found.indexes_gb + found.aggregates_gb + found.event_log_gb + found.manifests_gb
    assert (found.disk_gb, found.memory_gb, found.cores) == (pytest.approx(1.5 * held), 4.0, 3)
    assert growth.project(ROUND, 864_000_000).memory_gb == pytest.approx(2 * 864e6 * 10 * 50 / 1e9)
    # A hundred executions a tick on 500 sites: 500 * (1 - e^-0.2) of them; each read with the day before, 1.5 days of rows.
    cells = 500 * (1 - math.exp(-0.2))
    assert found.site_days_a_tick == pytest.approx(cells)
    cost = 0.5 + 0.001 * 2 * cells + 0.00001 * cells * 1.5 * 1728
    assert growth.refresh_seconds(ROUND, 100, 500, 1728) == pytest.approx(cost)
    assert cost + 2 < 10
    assert found.tick_seconds == 10
    assert found.runs_a_day == pytest.approx(8640)
    assert found.event_log_gb == pytest.approx(8640 * 30 * 100_000 / 1e9)
    assert found.wal_mb_a_second == pytest.approx((864_000 * 1200 + 8640 * 2 * cells * 200) / 86_400 / 1e6)
    assert found.cells_a_thousand_rows == pytest.approx(10 * cells)
    assert found.outbox_rows == pytest.approx(2 * 10 * 10)


@pytest.mark.parametrize("executions", growth.SCALES)
def test_a_tick_holds_exactly_its_own_cost(executions: int) -> None:
    found = growth.project(UNITS, executions)
    waiting = found.rows_a_second * found.tick_seconds
    cost = growth.refresh_seconds(UNITS, waiting, found.sites, executions / found.sites) + UNITS.rest_of_a_run_seconds
    assert found.tick_seconds == pytest.approx(max(cost, growth.SHORTEST_TICK_SECONDS), rel=1e-6)
    assert found.site_days_a_tick <= min(found.sites, waiting)


@pytest.mark.parametrize("limit", growth.LIMITS, ids=lambda limit: limit.part)
def test_a_part_holds_below_where_it_stops_and_not_above(limit: growth.Limit) -> None:
    where = growth.stops_at(limit, UNITS)
    if where is None:
        assert all(limit.figure(growth.project(UNITS, scale)) <= limit.bar for scale in np.geomspace(1e3, 1e12, 50))
    else:
        assert limit.figure(growth.project(UNITS, where * 0.999)) <= limit.bar
        assert limit.figure(growth.project(UNITS, where * 1.001)) > limit.bar


def test_the_fit_finds_the_costs_that_made_the_points_and_none_below_zero() -> None:
    made = [
        (1, c, r, 0.5 + 0.002 * c + 0.0001 * r) for c, r in ((10, 100), (10, 9000), (300, 700), (50, 50), (400, 8000))
    ]
    assert growth.fit(made) == pytest.approx((0.5, 0.002, 0.0001))
    falling = [(1, c, 0, 2 - 0.001 * c) for c in (0, 100, 500)]
    assert growth.fit(falling)[1] == 0


def test_the_stored_fit_is_that_of_the_stored_points_and_describes_them() -> None:
    points = STORED["refresh"]
    fixed, a_cell, a_row = growth.fit([(1, p["site_days"], p["rows"], p["seconds"]) for p in points])
    stored = (UNITS.refresh_seconds, UNITS.refresh_seconds_a_site_day, UNITS.refresh_seconds_a_row)
    assert stored == pytest.approx((fixed, a_cell, a_row), rel=0.01)
    for point in points:
        assert growth.fitted(UNITS, point) == pytest.approx(point["seconds"], rel=0.5), point
    # Twenty times as large as any of them.
    larger = STORED["larger"]
    assert larger["rows"] > 10 * max(point["rows"] for point in points)
    assert growth.fitted(UNITS, larger) == pytest.approx(larger["seconds"], rel=0.5)


@pytest.mark.long
@pytest.mark.timeout(600)
def test_measuring_again_gives_the_same_bytes() -> None:
    """Seconds are the machine's; bytes are PostgreSQL's."""
    again = growth.Units(**growth.measure()["units"])
    for name in growth.UNIT_WORDS:
        if "bytes" in name and not name.startswith(("refresh_wal", "aggregate")):
            assert getattr(again, name) == pytest.approx(getattr(UNITS, name), rel=0.3), name
        assert getattr(again, name) >= 0, name
