"""Where a rule fails: planted causes are named with true counterfactuals, and nothing is named where there is none."""

from __future__ import annotations

import datetime as dt
import random
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flywheel_pipeline.health import segments
from flywheel_pipeline.health.segments import Cells, Condition, Segment, buckets, find_causes, from_rows, matches
from flywheel_pipeline.simulation import planted

AGENT = (Condition("agent_version", "1.0.56"),)
TPM = (Condition("hardware", "vm-no-tpm"),)
WINDOWS_10 = (Condition("os", "Windows 10"), Condition("since", "2026-01-05"))
PLANTED = (AGENT, TPM, WINDOWS_10)
DAYS = [dt.date(2026, 1, 1) + dt.timedelta(days=i) for i in range(4)]

Row = tuple[str, str, str | None, str | None, str | None, int, int, int]


@st.composite
def rows(draw: st.DrawFn) -> list[Row]:
    """A few hosts over four days; hosts may change release, and may not say what they are."""
    said = {
        "agent": st.sampled_from(["1.0.56", "1.0.70", None]),
        "os": st.sampled_from(["Windows 10", "Windows 11", None]),
        "hardware": st.sampled_from(["vm", "laptop", None]),
    }
    made: list[Row] = []
    for host in range(draw(st.integers(1, 12))):
        site = f"site-{draw(st.integers(0, 2))}"
        os, hardware = draw(said["os"]), draw(said["hardware"])
        for bucket in range(len(DAYS)):
            executions = draw(st.integers(0, 30))
            if executions:
                failures = draw(st.integers(0, executions))
                made.append((site, f"h{host}", draw(said["agent"]), os, hardware, bucket, executions, failures))
    return made


def test_the_three_planted_causes_are_named_in_order_with_their_true_counterfactuals() -> None:
    executions = planted.golden_fleet()
    assert len(executions) == 3057
    found = find_causes(planted.cells(executions))
    assert tuple(s.conditions for s in found) == PLANTED
    for count, segment in enumerate(found, 1):
        truth = planted.true_rate_without(executions, set(range(count)))
        assert segment.rate_if_fixed == pytest.approx(truth, abs=0.03)
        assert segment.rate_if_only_this_fixed == pytest.approx(
            planted.true_rate_without(executions, {count - 1}), abs=0.03
        )
    assert found[0].share > found[1].share > found[2].share
    assert sum(s.share for s in found) <= 1


@pytest.mark.parametrize("seed", [11, 12])
def test_other_fleets_with_the_same_causes_get_the_same_names(seed: int) -> None:
    assert {s.conditions for s in find_causes(planted.cells(planted.fleet(seed=seed)))} == set(PLANTED)


NULL_KINDS: list[dict[str, Any]] = [
    {"base": 0.3},
    {"base": 0.5, "spread": 0.3, "hosts": 60, "sites": 8},
    {"base": 0.1, "dead_hosts": 6},
    {"base": 0.3, "spread": 0.2, "dead_hosts": 5, "hosts": 40, "sites": 3, "executions": 1000},
]


def test_of_twenty_fleets_without_a_cause_at_most_one_gets_one() -> None:
    named = [
        (seed, found)
        for seed in range(20)
        if (found := find_causes(planted.cells(planted.fleet([], seed=500 + seed, **NULL_KINDS[seed % 4]))))
    ]
    assert len(named) <= 1, named


def test_a_week_in_which_every_host_fails_is_named_from_its_first_to_its_last_day() -> None:
    broken = range(20, 27)
    week = planted.Cause("a week", lambda where: where.day in broken, 1.0, "Runbook not found: AUTO-X", 1)
    [found] = find_causes(planted.cells(planted.fleet([week], seed=3)))
    first, last = (planted.FIRST_DAY + dt.timedelta(days=d) for d in (broken[0], broken[-1]))
    assert found.conditions == (Condition("since", first.isoformat()), Condition("until", last.isoformat()))
    assert found.rate == 0


def test_the_other_names_of_the_same_executions_are_told() -> None:
    made: list[Row] = []
    for host in range(20):
        bad = host < 5
        made += [
            (
                "a" if bad else f"s{host % 4}",
                f"h{host}",
                "1.0.56" if bad else "1.0.70",
                None,
                None,
                b,
                10,
                9 if bad else 1,
            )
            for b in range(4)
        ]
    [found] = find_causes(from_rows(made, DAYS))
    assert found.conditions == AGENT
    assert found.also == ("site a",)


def test_what_no_agent_said_is_no_cause() -> None:
    made: list[Row] = [
        (f"s{h % 4}", f"h{h}", None if h < 10 else "1.0.70", None, None, b, 10, 9 if h < 10 else 1)
        for h in range(30)
        for b in range(4)
    ]
    for segment in find_causes(from_rows(made, DAYS)):
        assert {c.dimension for c in segment.conditions} <= {"site", "since", "until", "on"}


@pytest.mark.parametrize("made", [[], [("s", "h", None, None, None, 0, 50, 0)]])
def test_nothing_is_named_where_nothing_fails(made: list[Row]) -> None:
    assert find_causes(from_rows(made, DAYS)) == []


def test_a_cause_needs_three_hosts_and_twenty_executions() -> None:
    for hosts, each in ((2, 40), (4, 1)):
        made: list[Row] = [(f"s{h % 5}", f"h{h}", "1.0.70", None, None, h % 4, 20, 1) for h in range(40)]
        made += [(f"s{h}", f"bad{h}", "1.0.56", None, None, h % 4, each, each) for h in range(hosts)]
        assert AGENT not in [s.conditions for s in find_causes(from_rows(made, DAYS))]


def test_the_answer_does_not_depend_on_the_order_of_rows_that_are_told_apart() -> None:
    cells = planted.cells(planted.golden_fleet())
    assert [repr(s) for s in find_causes(cells, resamples=99)] == [
        repr(s) for s in find_causes(planted.cells(planted.golden_fleet()), resamples=99)
    ]
    shuffled = planted.golden_fleet()
    random.Random(3).shuffle(shuffled)
    again = find_causes(planted.cells(shuffled), resamples=99)
    assert tuple(s.conditions for s in again) == PLANTED


@given(rows())
@settings(max_examples=40, deadline=None)
def test_every_segment_searched_is_counted_as_its_conditions_say(made: list[Row]) -> None:
    cells = from_rows(made, DAYS)
    if not made:
        return
    profiles = segments._Profiles.of(cells)
    table = profiles.table(profiles.place, cells.executions.astype(np.float64))
    n_hosts = int(cells.host.max()) + 1
    for family in segments._families(cells, profiles):
        executions, hosts = family.count(table), family.hosts(cells, profiles, n_hosts)
        assert executions.shape == hosts.shape
        for group in np.flatnonzero(executions):
            inside = matches(cells, family.conditions(int(group), cells))
            assert executions[group] == cells.executions[inside].sum()
            assert hosts[group] == len(np.unique(cells.host[inside]))


@given(rows())
@settings(max_examples=40, deadline=None)
def test_whatever_is_named_is_counted_right_and_no_fix_makes_a_rate_worse(made: list[Row]) -> None:
    cells = from_rows(made, DAYS)
    found = find_causes(cells, alpha=0.2, resamples=19)
    rate = 1 - cells.failures.sum() / max(1, cells.executions.sum())
    for segment in found:
        _counts_are_true(segment, cells)
        assert segment.p_value <= 0.2
        assert rate - 1e-9 <= segment.rate_if_fixed <= 1
        assert segment.share >= -1e-9
        rate = segment.rate_if_fixed
    assert sum(s.share for s in found) <= 1 + 1e-9


def _counts_are_true(segment: Segment, cells: Cells) -> None:
    inside = matches(cells, segment.conditions)
    assert segment.executions == cells.executions[inside].sum() >= segments.MIN_EXECUTIONS
    assert segment.failures == cells.failures[inside].sum()
    assert segment.hosts == len(np.unique(cells.host[inside])) >= segments.MIN_HOSTS
    assert 1 <= len(segment.conditions) <= 2


@given(st.dates(), st.integers(0, 900))
def test_buckets_cover_the_window_in_at_most_sixty(first: dt.date, days: int) -> None:
    if first > dt.date.max - dt.timedelta(days=901):
        return
    last = first + dt.timedelta(days=days)
    width, starts = buckets(first, last)
    assert 1 <= len(starts) <= segments.MAX_BUCKETS
    assert starts[0] == first
    assert starts[-1] <= last < starts[-1] + dt.timedelta(days=width)
