"""Rules in service that get worse in a planted way: at once, at one site, on one release of the agent, or not at all.

Belongs here: simulated episodes of many runs, the decisions that a look after each episode would take, and loading the
runs into a database as rules of their own. Does not belong here: bars and tables (`benchmarks/bench_demotion.py`).
"""

from __future__ import annotations

import datetime as dt
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import sqlalchemy as sa

from flywheel_pipeline.health.cusum import FLEET, RatedEpisode, ScopeFigure, attribute
from flywheel_pipeline.promotion.gates import RuleEvidence, decide_rule
from flywheel_pipeline.promotion.ledger import import_rules
from flywheel_pipeline.promotion.policy import Policy

if TYPE_CHECKING:
    import numpy as np

BEGUN = dt.datetime(2026, 1, 1, tzinfo=dt.UTC)
NEW, OLD = "1.0.74", "1.0.56"


@dataclass(frozen=True)
class Decline:
    """A fleet on which a rule gets worse.

    Attributes:
        name: for the table.
        weights: share of volume of each site, any positive scale.
        releases: the agent release of each site.
        before, after: true success rate at each site before and from episode `onset` on, fractions.
        onset: episodes before the change.
        episodes: episodes in all.
    """

    name: str
    weights: tuple[float, ...]
    releases: tuple[str, ...]
    before: tuple[float, ...]
    after: tuple[float, ...]
    onset: int = 60
    episodes: int = 180


def falling(rate: float = 0.30, sites: int = 40, releases: Sequence[str] = (NEW,), **sizes: int) -> Decline:
    """Return a rule that falls from .95 to `rate` everywhere; the releases take turns over the sites."""
    return Decline(
        f"falls from .95 to {rate:.2f}, {len(releases)} release{'s' if len(releases) > 1 else ''}",
        (1.0,) * sites,
        tuple(releases[i % len(releases)] for i in range(sites)),
        (0.95,) * sites,
        (rate,) * sites,
        **sizes,
    )


def dead_site(volume: float = 0.30, sites: int = 20, releases: Sequence[str] = (NEW, OLD), **sizes: int) -> Decline:
    """Return a rule that fails always at one site with this share of the volume, and works at .95 elsewhere."""
    others = (1 - volume) / (sites - 1)
    return Decline(
        f"one dead site with {volume:.0%} of the volume",
        (volume, *(others,) * (sites - 1)),
        tuple(releases[i % len(releases)] for i in range(sites)),
        (0.95,) * sites,
        (0.0, *(0.95,) * (sites - 1)),
        **sizes,
    )


def old_cohort(share: float = 0.25, sites: int = 40, rate: float = 0.30, **sizes: int) -> Decline:
    """Return a rule that falls to `rate` on the old release, which this share of the sites has."""
    old = round(share * sites)
    return Decline(
        f"the old release breaks on {share:.0%} of the sites",
        (1.0,) * sites,
        (OLD,) * old + (NEW,) * (sites - old),
        (0.95,) * sites,
        (rate,) * old + (0.95,) * (sites - old),
        **sizes,
    )


def in_control(rate: float = 0.95, sites: int = 40, episodes: int = 5000) -> Decline:
    """Return a rule that stays as it is."""
    return Decline(
        f"stays at {rate:.2f}", (1.0,) * sites, (NEW,) * sites, (rate,) * sites, (rate,) * sites, 0, episodes
    )


def simulate(plan: Decline, runs: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Return (site, failed), each of shape (runs, episodes): int64, bool."""
    import numpy as np

    rng = np.random.default_rng(seed)
    weights = np.asarray(plan.weights) / sum(plan.weights)
    site = rng.choice(len(weights), size=(runs, plan.episodes), p=weights)
    changed = np.arange(plan.episodes) >= plan.onset
    rates = np.where(changed, np.asarray(plan.after)[site], np.asarray(plan.before)[site])
    return site, rng.random(site.shape) >= rates


def episodes_of(plan: Decline, site: np.ndarray, failed: np.ndarray) -> list[RatedEpisode]:
    """Return one run's episodes as the walk takes them."""
    return [
        RatedEpisode(f"site-{s:03d}", plan.releases[s], bool(f), str(i))
        for i, (s, f) in enumerate(zip(site.tolist(), failed.tolist(), strict=True))
    ]


@dataclass(frozen=True)
class Taken:
    """What a look took out of service: after how many episodes, and which scope (`fleet`: the rule)."""

    episode: int
    kind: str
    value: str


def follow(episodes: Sequence[RatedEpisode], policy: Policy) -> list[Taken]:
    """Look after each episode, as the pipeline would, with every gate of a rule in service; stop when it leaves.

    What is quarantined reports no more: its later episodes are left out, and its earlier ones no longer count.
    """
    taken: list[Taken] = []
    counted: list[RatedEpisode] = []
    sites_run: set[str] = set()
    for n, e in enumerate(episodes, 1):
        out = {(t.kind, t.value) for t in taken}
        if ("site", e.site_id) in out or ("agent_version", e.agent_version) in out:
            continue
        counted.append(e)
        sites_run.add(e.site_id)
        if not e.failed:
            continue  # no success makes a look take anything away
        decision_evidence = _evidence(counted, policy, [t.value for t in taken if t.kind == "site"], len(sites_run))
        decision = decide_rule(decision_evidence, policy)
        if decision.verdict == "quarantine":
            taken.append(Taken(n, "fleet", FLEET))
            return taken
        if decision.verdict == "quarantine_scope":
            for alarm in decision_evidence.alarms:
                taken.append(Taken(n, alarm.kind, alarm.value))
            out = {(t.kind, t.value) for t in taken}
            counted = [
                x for x in counted if ("site", x.site_id) not in out and ("agent_version", x.agent_version) not in out
            ]
    return taken


def _evidence(counted: Sequence[RatedEpisode], policy: Policy, sites_out: list[str], sites_run: int) -> RuleEvidence:
    found = attribute(counted, policy.demotion.cusum, sites_out=sites_out, sites_run=sites_run)
    tallies: dict[tuple[str, str], list[int]] = {}
    for e in counted:
        for scope in (("site", e.site_id), ("agent_version", e.agent_version)):
            tally = tallies.setdefault(scope, [0, 0])
            tally[0] += 1
            tally[1] += e.failed
    failures = sum(e.failed for e in counted)
    return RuleEvidence(
        rule_id="simulated",
        rule_version=1,
        incident_type="simulated",
        runbook_id="RB-SIMULATED",
        platform="windows",
        source="promoted",
        state="fleet",
        runbook_problem=None,
        matches=0,
        successes=0,
        failures=0,
        rated_successes=len(counted) - failures,
        rated_failures=failures,
        scopes=tuple(ScopeFigure(kind, value, n, f, 0.0, 0.0) for (kind, value), (n, f) in tallies.items()),
        alarms=found.scopes,
        fleet_alarm=found.fleet,
    )


def load_runs(connection: sa.Connection, plan: Decline, site: np.ndarray, failed: np.ndarray, prefix: str) -> list[str]:
    """Put each run into the database as a rule of its own, with its episodes as the refresh would leave them.

    Returns the rule ids, in the order of the runs. Episodes follow each other by a minute, each on a host of its own.
    """
    rules = [f"{prefix}-{run:04d}" for run in range(site.shape[0])]
    import_rules(
        connection,
        [
            {
                "rule_id": rule,
                "incident_pattern": {"incident_type": f"simulated_{rule}"},
                "runbook_id": "RB-WIN-SEC-001",
                "platform": "windows",
                "enabled": True,
                "created_at": BEGUN,
            }
            for rule in rules
        ],
        actor="simulation",
        reason="a planted decline",
    )
    connection.execute(
        sa.text(
            """
            INSERT INTO episodes (site_id, day, level, rule_id, incident_type, runbook_id, platform, hostname, first_at,
              last_at, executions, raw_successes, raw_failures, synthetic, agent_unsupported, not_applicable, unreachable,
              escalated, suppressed, unverified, failures, successes, refired, outcome, agent_version)
            SELECT 'site-' || to_char(x.site, 'FM000'), (x.at AT TIME ZONE 'UTC')::date, 'L1', x.rule, 'simulated',
              'RB-WIN-SEC-001', 'windows', 'host-' || x.n, x.at, x.at, 1, 1 - x.failed, x.failed, 0, 0, 0, 0, 0, 0, 0,
              x.failed, 1 - x.failed, 0, CASE x.failed WHEN 1 THEN 'failure' ELSE 'success' END,
              (CAST(:releases AS text[]))[x.site + 1]
            FROM (
              SELECT (CAST(:rules AS text[]))[(k - 1) / :n + 1] AS rule, (k - 1) % :n + 1 AS n, s.site, s.failed,
                CAST(:begun AS timestamptz) + ((k - 1) % :n + 1) * interval '1 minute' AS at
              FROM unnest(CAST(:sites AS int[]), CAST(:failed AS int[])) WITH ORDINALITY AS s (site, failed, k)
            ) AS x
            """
        ),
        {
            "rules": rules,
            "releases": list(plan.releases),
            "n": site.shape[1],
            "begun": BEGUN,
            "sites": site.ravel().tolist(),
            "failed": failed.astype(int).ravel().tolist(),
        },
    )
    return rules
