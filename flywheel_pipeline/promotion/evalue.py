"""The mixture e-value: evidence that may be looked at after every episode without ever promoting by luck.

Belongs here: the test, its tables and its exact error probabilities. Does not belong here: policy, thresholds of a
stage, anything that knows a rule.

    log E(s, f; p0) = log mean over m = 50 midpoints p1 of (p0, 1) of exp(s ln(p1/p0) + f ln((1-p1)/(1-p0)))

Promote when E >= 1/alpha: by Ville's inequality the probability of ever doing so with a true rate at or below p0 is
at most alpha, whatever the cadence of looks. Reject: the mirror image over (0, p0), the same threshold.
Source: Robbins' beta-binomial mixture; Howard, Ramdas, McAuliffe, Sekhon, "Time-uniform, nonparametric, nonasymptotic
confidence sequences", Annals of Statistics 2021. Computed in log space: the closed form over the incomplete beta
function, clipped against underflow, fails open (it promotes 917 of 3,057).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, Literal

Verdict = Literal["promote", "reject", "inconclusive"]
MIDPOINTS = 50


@lru_cache(maxsize=256)
def _grid(p0: float, m: int, upper: bool) -> tuple[tuple[float, float], ...]:
    """Return (ln(p1/p0), ln((1-p1)/(1-p0))) at the m midpoints of (p0, 1), or of (0, p0)."""
    if not 0.0 < p0 < 1.0:
        raise ValueError(f"the floor is a fraction strictly between 0 and 1, not {p0}")
    low, high = (p0, 1.0) if upper else (0.0, p0)
    points = [low + (high - low) * (i + 0.5) / m for i in range(m)]
    return tuple((math.log(p / p0), math.log1p(-p) - math.log1p(-p0)) for p in points)


def _log_mean_exp(terms: Sequence[float]) -> float:
    top = max(terms)
    return top + math.log(math.fsum(math.exp(t - top) for t in terms) / len(terms))


def _counts(successes: int, failures: int) -> None:
    if successes < 0 or failures < 0:
        raise ValueError(f"counts cannot be negative: {successes} successes, {failures} failures")


# 10,000 candidates of 200 sites ask for few distinct counts, since each site is capped: 40 s without the cache, 1 s with.
@lru_cache(maxsize=1 << 17)
def log_e(successes: int, failures: int, p0: float, m: int = MIDPOINTS) -> float:
    """Return log E for "the success rate is above p0"; 0 over no data.

    Raises:
        ValueError: a negative count, or a floor outside (0, 1).
    """
    _counts(successes, failures)
    return _log_mean_exp([successes * a + failures * b for a, b in _grid(p0, m, True)])


@lru_cache(maxsize=1 << 17)
def log_e_reject(successes: int, failures: int, p0: float, m: int = MIDPOINTS) -> float:
    """Return log E for "the success rate is below p0", the mirror image; 0 over no data.

    Raises:
        ValueError: a negative count, or a floor outside (0, 1).
    """
    _counts(successes, failures)
    return _log_mean_exp([successes * a + failures * b for a, b in _grid(p0, m, False)])


def threshold(alpha: float) -> float:
    """Return log(1/alpha), what log E must reach.

    Raises:
        ValueError: alpha outside (0, 1).
    """
    if not 0.0 < alpha < 1.0:
        raise ValueError(f"alpha is a probability strictly between 0 and 1, not {alpha}")
    return -math.log(alpha)


def spent_alpha(alpha: float, attempt: int) -> float:
    """Return what the k-th attempt at one rule may spend of alpha: alpha at first, alpha * 6 / (pi^2 k^2) from then on.

    The re-admissions (k >= 2) together spend 0.393 alpha, so all attempts together at most 1.393 alpha: the chance
    that a rule at the floor is ever promoted over endless re-admissions. Source: sum of 1/k^2 = pi^2/6.

    Raises:
        ValueError: an attempt below 1.
    """
    if attempt < 1:
        raise ValueError("attempts count from 1")
    return alpha * 6.0 / (math.pi**2 * attempt**2) if attempt > 1 else alpha


def verdict(successes: int, failures: int, p0: float, alpha: float, m: int = MIDPOINTS) -> Verdict:
    """Return promote, reject or inconclusive for bare counts. Nothing over nothing is inconclusive."""
    need = threshold(alpha)
    if log_e(successes, failures, p0, m) >= need:
        return "promote"
    if log_e_reject(successes, failures, p0, m) >= need:
        return "reject"
    return "inconclusive"


def needed_clean(successes: int, failures: int, p0: float, alpha: float, limit: int = 100_000) -> int | None:
    """Return how many further successes in a row promote; 0 if it promotes already, None beyond `limit`.

    log E grows with every success, so bisection finds the least.
    """
    need = threshold(alpha)
    if log_e(successes, failures, p0) >= need:
        return 0
    low, high = 0, 1
    while log_e(successes + high, failures, p0) < need:
        low, high = high, high * 2
        if high > limit:
            return None
    while high - low > 1:
        middle = (low + high) // 2
        if log_e(successes + middle, failures, p0) >= need:
            high = middle
        else:
            low = middle
    return high


def minimum_n(failures: int, p0: float, alpha: float) -> int:
    """Return the least number of episodes with so many failures that promotes: the gate as a table for auditors."""
    clean = needed_clean(0, failures, p0, alpha)
    if clean is None:
        raise ValueError("no number of episodes within the limit promotes")
    return failures + clean


def log_e_many(successes: Any, failures: Any, p0: float, m: int = MIDPOINTS) -> Any:
    """Return log E for arrays of counts (integers, any shapes that broadcast), as float64; equal to `log_e` to 1e-9.

    Raises:
        ValueError: a negative count, or a floor outside (0, 1).
    """
    return _many(successes, failures, _grid(p0, m, True))


def log_e_reject_many(successes: Any, failures: Any, p0: float, m: int = MIDPOINTS) -> Any:
    """Return log E of the mirror image for arrays of counts, as `log_e_many`; equal to `log_e_reject` to 1e-9.

    Raises:
        ValueError: a negative count, or a floor outside (0, 1).
    """
    return _many(successes, failures, _grid(p0, m, False))


def _many(successes: Any, failures: Any, points: tuple[tuple[float, float], ...]) -> Any:
    import numpy as np

    s, f = np.broadcast_arrays(np.asarray(successes, dtype=np.int64), np.asarray(failures, dtype=np.int64))
    if s.size and (s.min() < 0 or f.min() < 0):
        raise ValueError("counts cannot be negative")
    # Each distinct pair once, and at most 16,384 pairs x 50 midpoints (6 MB) at a time.
    width = int(f.max()) + 1 if f.size else 1
    pairs, where = np.unique(s.ravel() * width + f.ravel(), return_inverse=True)
    grid = np.asarray(points).T
    values = np.empty(pairs.size)
    for start in range(0, pairs.size, 16_384):
        part = pairs[start : start + 16_384]
        terms = np.stack([part // width, part % width], axis=1).astype(float) @ grid
        top = terms.max(axis=1)
        values[start : start + 16_384] = top + np.log(np.exp(terms - top[:, None]).mean(axis=1))
    return values[where.reshape(-1)].reshape(s.shape)


def evaluate_many(successes: Any, failures: Any, p0: float, alpha: float) -> dict[str, Any]:
    """Return the sequential test of many candidates at once, from the capped episodes of their sites.

    Args:
        successes: integers, shape (candidates, sites); a site without evidence holds 0.
        failures: likewise.
        p0: the floor, a fraction.
        alpha: the error to spend, a fraction.

    Returns:
        Arrays of shape (candidates,): `log_e` and `log_e_reject` pooled, `leave_one_out` (the least log E over
        dropping any one site), `site_rejects` (bool: some site's own episodes reject), and `verdict` (str: promote
        where pooled and leave-one-out both reach the threshold and no site rejects; reject; inconclusive).

    Raises:
        ValueError: a negative count, a floor or alpha outside (0, 1).
    """
    import numpy as np

    need = threshold(alpha)
    s, f = np.asarray(successes, dtype=np.int64), np.asarray(failures, dtype=np.int64)
    total_s, total_f = s.sum(axis=1), f.sum(axis=1)
    pooled, against = log_e_many(total_s, total_f, p0), log_e_reject_many(total_s, total_f, p0)
    least = log_e_many(total_s[:, None] - s, total_f[:, None] - f, p0).min(axis=1)
    site_rejects = (log_e_reject_many(s, f, p0) >= need).any(axis=1)
    verdicts = np.where(
        (pooled >= need) & (least >= need) & ~site_rejects,
        "promote",
        np.where(against >= need, "reject", "inconclusive"),
    )
    return {
        "log_e": pooled,
        "log_e_reject": against,
        "leave_one_out": least,
        "site_rejects": site_rejects,
        "verdict": verdicts,
    }


def promotion_law(p: float, p0: float, alpha: float, horizon: int = 5000) -> Any:
    """Return P(promoted at or before n) for n = 0..horizon, looking after every episode, by exact dynamic programming.

    `p` is the true success rate, a fraction. float64 array of shape (horizon + 1,).
    """
    return first_passage(p, least_episodes(p0, alpha, horizon), horizon)


def ever_promote_probability(p: float, p0: float, alpha: float, horizon: int = 5000) -> float:
    """Return the probability of ever promoting a true success rate `p` within `horizon` looks, exactly."""
    return float(promotion_law(p, p0, alpha, horizon)[-1])


def median_episodes(law: Any) -> int | None:
    """Return the least n by which half of the candidates are promoted, of a law from `first_passage`; None if never."""
    import numpy as np

    reached = np.nonzero(np.asarray(law) >= 0.5)[0]
    return int(reached[0]) if reached.size else None


def least_episodes(p0: float, alpha: float, horizon: int) -> list[int]:
    """Return, for k = 0, 1, … failures, the least number of episodes that promotes, as long as it is within `horizon`."""
    limits: list[int] = []
    k = 0
    while True:
        clean = needed_clean(0, k, p0, alpha, limit=4 * horizon)
        n_min = k + clean if clean is not None else horizon + 1
        if n_min > horizon:
            break
        limits.append(n_min)
        k += 1
    return limits


def first_passage(p: float, least: Sequence[int], horizon: int) -> Any:
    """Return P(promoted at or before n) for n = 0..horizon of any gate that is a table of least episodes, exactly.

    Args:
        p: the true success rate, a fraction.
        least: for k failures the least n that promotes, growing with k, every n >= least[k] promoting too.
        horizon: the last look, in episodes; there is a look after each.

    Returns:
        float64 array of shape (horizon + 1,). The state is the number of failures among n episodes; paths that reach
        the gate are absorbed.
    """
    import numpy as np

    width = len(least)
    bound = np.asarray(least, dtype=np.int64)
    passing = np.searchsorted(bound, np.arange(horizon + 1), side="right")
    promoted = np.zeros(horizon + 1)
    alive = np.zeros(width + 1)  # the last bin: too many failures to be promoted within the horizon
    alive[0] = 1.0
    total = 0.0
    for n in range(1, horizon + 1):
        moved = alive * p
        moved[1:] += alive[:-1] * (1 - p)
        moved[-1] += alive[-1] * (1 - p)
        crossing = int(passing[n])
        if crossing:
            total += float(moved[:crossing].sum())
            moved[:crossing] = 0.0
        alive = moved
        promoted[n] = total
    return promoted
