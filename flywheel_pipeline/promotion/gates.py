"""The gates: pure functions from evidence and policy to pass, fail or inconclusive, with figures and a sentence.

Belongs here: what each gate asks and the decision they add up to. Does not belong here: loading evidence, storing
decisions. All gates are evaluated in order and all are reported; the first that does not pass gives the reason. What
is not known is inconclusive, and the inconclusive holds: nothing fails open.
"""

from __future__ import annotations

import datetime as dt
import math
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from flywheel_pipeline.health.cusum import ScopeAlarm, ScopeFigure
from flywheel_pipeline.promotion import evalue
from flywheel_pipeline.promotion.policy import Policy
from flywheel_pipeline.promotion.runbook_ids import is_placeholder

GateVerdict = Literal["pass", "fail", "inconclusive"]
PatternVerdict = Literal["promote", "advance", "hold", "reject", "expired"]
RuleVerdict = Literal["keep", "warn", "quarantine_scope", "quarantine"]

NEXT_STAGE = {"none": "shadow", "proposed": "shadow", "shadow": "canary", "canary": "ring", "ring": "fleet"}
# A step out of these puts a rule where no machine has run it yet: a policy limits how many one run takes.
NOT_SERVED = frozenset({"none", "proposed", "shadow"})


@dataclass(frozen=True)
class SiteEvidence:
    """Rated episodes of one site that count (after the caps), and the hosts they come from; of L2, or of the rule (L1)."""

    site_id: str
    successes: int
    failures: int
    hosts: int
    level: str = "L2"


@dataclass(frozen=True)
class PatternEvidence:
    """What is known of a pattern when it is decided.

    `occurrences` and `successes` are raw L2 executions as reported; `sites` holds the capped, settled episodes that
    the sequential test counts: of L2 before the canary, of the rule itself from then on. Shares are fractions, None
    where nothing is known. `parked`: it expired at this stage and nobody has approved it since.

    `step` and `step_days` say where in canary or ring the rule stands and for how long; `own_*` count its own settled
    rated episodes since the canary, uncapped; `served_sites` the sites it is delivered to. While those are few, `sites`
    holds L2's episodes at the other sites as well, each from before the canary: a site counts for one level only, so no
    episode counts twice. `paused_by`: who stopped its rollout.
    """

    pattern_key: str
    incident_type: str
    runbook_id: str
    platform: str
    occurrences: int
    successes: int
    excluded: int
    unverified: int
    runbook_problem: str | None
    is_disruptive: bool
    category: str | None
    conditions: Mapping[str, Any]
    matched_incidents: int
    shadowed_rules: tuple[str, ...]
    capable_share: float | None
    selected_incidents: int
    type_incidents: int
    sites: tuple[SiteEvidence, ...]
    active_sites: int
    stage: str
    would_fires: int
    shadow_days: float
    attempt: int
    approvers: tuple[str, ...]
    rejected_by: str | None
    checks_green: bool | None
    days_observed: float | None = None
    first_at: dt.datetime | str | None = None
    last_at: dt.datetime | str | None = None
    parked: bool = False
    step: int | None = None
    step_days: float = 0.0
    own_successes: int = 0
    own_failures: int = 0
    served_sites: int = 0
    paused_by: str | None = None

    @property
    def rated(self) -> tuple[int, int]:
        """(successes, failures) over all sites."""
        return _pooled(self.sites)


@dataclass(frozen=True)
class RuleEvidence:
    """What is known of a rule in service. `matches` to `failures` are raw executions, `rated_*` episodes.

    `scopes` holds where its CUSUM stands, fleet first; `alarms` the scopes that must leave service, `fleet_alarm` the
    alarm of the whole rule.
    """

    rule_id: str
    rule_version: int
    incident_type: str
    runbook_id: str | None
    platform: str | None
    source: str
    state: str
    runbook_problem: str | None
    matches: int
    successes: int
    failures: int
    rated_successes: int
    rated_failures: int
    scopes: tuple[ScopeFigure, ...] = ()
    alarms: tuple[ScopeAlarm, ...] = ()
    fleet_alarm: ScopeAlarm | None = None


@dataclass(frozen=True)
class GateResult:
    """One gate's answer: what was observed, what the policy requires, and a sentence for the operator."""

    gate: str
    verdict: GateVerdict
    observed: str
    required: str
    sentence: str


@dataclass(frozen=True)
class Decision:
    """A verdict with its reason (the first gate that did not pass) and every gate in order."""

    verdict: PatternVerdict | RuleVerdict
    target_state: str | None
    reason: str
    gates: tuple[GateResult, ...]
    figures: Mapping[str, str] = field(default_factory=dict)


def _rate(part: int, whole: int) -> str:
    return f"{part} of {whole}" + (f" ({part / whole:.0%})" if whole else "")


def _executable(runbook_id: str | None, problem: str | None) -> GateResult:
    if problem is None and is_placeholder(runbook_id):
        problem = f"{runbook_id or 'an empty runbook'} is a placeholder: no script stands behind it"
    return GateResult(
        "executable_runbook",
        "fail" if problem else "pass",
        runbook_id or "none",
        "an enabled runbook of the catalogue, for the platform",
        f"{problem}." if problem else f"{runbook_id} is in the catalogue for this platform.",
    )


def _conditions(e: PatternEvidence) -> GateResult:
    named = any(
        isinstance(value, str) and value.strip()
        for key, value in e.conditions.items()
        if key in ("incident_type", "check_type")
    )
    return GateResult(
        "match_conditions",
        "pass" if named else "fail",
        ", ".join(f"{k} = {v}" for k, v in e.conditions.items()) or "none",
        "an incident type",
        "The rule matches one incident type." if named else "Empty match conditions would match every incident.",
    )


def _paused(e: PatternEvidence) -> list[GateResult]:
    if e.paused_by is None:
        return []
    sentence = f"{e.paused_by} paused its rollout."
    return [GateResult("not_paused", "inconclusive", f"paused by {e.paused_by}", "not paused", sentence)]


def _human(e: PatternEvidence) -> GateResult:
    return GateResult(
        "not_rejected",
        "fail" if e.rejected_by else "pass",
        f"rejected by {e.rejected_by}" if e.rejected_by else "not rejected",
        "not rejected",
        f"{e.rejected_by} rejected it." if e.rejected_by else "Nobody rejected it.",
    )


# ------------------------------------------------------------------------------------------- threshold policies


def _threshold_gates(e: PatternEvidence, policy: Policy) -> list[GateResult]:
    assert policy.threshold is not None  # noqa: S101 (the policy's own validation)
    least, floor = policy.threshold.min_occurrences, policy.threshold.min_success_rate
    enough = e.occurrences >= least
    rate = e.successes / e.occurrences if e.occurrences else None
    verdict: GateVerdict
    if rate is None:
        verdict, sentence = "inconclusive", "No L2 execution of it is in the telemetry."
    elif rate >= floor:
        verdict, sentence = (
            "pass",
            f"{_rate(e.successes, e.occurrences)} executions succeeded; the floor is {floor:.0%}.",
        )
    else:
        verdict, sentence = (
            "fail",
            f"{_rate(e.successes, e.occurrences)} executions succeeded; the floor is {floor:.0%}.",
        )
    return [
        _executable(e.runbook_id, e.runbook_problem),
        _conditions(e),
        _human(e),
        *_paused(e),
        GateResult(
            "occurrences",
            "pass" if enough else "inconclusive",
            str(e.occurrences),
            f"at least {least}",
            f"Seen {e.occurrences} times; {least} are needed."
            if not enough
            else f"Seen {e.occurrences} times; {least} suffice.",
        ),
        GateResult(
            "success_rate", verdict, "none" if rate is None else f"{rate:.4f}", f"at least {floor:.2f}", sentence
        ),
    ]


# ------------------------------------------------------------------------------------------- sequential policies


def is_high_risk(is_disruptive: bool, category: str | None, policy: Policy) -> bool:
    """Return whether a runbook is of the high-risk class: disruptive, or of a category that the policy names.

    A runbook whose category nobody stated might be of any class: it is taken for the worst.
    """
    return is_disruptive or category is None or category.strip().lower() in ("", *policy.approval.high_risk_categories)


def _matches(e: PatternEvidence, policy: Policy) -> GateResult:
    need = policy.admission.min_matched_incidents
    return GateResult(
        "matches_past_incidents",
        "pass" if e.matched_incidents >= need else "fail",
        str(e.matched_incidents),
        f"at least {need}",
        f"Replayed on the past, its conditions catch {e.matched_incidents} incidents.",
    )


def _shadows(e: PatternEvidence) -> GateResult:
    return GateResult(
        "shadows_no_rule",
        "fail" if e.shadowed_rules else "pass",
        ", ".join(e.shadowed_rules) or "none",
        "no healthy rule on the same incidents",
        f"It would stand before {', '.join(e.shadowed_rules)}, which already handles these incidents."
        if e.shadowed_rules
        else "No healthy rule handles these incidents.",
    )


def _checks(e: PatternEvidence) -> GateResult:
    known = e.checks_green is not None
    return GateResult(
        "checks_green",
        "inconclusive" if not known else "pass" if e.checks_green else "fail",
        "not run" if not known else "green" if e.checks_green else "failed",
        "green in this batch",
        "The data checks of this batch have not run."
        if not known
        else "The data checks of this batch passed."
        if e.checks_green
        else "A data check of this batch failed.",
    )


def _share(gate: str, share: float | None, need: float, sentence: str, *, at_most: bool = False) -> GateResult:
    if share is None:
        return GateResult(
            gate, "inconclusive", "unknown", f"{'at most' if at_most else 'at least'} {need:.2f}", sentence
        )
    good = share <= need if at_most else share >= need
    return GateResult(
        gate,
        "pass" if good else "fail",
        f"{share:.4f}",
        f"{'at most' if at_most else 'at least'} {need:.2f}",
        sentence,
    )


def _admission(e: PatternEvidence, policy: Policy) -> list[GateResult]:
    a = policy.admission
    selection = e.selected_incidents / e.type_incidents if e.type_incidents else None
    excluded = e.excluded / e.occurrences if e.occurrences else None
    return [
        _executable(e.runbook_id, e.runbook_problem),
        _conditions(e),
        _human(e),
        *_paused(e),
        _matches(e, policy),
        _shadows(e),
        _checks(e),
        _share(
            "agents_capable",
            e.capable_share,
            a.min_capable_share,
            "No appliance is known."
            if e.capable_share is None
            else f"{e.capable_share:.0%} of the appliances can run it; the others' agents are too old.",
        ),
        _share(
            "selection_share",
            selection,
            a.min_selection_share,
            f"L2 chose this runbook in {_rate(e.selected_incidents, e.type_incidents)} incidents of {e.incident_type}; "
            "a rule would fire on all of them.",
        ),
        _share(
            "exclusions",
            excluded,
            a.max_excluded_share,
            f"{_rate(e.excluded, e.occurrences)} executions enter no rate (unreachable, not applicable, escalated …).",
            at_most=True,
        ),
    ]


def _approval(e: PatternEvidence, policy: Policy, target: str) -> GateResult | None:
    reasons = []
    if target != "shadow":
        if policy.approval.required_always:
            reasons.append(f"policy {policy.name} asks for one")
        if policy.approval.required_for_disruptive and is_high_risk(e.is_disruptive, e.category, policy):
            reasons.append("the runbook is of the high-risk class")
    if target == "fleet" and e.active_sites < policy.approval.min_active_sites_without:
        reasons.append(
            f"only {e.active_sites} sites are active ({policy.approval.min_active_sites_without} needed without)"
        )
    if not reasons:
        return None
    given = bool(e.approvers)
    return GateResult(
        "approval",
        "pass" if given else "inconclusive",
        ", ".join(e.approvers) or "nobody",
        "a named approver",
        f"Approved by {', '.join(e.approvers)}." if given else f"A named approver is needed: {' and '.join(reasons)}.",
    )


def _shadow(e: PatternEvidence, policy: Policy) -> GateResult:
    s = policy.shadow
    good = e.would_fires >= s.min_would_fires or e.shadow_days >= s.min_days
    return GateResult(
        "shadow_observed",
        "pass" if good else "inconclusive",
        f"{e.would_fires} would-fires in {e.shadow_days:.1f} days",
        f"{s.min_would_fires} would-fires, or {s.min_days:g} days",
        f"In shadow for {e.shadow_days:.1f} days with {e.would_fires} would-fires.",
    )


STEPS = 2  # canary: one site, a tenth; ring: a quarter, half


def present_step(e: PatternEvidence) -> int:
    """Return the step of a rule in canary or ring; one that entered before there were steps had a tenth or a quarter."""
    return e.step if e.step is not None else STEPS if e.stage == "canary" else 1


def next_stage(e: PatternEvidence, policy: Policy) -> str | None:
    """Return the stage of the next step: in canary and ring the same stage once more, before the next one."""
    if policy.rollout is not None and e.stage in ("canary", "ring") and present_step(e) < STEPS:
        return e.stage
    return NEXT_STAGE.get(e.stage)


def _soak(e: PatternEvidence, policy: Policy) -> list[GateResult]:
    if policy.rollout is None or e.stage not in ("canary", "ring"):
        return []
    need = policy.rollout.soak_days(e.stage, present_step(e))
    return [
        GateResult(
            "soaked",
            "pass" if e.step_days >= need else "inconclusive",
            f"{e.step_days:.2f} days",
            f"at least {need:g} days",
            f"At step {present_step(e)} of the {e.stage} for {e.step_days:.1f} days, of {need:g} at least.",
        )
    ]


def _own(e: PatternEvidence, policy: Policy, target: str) -> list[GateResult]:
    """Ask for the rule's own episodes, which L2's can never replace.

    What is a theorem: where L2's runs and the rule's both succeed with a probability of at most the floor, the pooled
    e-value passes a gate with probability at most alpha at each of the four steps, whatever the mixture of the two:
    each episode counts once, and which sites count for which level is drawn by hash, not by outcome. What is a
    heuristic: that L2's success elsewhere speaks for the rule. So the rule's own episodes, all of them, must be enough
    and must by themselves favour a rate above the floor; its CUSUM watches on beside that.
    """
    if policy.rollout is None or e.stage not in ("canary", "ring"):
        return []
    r = policy.rollout
    gate = policy.stage_gate(target, e.incident_type, high_risk=is_high_risk(e.is_disruptive, e.category, policy))
    own = e.own_successes + e.own_failures
    need = r.widen_episodes if target == e.stage else r.own_episodes
    value = evalue.log_e(e.own_successes, e.own_failures, gate.floor)
    least = math.log(r.own_e_value)
    refuted = evalue.log_e_reject(e.own_successes, e.own_failures, gate.floor) >= evalue.threshold(gate.alpha)
    good = own >= need and value >= least
    return [
        GateResult(
            "own_evidence",
            "fail" if refuted else "pass" if good else "inconclusive",
            f"{own} episodes, log E = {value:.4f}",
            f"{need} episodes of its own, log E >= {least:.4f} (floor {gate.floor:.2f})",
            f"{_rate(e.own_successes, own)} of the rule's own episodes held"
            + (
                f"; {need} are needed."
                if own < need
                else "."
                if good
                else f"; that does not favour a rate above {gate.floor:.0%}."
            ),
        )
    ]


def _statistics(e: PatternEvidence, policy: Policy, target: str) -> tuple[list[GateResult], dict[str, str]]:
    gate = policy.stage_gate(target, e.incident_type, high_risk=is_high_risk(e.is_disruptive, e.category, policy))
    alpha = evalue.spent_alpha(gate.alpha, e.attempt)
    need = evalue.threshold(alpha)
    # Each site is capped, so 200 sites share few distinct counts: what depends on counts only is asked once for each.
    pairs = Counter([(site.successes, site.failures) for site in e.sites])
    s = sum([pair[0] * n for pair, n in pairs.items()])
    f = sum([pair[1] * n for pair, n in pairs.items()])
    log_e = evalue.log_e(s, f, gate.floor)
    against = evalue.log_e_reject(s, f, gate.floor)
    verdict: GateVerdict
    required = f"log E >= {need:.4f} (floor {gate.floor:.2f}, alpha {alpha:.5f})"
    if log_e >= need:
        verdict, sentence = (
            "pass",
            f"{_rate(s, s + f)} episodes held; beyond doubt above the floor of {gate.floor:.0%}.",
        )
    elif against >= need:
        verdict, sentence = "fail", f"{_rate(s, s + f)} episodes held, the floor is {gate.floor:.0%}: rejected."
    else:
        clean = evalue.needed_clean(s, f, gate.floor, alpha)
        verdict = "inconclusive"
        sentence = f"{_rate(s, s + f)} episodes held; {clean} more in a row would show a rate above {gate.floor:.0%}."
    results = [GateResult("e_value", verdict, f"log E = {log_e:.4f}", required, sentence)]
    figures = {
        "log_e": f"{log_e:.9f}",
        "log_e_reject": f"{against:.9f}",
        "log_threshold": f"{need:.9f}",
        "successes": str(s),
        "failures": str(f),
    }
    if target in ("ring", "fleet"):
        q = policy.quorum
        wide = sum([n for pair, n in pairs.items() if sum(pair) >= q.min_episodes_per_site])
        hosts = sum([site.hosts for site in e.sites])
        results.append(
            GateResult(
                "quorum",
                "pass" if wide >= q.min_sites and hosts >= q.min_hosts else "inconclusive",
                f"{wide} sites, {hosts} hosts",
                f"{q.min_sites} sites with {q.min_episodes_per_site} episodes each, {q.min_hosts} hosts",
                f"Evidence from {wide} sites with {q.min_episodes_per_site} episodes or more, and from {hosts} hosts.",
            )
        )
        if q.leave_one_site_out:
            worst, without = _leave_one_out(e.sites, pairs, s, f, gate.floor)
            figures["log_e_leave_one_out"] = f"{worst:.9f}"
            results.append(
                GateResult(
                    "leave_one_site_out",
                    "pass" if worst >= need else "inconclusive",
                    f"log E = {worst:.4f} without {without or 'any'}",
                    f"log E >= {need:.4f} without any one site",
                    "No single site carries the evidence."
                    if worst >= need
                    else f"Without {without or 'its sites'} the evidence does not suffice.",
                )
            )
        refuting = {pair for pair in pairs if evalue.log_e_reject(*pair, gate.floor) >= need}
        rejecting = [x.site_id for x in e.sites if (x.successes, x.failures) in refuting] if refuting else []
        results.append(
            GateResult(
                "no_site_rejects",
                "fail" if rejecting else "pass",
                ", ".join(rejecting) or "none",
                "no site whose own episodes reject it",
                f"It fails at {', '.join(rejecting)}." if rejecting else "It fails at no single site.",
            )
        )
    return results, figures


def leave_one_out(sites: tuple[SiteEvidence, ...], floor: float) -> tuple[float, str | None]:
    """Return the least log E over dropping any one site, and that site (the first of equals); (0, None) without sites."""
    return _leave_one_out(sites, {(x.successes, x.failures) for x in sites}, *_pooled(sites), floor)


def _pooled(sites: tuple[SiteEvidence, ...]) -> tuple[int, int]:
    return sum([x.successes for x in sites]), sum([x.failures for x in sites])


def _leave_one_out(
    sites: tuple[SiteEvidence, ...], pairs: Collection[tuple[int, int]], s: int, f: int, floor: float
) -> tuple[float, str | None]:
    # log E grows with each success and falls with each failure, so among sites with equally many failures only the one
    # with most successes can be worst to lose, and only if no site with fewer failures has as many.
    most: dict[int, int] = {}
    for successes, failures in pairs:
        if successes > most.get(failures, -1):
            most[failures] = successes
    worst: tuple[float, int, int] | None = None
    so_far = -1
    for failures in sorted(most):
        successes = most[failures]
        if successes <= so_far:
            continue
        so_far = successes
        value = evalue.log_e(s - successes, f - failures, floor)
        if worst is None or value < worst[0]:
            worst = (value, successes, failures)
    if worst is None:
        return 0.0, None
    return worst[0], next(x.site_id for x in sites if (x.successes, x.failures) == worst[1:])


def _expiry(e: PatternEvidence, policy: Policy) -> GateResult | None:
    rated = sum(e.rated)
    days = e.days_observed
    over = (days is not None and days >= policy.expiry.days) or rated >= policy.expiry.episodes
    if not over and not e.parked:
        return None
    return GateResult(
        "expiry",
        "fail",
        f"{rated} episodes in {0 if days is None else days:.0f} days",
        f"a verdict within {policy.expiry.days:g} days and {policy.expiry.episodes} episodes",
        "Inconclusive for too long: parked until somebody approves it.",
    )


def decide_pattern(evidence: PatternEvidence, policy: Policy) -> Decision:
    """Decide whether a pattern takes its next step under a policy.

    Under a threshold policy the step is to the whole fleet at once. Under a sequential one it is the next stage:
    shadow, canary, ring, fleet; the test of a stage stands before entering it. Where the policy rolls out in steps,
    canary and ring have two each, and the test of the stage stands before the second step too.

    Returns:
        `promote` (threshold) or `advance` (sequential) with the target state if every gate passes; `reject` if the
        evidence itself speaks against it; `expired` if it stayed inconclusive too long; else `hold`.
    """
    target = next_stage(evidence, policy)
    gates = [] if target else [_no_next_stage(evidence)]
    if policy.kind == "threshold":
        if evidence.stage in ("none", "proposed"):
            target = "fleet"
        gates += _threshold_gates(evidence, policy)
        return _conclude("promote", target, gates, {})
    gates += _admission(evidence, policy)
    tested = "canary" if target == "shadow" else target or "fleet"
    statistics, figures = _statistics(evidence, policy, tested)
    if target == "shadow":
        # Shadow runs nothing: it needs no proof of success, but some rated episode, and nothing refuted enters it.
        first = statistics[0]
        rated = sum(evidence.rated)
        if first.verdict == "inconclusive":
            statistics[0] = GateResult(
                first.gate,
                "pass" if rated else "inconclusive",
                first.observed,
                "at least one rated episode, and not refuted",
                first.sentence if rated else "No episode of it is rated yet: none was both settled and verified.",
            )
    if evidence.stage == "shadow":
        gates.append(_shadow(evidence, policy))
    gates += _soak(evidence, policy)
    statistics = _own(evidence, policy, tested) + statistics
    gates += statistics
    approval = _approval(evidence, policy, target or "fleet")
    if approval is not None:
        gates.append(approval)
    # Only evidence expires: a candidate that waits for its shadow time, for a check or for a name does not.
    undecided = any(g.verdict == "inconclusive" for g in statistics)
    if (undecided or evidence.parked) and not evidence.approvers:
        expiry = _expiry(evidence, policy)
        if expiry is not None:
            gates.append(expiry)
    return _conclude("advance", target, gates, figures)


def _no_next_stage(e: PatternEvidence) -> GateResult:
    sentence = {
        "fleet": "Its rule serves the whole fleet already.",
        "quarantined": "Its rule is quarantined: only a re-admission with changed content begins again.",
        "retired": "Its rule is retired, for ever.",
    }.get(e.stage, f"Nothing follows the stage {e.stage or 'unknown'}.")
    return GateResult("stage", "fail", e.stage or "unknown", "a stage before fleet", sentence)


def _conclude(
    good: PatternVerdict, target: str | None, gates: list[GateResult], figures: Mapping[str, str]
) -> Decision:
    open_gates = [g for g in gates if g.verdict != "pass"]
    if not open_gates:
        return Decision(good, target, f"All {len(gates)} gates pass: {gates[-1].sentence}", tuple(gates), figures)
    refuted = next((g for g in open_gates if g.gate in ("e_value", "not_rejected") and g.verdict == "fail"), None)
    expired = next((g for g in open_gates if g.gate == "expiry"), None)
    first = open_gates[0]
    if refuted is not None and first is refuted:
        return Decision("reject", None, refuted.sentence, tuple(gates), figures)
    if expired is not None and all(g.verdict == "inconclusive" or g is expired for g in open_gates):
        return Decision("expired", None, expired.sentence, tuple(gates), figures)
    return Decision("hold", None, first.sentence, tuple(gates), figures)


def is_healthy(rated_rate: float | None, policy: Policy) -> bool:
    """Return whether a rule in service, with this rate of rated episodes, must not be shadowed; unrated ones count."""
    return rated_rate is None or rated_rate >= policy.admission.healthy_rule_rate


def within_limit(waiting: Sequence[tuple[str, int]], policy: Policy) -> tuple[str, ...]:
    """Return the keys that one run may promote of (key, successes) that are due: those with most evidence first."""
    ordered = sorted(waiting, key=lambda item: (-item[1], item[0]))
    return tuple(key for key, _ in ordered[: policy.limits.promotions_per_run])


def decide_rule(evidence: RuleEvidence, policy: Policy) -> Decision:
    """Decide whether a rule stays in service under a policy: keep, warn or quarantine.

    A rule whose runbook cannot run leaves service under every policy, built-in ones excepted where the policy spares
    them: those ship with the agent, and only a person takes them out.
    """
    d = policy.demotion
    spared = evidence.source == "builtin" and d.spare_builtin
    gates = [_executable(evidence.runbook_id, evidence.runbook_problem)]
    rate = evidence.successes / evidence.matches if evidence.matches else None
    low = rate is not None and evidence.matches >= d.min_matches and rate < d.warn_below
    gates.append(
        GateResult(
            "raw_rate",
            "fail" if low else "inconclusive" if rate is None or evidence.matches < d.min_matches else "pass",
            "none" if rate is None else f"{rate:.4f} of {evidence.matches}",
            f"at least {d.warn_below:.2f} over {d.min_matches} matches",
            "It has matched nothing yet."
            if rate is None
            else f"{_rate(evidence.successes, evidence.matches)} executions succeeded.",
        )
    )
    against = evalue.log_e_reject(evidence.rated_successes, evidence.rated_failures, d.floor)
    need = evalue.threshold(d.alpha)
    rated = evidence.rated_successes + evidence.rated_failures
    carrier = _carrier(evidence, policy) if against >= need else None
    refuted = against >= need and carrier is None
    gates.append(
        GateResult(
            "not_refuted",
            "fail" if refuted else "inconclusive" if carrier or not rated else "pass",
            f"log E against = {against:.4f}",
            f"below {need:.4f} (floor {d.floor:.2f}, alpha {d.alpha:.2f})",
            f"{_rate(evidence.rated_successes, rated)} episodes held"
            + (
                "."
                if not rated
                else f"; without {carrier} nothing speaks against it."
                if carrier
                else f"; the floor is {d.floor:.0%}."
            ),
        )
    )
    gates.append(_in_control(evidence, policy))
    if gates[0].verdict == "fail":
        return Decision(
            "warn" if spared else "quarantine", None if spared else "quarantined", gates[0].sentence, tuple(gates)
        )
    acts = d.failing_rule == "quarantine" and not spared
    fallen = evidence.fleet_alarm is not None
    if refuted and acts:
        return Decision("quarantine", "quarantined", gates[2].sentence, tuple(gates))
    if fallen and acts:
        return Decision("quarantine", "quarantined", gates[3].sentence, tuple(gates))
    if evidence.alarms and acts:
        return Decision("quarantine_scope", None, gates[3].sentence, tuple(gates))
    if low or refuted or gates[3].verdict == "fail":
        failing = gates[1] if low else gates[2] if refuted else gates[3]
        return Decision("warn", None, failing.sentence, tuple(gates))
    return Decision("keep", None, gates[2].sentence if rated else gates[1].sentence, tuple(gates))


def _carrier(evidence: RuleEvidence, policy: Policy) -> str | None:
    """Return the one site or release without which no episode speaks against the rule, where the rest is known.

    The CUSUM of that scope answers for it: one dead site must not take the rule from all the others. The heuristic of
    `health/cusum.py`, on counts: log E against of the rest lies below `calm`.
    """
    d = policy.demotion
    for scope in evidence.scopes:
        if scope.kind == "fleet":
            continue
        failures = evidence.rated_failures - scope.failures
        successes = evidence.rated_successes - (scope.episodes - scope.failures)
        if (
            failures >= 0
            and successes >= 0
            and failures + successes >= d.cusum.rest_episodes
            and evalue.log_e_reject(successes, failures, d.floor) < d.cusum.calm
        ):
            return scope.value if scope.kind == "site" else f"agents {scope.value}"
    return None


def _in_control(e: RuleEvidence, policy: Policy) -> GateResult:
    """Answer whether the rule's CUSUM is in control everywhere: a scope at the limit to warn already fails it."""
    c = policy.demotion.cusum
    alarms = [*e.alarms, *([e.fleet_alarm] if e.fleet_alarm else [])]
    warned = [scope for scope in e.scopes if scope.w >= c.warn_at]
    if alarms:
        verdict: GateVerdict = "fail"
        sentence = " ".join(a.sentence for a in reversed(alarms))
    elif warned:
        verdict = "fail"
        named = ", ".join(s.value if s.kind != "fleet" else "the fleet" for s in warned[:5])
        sentence = f"It is getting worse at {named}: W = {max(s.w for s in warned):.2f}."
    else:
        verdict = "pass" if e.scopes else "inconclusive"
        sentence = (
            "In control at every site, on every release and over the fleet."
            if e.scopes
            else "No rated episode of this version yet."
        )
    highest = max((scope.w for scope in e.scopes), default=0.0)
    return GateResult(
        "in_control",
        verdict,
        f"highest W = {highest:.2f}",
        f"below {c.warn_at:g}; {c.quarantine_at:g} takes the scope out of service",
        sentence,
    )
