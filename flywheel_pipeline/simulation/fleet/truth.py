"""The planted truth: what the pipeline should find, known because it was planted.

Belongs here: counting what is planted, in bounded memory, and the truth as a document. Does not belong here: comparing
it with what the pipeline found (`score`).
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any, Final

from flywheel_pipeline.simulation.fleet.reports import Attempt
from flywheel_pipeline.simulation.fleet.scenario import Change, Drift, Scenario

FORMAT: Final = 1


def rate_at(base: float, changes: tuple[Change, ...], day: float, site_share: float) -> float:
    """Return the true rate on a day at a site that stands at `site_share` (in [0, 1)) of the sites in their order."""
    rate = base
    for change in sorted(changes, key=lambda c: c.day):
        if day >= change.day and site_share < change.sites_share:
            rate = change.success_rate
    return rate


def pattern_rate(drift: Drift, scenario: Scenario, day: float) -> float:
    """Return the true rate of the drift's runbook over the fleet on a day: healed for good, of what can be healed.

    Each site counts once. A success that comes back within 24 hours, and every one on a flapping host, is none.
    """
    sites = scenario.fleet.sites
    total = 0.0
    for number in range(sites):
        share = number / sites
        rate = rate_at(drift.success_rate, drift.changes, day, share)
        total += drift.failing_sites_rate if share < drift.failing_sites_share else rate
    return total / sites * (1 - drift.recurrence_rate) * (1 - scenario.fleet.flapping_hosts)


@dataclass
class Counted:
    """Executions by final version: how many, how many reported as success, and by outcome."""

    executions: int = 0
    reported_successes: int = 0
    outcomes: Counter[str] = field(default_factory=Counter)

    def add(self, attempt: Attempt) -> None:
        """Count one execution."""
        self.executions += 1
        self.reported_successes += attempt.reported_success
        self.outcomes[attempt.outcome] += 1

    def as_dict(self) -> dict[str, Any]:
        """The counts as JSON types."""
        return {
            "executions": self.executions,
            "reported_successes": self.reported_successes,
            "outcomes": dict(sorted(self.outcomes.items())),
        }


@dataclass
class Truth:
    """Everything planted so far. Memory grows with patterns, rules and sites, never with rows."""

    scenario: Scenario
    seed: int
    deliveries: int = 0
    duplicates: int = 0
    replays: int = 0
    corrections: int = 0
    late: int = 0
    invalid: Counter[str] = field(default_factory=Counter)
    all: Counted = field(default_factory=Counted)
    levels: Counter[str] = field(default_factory=Counter)
    sites: Counter[str] = field(default_factory=Counter)
    patterns: dict[str, Counted] = field(default_factory=dict)
    rules: dict[str, Counted] = field(default_factory=dict)
    unregistered: Counter[str] = field(default_factory=Counter)
    first_ms: int | None = None
    last_ms: int | None = None

    def count(self, attempt: Attempt, pattern_key: str, site_today: str, *, registered: bool) -> None:
        """Count one execution in its final version; synthetic ones enter no pattern and no rule."""
        self.all.add(attempt)
        self.sites[site_today] += 1
        at = attempt.started_ms
        self.first_ms = at if self.first_ms is None else min(self.first_ms, at)
        self.last_ms = at if self.last_ms is None else max(self.last_ms, at)
        if attempt.outcome == "synthetic":
            return
        self.levels[attempt.level] += 1
        if attempt.rule_id is not None:
            if registered:
                self.rules.setdefault(attempt.rule_id, Counted()).add(attempt)
            else:
                self.unregistered[attempt.rule_id] += 1
        elif attempt.level == "L2":
            self.patterns.setdefault(pattern_key, Counted()).add(attempt)

    def document(self) -> dict[str, Any]:
        """The truth as JSON types, ready for truth.json."""
        scenario = self.scenario
        patterns = []
        for drift in scenario.drifts:
            planned = [
                (drift.key, drift.runbook, [(0.0, pattern_rate(drift, scenario, 0.0))], drift.expect),
            ]
            for day in sorted({change.day for change in drift.changes}):
                planned[0][2].append((day, pattern_rate(drift, scenario, day)))
            if drift.otherwise is not None:
                other = drift.model_copy(update={"runbook": drift.otherwise.runbook})
                planned.append((other.key, other.runbook, [(0.0, drift.otherwise.success_rate)], "any"))
            for key, runbook, rates, expect in planned:
                patterns.append(
                    {
                        "pattern_key": key,
                        "incident_type": drift.incident_type,
                        "platform": drift.platform,
                        "runbook": runbook,
                        "true_rates": [{"day": day, "rate": round(rate, 6)} for day, rate in rates],
                        "chosen_share": 1.0
                        if drift.otherwise is None
                        else drift.otherwise.share
                        if runbook == drift.otherwise.runbook
                        else 1 - drift.otherwise.share,
                        "expect": expect,
                        **self.patterns.get(key, Counted()).as_dict(),
                    }
                )
        standing = {drift.rule.rule_id: drift for drift in scenario.drifts if drift.rule is not None}
        rules = []
        for rule_id in sorted(standing.keys() | self.rules.keys()):
            drift_of_rule = standing.get(rule_id)
            rule = None if drift_of_rule is None else drift_of_rule.rule
            entry: dict[str, Any] = {"rule_id": rule_id, "expect": "any", "registered": True, "true_rates": None}
            if rule is not None and drift_of_rule is not None:
                base = drift_of_rule.success_rate if rule.success_rate is None else rule.success_rate
                days = sorted({0.0, *(change.day for change in rule.changes)})
                entry |= {
                    "expect": rule.expect,
                    "registered": rule.registered,
                    "enabled": rule.enabled,
                    "runbook": rule.runbook or drift_of_rule.runbook,
                    "true_rates": [{"day": day, "rate": rate_at(base, rule.changes, day, 0.0)} for day in days],
                    "sites_share": min((change.sites_share for change in rule.changes), default=1.0),
                }
            counted = self.rules.get(rule_id, Counted())
            rules.append({**entry, **counted.as_dict()})
        return {
            "format": FORMAT,
            "scenario": scenario.name,
            "scenario_hash": scenario.content_hash,
            "seed": self.seed,
            "starts_at": scenario.begins.isoformat(),
            "days": scenario.days,
            "settle_days": scenario.settle_days,
            "policy": scenario.policy,
            "campaign": scenario.campaign,
            "counts": {
                "deliveries": self.deliveries,
                "executions": self.all.executions,
                "reported_successes": self.all.reported_successes,
                "outcomes": dict(sorted(self.all.outcomes.items())),
                "levels": dict(sorted(self.levels.items())),
                "duplicates": self.duplicates,
                "replays": self.replays,
                "corrections": self.corrections,
                "late": self.late,
                "invalid": dict(sorted(self.invalid.items())),
                "unregistered": dict(sorted(self.unregistered.items())),
                "sites": dict(sorted(self.sites.items())),
                "first_ms": self.first_ms,
                "last_ms": self.last_ms,
            },
            "patterns": patterns,
            "rules": rules,
        }
