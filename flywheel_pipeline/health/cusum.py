"""The CUSUM of a rule in service: when it got worse, and which part of the fleet answers for it.

Belongs here: the walk over one rule's episodes, episode by episode, and which scope an alarm is attributed to; pure
functions. Does not belong here: finding the rules that alarm (`dbt_like_sql/health/rule_cusum.sql` does, for all rules
at once) and taking a scope out of service (`promotion/apply.py`).

Each episode adds ln(bad/good) if it held, ln((1-bad)/(1-good)) if it failed: the log likelihood ratio of the rates that
the policy tells apart (.60 against .85: -0.348 and +0.981). S is the running sum, W = S - min(0, least S so far), and W
at 6 alarms (Page 1954). In control at .95 that happens within 5,000 executions with a probability of .001; a fall to
.30 is caught after 10 executions, in 95 % of cases within 17; one to .60 after 27.

Three scopes see the same episodes: the site, the release of the agent (a cohort), and the fleet. Alarms are answered
in event order, whatever the cadence at which anybody looks, and the smallest scope goes first:

- A site alarms: it is quarantined, and no other scope counts its episodes any more, those before the alarm included.
  One dead site with 30 % of the volume makes a pooled detector demote the fleet every time; here it reaches its own
  alarm by seven failures in a row, and what remains of cohort and fleet is healthy.
- A cohort alarms: it is quarantined, with all its episodes at all its sites. When one release breaks at many sites its
  failures add up in the cohort long before any single site has seven of them: so the cohort goes, and neither its
  sites one by one nor the fleet.
- The fleet alarms: the rule leaves service.

The two would disturb each other, so a larger scope holds its fire while one smaller scope carries its alarm: without
that scope, which has reached the limit to warn itself, W of the larger one lies below `calm` (one late failure at most
that successes have not outweighed). The smaller one then alarms within a few episodes or recovers. Where a cohort and
the fleet alarm at once and the other releases are not calm, it is the fleet. And a scope counts
as smaller only if the rest is known: with fewer than `rest_episodes` elsewhere (a canary at one site, a fleet with one
release) nothing says that the rest is better, and the rule leaves service: fail closed. Where many sites break one by
one the last clause holds: at least `min_sites` sites and `site_share` of those that ran the rule, and all of it goes.

The figures of one CUSUM are known (gate.md); the attribution between scopes is a simulated heuristic
(`benchmarks/bench_demotion.py`), not a theorem.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from flywheel_pipeline.promotion.policy import Cusum

if TYPE_CHECKING:
    import numpy as np

ScopeKind = Literal["site", "agent_version", "fleet"]
FLEET = "all"


@dataclass(frozen=True)
class ScopeFigure:
    """Where the CUSUM of a rule stands in one scope: its rated episodes that count, W now and at its highest."""

    kind: str
    value: str
    episodes: int
    failures: int
    w: float
    w_peak: float


@dataclass(frozen=True)
class RatedEpisode:
    """One rated episode of a rule, in event order; `at` is ISO text for the evidence."""

    site_id: str
    agent_version: str
    failed: bool
    at: str = ""


@dataclass(frozen=True)
class ScopeAlarm:
    """A scope whose CUSUM alarmed, and what it rests on.

    Attributes:
        kind, value: the scope; `fleet` and `all` for the whole rule.
        w: W at the alarm.
        episodes, failures: those of the scope since W last stood at zero, up to the alarm.
        nth: position of the alarming episode among the episodes walked, from 1.
        window_from, window_to: first and last of these episodes.
        sentence: what happened, for the operator.
    """

    kind: ScopeKind
    value: str
    w: float
    episodes: int
    failures: int
    nth: int
    window_from: str
    window_to: str
    sentence: str


@dataclass(frozen=True)
class Attribution:
    """The scopes to quarantine, in event order; where `fleet` is set the rule leaves service, and it is the last."""

    scopes: tuple[ScopeAlarm, ...]
    fleet: ScopeAlarm | None


def increments(c: Cusum) -> tuple[float, float]:
    """Return what an episode adds to S: (if it held, if it failed)."""
    return math.log(c.bad / c.good), math.log((1 - c.bad) / (1 - c.good))


def attribute(
    episodes: Sequence[RatedEpisode], c: Cusum, *, sites_out: Collection[str] = (), sites_run: int = 0
) -> Attribution:
    """Walk the episodes of one rule in event order and say which scopes leave service.

    Args:
        episodes: those that count, outside every scope that is quarantined already, in event order.
        c: rates and limits.
        sites_out: sites where the rule is quarantined already; they count toward the share of sites.
        sites_run: sites that have run this version, those included; at least the sites of `episodes`.
    """
    run = max(sites_run, len({e.site_id for e in episodes} | set(sites_out)))
    gone: set[tuple[ScopeKind, str]] = set()
    found: list[ScopeAlarm] = []
    while True:
        alarm = _first_alarm([e for e in episodes if not _within(e, gone)], c)
        if alarm is None:
            return Attribution(tuple(found), None)
        if alarm.kind == "fleet":
            return Attribution(tuple(found), alarm)
        found.append(alarm)
        gone.add((alarm.kind, alarm.value))
        sites = set(sites_out) | {value for kind, value in gone if kind == "site"}
        if len(sites) >= c.min_sites and len(sites) >= c.site_share * run:
            spread = ScopeAlarm(
                "fleet",
                FLEET,
                alarm.w,
                alarm.episodes,
                alarm.failures,
                alarm.nth,
                alarm.window_from,
                alarm.window_to,
                f"It is quarantined at {len(sites)} of the {run} sites that ran it; from {c.site_share:.0%} on, and "
                f"{c.min_sites} sites, it leaves service everywhere.",
            )
            return Attribution(tuple(found), spread)


def _within(e: RatedEpisode, gone: Collection[tuple[ScopeKind, str]]) -> bool:
    return ("site", e.site_id) in gone or ("agent_version", e.agent_version) in gone


@dataclass
class _Walk:
    """W of one scope, and where its present excursion above zero began."""

    w: float = 0.0
    n: int = 0
    failures: int = 0
    began: str = ""

    def add(self, e: RatedEpisode, held: float, missed: float) -> None:
        if self.w <= 0.0:
            self.n = self.failures = 0
            self.began = e.at
        self.w = max(0.0, self.w + (missed if e.failed else held))
        self.n += 1
        self.failures += e.failed


def _w_of(episodes: Sequence[RatedEpisode], keep: Callable[[RatedEpisode], bool], c: Cusum) -> tuple[float, int]:
    """Return (W, episodes) of those that `keep` lets through."""
    held, missed = increments(c)
    w, n = 0.0, 0
    for e in episodes:
        if keep(e):
            w = max(0.0, w + (missed if e.failed else held))
            n += 1
    return w, n


def _first_alarm(walked: Sequence[RatedEpisode], c: Cusum) -> ScopeAlarm | None:
    held, missed = increments(c)
    sites: dict[str, _Walk] = defaultdict(_Walk)
    cohorts: dict[str, _Walk] = defaultdict(_Walk)
    site_cohort: dict[str, set[str]] = defaultdict(set)
    fleet = _Walk()
    for i, e in enumerate(walked):
        site, cohort = sites[e.site_id], cohorts[e.agent_version]
        site_cohort[e.agent_version].add(e.site_id)
        for walk in (site, cohort, fleet):
            walk.add(e, held, missed)
        if max(site.w, cohort.w, fleet.w) < c.quarantine_at:
            continue
        seen = walked[: i + 1]

        def alarm(
            kind: ScopeKind, value: str, walk: _Walk, where: str, e: RatedEpisode = e, nth: int = i + 1
        ) -> ScopeAlarm:
            return ScopeAlarm(
                kind,
                value,
                round(walk.w, 9),
                walk.n,
                walk.failures,
                nth,
                walk.began,
                e.at,
                f"{walk.failures} of its last {walk.n} episodes {where} failed: W = {walk.w:.2f}, the limit is "
                f"{c.quarantine_at:g}.",
            )

        if site.w >= c.quarantine_at:
            _, rest = _w_of(seen, lambda x, s=e.site_id: x.site_id != s, c)  # type: ignore[misc]
            if rest >= c.rest_episodes:
                return alarm("site", e.site_id, site, f"at {e.site_id}")
            return alarm("fleet", FLEET, site, f"at {e.site_id}, and hardly any elsewhere,")
        mine = [x for x in seen if x.agent_version == e.agent_version] if cohort.w >= c.quarantine_at else []
        if mine and not _carried(mine, {s: sites[s].w for s in site_cohort[e.agent_version]}, "site_id", c):
            rest_w, rest = _w_of(seen, lambda x, a=e.agent_version: x.agent_version != a, c)  # type: ignore[misc]
            if rest >= c.rest_episodes and (rest_w < c.calm or fleet.w < c.quarantine_at):
                return alarm("agent_version", e.agent_version, cohort, f"on agents {e.agent_version}")
            if rest >= c.rest_episodes:
                return alarm("fleet", FLEET, fleet, "over the fleet")
            return alarm("fleet", FLEET, cohort, f"on agents {e.agent_version}, and hardly any on others,")
        if (
            fleet.w >= c.quarantine_at
            and not _carried(seen, {k: v.w for k, v in sites.items()}, "site_id", c)
            and not _carried(seen, {k: v.w for k, v in cohorts.items()}, "agent_version", c)
        ):
            return alarm("fleet", FLEET, fleet, "over the fleet")
    return None


def _carried(seen: Sequence[RatedEpisode], w: dict[str, float], by: str, c: Cusum) -> bool:
    """Whether one of these scopes carries the alarm alone: suspect itself, and the known rest without it is calm."""
    worst = max(w, key=lambda name: (w[name], name))
    if w[worst] < c.warn_at:
        return False
    rest_w, rest = _w_of(seen, lambda x: getattr(x, by) != worst, c)
    return rest >= c.rest_episodes and rest_w < c.calm


def w_of_runs(failed: np.ndarray, c: Cusum, counts: np.ndarray | None = None) -> np.ndarray:
    """Return W after each episode of many runs at once: the twin of the two window functions in SQL.

    Args:
        failed: bool, shape (runs, episodes), in event order.
        c: the rates.
        counts: bool of the same shape: which episodes are in the scope; the others leave W as it is. None: all.

    Returns:
        float64 of the same shape.
    """
    import numpy as np

    held, missed = increments(c)
    steps = np.where(failed, missed, held)
    if counts is not None:
        steps = np.where(counts, steps, 0.0)
    s = np.cumsum(steps, axis=1)
    return np.asarray(s - np.minimum(0.0, np.minimum.accumulate(s, axis=1)))


def evidence_of(alarm: ScopeAlarm, policy_hash: str) -> dict[str, Any]:
    """Return what stands as evidence beside a quarantine of a scope, as JSON types."""
    return {
        "w": alarm.w,
        "episodes": alarm.episodes,
        "failures": alarm.failures,
        "window": [alarm.window_from, alarm.window_to],
        "policy_hash": policy_hash,
    }
