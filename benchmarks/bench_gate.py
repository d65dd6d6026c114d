"""The gates on 10,000 candidates with evidence from 200 sites each; bar: 5 s, on two cores.

Two ways are measured: `decide_pattern` on every candidate, with every gate and sentence, as the pipeline does it; and
`evaluate_many`, the sequential test alone on arrays. Exit 1 if the first misses the bar, or if the two disagree. The
bar is on wall time; the CPU seconds beside it tell a slow gate from a busy machine.
"""

from __future__ import annotations

import sys
import time
from dataclasses import replace

import numpy as np

from flywheel_pipeline.promotion import evalue
from flywheel_pipeline.promotion.gates import PatternEvidence, SiteEvidence, decide_pattern
from flywheel_pipeline.promotion.policy import load_policy

CANDIDATES, SITES, BAR_SECONDS = 10_000, 200, 5.0


def main() -> int:
    """Print the table; return the exit code."""
    rng = np.random.default_rng(20260215)
    # True rates from hopeless to perfect, sites that differ, one to ten counted episodes each.
    rate = rng.choice([0.3, 0.8, 0.88, 0.9, 0.93, 0.97, 1.0], size=(CANDIDATES, 1))
    site_rate = np.clip(rate + rng.normal(0, 0.03, (CANDIDATES, SITES)), 0, 1)
    episodes = rng.integers(1, 11, (CANDIDATES, SITES))
    successes = rng.binomial(episodes, site_rate)
    failures = episodes - successes
    policy = load_policy("standard")
    base = PatternEvidence(
        pattern_key="firewall~RB-WIN-SEC-001~windows",
        incident_type="firewall",
        runbook_id="RB-WIN-SEC-001",
        platform="windows",
        occurrences=2000,
        successes=1900,
        excluded=0,
        unverified=0,
        runbook_problem=None,
        is_disruptive=False,
        category="firewall",
        conditions={"incident_type": "firewall"},
        matched_incidents=2000,
        shadowed_rules=(),
        capable_share=1.0,
        selected_incidents=2000,
        type_incidents=2000,
        sites=(),
        active_sites=SITES,
        stage="canary",
        would_fires=60,
        shadow_days=20.0,
        attempt=1,
        approvers=(),
        rejected_by=None,
        checks_green=True,
        days_observed=10.0,
        step=2,
        step_days=10.0,
        own_successes=500,
        served_sites=SITES,
    )
    names = [f"site-{i:03d}" for i in range(SITES)]
    evidence = [
        replace(
            base,
            sites=tuple(
                SiteEvidence(name, s, f, 4) for name, s, f in zip(names, good.tolist(), bad.tolist(), strict=True)
            ),
        )
        for good, bad in zip(successes, failures, strict=True)
    ]

    started, started_cpu = time.perf_counter(), time.process_time()
    decisions = [decide_pattern(e, policy) for e in evidence]
    gates_seconds, gates_cpu = time.perf_counter() - started, time.process_time() - started_cpu

    gate = policy.stage_gate("ring", "firewall")
    started = time.perf_counter()
    arrays = evalue.evaluate_many(successes, failures, gate.floor, gate.alpha)
    arrays_seconds = time.perf_counter() - started

    advanced = sum(d.verdict == "advance" for d in decisions)
    rejected = sum(d.verdict == "reject" for d in decisions)
    agree = all((d.verdict == "advance") == (v == "promote") for d, v in zip(decisions, arrays["verdict"], strict=True))
    print(f"{CANDIDATES:,} candidates of {SITES} sites: {advanced:,} advance, {rejected:,} rejected")
    print(f"decide_pattern, all gates    {gates_seconds:6.2f} s   bar {BAR_SECONDS:.0f} s   (CPU {gates_cpu:.2f} s)")
    print(f"evaluate_many, the test only {arrays_seconds:6.2f} s")
    print(f"the two agree: {'yes' if agree else 'NO'}")
    return 0 if gates_seconds <= BAR_SECONDS and agree else 1


if __name__ == "__main__":
    sys.exit(main())
