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


def log_e(successes: int, failures: int, p0: float, m: int = MIDPOINTS) -> float:
    """Return log E for "the success rate is above p0"; 0 over no data.

    Raises:
        ValueError: a negative count, or a floor outside (0, 1).
    """
    _counts(successes, failures)
    return _log_mean_exp([successes * a + failures * b for a, b in _grid(p0, m, True)])


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
    """Return alpha of the k-th attempt, alpha * 6 / (pi^2 k^2): over all attempts they add up to alpha.

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
    """Return log E for arrays of counts (any shape, integers), as float64 of that shape; equal to `log_e` to 1e-9."""
    import numpy as np

    grid = np.asarray(_grid(p0, m, True))
    s = np.asarray(successes, dtype=float)[..., None]
    f = np.asarray(failures, dtype=float)[..., None]
    terms = s * grid[:, 0] + f * grid[:, 1]
    top = terms.max(axis=-1)
    return top + np.log(np.exp(terms - top[..., None]).mean(axis=-1))


def promotion_law(p: float, p0: float, alpha: float, horizon: int = 5000) -> Any:
    """Return P(promoted at or before n) for n = 0..horizon, looking after every episode, by exact dynamic programming.

    The state is the number of failures among n episodes; paths that reach the threshold are absorbed. float64 array.
    """
    import numpy as np

    promoted = np.zeros(horizon + 1)
    # For each number of failures, the least n that promotes; beyond it the path is absorbed.
    limits: list[int] = []
    k = 0
    while True:
        clean = needed_clean(0, k, p0, alpha, limit=4 * horizon)
        n_min = k + clean if clean is not None else horizon + 1
        if n_min > horizon:
            break
        limits.append(n_min)
        k += 1
    width = len(limits)
    least = np.asarray(limits)
    alive = np.zeros(width + 1)  # the last bin: too many failures to be promoted within the horizon
    alive[0] = 1.0
    total = 0.0
    for n in range(1, horizon + 1):
        moved = alive * p
        moved[1:] += alive[:-1] * (1 - p)
        moved[-1] += alive[-1] * (1 - p)
        crossing = np.nonzero(least <= n)[0]
        if crossing.size:
            total += float(moved[crossing].sum())
            moved[crossing] = 0.0
        alive = moved
        promoted[n] = total
    return promoted
