"""Since when a rule fails, and what happened that day."""

from __future__ import annotations

import datetime as dt
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flywheel_pipeline.health.change_point import ChangePoint, Event, agent_upgrades, find_change, join_events

FIRST = dt.date(2026, 1, 1)


def day(i: int) -> dt.date:
    return FIRST + dt.timedelta(days=i)


def series(rates: list[float], *, executions: int = 50, seed: int = 1) -> list[tuple[dt.date, int, int]]:
    rng = random.Random(seed)
    return [(day(i), executions, sum(rng.random() >= r for _ in range(executions))) for i, r in enumerate(rates)]


def test_the_day_of_a_drop_is_found_with_the_rates_on_either_side() -> None:
    found = find_change(series([0.95] * 30 + [0.4] * 15))
    assert found is not None
    assert found.day == day(30)
    assert found.before == pytest.approx(0.95, abs=0.03)
    assert found.after == pytest.approx(0.4, abs=0.05)
    assert (found.executions_before, found.executions_after) == (1500, 750)
    assert found.p_value == 0.001


def test_order_and_empty_days_change_nothing() -> None:
    days = series([0.9] * 20 + [0.5] * 20)
    assert find_change([*reversed(days), (day(99), 0, 0)]) == find_change(days)


def test_of_a_hundred_steady_rules_with_bad_days_at_most_five_change() -> None:
    changed = 0
    for seed in range(100):
        rng = random.Random(seed)
        changed += find_change(series([rng.choice([0.9, 0.9, 0.7, 0.3]) for _ in range(40)], seed=seed)) is not None
    assert changed <= 5


@pytest.mark.parametrize(
    "days",
    [
        [],
        series([0.9] * 3 + [0.1] * 2),  # five days
        series([1.0] * 40),
        series([0.0] * 40),
        series([0.9] * 20 + [0.1] * 20, executions=1),  # twenty a side are needed, a day has one
        series([0.90] * 200 + [0.88] * 200, executions=500),  # a real change, and of no interest
    ],
)
def test_no_change_where_there_is_too_little_to_say(days: list[tuple[dt.date, int, int]]) -> None:
    if len(days) == 40 and days[0][1] == 1:
        days = days[:19] + days[-19:]
    assert find_change(days) is None


@given(st.lists(st.tuples(st.integers(0, 60), st.integers(0, 60)), max_size=30))
@settings(max_examples=30, deadline=None)
def test_a_change_found_is_counted_right(counts: list[tuple[int, int]]) -> None:
    days = [(day(i), max(n, f), f) for i, (n, f) in enumerate(counts)]
    found = find_change(days, alpha=1.0)
    if found is None:
        return
    before = [d for d in days if d[0] < found.day]
    after = [d for d in days if d[0] >= found.day]
    assert found.executions_before == sum(d[1] for d in before)
    assert found.executions_after == sum(d[1] for d in after)
    assert found.before == pytest.approx(1 - sum(d[2] for d in before) / found.executions_before)
    assert found.after == pytest.approx(1 - sum(d[2] for d in after) / found.executions_after)


def test_a_release_is_an_upgrade_where_another_one_ran_before_it() -> None:
    first_seen = [
        ("a", "1.0.56", day(0)),
        ("a", "1.0.70", day(30)),
        ("b", "1.0.56", day(0)),
        ("b", "1.0.70", day(30)),
        ("c", "1.0.70", day(30)),  # a new site is no upgrade
        ("d", None, day(0)),
        ("d", "1.0.70", day(31)),
    ]
    assert agent_upgrades(first_seen) == [Event(day(30), "agent", "agent 1.0.70 reached 2 sites", 2)]


def test_what_happened_within_a_day_is_joined_the_widest_upgrade_first() -> None:
    change = ChangePoint(day(30), 0.9, 0.5, 100, 100, 20.0, 0.001)
    near = [Event(day(29), "agent", "x", 1), Event(day(31), "agent", "y", 9), Event(day(30), "policy", "z")]
    far = [Event(day(28), "agent", "far", 99), Event(day(32), "ledger", "far")]
    assert join_events(change, [near[2], *far, near[0], near[1]]) == (near[1], near[0], near[2])
