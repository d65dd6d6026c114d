"""The gates: golden decisions, what holds for any evidence, and that nothing fails open."""

from __future__ import annotations

import math
import random
from dataclasses import replace

import pytest
from evidence import counted, gate, pattern, rule, sites
from hypothesis import given, settings
from hypothesis import strategies as st

from flywheel_pipeline.promotion import evalue
from flywheel_pipeline.promotion.gates import decide_pattern, decide_rule, leave_one_out
from flywheel_pipeline.promotion.policy import load_policy

STANDARD, LEGACY, HIGH_RISK = (load_policy(name) for name in ("standard", "legacy", "high_risk"))

SITES = st.lists(st.tuples(st.integers(0, 10), st.integers(0, 10), st.integers(1, 9)), max_size=25).map(
    lambda rows: sites(*rows)
)


# -------------------------------------------------------------------------------------------------- golden decisions


def test_eight_sites_of_ten_with_one_failure_enter_the_ring():
    decision = decide_pattern(pattern(stage="canary", sites=sites(*[(10, 0)] * 7, (9, 1))), STANDARD)
    assert (decision.verdict, decision.target_state) == ("advance", "ring")
    assert math.exp(float(decision.figures["log_e"])) == pytest.approx(63.5, abs=0.05)
    assert math.exp(float(decision.figures["log_e_leave_one_out"])) == pytest.approx(28.8, abs=0.05)


def test_one_site_with_a_hundred_of_a_hundred_is_inconclusive_by_quorum():
    decision = decide_pattern(pattern(stage="canary", sites=sites((100, 0, 40))), STANDARD)
    assert decision.verdict == "hold"
    assert gate(decision, "e_value").verdict == "pass"
    assert gate(decision, "quorum").verdict == "inconclusive"
    assert decision.reason == gate(decision, "quorum").sentence
    assert gate(decision, "leave_one_site_out").verdict == "inconclusive"


@pytest.mark.parametrize(
    ("stage", "target"),
    [("none", "shadow"), ("proposed", "shadow"), ("shadow", "canary"), ("canary", "ring"), ("ring", "fleet")],
)
def test_good_evidence_climbs_one_stage_at_a_time(stage, target):
    decision = decide_pattern(pattern(stage=stage), STANDARD)
    assert (decision.verdict, decision.target_state) == ("advance", target)
    assert all(g.verdict == "pass" for g in decision.gates)


@pytest.mark.parametrize("policy", [STANDARD, LEGACY, HIGH_RISK])
@pytest.mark.parametrize("stage", ["fleet", "quarantined", "retired", "", "unheard of"])
def test_from_a_stage_that_nothing_follows_nothing_is_promoted(policy, stage):
    decision = decide_pattern(pattern(stage=stage, approvers=("ana",)), policy)
    assert (decision.verdict, decision.target_state) == ("hold", None)
    assert decision.reason == decision.gates[0].sentence
    assert len(decision.gates) > 5


@pytest.mark.parametrize(
    ("successes", "total", "verdict", "words"),
    [
        (166, 166, "keep", "166 of 166"),
        (20, 20, "keep", "20 of 20"),
        (16, 24, "quarantine", "16 of 24 (67%) episodes held; the floor is 90%."),
        (146, 260, "quarantine", "146 of 260 (56%)"),
        (917, 3057, "quarantine", "917 of 3057 (30%)"),
        (0, 31, "quarantine", "0 of 31 (0%)"),
    ],
)
def test_the_rules_of_the_day_under_standard(successes, total, verdict, words):
    decision = decide_rule(counted(successes, total), STANDARD)
    assert decision.verdict == verdict
    assert words in decision.reason


@pytest.mark.parametrize(
    ("successes", "total", "verdict"),
    [(166, 166, "keep"), (20, 20, "keep"), (16, 24, "keep"), (146, 260, "keep"), (917, 3057, "warn")],
)
def test_the_rules_of_the_day_under_legacy_stay_and_bitlocker_warns(successes, total, verdict):
    assert decide_rule(counted(successes, total), LEGACY).verdict == verdict


@pytest.mark.parametrize("policy", [STANDARD, LEGACY, HIGH_RISK])
def test_a_rule_on_a_placeholder_leaves_service_and_a_good_rb_auto_rule_stays(policy):
    bad = rule(rule_id="RB-AUTO-SMB_SIGN", runbook_id="AUTO-SMB_SIGNING", matches=0, successes=0, rated_successes=0)
    decision = decide_rule(bad, policy)
    assert (decision.verdict, decision.target_state) == ("quarantine", "quarantined")
    assert "placeholder" in decision.reason
    assert decide_rule(rule(rule_id="RB-AUTO-FIREWALL"), policy).verdict == "keep"


@pytest.mark.parametrize("policy", [STANDARD, LEGACY, HIGH_RISK])
def test_a_rule_on_a_runbook_that_the_catalogue_lacks_leaves_service(policy):
    problem = "RB-WIN-SCREENLOCK-001 is not in the runbook catalogue"
    decision = decide_rule(rule(runbook_id="RB-WIN-SCREENLOCK-001", runbook_problem=problem), policy)
    assert decision.verdict == "quarantine"
    assert problem in decision.reason


@pytest.mark.parametrize("policy", [STANDARD, LEGACY, HIGH_RISK])
def test_a_built_in_rule_is_never_quarantined_by_itself(policy):
    assert decide_rule(counted(0, 729, source="builtin"), policy).verdict == "warn"
    assert decide_rule(rule(source="builtin", runbook_problem="LIN-CRYPTO-001 is disabled"), policy).verdict == "warn"


def test_a_rule_that_matched_nothing_is_kept_and_no_rate_is_claimed():
    decision = decide_rule(counted(0, 0), STANDARD)
    assert decision.verdict == "keep"
    assert decision.reason == "It has matched nothing yet."
    assert gate(decision, "raw_rate").verdict == "inconclusive"


# ------------------------------------------------------------------------------------------------- the legacy policy


@pytest.mark.parametrize(
    ("successes", "occurrences", "verdict"),
    [(5, 5, "promote"), (4, 4, "hold"), (9, 10, "promote"), (8, 10, "hold"), (0, 0, "hold"), (899, 1000, "hold")],
)
def test_legacy_promotes_five_of_five_to_the_whole_fleet(successes, occurrences, verdict):
    e = pattern(stage="none", successes=successes, occurrences=occurrences, sites=(), checks_green=None)
    decision = decide_pattern(e, LEGACY)
    assert decision.verdict == verdict
    assert decision.target_state == ("fleet" if verdict == "promote" else None)


@pytest.mark.parametrize("runbook_id", ["AUTO-FIREWALL", "L2-restart", "ESCALATE", "unknown", ""])
def test_legacy_promotes_no_placeholder_whatever_its_rate(runbook_id):
    decision = decide_pattern(pattern(stage="none", runbook_id=runbook_id), LEGACY)
    assert decision.verdict == "hold"
    assert "placeholder" in decision.reason


def test_legacy_takes_only_steps_that_the_ledger_knows():
    targets = {
        stage: decide_pattern(pattern(stage=stage), LEGACY).target_state
        for stage in ("none", "proposed", "shadow", "canary", "ring")
    }
    assert targets == {"none": "fleet", "proposed": "fleet", "shadow": "canary", "canary": "ring", "ring": "fleet"}


# ------------------------------------------------------------------------------- each gate, and that none fails open

BLOCKS = {
    "a placeholder": ({"runbook_id": "AUTO-FIREWALL"}, "executable_runbook", "fail"),
    "a runbook for another platform": ({"runbook_problem": "it is a runbook for linux"}, "executable_runbook", "fail"),
    "no conditions": ({"conditions": {}}, "match_conditions", "fail"),
    "blank conditions": ({"conditions": {"incident_type": "  "}}, "match_conditions", "fail"),
    "null conditions": ({"conditions": {"incident_type": None}}, "match_conditions", "fail"),
    "conditions on something else": ({"conditions": {"hostname": "dc01"}}, "match_conditions", "fail"),
    "no past incident": ({"matched_incidents": 0}, "matches_past_incidents", "fail"),
    "a healthy built-in behind it": ({"shadowed_rules": ("L1-FIREWALL-001",)}, "shadows_no_rule", "fail"),
    "red checks": ({"checks_green": False}, "checks_green", "fail"),
    "checks that never ran": ({"checks_green": None}, "checks_green", "inconclusive"),
    "old agents": ({"capable_share": 0.94}, "agents_capable", "fail"),
    "unknown agents": ({"capable_share": None}, "agents_capable", "inconclusive"),
    "a runbook chosen now and then": ({"selected_incidents": 215, "type_incidents": 240}, "selection_share", "fail"),
    "no L2 incident": ({"selected_incidents": 0, "type_incidents": 0}, "selection_share", "inconclusive"),
    "many exclusions": ({"excluded": 49, "occurrences": 240}, "exclusions", "fail"),
    "no execution": ({"excluded": 0, "occurrences": 0}, "exclusions", "inconclusive"),
    "no rated episode": ({"sites": ()}, "e_value", "inconclusive"),
}


@pytest.mark.parametrize("stage", ["none", "shadow", "canary", "ring"])
@pytest.mark.parametrize(("change", "name", "verdict"), BLOCKS.values(), ids=BLOCKS.keys())
def test_each_gate_holds_at_every_stage_even_with_an_approver(stage, change, name, verdict):
    decision = decide_pattern(pattern(stage=stage, approvers=("ana",), **change), STANDARD)
    found = gate(decision, name)
    assert found.verdict == verdict
    assert (decision.verdict, decision.target_state) == ("hold", None)
    assert decision.reason == found.sentence


def test_the_rejection_by_a_person_rejects_under_every_policy():
    for policy in (STANDARD, LEGACY, HIGH_RISK):
        decision = decide_pattern(pattern(rejected_by="ana", approvers=("ben",)), policy)
        assert decision.verdict == "reject"
        assert decision.reason == "ana rejected it."


def test_evidence_against_it_rejects_at_every_stage_even_before_shadow():
    bad = sites(*[(3, 7)] * 12)
    for stage in ("none", "shadow", "canary", "ring"):
        decision = decide_pattern(pattern(stage=stage, sites=bad), STANDARD)
        assert decision.verdict == "reject"
        assert "36 of 120 (30%) episodes held, the floor is" in decision.reason


def test_the_reason_is_the_first_gate_that_does_not_pass_and_all_are_reported():
    decision = decide_pattern(
        pattern(stage="shadow", matched_incidents=0, capable_share=None, would_fires=0, shadow_days=1.0, sites=()),
        STANDARD,
    )
    open_gates = [g.gate for g in decision.gates if g.verdict != "pass"]
    assert open_gates == ["matches_past_incidents", "agents_capable", "shadow_observed", "e_value"]
    assert decision.reason == decision.gates[3].sentence


def test_one_rated_episode_opens_the_shadow_and_none_does_not():
    # The interlock recounts the rate of every promotion: a candidate without one would block the whole batch.
    assert decide_pattern(pattern(stage="none", sites=sites((1, 0, 1))), STANDARD).target_state == "shadow"
    assert decide_pattern(pattern(stage="none", sites=()), STANDARD).verdict == "hold"


def test_shadow_ends_by_would_fires_or_by_time():
    early = {"stage": "shadow", "would_fires": 49, "shadow_days": 13.9}
    assert gate(decide_pattern(pattern(**early), STANDARD), "shadow_observed").verdict == "inconclusive"
    assert decide_pattern(pattern(**{**early, "would_fires": 50}), STANDARD).target_state == "canary"
    assert decide_pattern(pattern(**{**early, "shadow_days": 14.0}), STANDARD).target_state == "canary"


def test_a_site_whose_own_episodes_reject_it_holds_it():
    decision = decide_pattern(pattern(sites=sites(*[(10, 0)] * 30, (1, 9))), STANDARD)
    assert decision.verdict == "hold"
    assert gate(decision, "e_value").verdict == "pass"
    assert decision.reason == "It fails at site-31."


def test_a_small_fleet_needs_a_named_approver():
    held = decide_pattern(pattern(active_sites=9), STANDARD)
    assert held.verdict == "hold"
    assert "A named approver is needed: only 9 sites are active" in held.reason
    assert decide_pattern(pattern(active_sites=9, approvers=("ana",)), STANDARD).target_state == "fleet"
    assert decide_pattern(pattern(active_sites=10), STANDARD).target_state == "fleet"


@pytest.mark.parametrize(
    "change",
    [{"is_disruptive": True}, {"category": None}, {"category": ""}]
    + [{"category": c} for c in ("disk", "Reboot", "credentials", "network", "network_security")],
)
@pytest.mark.parametrize("stage", ["shadow", "canary", "ring"])
def test_the_high_risk_class_needs_95_percent_at_one_percent_and_a_name(stage, change):
    held = decide_pattern(pattern(stage=stage, **change), STANDARD)
    assert held.verdict == "hold"
    assert "high-risk class" in held.reason
    assert "(floor 0.95, alpha 0.01000)" in gate(held, "e_value").required
    assert decide_pattern(pattern(stage=stage, approvers=("ana",), **change), STANDARD).verdict == "advance"
    few = sites(*[(10, 0)] * 12)  # 120 clean: enough for .90 at .01, not for .95 at .01 (126)
    assert decide_pattern(pattern(stage=stage, approvers=("ana",), sites=few, **change), STANDARD).verdict == "hold"
    assert decide_pattern(pattern(stage=stage, sites=few), STANDARD).verdict == "advance"


def test_a_re_admission_needs_more_evidence_than_the_first_attempt():
    exact = sites(*[(10, 0)] * 4, (6, 0), (6, 0), (6, 0), (6, 0))  # 64 clean
    assert decide_pattern(pattern(sites=exact, stage="canary"), STANDARD).target_state == "ring"
    second = decide_pattern(pattern(sites=exact, stage="canary", attempt=2), STANDARD)
    assert second.verdict == "hold"
    assert evalue.spent_alpha(0.05, 2) == pytest.approx(0.0076, abs=1e-4)
    assert "more in a row" in second.reason


def test_only_evidence_expires_and_not_the_wait_for_shadow_checks_or_a_name():
    thin = sites(*[(5, 0)] * 5)
    assert decide_pattern(pattern(sites=thin, days_observed=59.0), STANDARD).verdict == "hold"
    expired = decide_pattern(pattern(sites=thin, days_observed=60.0), STANDARD)
    assert expired.verdict == "expired"
    assert expired.reason == "Inconclusive for too long: parked until somebody approves it."
    assert decide_pattern(pattern(sites=thin, days_observed=60.0, approvers=("ana",)), STANDARD).verdict == "hold"
    waiting = {"days_observed": 400.0}
    assert (
        decide_pattern(pattern(stage="shadow", would_fires=1, shadow_days=1.0, **waiting), STANDARD).verdict == "hold"
    )
    assert decide_pattern(pattern(checks_green=None, **waiting), STANDARD).verdict == "hold"
    assert decide_pattern(pattern(active_sites=3, **waiting), STANDARD).verdict == "hold"


def test_a_parked_pattern_stays_parked_whatever_it_shows_until_somebody_approves_it():
    assert decide_pattern(pattern(), STANDARD).verdict == "advance"
    parked = decide_pattern(pattern(parked=True), STANDARD)
    assert (parked.verdict, parked.target_state) == ("expired", None)
    assert decide_pattern(pattern(parked=True, approvers=("ana",)), STANDARD).verdict == "advance"


def test_a_thousand_inconclusive_episodes_expire_as_well():
    # 90.5 % of 1,000: neither promoted nor rejected at the floor of 90 %.
    half = sites(*[(9, 1)] * 95, *[(10, 0)] * 5)
    assert evalue.verdict(905, 95, 0.90, 0.01) == "inconclusive"
    decision = decide_pattern(pattern(sites=half, days_observed=5.0), STANDARD)
    assert decision.verdict == "expired"
    assert decide_pattern(pattern(sites=half[1:], days_observed=5.0), STANDARD).verdict == "hold"


# ------------------------------------------------------------------------------------------------- for any evidence


@given(SITES, st.randoms(use_true_random=False), st.sampled_from(["none", "shadow", "canary", "ring"]))
def test_the_order_of_sites_is_irrelevant(evidence_sites, rng: random.Random, stage):
    shuffled = list(evidence_sites)
    rng.shuffle(shuffled)
    one = decide_pattern(pattern(stage=stage, sites=evidence_sites), STANDARD)
    other = decide_pattern(pattern(stage=stage, sites=tuple(shuffled)), STANDARD)
    assert (one.verdict, one.target_state) == (other.verdict, other.target_state)
    assert [g.verdict for g in one.gates] == [g.verdict for g in other.gates]
    assert one.figures == other.figures


@given(SITES, st.sampled_from([0.8, 0.9, 0.95]))
def test_leave_one_out_is_the_least_over_really_dropping_each_site(evidence_sites, floor):
    s, f = sum(x.successes for x in evidence_sites), sum(x.failures for x in evidence_sites)
    values = [evalue.log_e(s - x.successes, f - x.failures, floor) for x in evidence_sites]
    least, site = leave_one_out(evidence_sites, floor)
    if not values:
        assert (least, site) == (0.0, None)
    else:
        assert least == min(values)
        assert site == evidence_sites[values.index(least)].site_id


@given(SITES, st.integers(0, 24))
def test_removing_a_site_never_helps_by_more_than_its_own_evidence(evidence_sites, index):
    if not evidence_sites:
        return
    gone = evidence_sites[index % len(evidence_sites)]
    s, f = sum(x.successes for x in evidence_sites), sum(x.failures for x in evidence_sites)
    with_it, without = evalue.log_e(s, f, 0.9), evalue.log_e(s - gone.successes, f - gone.failures, 0.9)
    # Each success can have added, and each failure cost, at most what the outermost midpoint gives it.
    add = gone.successes * math.log(0.999 / 0.9)
    cost = gone.failures * (math.log(1 - 0.9) - math.log(1 - 0.999))
    assert with_it - add - 1e-9 <= without <= with_it + cost + 1e-9
    if gone.failures == 0:
        assert without <= with_it


@given(SITES, st.sampled_from(["none", "shadow", "canary", "ring"]), st.integers(0, 24))
@settings(max_examples=150)
def test_one_more_success_at_a_site_never_turns_an_advance_into_less(evidence_sites, stage, index):
    before = decide_pattern(pattern(stage=stage, sites=evidence_sites), STANDARD)
    if before.verdict != "advance":
        return
    k = index % len(evidence_sites)
    site = evidence_sites[k]
    more = (*evidence_sites[:k], replace(site, successes=site.successes + 1), *evidence_sites[k + 1 :])
    after = decide_pattern(pattern(stage=stage, sites=more), STANDARD)
    # Leave-one-out takes the site with most successes away, but what remains is never less than before.
    assert after.verdict == "advance"


@given(SITES, st.sampled_from(["none", "shadow", "canary", "ring", "fleet", "quarantined"]), st.integers(0, 3))
def test_what_is_unknown_never_advances(evidence_sites, stage, which):
    unknown = ({"capable_share": None}, {"checks_green": None}, {"type_incidents": 0}, {"occurrences": 0})[which]
    decision = decide_pattern(pattern(stage=stage, sites=evidence_sites, approvers=("ana",), **unknown), STANDARD)
    assert decision.verdict not in ("advance", "promote")
    assert decision.target_state is None


@given(SITES, st.sampled_from(["none", "shadow", "canary", "ring", "fleet"]))
def test_every_gate_says_something_that_an_operator_can_read(evidence_sites, stage):
    for policy in (STANDARD, LEGACY, HIGH_RISK):
        decision = decide_pattern(pattern(stage=stage, sites=evidence_sites), policy)
        assert decision.reason
        for g in decision.gates:
            assert g.sentence[0].isupper() or g.sentence[0].isdigit(), g
            assert g.sentence.endswith((".", "…).")), g
            assert g.observed, g
            assert g.required, g
            assert "None" not in g.sentence, g
