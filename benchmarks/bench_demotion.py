"""Demotion under `standard`: how soon a rule that gets worse is taken out, and from whom alone.

Each run is a simulated history whose planted truth is known, looked at after every episode with every gate of a rule in
service (`simulation/decline.py`): what is quarantined reports no more. Bars:

- falls from .95 to .30 everywhere: out of service within 17 episodes of the fall in 95 % of the runs
- one dead site with 30 % of the volume: the fleet demoted in at most 2 % of the runs, that site quarantined in the others
- the old release breaks: that release quarantined, no rule taken from the others, in 95 % of the runs
- nothing changes, 2,000 episodes: the fleet demoted in at most 1 % of the runs (a plausibility check, no bar of the issue)

    python benchmarks/bench_demotion.py [--quick] [--runs 500] [--seed 1]
"""

from __future__ import annotations

import argparse
import sys

import numpy as np

from flywheel_pipeline.promotion.policy import load_policy
from flywheel_pipeline.simulation.decline import (
    OLD,
    Decline,
    Taken,
    dead_site,
    episodes_of,
    falling,
    follow,
    in_control,
    old_cohort,
    simulate,
)

WITHIN = 17


def histories(plan: Decline, runs: int, seed: int) -> list[list[Taken]]:
    """What was taken out of service in each run, in order."""
    policy = load_policy("standard")
    sites, failed = simulate(plan, runs, seed)
    return [follow(episodes_of(plan, site, bad), policy) for site, bad in zip(sites, failed, strict=True)]


def share(flags: list[bool]) -> float:
    """The fraction of the runs."""
    return sum(flags) / len(flags)


def told(met: bool, sentence: str) -> bool:
    """Print one line of the table."""
    print(f"{'ok  ' if met else 'MISS'} {sentence}", flush=True)
    return met


def fleet(run: list[Taken]) -> bool:
    """Whether the rule left service altogether."""
    return any(taken.kind == "fleet" for taken in run)


def main() -> int:
    """Simulate, count, and return 1 where a bar is missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="100 runs")
    parser.add_argument("--runs", type=int, default=500)
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    runs = 100 if options.quick else options.runs
    met = True

    plan = falling()
    found = histories(plan, runs, options.seed)
    delays = [
        next((t.episode - plan.onset for t in run if t.kind == "fleet" and t.episode > plan.onset), 10**6)
        for run in found
    ]
    early = share([any(t.episode <= plan.onset for t in run) for run in found])
    within = share([any(t.episode <= plan.onset + WITHIN for t in run if t.kind == "fleet") for run in found])
    met &= told(
        within >= 0.95,
        f"demotion: {plan.name}: out within {WITHIN} episodes in {within:.1%} of {runs} runs (bar 95 %), "
        f"median {np.median(delays):.0f}, something taken before the fall in {early:.1%}",
    )

    plan = dead_site()
    found = histories(plan, runs, options.seed + 1)
    demoted = share([fleet(run) for run in found])
    caught = share([any((t.kind, t.value) == ("site", "site-000") for t in run) for run in found])
    met &= told(
        demoted <= 0.02 and caught >= 1 - demoted - 0.02,
        f"demotion: {plan.name}: fleet demoted in {demoted:.1%} of {runs} runs (bar 2 %), that site quarantined in {caught:.1%}",
    )

    plan = old_cohort()
    found = histories(plan, runs, options.seed + 2)
    right = share([any((t.kind, t.value) == ("agent_version", OLD) for t in run) and not fleet(run) for run in found])
    others = share([any(t.kind == "agent_version" and t.value != OLD for t in run) or fleet(run) for run in found])
    met &= told(
        right >= 0.95 and others <= 0.02,
        f"demotion: {plan.name}: that release quarantined and no other in {right:.1%} of {runs} runs (bar 95 %), "
        f"others touched in {others:.1%}",
    )

    plan = in_control(episodes=600 if options.quick else 2000)
    found = histories(plan, runs, options.seed + 3)
    demoted = share([fleet(run) for run in found])
    met &= told(
        demoted <= 0.01,
        f"demotion: {plan.name} for {plan.episodes:,} episodes: fleet demoted in {demoted:.1%} of {runs} runs",
    )
    return 0 if met else 1


if __name__ == "__main__":
    sys.exit(main())
