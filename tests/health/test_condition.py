"""A narrower condition is suggested only where it holds on sites that had no part in finding it."""

from __future__ import annotations

import datetime as dt

import pytest

from flywheel_pipeline.health.condition import held_out, lower_bound, suggest
from flywheel_pipeline.health.segments import Cells, Condition, from_rows
from flywheel_pipeline.simulation import planted

DAYS = [dt.date(2026, 1, 1)]


def fleet(rate: dict[bool, dict[str, int]], *, sites: int = 12) -> Cells:
    """Hosts of two kinds of hardware on each site; failures of ten executions by (held out, hardware)."""
    return from_rows(
        [
            (f"s{s}", f"h{s}-{hw}-{i}", "1.0.70", None, hw, 0, 10, rate[held_out(f"s{s}")][hw])
            for s in range(sites)
            for hw in ("vm", "laptop")
            for i in range(4)
        ],
        DAYS,
    )


def test_half_of_the_sites_are_held_out_always_the_same() -> None:
    out = [held_out(f"site-{i}") for i in range(400)]
    assert 160 <= sum(out) <= 240
    assert out == [held_out(f"site-{i}") for i in range(400)]
    assert held_out("site-1") is not held_out("site-4") or len(set(out)) == 2


def test_hardware_that_fails_everywhere_is_suggested_with_the_rate_of_held_out_sites() -> None:
    cells = fleet({True: {"vm": 10, "laptop": 1}, False: {"vm": 10, "laptop": 1}})
    found, why = suggest(cells)
    assert found is not None, why
    assert found.exclude == ((Condition("hardware", "vm"),),)
    assert (found.rate_before, found.rate, found.kept) == (pytest.approx(0.45), pytest.approx(0.9), 0.5)
    assert found.rate_before < found.lower_bound < found.rate
    assert found.sites == sum(held_out(f"s{s}") for s in range(12))


def test_what_does_not_hold_on_held_out_sites_is_not_suggested() -> None:
    found, why = suggest(fleet({True: {"vm": 3, "laptop": 3}, False: {"vm": 10, "laptop": 1}}))
    assert found is None
    assert "does not hold" in why


def test_no_suggestion_says_why() -> None:
    few = from_rows([("a", f"h{i}", None, None, None, 0, 10, 5) for i in range(9)], DAYS)
    assert suggest(few)[1].startswith("too few sites")
    even = fleet({True: {"vm": 3, "laptop": 3}, False: {"vm": 3, "laptop": 3}})
    assert suggest(even) == (None, "no agent release, hardware or system stands out on the sites that are not held out")


def test_the_planted_fleet_gets_a_condition_without_time_or_site() -> None:
    found, why = suggest(planted.cells(planted.fleet(seed=6, executions=12_000, sites=40, hosts=400)))
    assert found is not None, why
    assert {c.dimension for conditions in found.exclude for c in conditions} <= {"agent_version", "hardware", "os"}
    assert found.lower_bound > found.rate_before + 0.15


def test_the_bound_widens_where_hosts_differ() -> None:
    alike = from_rows([("a", f"h{i}", None, None, None, 0, 10, 2) for i in range(20)], DAYS)
    apart = from_rows([("a", f"h{i}", None, None, None, 0, 10, 10 if i < 4 else 0) for i in range(20)], DAYS)
    assert lower_bound(apart) < lower_bound(alike) < 0.8
    # Twenty successes on one host are one success.
    assert lower_bound(from_rows([("a", "h", None, None, None, 0, 20, 0)], DAYS)) < 0.3
