"""A narrower condition under which a rule would do well, tested where it was not found.

Belongs here: the split of sites, the search on one half and the test on the other. A suggestion that does not hold on
sites which it has not seen is not made. It changes no rule: a person re-admits a rule with a changed condition.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from flywheel_pipeline.health.segments import Cells, Condition, find_causes, matches

MIN_SITES = 2  # in either half
MIN_EXECUTIONS = 20
MIN_HOSTS = 3
Z95 = 1.6449  # one-sided


@dataclass(frozen=True)
class Suggestion:
    """A narrower condition, with its rate on sites that had no part in finding it.

    Attributes:
        exclude: segments that the rule should no longer match, each with one or two conditions that all hold.
        sites, hosts, executions: held out, and still matched.
        kept: fraction of the held-out executions that the rule would still match.
        rate_before, rate: success rate of the held-out executions, all of them and those still matched.
        lower_bound: of `rate`, one-sided 95 %, widened by how much hosts differ.
    """

    exclude: tuple[tuple[Condition, ...], ...]
    sites: int
    hosts: int
    executions: int
    kept: float
    rate_before: float
    rate: float
    lower_bound: float


def held_out(site: str) -> bool:
    """Whether a site is held out: half of them by a hash of their name, the same ones for ever."""
    return hashlib.sha256(b"held-out:" + site.encode()).digest()[0] % 2 == 0


def suggest(cells: Cells, *, seed: int = 20260215) -> tuple[Suggestion | None, str]:
    """Look for a narrower condition.

    Returns:
        The suggestion, or None and the reason why none is made.
    """
    out = np.array([held_out(site) for site in cells.labels["site"]], dtype=bool)
    if int(out.sum()) < MIN_SITES or int((~out).sum()) < MIN_SITES:
        return None, f"too few sites to hold some out: {int(out.sum())} would be, {int((~out).sum())} would not"
    test_rows = out[cells.codes["site"]]
    learned = find_causes(cells.only(~test_rows), seed=seed)
    # A time or a site is no condition that a rule could carry to another site.
    usable = [
        s.conditions for s in learned if all(c.dimension in ("agent_version", "hardware", "os") for c in s.conditions)
    ]
    if not usable:
        return None, "no agent release, hardware or system stands out on the sites that are not held out"
    test = cells.only(test_rows)
    return _tested(test, usable)


def _tested(test: Cells, usable: Sequence[tuple[Condition, ...]]) -> tuple[Suggestion | None, str]:
    keep = np.ones(len(test.host), dtype=bool)
    for conditions in usable:
        keep &= ~matches(test, conditions)
    n_all, f_all = int(test.executions.sum()), int(test.failures.sum())
    kept = test.only(keep)
    n, f = int(kept.executions.sum()), int(kept.failures.sum())
    hosts, sites = len(np.unique(kept.host)), len(np.unique(kept.codes["site"]))
    if n < MIN_EXECUTIONS or hosts < MIN_HOSTS or sites < MIN_SITES:
        return None, f"only {n} executions on {hosts} hosts of {sites} held-out sites would still match"
    rate_before, rate = 1 - f_all / n_all, 1 - f / n
    bound = lower_bound(kept)
    if bound <= rate_before:
        return None, (
            f"on held-out sites it does not hold: {rate:.1%} with a lower bound of {bound:.1%}, against {rate_before:.1%} as it is"
        )
    return Suggestion(tuple(usable), sites, hosts, n, n / n_all, rate_before, rate, bound), ""


def lower_bound(cells: Cells) -> float:
    """One-sided 95 % Wilson bound of the success rate, on as many executions as they are worth with hosts as clusters."""
    n, f = float(cells.executions.sum()), float(cells.failures.sum())
    rate = 1 - f / n
    by_host_n = np.bincount(cells.host, weights=cells.executions)
    by_host_f = np.bincount(cells.host, weights=cells.failures)
    binomial = n * rate * (1 - rate)
    residual = float(((by_host_f - by_host_n * (1 - rate)) ** 2).sum())
    inflation = max(1.0, residual / binomial) if binomial > 0 else max(1.0, float((by_host_n**2).sum()) / n)
    worth = n / inflation
    centre = rate + Z95**2 / (2 * worth)
    width = Z95 * math.sqrt(rate * (1 - rate) / worth + Z95**2 / (4 * worth**2))
    return max(0.0, (centre - width) / (1 + Z95**2 / worth))
