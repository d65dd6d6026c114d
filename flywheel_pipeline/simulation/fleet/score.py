"""The score: what the pipeline found, held against what was planted.

Belongs here: reading the pipeline's state and comparing it with a planted truth. Does not belong here: planting
(`truth`), printing (`cli.simulation`). Rates are fractions, delays are days and executions; nothing over nothing is null.

Crossing: the moment at which the settled, capped L2 episodes of a pattern first suffice for the policy's first served
stage, looked at after each of them. The delay runs from there to the ledger's first served stage, so it holds what the
cadence of passes, the shadow stage and the other gates cost.
"""

from __future__ import annotations

import datetime as dt
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, Final

import sqlalchemy as sa

from flywheel_pipeline.aggregates import quality as aggregates_quality
from flywheel_pipeline.candidates.keys import rule_id_of_pattern
from flywheel_pipeline.delivery.quality import manifests_match_registry
from flywheel_pipeline.promotion import evalue
from flywheel_pipeline.promotion.gates import is_high_risk
from flywheel_pipeline.promotion.policy import Policy, load_policy
from flywheel_pipeline.promotion.quality import no_placeholder_enabled, registry_equals_ledger

SERVED: Final = ("canary", "ring", "fleet")
STAGES: Final = ("shadow", *SERVED)
_SETTLE: Final = dt.timedelta(hours=24)


def score(
    engine: sa.Engine, truth: Mapping[str, Any], *, history: Sequence[Mapping[str, Any]] | None = None
) -> dict[str, Any]:
    """Compare the pipeline's state with a planted truth.

    Args:
        engine: the database that the pipeline ran over.
        truth: a document of `truth.Truth`.
        history: the days of `lab.History`, if the lab stepped them: what became of acts.

    Returns:
        JSON types: `figures`, each {figure, expected, found, ok}; `patterns` and `rules` with their verdicts and
        delays; `promotion` with precision, recall and false promotions by stage; `ok`.
    """
    figures: list[dict[str, Any]] = []
    with engine.connect() as connection:
        figures += _counts(connection, truth)
        patterns = _patterns(connection, truth)
        rules = _rules(connection, truth)
        unresolved = {
            row.rule_id: row.executions
            for row in connection.execute(
                sa.text("SELECT rule_id, executions FROM unresolved_rule_ids WHERE executions > 0 ORDER BY rule_id")
            )
        }
        questions = [
            aggregates_quality.attributed_plus_unresolved_is_all(connection),
            registry_equals_ledger(connection),
            no_placeholder_enabled(connection),
            manifests_match_registry(connection),
        ]
    questions.insert(0, aggregates_quality.counters_equal_recount(engine, full=True))
    if truth["campaign"] is None:
        figures.append(_figure("unresolved rule ids", truth["counts"]["unregistered"], unresolved))
    for finding in questions:
        figures.append(_figure(f"invariant: {finding.sentence}", finding.required, finding.observed, ok=finding.passed))
    for pattern in patterns:
        if pattern["expect"] != "any":
            figures.append(
                _figure(f"pattern {pattern['pattern_key']}", pattern["expect"], pattern["reached"], ok=pattern["ok"])
            )
    for rule in rules:
        if rule["expect"] != "any":
            figures.append(_figure(f"rule {rule['rule_id']}", rule["expect"], rule["state"], ok=rule["ok"]))
    promotion = _promotion(patterns)
    figures.append(_figure("false promotions to the fleet", 0, promotion["false_promotions"]["fleet"]))
    for day in history or ():
        for act in day["acts"]:
            if act["act"] == "blanket_reenable":
                figures.append(_figure("a blanket re-enable is refused", "refused", act["message"], ok=not act["done"]))
    return {
        "scenario": truth["scenario"],
        "seed": truth["seed"],
        "policy": truth["policy"],
        "ok": all(figure["ok"] for figure in figures),
        "promotion": promotion,
        "patterns": patterns,
        "rules": rules,
        "figures": figures,
    }


def _figure(name: str, expected: Any, found: Any, *, ok: bool | None = None) -> dict[str, Any]:
    return {"figure": name, "expected": expected, "found": found, "ok": expected == found if ok is None else ok}


# ------------------------------------------------------------------------------------------------------- counts


def _counts(connection: sa.Connection, truth: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Rows lost, rows counted twice, classes, patterns, rules, sites, corrections and rejects."""
    planted = truth["counts"]
    campaign = truth["campaign"]
    where = "chaos_campaign_id = :campaign" if campaign else "true"
    values = {"campaign": campaign} if campaign else {}
    rows = connection.execute(
        sa.text(f"SELECT count(*) FROM execution_telemetry WHERE {where}"),  # noqa: S608 (constants)
        values,
    ).scalar_one()
    found = [
        _figure("executions in the log (planted - found = lost)", planted["executions"], rows),
    ]
    if campaign:
        counted = connection.execute(
            sa.text(
                "SELECT count(*) FROM executions AS e JOIN execution_telemetry AS t USING (execution_id) "
                "WHERE t.chaos_campaign_id = :campaign AND e.outcome_class <> 'synthetic'"
            ),
            values,
        ).scalar_one()
        return [*found, _figure("campaign rows that count", 0, counted)]
    classes = {
        row.outcome_class: row.n
        for row in connection.execute(
            sa.text("SELECT outcome_class, count(*) AS n FROM executions GROUP BY outcome_class ORDER BY outcome_class")
        )
    }
    found.append(_figure("executions by outcome class", planted["outcomes"], classes))
    counted = connection.execute(
        sa.text("SELECT coalesce(sum(executions + synthetic), 0)::bigint FROM episodes")
    ).scalar_one()
    found.append(_figure("executions counted in episodes (more: counted twice)", planted["executions"], counted))
    sites = {
        row.site_id: row.n
        for row in connection.execute(
            sa.text(
                "SELECT site_id, sum(executions + synthetic)::bigint AS n FROM episodes GROUP BY site_id ORDER BY site_id"
            )
        )
    }
    wrong = sorted(s for s in sites.keys() | planted["sites"].keys() if sites.get(s) != planted["sites"].get(s))
    found.append(_figure("sites whose executions are not those planted", [], wrong[:20]))
    expected_rules = {
        r["rule_id"]: [r["executions"], r["reported_successes"]] for r in truth["rules"] if r["executions"]
    }
    counted_rules = {
        row.rule_id: [row.match_count, row.success_count]
        for row in connection.execute(
            sa.text("SELECT rule_id, match_count, success_count FROM l1_rules WHERE match_count > 0 ORDER BY rule_id")
        )
    }
    found.append(_figure("matches and successes of each rule", expected_rules, counted_rules))
    expected_patterns = {
        p["pattern_key"]: [p["executions"], p["reported_successes"]] for p in truth["patterns"] if p["executions"]
    }
    counted_patterns = {
        row.pattern_key: [row.executions, row.raw_successes]
        for row in connection.execute(
            sa.text("SELECT pattern_key, executions, raw_successes FROM pattern_candidates WHERE executions > 0")
        )
    }
    found.append(_figure("executions and successes of each pattern", expected_patterns, counted_patterns))
    rejects = {
        row.reason_code: row.n
        for row in connection.execute(
            sa.text(
                "SELECT reason_code, sum(times_seen)::bigint AS n FROM telemetry_rejects GROUP BY reason_code "
                "ORDER BY reason_code"
            )
        )
    }
    found.append(_figure("rejects by reason", planted["invalid"], rejects))
    return found


# ------------------------------------------------------------------------------------------------------ patterns


def _rate_on(rates: Sequence[Mapping[str, Any]] | None, day: float) -> float | None:
    """Return the planted rate on a day; None where none was planted."""
    known = [entry["rate"] for entry in rates or () if entry["day"] <= day]
    return known[-1] if known else None


def _patterns(connection: sa.Connection, truth: Mapping[str, Any]) -> list[dict[str, Any]]:
    policy = load_policy(truth["policy"])
    begins = dt.datetime.fromisoformat(truth["starts_at"])
    found = []
    for pattern in truth["patterns"]:
        key = pattern["pattern_key"]
        events = connection.execute(
            sa.text(
                "SELECT e.rule_id, e.to_state, e.occurred_at FROM rule_events AS e "
                "WHERE e.definition ->> 'pattern_key' = :key AND e.kind IN ('advanced', 'promoted') ORDER BY e.event_id"
            ),
            {"key": key},
        ).all()
        state = connection.execute(
            sa.text(
                "SELECT state, rule_id FROM l1_rules WHERE pattern_key = :key AND source = 'promoted' ORDER BY rule_id"
            ),
            {"key": key},
        ).all()
        reached: dict[str, dict[str, Any]] = {}
        for event in events:
            day = (event.occurred_at - begins).total_seconds() / 86400
            rate = _rate_on(pattern["true_rates"], day)
            reached.setdefault(
                event.to_state,
                {"day": round(day, 3), "true_rate": rate, "false": _is_false(policy, pattern, event.to_state, rate)},
            )
        served_at = min((e.occurred_at for e in events if e.to_state in SERVED), default=None)
        crossing = _crossing(connection, policy, pattern)
        stage = state[0].state if state else "none"
        observed = connection.execute(
            sa.text("SELECT rated_episodes, successful_episodes FROM pattern_candidates WHERE pattern_key = :key"),
            {"key": key},
        ).one_or_none()
        found.append(
            {
                "pattern_key": key,
                "expect": pattern["expect"],
                "rules": [row.rule_id for row in state],
                "own_rule": all(row.rule_id == rule_id_of_pattern(key) for row in state),
                "state": stage,
                "reached": stage if not reached else f"{stage}, furthest {max(reached, key=STAGES.index)}",
                "stages": reached,
                "ok": _pattern_ok(pattern["expect"], stage, reached),
                "good": _is_good(policy, pattern),
                "true_rate": pattern["true_rates"][-1]["rate"],
                "observed_rate": None
                if observed is None or not observed.rated_episodes
                else observed.successful_episodes / observed.rated_episodes,
                "crossed_day": None if crossing is None else round((crossing - begins).total_seconds() / 86400, 3),
                "delay_days": None
                if crossing is None or served_at is None
                else round((served_at - crossing).total_seconds() / 86400, 3),
                "delay_executions": None
                if crossing is None or served_at is None
                else connection.execute(
                    sa.text(
                        "SELECT count(*) FROM executions WHERE level = 'L2' AND incident_type = :type AND runbook_id = :runbook "
                        "AND platform = :platform AND event_at > :crossing AND event_at <= :served"
                    ),
                    {
                        "type": pattern["incident_type"],
                        "runbook": pattern["runbook"],
                        "platform": pattern["platform"],
                        "crossing": crossing,
                        "served": served_at,
                    },
                ).scalar_one(),
            }
        )
    return found


def _fleet_floor(policy: Policy, stage: str, incident_type: str) -> float:
    if policy.threshold is not None:
        return policy.threshold.min_success_rate
    return policy.stage_gate(stage, incident_type).floor


def _is_good(policy: Policy, pattern: Mapping[str, Any]) -> bool:
    """Whether a rule of this pattern would deserve the whole fleet: its rate stays above the floor, and it is eligible.

    Eligible is what the scenario does not say must never be served, and what L2 chooses for nearly all incidents.
    """
    floor = _fleet_floor(policy, "fleet", pattern["incident_type"])
    lowest = min(entry["rate"] for entry in pattern["true_rates"])
    return bool(lowest > floor and pattern["expect"] != "never" and pattern["chosen_share"] >= 0.9)


def _is_false(policy: Policy, pattern: Mapping[str, Any], stage: str, rate: float | None) -> bool:
    """Whether entering a stage was wrong: below that stage's own floor then, or never to be served. Shadow runs nothing."""
    if stage not in SERVED:
        return False
    if pattern["expect"] == "never":
        return True
    return rate is not None and rate < _fleet_floor(policy, stage, pattern["incident_type"]) - 1e-9


def _pattern_ok(expect: str, stage: str, reached: Mapping[str, Any]) -> bool:
    if expect == "never":
        return stage not in SERVED and not any(name in reached for name in SERVED)
    return expect == "any" or stage == "fleet" or (expect == "served" and stage in SERVED)


def _promotion(patterns: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Precision and recall of serving at all, false promotions by stage, delays."""
    false = Counter(stage for p in patterns for stage, entered in p["stages"].items() if entered["false"])
    served = [p for p in patterns if any(stage in p["stages"] for stage in SERVED)]
    good = [p for p in patterns if p["good"]]
    right = [p for p in served if p["good"]]
    delays = sorted(p["delay_days"] for p in right if p["delay_days"] is not None)
    executions = sorted(p["delay_executions"] for p in right if p["delay_executions"] is not None)
    return {
        "patterns": len(patterns),
        "good": len(good),
        "served": len(served),
        "precision": len(right) / len(served) if served else None,
        "recall": len(right) / len(good) if good else None,
        "false_promotions": {stage: false.get(stage, 0) for stage in SERVED},
        "median_delay_days": delays[len(delays) // 2] if delays else None,
        "median_delay_executions": executions[len(executions) // 2] if executions else None,
    }


def _crossing(connection: sa.Connection, policy: Policy, pattern: Mapping[str, Any]) -> dt.datetime | None:
    """Return when the evidence of L2 first sufficed for the first served stage; None: it never did."""
    if policy.threshold is not None:
        executions = connection.execute(
            sa.text(
                "SELECT event_at, success FROM executions WHERE level = 'L2' AND outcome_class <> 'synthetic' "
                "AND incident_type = :type AND runbook_id = :runbook AND platform = :platform ORDER BY event_at"
            ),
            {"type": pattern["incident_type"], "runbook": pattern["runbook"], "platform": pattern["platform"]},
        )
        good = 0
        for n, row in enumerate(executions, 1):
            good += row.success
            enough = n >= policy.threshold.min_occurrences
            if enough and good >= policy.threshold.min_success_rate * n - 1e-9:
                at: dt.datetime = row.event_at
                return at
        return None
    catalogue = connection.execute(
        sa.text("SELECT is_disruptive, category FROM pattern_candidates WHERE pattern_key = :key"),
        {"key": pattern["pattern_key"]},
    ).one_or_none()
    if catalogue is None:
        return None
    risk = is_high_risk(bool(catalogue.is_disruptive), catalogue.category, policy)
    gate = policy.stage_gate("canary", pattern["incident_type"], high_risk=risk)
    need = evalue.threshold(gate.alpha)
    hosts: Counter[tuple[str, str]] = Counter()
    sites: Counter[str] = Counter()
    successes = failures = 0
    for row in connection.execute(
        sa.text(
            "SELECT site_id, hostname, succeeded, last_at FROM pattern_evidence WHERE pattern_key = :key "
            "ORDER BY last_at, site_id, hostname"
        ),
        {"key": pattern["pattern_key"]},
    ):
        hosts[row.site_id, row.hostname] += 1
        if hosts[row.site_id, row.hostname] > policy.evidence.episodes_per_host:
            continue
        sites[row.site_id] += 1
        if sites[row.site_id] > policy.evidence.episodes_per_site:
            continue
        successes += row.succeeded
        failures += not row.succeeded
        if evalue.log_e(successes, failures, gate.floor) >= need:
            settled: dt.datetime = row.last_at + _SETTLE
            return settled
    return None


# --------------------------------------------------------------------------------------------------------- rules


def _rules(connection: sa.Connection, truth: Mapping[str, Any]) -> list[dict[str, Any]]:
    policy = load_policy(truth["policy"])
    begins = dt.datetime.fromisoformat(truth["starts_at"])
    floor = policy.demotion.floor
    found = []
    for rule in truth["rules"]:
        state = connection.execute(
            sa.text("SELECT state, state_reason FROM l1_rules WHERE rule_id = :id"), {"id": rule["rule_id"]}
        ).one_or_none()
        taken_out = connection.execute(
            sa.text(
                "SELECT min(occurred_at) FROM rule_events WHERE rule_id = :id AND to_state = 'quarantined' AND kind = 'quarantined'"
            ),
            {"id": rule["rule_id"]},
        ).scalar()
        bad_from = next((e["day"] for e in rule["true_rates"] or () if e["rate"] < floor), None)
        entry: dict[str, Any] = {
            "rule_id": rule["rule_id"],
            "expect": rule["expect"],
            "state": "unknown to the registry" if state is None else state.state,
            "reason": None if state is None else state.state_reason,
            "bad_from_day": bad_from,
            "quarantined_day": None if taken_out is None else round((taken_out - begins).total_seconds() / 86400, 3),
            "quarantine_delay_days": None,
            "quarantine_delay_executions": None,
            "ok": {
                "quarantined": state is not None and state.state == "quarantined",
                "kept": state is not None and state.state in SERVED,
                "any": True,
            }[rule["expect"]],
        }
        if bad_from is not None and taken_out is not None:
            turned = begins + dt.timedelta(days=bad_from)
            entry["quarantine_delay_days"] = round((taken_out - turned).total_seconds() / 86400, 3)
            entry["quarantine_delay_executions"] = connection.execute(
                sa.text(
                    "SELECT count(*) FROM executions WHERE rule_id = :id AND level = 'L1' AND outcome_class <> 'synthetic' "
                    "AND event_at >= :turned AND event_at <= :out"
                ),
                {"id": rule["rule_id"], "turned": turned, "out": taken_out},
            ).scalar_one()
        if bad_from is not None and rule.get("sites_share", 1.0) < 1.0:
            entry["scope"] = _scope(connection, truth, rule)
        found.append(entry)
    return found


def _scope(connection: sa.Connection, truth: Mapping[str, Any], rule: Mapping[str, Any]) -> dict[str, Any]:
    """Compare, by the manifests alone, where a rule is served at the end with where it is bad.

    The bad sites are the first ones, as planted. Returns {bad_sites, still_served_at_bad, withdrawn_from_good}: the
    smallest right scope leaves both last figures at 0.
    """
    sites = sorted(truth["counts"]["sites"])
    bad = set(sites[: round(rule["sites_share"] * len(sites))])
    served = set(
        connection.execute(
            sa.text(
                "SELECT DISTINCT m.site_id FROM manifest_entries AS e "
                "JOIN manifest_contents AS c ON c.entry_ids @> ARRAY[e.entry_id] "
                "JOIN appliance_manifests AS m ON m.content_hash = c.content_hash WHERE e.rule_id = :id"
            ),
            {"id": rule["rule_id"]},
        ).scalars()
    )
    return {
        "bad_sites": len(bad),
        "still_served_at_bad": len(served & bad),
        "withdrawn_from_good": len(set(sites) - bad - served),
    }
