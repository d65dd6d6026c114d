"""Backtests: the published table exactly, planted fleets, and histories replayed as they were known at each look."""

from __future__ import annotations

import itertools
import random
from dataclasses import replace

import pytest
from evidence import pattern
from hypothesis import given, settings
from hypothesis import strategies as st

from flywheel_pipeline.promotion import backtest, evalue
from flywheel_pipeline.promotion.backtest import Candidate, EpisodeLog, capped_sites, replay_history
from flywheel_pipeline.promotion.gates import decide_pattern
from flywheel_pipeline.promotion.policy import load_policy

STANDARD, LEGACY = load_policy("standard"), load_policy("legacy")
RATES = (0.70, 0.80, 0.85, 0.88, 0.90)

# P(ever promoted) within 5,000 looks at the floor of 90 %, and the median episodes at .95 and .98; exact computation.
PUBLISHED = {
    "legacy": ((0.235, 0.504, 0.716, 0.876, 0.989), 5, 5),
    "rate_of_20": ((0.038, 0.245, 0.527, 0.787, 0.981), 20, 20),
    "wilson": ((0.000, 0.004, 0.026, 0.094, 0.400), 58, 25),
    "clopper_pearson": ((0.000, 0.002, 0.015, 0.068, 0.365), 76, 29),
    "e_value": ((0.000, 0.000, 0.0012, 0.0074, 0.0432), 168, 66),
}


@pytest.mark.parametrize(("gate", "published"), PUBLISHED.items())
def test_the_comparison_of_gates_is_the_published_one(gate, published):
    promoted, at_95, at_98 = published
    rows = {row["rate"]: row for row in backtest.exact_table([gate])}
    for rate, expected in zip(RATES, promoted, strict=True):
        assert rows[rate]["promoted"] == pytest.approx(expected, abs=5.1e-4 if expected > 0.01 else 6e-4)
    assert (rows[0.95]["median_episodes"], rows[0.98]["median_episodes"]) == (at_95, at_98)


def test_the_figures_that_this_product_promises_hold():
    rows = {row["rate"]: row for row in backtest.exact_table(["e_value"])}
    assert rows[0.85]["promoted"] <= 0.002
    assert rows[0.90]["promoted"] <= 0.05
    assert rows[0.98]["median_episodes"] <= 70
    assert rows[0.95]["median_episodes"] <= 175


def test_an_unknown_gate_is_refused():
    with pytest.raises(ValueError, match="no gate bayes"):
        backtest.least_of("bayes", 100)


# ------------------------------------------------------------------------------------------------ simulated fleets


@pytest.mark.parametrize("plan", [backtest.dead_sites(), backtest.giant_site(), backtest.giant_site(rate=0.98)])
def test_dead_sites_and_a_giant_good_site_fool_legacy_and_not_the_standard_policy(plan):
    assert plan.average == pytest.approx(0.85)
    standard, legacy = backtest.compare_on_fleets([STANDARD, LEGACY], [plan], pattern(), runs=1000, seed=20260215)
    assert standard["false_promotion"] <= 0.02
    assert legacy["false_promotion"] >= 0.60


def test_a_runbook_of_85_percent_everywhere_is_promoted_by_legacy_only():
    plan = backtest.even_fleet(0.85)
    standard, legacy = backtest.compare_on_fleets([STANDARD, LEGACY], [plan], pattern(), runs=300)
    assert standard["promoted"] <= 0.01
    assert legacy["promoted"] >= 0.60


def test_a_runbook_of_98_percent_is_promoted_by_the_standard_policy_soon():
    (row,) = backtest.compare_on_fleets([STANDARD], [backtest.even_fleet(0.98)], pattern(), runs=200)
    assert row["promoted"] >= 0.98
    assert row["false_promotion"] is None
    assert row["median_episodes"] <= 90


def test_the_giant_has_its_planted_share_and_the_sites_their_planted_rates():
    plan = backtest.giant_site(volume=0.60, average=0.85)
    site, _, good = backtest.simulate_runs(plan, 40, 3)
    assert (site == 0).mean() == pytest.approx(0.60, abs=0.01)
    assert good[site == 0].all()
    assert good[site != 0].mean() == pytest.approx(plan.site_rates[1], abs=0.01)


def test_the_same_seed_gives_the_same_backtest():
    once, again = (
        backtest.promoted_after(backtest.even_fleet(0.95), STANDARD, pattern(), runs=20, seed=7) for _ in range(2)
    )
    assert once == again


def test_skipping_looks_at_which_the_evidence_is_too_thin_changes_no_result():
    # The same runs, decided at every single look by the gates alone.
    plan = replace(backtest.even_fleet(0.96, sites=8), episodes=110)
    fast = backtest.promoted_after(plan, STANDARD, pattern(), runs=12, seed=5)
    slow: list[int | None] = []
    for site, host, good in zip(*backtest.simulate_runs(plan, 12, 5), strict=True):
        rows = [
            (i, f"site-{s + 1:03d}", str(h), bool(g)) for i, (s, h, g) in enumerate(zip(site, host, good, strict=True))
        ]
        log = EpisodeLog.of(rows)
        first = None
        for n in range(1, len(log) + 1):
            seen = replace(
                pattern(stage="canary"), excluded=0, occurrences=n, sites=capped_sites(log, STANDARD, until=n - 1)
            )
            if decide_pattern(seen, STANDARD).target_state is not None:
                first = n
                break
        slow.append(first)
    assert fast == slow
    assert None in fast or len(set(fast)) > 1


# ------------------------------------------------------------------------------------------------------------ caps

ROWS = st.lists(
    st.tuples(
        st.integers(0, 200).map(float),
        st.sampled_from(["a", "b", "c"]),
        st.sampled_from(["h1", "h2", "h3", "h4", "h5"]),
        st.booleans(),
    ),
    max_size=120,
)


@given(ROWS, st.randoms(use_true_random=False))
def test_the_order_in_which_episodes_arrive_is_irrelevant(rows, rng: random.Random):
    shuffled = list(rows)
    rng.shuffle(shuffled)
    assert capped_sites(EpisodeLog.of(shuffled), STANDARD) == capped_sites(EpisodeLog.of(rows), STANDARD)


@given(ROWS)
def test_no_site_and_no_host_counts_more_than_its_cap_and_the_earliest_count(rows):
    log = EpisodeLog.of(rows)
    for site in capped_sites(log, STANDARD):
        assert site.successes + site.failures <= min(10, 3 * site.hosts)
        mine = [i for i in range(len(log)) if log.site[i] == site.site_id]
        earliest: list[int] = []
        for i in mine:
            if sum(log.host[j] == log.host[i] for j in mine if j < i) < 3 and len(earliest) < 10:
                earliest.append(i)
        assert site.successes == sum(log.succeeded[i] for i in earliest)
        assert site.failures == len(earliest) - site.successes
        assert site.hosts == len({log.host[i] for i in earliest})


def test_hosts_of_the_same_name_at_two_sites_are_two_hosts():
    log = EpisodeLog.of([(day, site, "dc01", True) for day in range(5) for site in ("a", "b")])
    assert [(s.site_id, s.successes, s.hosts) for s in capped_sites(log, STANDARD)] == [("a", 3, 1), ("b", 3, 1)]


@pytest.mark.parametrize(
    "row", [(1.0, "a", "h"), (1.0, "a", "h", True, 2, 3), (1.0, "a", "h", True, 1, -1), (1.0,) * 7]
)
def test_a_row_that_is_no_episode_is_refused(row):
    with pytest.raises(ValueError, match=r"episode|count"):
        EpisodeLog.of([row])


# --------------------------------------------------------------------------------------------------------- history


def history(rate: float, *, days: int = 80, sites: int = 20, seed: int = 1) -> EpisodeLog:
    """Five episodes a day over so many sites, each host once a week or so."""
    rng = random.Random(seed)
    return EpisodeLog.of(
        (day + i / 5, f"site-{rng.randrange(sites):02d}", f"host-{rng.randrange(6)}", rng.random() < rate)
        for day in range(days)
        for i in range(5)
    )


LADDER = [("shadow", None), ("canary", 1), ("canary", 2), ("ring", 1), ("ring", 2), ("fleet", None)]


def test_a_good_pattern_climbs_every_stage_in_order_and_late_failures_are_counted():
    log = history(1.0)
    (found,) = replay_history([Candidate(pattern(), log)], STANDARD)
    assert [(m.to_state, m.step) for m in found.moves] == LADDER
    assert [m.at for m in found.moves] == sorted(m.at for m in found.moves)
    assert found.served_at == found.moves[1].at
    assert found.fleet_at == found.moves[5].at
    assert found.episodes_before + found.later_episodes == len(log)
    assert found.later_failures == 0
    assert found.moves[3].episodes >= evalue.minimum_n(0, 0.90, 0.05)


def test_history_under_two_policies_shows_what_an_early_promotion_costs():
    candidates = [Candidate(pattern(pattern_key=f"p{i}"), history(0.85, seed=i)) for i in range(12)]
    legacy, standard = (replay_history(candidates, policy) for policy in (LEGACY, STANDARD))
    assert sum(r.fleet_at is not None for r in legacy) >= 6
    assert sum(r.fleet_at is not None for r in standard) == 0
    assert sum(r.later_failures for r in legacy) > 100
    rows = backtest.summary([*legacy, *standard])
    assert {row["policy"] for row in rows} == {"legacy", "standard"}
    for row in rows:
        if row["later_episodes"]:
            assert row["later_success_rate"] == 1 - row["later_failures"] / row["later_episodes"]
        else:
            assert row["later_success_rate"] is None


def test_legacy_promotes_at_the_fifth_execution_and_not_before():
    log = EpisodeLog.of([(float(day), "site-01", "dc01", True) for day in range(9)])
    (found,) = replay_history([Candidate(pattern(), log)], LEGACY)
    assert (found.fleet_at, found.episodes_before, found.later_episodes) == (4.0, 5, 4)


def test_legacy_counts_executions_and_not_episodes():
    log = EpisodeLog.of([(0.0, "site-01", "dc01", True, 5, 5), (3.0, "site-01", "dc01", False, 4, 0)])
    (found,) = replay_history([Candidate(pattern(), log)], LEGACY)
    assert (found.fleet_at, found.later_failures) == (0.0, 1)


def test_an_episode_counts_only_once_it_has_settled():
    log = EpisodeLog.of([(0.0, "site-01", "dc01", True)])
    early, late = (replay_history([Candidate(pattern(), log)], STANDARD, [now])[0] for now in (0.9, 1.0))
    assert early.moves == ()
    assert early.last.reason == "No episode of it is rated yet: none was both settled and verified."
    assert [m.to_state for m in late.moves] == ["shadow"]


def test_what_happens_after_a_look_does_not_change_what_it_decided():
    log = history(0.97)
    looks = [float(day) for day in range(81)]
    (full,) = replay_history([Candidate(pattern(), log)], STANDARD, looks)
    until = full.moves[2].at
    past = EpisodeLog.of(
        zip(
            *(column[: sum(at <= until for at in log.at)] for column in (log.at, log.site, log.host, log.succeeded)),
            strict=True,
        )
    )
    (cut,) = replay_history([Candidate(pattern(), past)], STANDARD, [day for day in looks if day <= until])
    assert cut.moves == full.moves[:3]


def test_new_rules_beyond_the_limit_of_a_run_wait_for_the_next_look():
    log = EpisodeLog.of([(0.0, "site-01", f"h{i}", True) for i in range(6)])
    candidates = [Candidate(pattern(pattern_key=f"p{i}"), log) for i in range(7)]
    found = replay_history(candidates, LEGACY, [0.0, 1.0])
    assert LEGACY.limits.promotions_per_run == 5
    assert [r.fleet_at for r in found] == [0.0] * 5 + [1.0] * 2


@pytest.mark.parametrize("policy", [STANDARD, LEGACY])
def test_a_pattern_without_history_is_held_and_a_placeholder_never_moves(policy):
    empty, placeholder = replay_history(
        [
            Candidate(pattern(), EpisodeLog.of([])),
            Candidate(pattern(runbook_id="AUTO-FIREWALL"), history(1.0, days=20)),
        ],
        policy,
        [float(day) for day in range(25)],
    )
    assert (empty.moves, empty.served_at, empty.later_episodes) == ((), None, 0)
    assert placeholder.moves == ()
    assert "placeholder" in placeholder.last.reason


@given(st.integers(0, 10_000), st.sampled_from([0.7, 0.9, 1.0]))
@settings(max_examples=15, deadline=None)
def test_no_stage_is_ever_skipped_under_the_standard_policy(seed, rate):
    (found,) = replay_history(
        [Candidate(pattern(), history(rate, days=50, seed=seed))], STANDARD, [float(d) for d in range(60)]
    )
    assert [(m.to_state, m.step) for m in found.moves] == LADDER[: len(found.moves)]
    soaked = {("canary", 1): 1.0, ("canary", 2): 2.0, ("ring", 1): 2.0, ("ring", 2): 3.0}
    for before, after in itertools.pairwise(found.moves):
        assert after.at - before.at >= soaked.get((before.to_state, before.step), 0.0)


# ------------------------------------------------------------------------------------------------------------ plot


def test_the_plot_is_a_small_png_of_either_table():
    exact = backtest.plot(backtest.exact_table(["legacy", "e_value"], horizon=500))
    fleets = backtest.plot(
        backtest.compare_on_fleets([STANDARD, LEGACY], [backtest.even_fleet(0.9)], pattern(), runs=5)
    )
    for image in (exact, fleets, backtest.plot([])):
        assert image.startswith(b"\x89PNG\r\n")
        assert len(image) <= 60_000
