"""On how many hosts a rule fails."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from flywheel_pipeline.health.concentration import StepShare, WorstHost, concentration, flapping, step_shares

HOSTS = st.lists(
    st.tuples(st.sampled_from(["a", "b"]), st.integers(0, 9).map(str), st.integers(1, 50), st.integers(0, 50)).map(
        lambda h: (h[0], h[1], max(h[2], h[3]), h[3])
    ),
    unique_by=lambda h: h[:2],
)


def test_dead_hosts_and_the_rate_without_them() -> None:
    found = concentration(
        [("a", "DR-SMITH", 90, 90), ("a", "WS-2", 100, 10), ("b", "WS-3", 4, 4), ("b", "WS-4", 50, 0)]
    )
    assert (found.hosts, found.failing_hosts, found.hosts_for_half) == (4, 3, 1)
    # Four tries may be bad luck.
    assert (found.dead_hosts, found.dead_failures, found.dead_sites) == (1, 90, 1)
    assert found.share_of_dead == 90 / 104
    assert found.rate_without_dead == 1 - 14 / 154


def test_the_worst_hosts_are_numbered_within_their_site_and_not_named() -> None:
    found = concentration([("a", "DR-SMITH", 90, 90), ("b", "JANES-LAPTOP", 80, 80), ("a", "FRONT", 70, 7)])
    assert found.worst == (
        WorstHost("a", "host 1", 90, 90),
        WorstHost("b", "host 1", 80, 80),
        WorstHost("a", "host 2", 70, 7),
    )
    assert not any(name in repr(found) for name in ("SMITH", "JANE", "FRONT"))


def test_over_nothing_a_rate_is_null() -> None:
    assert concentration([]).rate_without_dead is None
    assert concentration([("a", "x", 9, 9)]).rate_without_dead is None
    assert flapping([]).share is None
    assert step_shares([]) == []


@given(HOSTS)
def test_the_hosts_that_make_half_of_the_failures_are_the_fewest(hosts: list[tuple[str, str, int, int]]) -> None:
    found = concentration(hosts)
    failures = sorted((h[3] for h in hosts), reverse=True)
    half = found.hosts_for_half
    assert 2 * sum(failures[:half]) >= sum(failures)
    assert half == 0 or 2 * sum(failures[: half - 1]) < sum(failures)
    assert 0 <= found.dead_hosts <= found.failing_hosts <= found.hosts == len(hosts)
    assert 0 <= found.share_of_dead <= 1


def test_hosts_flap_where_half_of_three_fixes_or_more_did_not_hold() -> None:
    found = flapping([("a", "x", 6, 3), ("a", "y", 7, 3), ("b", "z", 2, 2), ("b", "w", 40, 40)])
    assert (found.hosts, found.sites, found.returned, found.share) == (2, 2, 48, 48 / 55)


def test_steps_are_ranked_and_the_unknown_one_is_a_step_too() -> None:
    assert step_shares([(2, 5), (None, 5), (1, 10), (2, 5), (3, 0)]) == [
        StepShare(1, 10, 0.4),
        StepShare(2, 10, 0.4),
        StepShare(None, 5, 0.2),
    ]
