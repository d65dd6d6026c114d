"""Evidence that passes every gate, to be changed in one place by a test."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from flywheel_pipeline.promotion.gates import Decision, GateResult, PatternEvidence, RuleEvidence, SiteEvidence
from flywheel_pipeline.promotion.policy import Policy


def sites(*counts: tuple[int, int] | tuple[int, int, int]) -> tuple[SiteEvidence, ...]:
    """Sites from (successes, failures[, hosts]); four hosts unless said."""
    return tuple(
        SiteEvidence(f"site-{i + 1:02d}", c[0], c[1], c[2] if len(c) == 3 else 4) for i, c in enumerate(counts)
    )


def pattern(**changes: Any) -> PatternEvidence:
    """A firewall pattern at the ring's second step with 20 sites of ten clean episodes: it goes to the fleet."""
    base = PatternEvidence(
        pattern_key="firewall~RB-WIN-SEC-001~windows",
        incident_type="firewall",
        runbook_id="RB-WIN-SEC-001",
        platform="windows",
        occurrences=240,
        successes=240,
        excluded=10,
        unverified=0,
        runbook_problem=None,
        is_disruptive=False,
        category="firewall",
        conditions={"incident_type": "firewall"},
        matched_incidents=240,
        shadowed_rules=(),
        capable_share=1.0,
        selected_incidents=236,
        type_incidents=240,
        sites=sites(*[(10, 0)] * 20),
        active_sites=20,
        stage="ring",
        would_fires=60,
        shadow_days=20.0,
        attempt=1,
        approvers=(),
        rejected_by=None,
        checks_green=True,
        days_observed=30.0,
        step=2,
        step_days=10.0,
        own_successes=100,
        own_failures=0,
        served_sites=20,
    )
    return replace(base, **changes)


def rule(**changes: Any) -> RuleEvidence:
    """RB-AUTO-FIREWALL as it stood on the day: 166 of 166."""
    base = RuleEvidence(
        rule_id="RB-AUTO-FIREWALL",
        rule_version=1,
        incident_type="firewall",
        runbook_id="RB-WIN-SEC-001",
        platform="windows",
        source="promoted",
        state="fleet",
        runbook_problem=None,
        matches=166,
        successes=166,
        failures=0,
        rated_successes=166,
        rated_failures=0,
    )
    return replace(base, **changes)


def counted(successes: int, total: int, **changes: Any) -> RuleEvidence:
    """A rule whose raw executions and rated episodes are the same bare counts."""
    failures = total - successes
    return rule(
        matches=total,
        successes=successes,
        failures=failures,
        rated_successes=successes,
        rated_failures=failures,
        **changes,
    )


def gate(decision: Decision, name: str) -> GateResult:
    """The one gate of this name."""
    (found,) = [g for g in decision.gates if g.gate == name]
    return found


def changed(policy: Policy, path: str, value: Any) -> Policy:
    """The policy with one value replaced, at a dotted path, validated anew."""
    document = policy.model_dump(mode="json")
    *parents, last = path.split(".")
    place: Any = document
    for part in parents:
        place = place[int(part)] if part.isdigit() else place[part]
    assert (last in place) if isinstance(place, dict) else True
    place[last] = value
    return Policy.model_validate(document)
