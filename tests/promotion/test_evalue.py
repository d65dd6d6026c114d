"""The sequential test: golden tables, exact error probabilities, and what holds for any counts."""

from __future__ import annotations

import math
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from flywheel_pipeline.promotion import evalue

COUNTS = st.integers(min_value=0, max_value=3000)
FLOORS = st.sampled_from([0.5, 0.8, 0.9, 0.95])

# Least number of episodes with k = 0, 1, 2, 3, 4, 5, 10 failures, by exact computation.
LEAST = {
    (0.80, 0.05): (20, 31, 41, 50, 58, 66, 103),
    (0.90, 0.05): (43, 66, 85, 103, 120, 137, 212),
    (0.90, 0.01): (62, 86, 107, 126, 144, 161, 241),
    (0.95, 0.05): (88, 134, 174, 210, 244, 277, 430),
    (0.95, 0.01): (126, 176, 218, 257, 294, 329, 490),
}


@pytest.mark.parametrize(("gate", "row"), LEAST.items())
def test_the_table_for_auditors_is_the_published_one(gate, row):
    assert tuple(evalue.minimum_n(k, *gate) for k in (0, 1, 2, 3, 4, 5, 10)) == row


@pytest.mark.parametrize(("gate", "row"), LEAST.items())
def test_one_episode_fewer_than_the_table_says_does_not_promote(gate, row):
    for k, n in zip((0, 1, 2, 3, 4, 5, 10), row, strict=True):
        assert evalue.verdict(n - k, k, *gate) == "promote"
        assert evalue.verdict(n - k - 1, k, *gate) == "inconclusive"


@pytest.mark.parametrize(
    ("successes", "total", "expected"),
    [
        (166, 166, "promote"),
        (43, 43, "promote"),
        (65, 66, "promote"),
        (42, 42, "inconclusive"),
        (64, 65, "inconclusive"),
        (20, 20, "inconclusive"),
        (0, 0, "inconclusive"),
        (16, 24, "reject"),
        (146, 260, "reject"),
        (917, 3057, "reject"),
        (0, 303, "reject"),
        (0, 31, "reject"),
        (0, 729, "reject"),
    ],
)
def test_the_rules_of_the_day_get_their_verdicts(successes, total, expected):
    assert evalue.verdict(successes, total - successes, 0.90, 0.05) == expected


def test_twenty_of_twenty_is_evidence_of_three_and_a_half_and_needs_23_more():
    assert math.exp(evalue.log_e(20, 0, 0.90)) == pytest.approx(3.5, abs=0.05)
    assert evalue.needed_clean(20, 0, 0.90, 0.05) == 23


def test_no_data_is_evidence_of_nothing():
    assert evalue.log_e(0, 0, 0.90) == 0.0
    assert evalue.log_e_reject(0, 0, 0.90) == 0.0


def test_what_promotes_needs_no_more_clean_episodes():
    assert evalue.needed_clean(43, 0, 0.90, 0.05) == 0


def test_beyond_the_limit_no_number_of_clean_episodes_is_promised():
    assert evalue.needed_clean(0, 3000, 0.90, 0.05, limit=10) is None


@given(COUNTS, COUNTS, FLOORS)
def test_one_more_success_never_lowers_the_evidence_and_one_more_failure_never_raises_it(s, f, p0):
    assert evalue.log_e(s + 1, f, p0) > evalue.log_e(s, f, p0)
    assert evalue.log_e(s, f + 1, p0) < evalue.log_e(s, f, p0)
    assert evalue.log_e_reject(s + 1, f, p0) < evalue.log_e_reject(s, f, p0)
    assert evalue.log_e_reject(s, f + 1, p0) > evalue.log_e_reject(s, f, p0)


@given(COUNTS, COUNTS, FLOORS)
def test_evidence_is_a_finite_number_and_never_both_for_and_against(s, f, p0):
    up, down = evalue.log_e(s, f, p0), evalue.log_e_reject(s, f, p0)
    assert math.isfinite(up)
    assert math.isfinite(down)
    assert min(up, down) <= 0.0  # over (p0, 1) and (0, p0) the likelihood cannot grow on both sides


@given(st.integers(0, 400), st.integers(0, 60), FLOORS, st.sampled_from([0.05, 0.01]))
def test_the_clean_episodes_needed_are_the_least_that_promote(s, f, p0, alpha):
    n = evalue.needed_clean(s, f, p0, alpha)
    assert n is not None
    assert evalue.verdict(s + n, f, p0, alpha) == "promote"
    if n:
        assert evalue.verdict(s + n - 1, f, p0, alpha) != "promote"


@given(st.lists(st.tuples(COUNTS, COUNTS), min_size=1, max_size=30), FLOORS)
def test_many_at_once_equal_each_alone(pairs, p0):
    s, f = (np.array(column) for column in zip(*pairs, strict=True))
    assert evalue.log_e_many(s, f, p0) == pytest.approx([evalue.log_e(*p, p0) for p in pairs], abs=1e-9)
    assert evalue.log_e_reject_many(s, f, p0) == pytest.approx([evalue.log_e_reject(*p, p0) for p in pairs], abs=1e-9)


def test_arrays_keep_their_shape_and_may_be_empty():
    assert evalue.log_e_many(np.zeros((3, 0), int), np.zeros((3, 0), int), 0.9).shape == (3, 0)
    assert evalue.log_e_many(np.ones((2, 3), int), 0, 0.9).shape == (2, 3)


@given(st.integers(0, 60), st.integers(0, 20), FLOORS)
def test_the_evidence_is_a_martingale_at_the_floor(s, f, p0):
    # E[E(next)] = E(now) at the true rate p0: why no cadence of looks can promote by luck (Ville).
    now = math.exp(evalue.log_e(s, f, p0))
    following = p0 * math.exp(evalue.log_e(s + 1, f, p0)) + (1 - p0) * math.exp(evalue.log_e(s, f + 1, p0))
    assert following == pytest.approx(now, rel=1e-9)


@pytest.mark.parametrize(
    ("rate", "low", "high"), [(0.70, 0, 1e-4), (0.80, 0, 5e-4), (0.85, 0.0011, 0.0013), (0.88, 0.0073, 0.0075)]
)
def test_a_bad_runbook_is_almost_never_promoted_however_often_we_look(rate, low, high):
    assert low <= evalue.ever_promote_probability(rate, 0.90, 0.05) <= high


def test_the_error_bars_of_the_standard_gate_hold_exactly():
    assert evalue.ever_promote_probability(0.85, 0.90, 0.05) <= 0.002
    assert evalue.ever_promote_probability(0.90, 0.90, 0.05) == pytest.approx(0.0432, abs=5e-5)
    assert evalue.ever_promote_probability(0.90, 0.90, 0.05) <= 0.05


@pytest.mark.parametrize(("rate", "median"), [(0.95, 168), (0.98, 66)])
def test_a_good_runbook_is_promoted_in_the_published_median(rate, median):
    assert evalue.median_episodes(evalue.promotion_law(rate, 0.90, 0.05)) == median


def test_the_exact_law_equals_an_enumeration_of_every_path():
    p, horizon = 0.8, 14
    law = evalue.first_passage(p, [4, 8, 11], horizon)
    expected = np.zeros(horizon + 1)
    for path in range(2**horizon):
        failures, probability, hit = 0, 1.0, None
        for n in range(1, horizon + 1):
            failed = path >> (n - 1) & 1
            failures += failed
            probability *= 1 - p if failed else p
            if hit is None and failures < 3 and n >= [4, 8, 11][failures]:
                hit = n
        if hit is not None:
            expected[hit:] += probability
    assert law == pytest.approx(expected, abs=1e-12)


def test_a_gate_that_nothing_passes_has_no_median():
    assert evalue.median_episodes(evalue.first_passage(0.9, [], 50)) is None


def test_attempts_after_the_first_spend_what_the_series_leaves():
    assert evalue.spent_alpha(0.05, 1) == 0.05
    assert evalue.spent_alpha(0.05, 2) == pytest.approx(0.05 * 6 / (math.pi**2 * 4))
    assert evalue.spent_alpha(0.05, 3) == pytest.approx(0.05 * 6 / (math.pi**2 * 9))
    assert sum(evalue.spent_alpha(0.05, k) for k in range(1, 200_000)) <= 0.05 * 1.393


def test_many_candidates_are_judged_as_the_gates_judge_one():
    # 8 sites of 10 with one failure in all; a lone giant; a site that rejects on its own; nothing.
    s = np.array([[10] * 7 + [9], [100] + [0] * 7, [10] * 7 + [0], [0] * 8])
    f = np.array([[0] * 7 + [1], [0] * 8, [0] * 7 + [10], [0] * 8])
    found = evalue.evaluate_many(s, f, 0.90, 0.05)
    assert found["verdict"].tolist() == ["promote", "inconclusive", "inconclusive", "inconclusive"]
    assert math.exp(found["log_e"][0]) == pytest.approx(63.5, abs=0.05)
    assert math.exp(found["leave_one_out"][0]) == pytest.approx(28.8, abs=0.05)
    assert found["site_rejects"].tolist() == [False, False, True, False]


@pytest.mark.parametrize("call", [evalue.log_e, evalue.log_e_reject, evalue.log_e_many, evalue.log_e_reject_many])
def test_negative_counts_and_impossible_floors_are_refused(call):
    with pytest.raises(ValueError, match="negative"):
        call(-1, 0, 0.9)
    for floor in (0.0, 1.0, 90):
        with pytest.raises(ValueError, match="floor"):
            call(1, 0, floor)


def test_impossible_alphas_and_attempts_are_refused():
    for alpha in (0.0, 1.0, -0.05):
        with pytest.raises(ValueError, match="alpha"):
            evalue.verdict(1, 0, 0.9, alpha)
    with pytest.raises(ValueError, match="attempts"):
        evalue.spent_alpha(0.05, 0)


def test_the_gates_load_neither_numpy_nor_a_database_nor_dagster():
    program = (
        "import sys; import flywheel_pipeline.promotion.gates, flywheel_pipeline.promotion.runbook_ids; "
        "print([m for m in ('numpy', 'scipy', 'matplotlib', 'sqlalchemy', 'dagster') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
