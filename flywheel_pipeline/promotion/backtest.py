"""Backtest: what a policy would have promoted, when, and at what cost; on history and on fleets with planted truth.

Belongs here: replaying episodes through the gates, simulated fleets, exact error probabilities, the plot. Does not
belong here: the gates (`gates.decide_pattern` decides here as it does in service, so a backtest tests what runs), and
loading history from the database. Times are days, as floats, from any origin; rates are fractions.
"""

from __future__ import annotations

import io
import math
import statistics
from bisect import bisect_left
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from flywheel_pipeline.promotion import evalue
from flywheel_pipeline.promotion.gates import (
    NOT_SERVED,
    Decision,
    PatternEvidence,
    SiteEvidence,
    decide_pattern,
    within_limit,
)
from flywheel_pipeline.promotion.policy import Policy

if TYPE_CHECKING:
    import numpy as np

SETTLE_DAYS = 1.0  # an episode's outcome stands once the drift stayed away for the recurrence window, 24 hours
SERVED = ("canary", "ring", "fleet")
RATES = (0.70, 0.80, 0.85, 0.88, 0.90, 0.95, 0.98)

__all__ = [
    "Candidate",
    "EpisodeLog",
    "FleetPlan",
    "Move",
    "Replayed",
    "capped_sites",
    "compare_on_fleets",
    "dead_sites",
    "even_fleet",
    "exact_table",
    "giant_site",
    "ideal_facts",
    "least_of",
    "plot",
    "promoted_after",
    "replay_history",
    "simulate_runs",
    "summary",
]


# ------------------------------------------------------------------------------------------------------- episodes


@dataclass(frozen=True)
class EpisodeLog:
    """Episodes of one pattern in the order of event time, as parallel tuples of one length.

    Attributes:
        at: when each began, days.
        site, host: names; a host is meant within its site.
        succeeded: healed for good; None where no execution of it was rated: a threshold counts it, the test does not.
        executions, raw_successes: the L2 executions in it, and those reported as success: what a threshold counts.
    """

    at: tuple[float, ...]
    site: tuple[str, ...]
    host: tuple[str, ...]
    succeeded: tuple[bool | None, ...]
    executions: tuple[int, ...]
    raw_successes: tuple[int, ...]

    @classmethod
    def of(cls, rows: Iterable[Sequence[Any]]) -> EpisodeLog:
        """Build a log from (at, site, host, succeeded[, executions, raw_successes]) in any order.

        Without counts an episode is one execution, reported as it turned out.

        Raises:
            ValueError: a row of another length, or more successes than executions.
        """
        full: list[tuple[float, str, str, bool | None, int, int]] = []
        for row in rows:
            if len(row) not in (4, 6):
                raise ValueError(f"an episode is (at, site, host, succeeded[, executions, raw_successes]), not {row!r}")
            at, site, host = float(row[0]), str(row[1]), str(row[2])
            succeeded = None if row[3] is None else bool(row[3])
            executions, raw = (int(row[4]), int(row[5])) if len(row) == 6 else (1, int(bool(succeeded)))
            if not 0 <= raw <= executions:
                raise ValueError(f"{raw} successes of {executions} executions is no count")
            full.append((at, site, host, succeeded, executions, raw))
        full.sort(key=lambda row: (*row[:3], str(row[3]), *row[4:]))
        columns = tuple(zip(*full, strict=True)) if full else ((),) * 6
        return cls(*columns)

    def __len__(self) -> int:
        return len(self.at)


class _Tally:
    """Counts of a log up to a moment: raw as reported at once, rated and capped once settled. Moves forward only."""

    def __init__(self, log: EpisodeLog, policy: Policy) -> None:
        self.log = log
        self.caps = policy.evidence
        self.reported = self.settled = 0
        self.executions = self.raw_successes = 0
        self._hosts: dict[tuple[str, str], int] = {}
        self._sites: dict[str, list[int]] = {}
        self._site_hosts: dict[str, set[str]] = {}

    def advance(self, now: float, settle_days: float) -> None:
        log = self.log
        while self.reported < len(log) and log.at[self.reported] <= now:
            self.executions += log.executions[self.reported]
            self.raw_successes += log.raw_successes[self.reported]
            self.reported += 1
        while self.settled < len(log) and log.at[self.settled] + settle_days <= now:
            self._count(self.settled)
            self.settled += 1

    def _count(self, i: int) -> None:
        if self.log.succeeded[i] is None:
            return
        site, host = self.log.site[i], self.log.host[i]
        counts = self._sites.setdefault(site, [0, 0])
        nth = self._hosts.get((site, host), 0) + 1
        self._hosts[site, host] = nth
        if nth > self.caps.episodes_per_host or sum(counts) >= self.caps.episodes_per_site:
            return
        counts[0 if self.log.succeeded[i] else 1] += 1
        self._site_hosts.setdefault(site, set()).add(host)

    def sites(self) -> tuple[SiteEvidence, ...]:
        return tuple(
            SiteEvidence(site, counts[0], counts[1], len(self._site_hosts[site]))
            for site, counts in sorted(self._sites.items())
        )


def capped_sites(log: EpisodeLog, policy: Policy, until: float = math.inf) -> tuple[SiteEvidence, ...]:
    """Return the episodes that count by site, of those that began before or at `until`: the first so many of each host
    and of each site by event time, so that the evidence cannot be picked.
    """
    tally = _Tally(log, policy)
    tally.advance(until, 0.0)
    return tally.sites()


# -------------------------------------------------------------------------------------------------------- history


@dataclass(frozen=True)
class Candidate:
    """A pattern with its history.

    `facts` holds what a log of episodes does not tell: runbook, agents, shadowed rules, approvers, checks. It is taken
    as of now for all past looks, with its shares; counts, stage and times come from the log.
    """

    facts: PatternEvidence
    log: EpisodeLog


@dataclass(frozen=True)
class Move:
    """One step a policy would have taken: when, to which state and step in it, on how many counted episodes, and why."""

    at: float
    to_state: str
    episodes: int
    reason: str
    step: int | None = None


@dataclass(frozen=True)
class Replayed:
    """What one policy would have done with one candidate.

    Attributes:
        served_at: first day on any machine (canary or further), None if never.
        fleet_at: first day on every machine, None if never.
        episodes_before: rated episodes seen when it was first served, or in all if it never was.
        later_episodes, later_failures: what came after it was first served: the price of an early promotion.
        last: the decision at the last look.
    """

    pattern_key: str
    policy: str
    moves: tuple[Move, ...]
    served_at: float | None
    fleet_at: float | None
    episodes_before: int
    later_episodes: int
    later_failures: int
    last: Decision


def replay_history(
    candidates: Sequence[Candidate],
    policy: Policy,
    looks: Sequence[float] | None = None,
    *,
    settle_days: float = SETTLE_DAYS,
) -> list[Replayed]:
    """Replay history through a policy as of each past look, stage by stage, and return what it would have done.

    At each look only what was known then counts: executions that began, episodes that had settled. A shadow rule
    would have fired at each episode since it entered shadow; from the canary on L2's later episodes stand for its own.
    Rules not yet served beyond the policy's limit wait for the next look. A rule takes one step at a look, as in service.

    Args:
        candidates: patterns with their logs.
        policy: the policy to try.
        looks: days of the looks; without it there is one at each episode's beginning and settling.
        settle_days: how long an episode takes to settle.

    Returns:
        One result per candidate, in their order.
    """
    if looks is None:
        moments = {at + wait for c in candidates for at in c.log.at for wait in (0.0, settle_days)}
        looks = sorted(moments)
    tallies = [_Tally(c.log, policy) for c in candidates]
    stages = ["none"] * len(candidates)
    steps: list[int | None] = [None] * len(candidates)
    canary_since: list[float | None] = [None] * len(candidates)
    entered = [0.0] * len(candidates)
    parked = [False] * len(candidates)
    moves: list[list[Move]] = [[] for _ in candidates]
    last: list[Decision] = [
        decide_pattern(_as_of(c, t, "none", 0.0, 0.0), policy) for c, t in zip(candidates, tallies, strict=True)
    ]
    for now in sorted(looks):
        due: list[tuple[str, int]] = []
        for i, candidate in enumerate(candidates):
            tallies[i].advance(now, settle_days)
            present = _as_of(candidate, tallies[i], stages[i], entered[i], now)
            own = _own_since(candidate.log, tallies[i].settled, canary_since[i])
            present = replace(present, parked=parked[i], step=steps[i], own_successes=own[0], own_failures=own[1])
            last[i] = decide_pattern(present, policy)
            parked[i] = parked[i] or last[i].verdict == "expired"
            if last[i].target_state is not None and stages[i] in NOT_SERVED:
                due.append((f"{i:09d}", sum(s.successes for s in tallies[i].sites())))
        allowed = set(within_limit(due, policy))
        for i, decision in enumerate(last):
            if decision.target_state is None or (stages[i] in NOT_SERVED and f"{i:09d}" not in allowed):
                continue
            if decision.target_state == "canary" and canary_since[i] is None:
                canary_since[i] = now
            stepped = policy.rollout is not None and decision.target_state in ("canary", "ring")
            steps[i] = (2 if stages[i] == decision.target_state else 1) if stepped else None
            stages[i], entered[i] = decision.target_state, now
            counted = sum(s.successes + s.failures for s in tallies[i].sites())
            moves[i].append(Move(now, decision.target_state, counted, decision.reason, steps[i]))
    return [_result(c, policy, tuple(m), d) for c, m, d in zip(candidates, moves, last, strict=True)]


def _own_since(log: EpisodeLog, settled: int, since: float | None) -> tuple[int, int]:
    """Return (successes, failures) of the settled rated episodes since the canary: L2's stand for the rule's own."""
    if since is None:
        return 0, 0
    outcomes = log.succeeded[bisect_left(log.at, since) : settled]
    return outcomes.count(True), outcomes.count(False)


def _as_of(candidate: Candidate, tally: _Tally, stage: str, entered: float, now: float) -> PatternEvidence:
    facts, log = candidate.facts, candidate.log
    since = max(tally.reported - bisect_left(log.at, entered), 0) if stage == "shadow" else 0
    return replace(
        facts,
        stage=stage,
        occurrences=tally.executions,
        successes=tally.raw_successes,
        excluded=facts.excluded * tally.executions // facts.occurrences if facts.occurrences else facts.excluded,
        sites=tally.sites(),
        would_fires=since,
        shadow_days=now - entered if stage == "shadow" else 0.0,
        step_days=now - entered if stage in ("canary", "ring") else 0.0,
        days_observed=now - log.at[0] if tally.reported else None,
    )


def _result(candidate: Candidate, policy: Policy, moves: tuple[Move, ...], last: Decision) -> Replayed:
    log = candidate.log
    served = next((m.at for m in moves if m.to_state in SERVED), None)
    fleet = next((m.at for m in moves if m.to_state == "fleet"), None)
    rated = [(at, good) for at, good in zip(log.at, log.succeeded, strict=True) if good is not None]
    later = [] if served is None else [good for at, good in rated if at > served]
    return Replayed(
        pattern_key=candidate.facts.pattern_key,
        policy=policy.name,
        moves=moves,
        served_at=served,
        fleet_at=fleet,
        episodes_before=len(rated) - len(later),
        later_episodes=len(later),
        later_failures=later.count(False),
        last=last,
    )


def summary(results: Iterable[Replayed]) -> list[dict[str, Any]]:
    """Return one row per result as JSON types, for a table: who was served when, and what failed afterwards."""
    return [
        {
            "pattern": r.pattern_key,
            "policy": r.policy,
            "served_day": r.served_at,
            "fleet_day": r.fleet_at,
            "episodes_before": r.episodes_before,
            "later_episodes": r.later_episodes,
            "later_failures": r.later_failures,
            "later_success_rate": None if not r.later_episodes else 1 - r.later_failures / r.later_episodes,
            "verdict": r.last.verdict,
            "reason": r.last.reason,
        }
        for r in results
    ]


# ------------------------------------------------------------------------------------------------ simulated fleets


@dataclass(frozen=True)
class FleetPlan:
    """A fleet with planted truth.

    Attributes:
        name: for the table.
        site_rates: the true success rate of the runbook at each site, fractions.
        site_weights: share of volume of each site, any positive scale.
        hosts_per_site: hosts of a site; of the busiest site, ten times as many.
        episodes: how many to simulate.
    """

    name: str
    site_rates: tuple[float, ...]
    site_weights: tuple[float, ...]
    hosts_per_site: int = 8
    episodes: int = 3000

    @property
    def average(self) -> float:
        """The mean of the sites' true rates: what the fleet as a whole would get, each site counting once."""
        return round(statistics.fmean(self.site_rates), 12)


def ideal_facts() -> PatternEvidence:
    """Return evidence on which every gate but those on successes and failures passes: what remains is the test."""
    return PatternEvidence(
        pattern_key="simulated",
        incident_type="simulated",
        runbook_id="simulated",
        platform="simulated",
        occurrences=0,
        successes=0,
        excluded=0,
        unverified=0,
        runbook_problem=None,
        is_disruptive=False,
        category="simulated",
        conditions={"incident_type": "simulated"},
        matched_incidents=10**6,
        shadowed_rules=(),
        capable_share=1.0,
        selected_incidents=1,
        type_incidents=1,
        sites=(),
        active_sites=10**6,
        stage="none",
        would_fires=10**6,
        shadow_days=10.0**6,
        attempt=1,
        approvers=("simulated",),
        rejected_by=None,
        checks_green=True,
        step=2,
        step_days=10.0**6,
        own_successes=10**6,
        served_sites=10**6,
    )


def even_fleet(rate: float, sites: int = 40) -> FleetPlan:
    """Return a fleet in which every site has the same rate and volume."""
    return FleetPlan(f"every site {rate:.0%}", (rate,) * sites, (1.0,) * sites)


def dead_sites(share: float = 0.15, sites: int = 40, rate: float = 1.0) -> FleetPlan:
    """Return a fleet in which the runbook works at `rate`, and never at a share of the sites."""
    dead = round(share * sites)
    return FleetPlan(f"{dead} of {sites} sites dead", (0.0,) * dead + (rate,) * (sites - dead), (1.0,) * sites)


def giant_site(volume: float = 0.60, average: float = 0.85, sites: int = 40, rate: float = 1.0) -> FleetPlan:
    """Return a fleet in which one good site has `volume` of the episodes, and the sites' rates average `average`."""
    others = (average * sites - rate) / (sites - 1)
    weights = (volume, *((1 - volume) / (sites - 1),) * (sites - 1))
    return FleetPlan(f"a giant good site, average {average:.0%}", (rate, *(others,) * (sites - 1)), weights)


def simulate_runs(plan: FleetPlan, runs: int, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return (site, host, succeeded), each of shape (runs, episodes): int64, int64 within the site, bool."""
    import numpy as np

    rng = np.random.default_rng(seed)
    weights = np.asarray(plan.site_weights) / sum(plan.site_weights)
    shape = (runs, plan.episodes)
    site = rng.choice(len(weights), size=shape, p=weights)
    hosts = np.where(weights > 3 * weights.mean(), 10 * plan.hosts_per_site, plan.hosts_per_site)
    host = (rng.random(shape) * hosts[site]).astype(np.int64)
    succeeded = rng.random(shape) < np.asarray(plan.site_rates)[site]
    return site, host, succeeded


def promoted_after(
    plan: FleetPlan, policy: Policy, facts: PatternEvidence, *, runs: int = 1000, seed: int = 1, stage: str = "canary"
) -> list[int | None]:
    """Return, for each simulated run, after how many episodes the policy promotes from `stage`; None for never.

    There is a look after every episode. Under a sequential policy the step is one stage: from canary into the ring
    is the first at which quorum and leave-one-out stand. The gates themselves decide; looks at which the pooled
    e-value alone is below its threshold are skipped, since every other gate can only hold.
    """
    import numpy as np

    found: list[int | None] = []
    sites, hosts, outcomes = simulate_runs(plan, runs, seed)
    names = [f"site-{i + 1:03d}" for i in range(len(plan.site_rates))]
    for site, host, good in zip(sites, hosts, outcomes, strict=True):
        if policy.threshold is not None:
            n = np.arange(1, plan.episodes + 1)
            wins = np.cumsum(good)
            look = (n >= policy.threshold.min_occurrences) & (wins >= policy.threshold.min_success_rate * n - 1e-9)
            first = None
            for k in np.nonzero(look)[0]:
                seen = replace(facts, stage="none", occurrences=int(n[k]), successes=int(wins[k]))
                if decide_pattern(seen, policy).target_state is not None:
                    first = int(n[k])
                    break
            found.append(first)
            continue
        counted = _counting(site, host, policy)
        s, f = np.cumsum(good & counted), np.cumsum(~good & counted)
        target = {"shadow": "canary", "canary": "ring", "ring": "fleet"}[stage]
        gate = policy.stage_gate(target, facts.incident_type)
        enough = (
            evalue.log_e_many(s, f, gate.floor)
            >= evalue.threshold(evalue.spent_alpha(gate.alpha, facts.attempt)) - 1e-9
        )
        first = None
        for k in np.nonzero(enough & counted)[0]:
            seen = replace(facts, stage=stage, excluded=0, occurrences=int(k) + 1, successes=int(good[: k + 1].sum()))
            seen = replace(seen, sites=_sites_of(site[: k + 1], host[: k + 1], good[: k + 1], counted[: k + 1], names))
            if decide_pattern(seen, policy).target_state is not None:
                first = int(k) + 1
                break
        found.append(first)
    return found


def _counting(site: np.ndarray, host: np.ndarray, policy: Policy) -> np.ndarray:
    """Return which episodes count under the caps, a mask of the same shape (episodes,)."""
    import numpy as np

    within_host = _nth(site * (int(host.max()) + 1) + host) <= policy.evidence.episodes_per_host
    mask = np.zeros(site.size, dtype=bool)
    eligible = np.nonzero(within_host)[0]
    mask[eligible[_nth(site[eligible]) <= policy.evidence.episodes_per_site]] = True
    return mask


def _nth(groups: np.ndarray) -> np.ndarray:
    """Return each element's position within its group, from 1, in order of appearance."""
    import numpy as np

    order = np.argsort(groups, kind="stable")
    ordered = groups[order]
    starts = np.r_[True, ordered[1:] != ordered[:-1]]
    first = np.maximum.accumulate(np.where(starts, np.arange(groups.size), 0))
    nth = np.empty(groups.size, dtype=np.int64)
    nth[order] = np.arange(groups.size) - first + 1
    return nth


def _sites_of(
    site: np.ndarray, host: np.ndarray, good: np.ndarray, counted: np.ndarray, names: Sequence[str]
) -> tuple[SiteEvidence, ...]:
    import numpy as np

    site, host, good = site[counted], host[counted], good[counted]
    n = len(names)
    wins = np.bincount(site[good], minlength=n)
    losses = np.bincount(site[~good], minlength=n)
    width = int(host.max()) + 1
    hosts = np.bincount(np.unique(site * width + host) // width, minlength=n)
    return tuple(
        SiteEvidence(name, int(w), int(x), int(h))
        for name, w, x, h in zip(names, wins, losses, hosts, strict=True)
        if w + x
    )


def compare_on_fleets(
    policies: Sequence[Policy],
    plans: Sequence[FleetPlan],
    facts: PatternEvidence,
    *,
    runs: int = 1000,
    seed: int = 1,
    floor: float = 0.90,
) -> list[dict[str, Any]]:
    """Return one row per fleet and policy as JSON types, for a table.

    Keys: fleet, average (true, fraction), policy, promoted (fraction of runs), false_promotion (the same where the
    average is below `floor`, else null), median_episodes (of the promoted runs, null without any), runs.
    """
    rows = []
    for plan in plans:
        for policy in policies:
            after = [n for n in promoted_after(plan, policy, facts, runs=runs, seed=seed) if n is not None]
            share = len(after) / runs
            rows.append(
                {
                    "fleet": plan.name,
                    "average": plan.average,
                    "policy": policy.name,
                    "promoted": share,
                    "false_promotion": share if plan.average < floor - 1e-9 else None,
                    "median_episodes": statistics.median(after) if after else None,
                    "runs": runs,
                }
            )
    return rows


# ---------------------------------------------------------------------------------------------- exact comparisons


def least_of(gate: str, horizon: int, *, p0: float = 0.90, alpha: float = 0.05) -> list[int]:
    """Return the least episodes for k = 0, 1, … failures at which a gate promotes, as far as `horizon`.

    Args:
        gate: `legacy` (n >= 5 and rate >= p0), `rate_of_20` (n >= 20), `wilson` (one-sided lower bound at 1 - alpha),
            `clopper_pearson` (likewise, exact), `e_value`.
        horizon: the last look, in episodes.
        p0: the floor.
        alpha: the error of a single look, or of all looks for `e_value`.

    Raises:
        ValueError: there is no such gate.
    """
    if gate == "e_value":
        return evalue.least_episodes(p0, alpha, horizon)
    if gate not in ("legacy", "rate_of_20", "wilson", "clopper_pearson"):
        raise ValueError(f"there is no gate {gate} to compare with")
    if gate == "clopper_pearson":
        return _least_of_clopper_pearson(horizon, p0, alpha)
    z = statistics.NormalDist().inv_cdf(1 - alpha)
    least: list[int] = []
    n = 1
    while True:
        k = len(least)
        n = max(n, k + 1)
        while n <= horizon and not _passes(gate, n, k, p0, z):
            n += 1
        if n > horizon:
            return least
        least.append(n)


def _passes(gate: str, n: int, failures: int, p0: float, z: float) -> bool:
    s = n - failures
    if gate == "wilson":
        # The lower end of Wilson's interval (1927), one-sided: z is the normal quantile of 1 - alpha.
        p = s / n
        return (p + z * z / (2 * n) - z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))) / (1 + z * z / n) >= p0
    return n >= (5 if gate == "legacy" else 20) and s >= p0 * n - 1e-9


def _least_of_clopper_pearson(horizon: int, p0: float, alpha: float) -> list[int]:
    """Return the table of the exact bound (Clopper and Pearson 1934), one-sided.

    The bound is at or above p0 if and only if so few failures have a probability of at most alpha at the rate p0.
    """
    import numpy as np

    n = np.arange(horizon + 1)
    log_factorial = np.concatenate([[0.0], np.cumsum(np.log(np.arange(1, horizon + 1)))])
    at_most = np.zeros(horizon + 1)  # P(at most k failures among n), for every n
    least: list[int] = []
    for k in range(horizon + 1):
        m = n[k:]
        log_p = (
            log_factorial[m] - log_factorial[k] - log_factorial[m - k] + k * math.log1p(-p0) + (m - k) * math.log(p0)
        )
        at_most[k:] += np.exp(log_p)
        passing = np.nonzero(at_most[k + 1 :] <= alpha)[0]
        if not passing.size:
            return least
        least.append(int(passing[0]) + k + 1)
    return least


def exact_table(
    gates: Sequence[str] = ("legacy", "rate_of_20", "wilson", "clopper_pearson", "e_value"),
    *,
    rates: Sequence[float] = RATES,
    horizon: int = 5000,
    p0: float = 0.90,
    alpha: float = 0.05,
) -> list[dict[str, Any]]:
    """Return one row per gate and true rate, looking after every episode, by exact dynamic programming.

    Keys: gate, rate, promoted (P(ever promoted) within the horizon), median_episodes (null if less than half are).
    """
    rows = []
    for gate in gates:
        least = least_of(gate, horizon, p0=p0, alpha=alpha)
        for rate in rates:
            law = evalue.first_passage(rate, least, horizon)
            rows.append(
                {
                    "gate": gate,
                    "rate": rate,
                    "promoted": float(law[-1]),
                    "median_episodes": evalue.median_episodes(law),
                }
            )
    return rows


def plot(rows: Sequence[Mapping[str, Any]], *, p0: float = 0.90, alpha: float = 0.05) -> bytes:
    """Draw P(ever promoted) against the true rate, one line per gate or policy; return a PNG.

    Args:
        rows: of `exact_table` (gate, rate, promoted) or of `compare_on_fleets` (policy, average, promoted).
        p0: the floor, drawn as a line.
        alpha: the error allowed at the floor, drawn as a line.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 3.6), dpi=80, layout="constrained")
    axes = figure.subplots()
    series: dict[str, list[tuple[float, float]]] = {}
    for row in rows:
        name = str(row["gate"] if "gate" in row else row["policy"])
        rate = float(row["rate"] if "rate" in row else row["average"])
        series.setdefault(name, []).append((rate, float(row["promoted"])))
    for name, points in series.items():
        points.sort()
        axes.plot(
            [x for x, _ in points], [y for _, y in points], marker="o", markersize=3, label=name.replace("_", " ")
        )
    axes.axvline(p0, color="0.6", linewidth=0.8, linestyle="--")
    axes.axhline(alpha, color="0.6", linewidth=0.8, linestyle=":")
    axes.set_xlabel("true success rate")
    axes.set_ylabel("probability of ever promoting")
    axes.set_ylim(-0.02, 1.02)
    axes.xaxis.set_major_formatter(lambda x, _: f"{x:.0%}")
    axes.yaxis.set_major_formatter(lambda y, _: f"{y:.0%}")
    if series:
        axes.legend(fontsize=8, frameon=False)
    out = io.BytesIO()
    figure.savefig(out, format="png", metadata={"Software": None})
    return out.getvalue()
