"""Policies: strict reading, and for every value that a policy file states a decision that it changes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from importlib.resources import files
from typing import Any, get_args, get_origin

import pytest
import yaml
from evidence import changed, counted, pattern, rule, sites
from pydantic import BaseModel

from flywheel_pipeline.errors import PolicyError
from flywheel_pipeline.health.cusum import Attribution, RatedEpisode, attribute
from flywheel_pipeline.health.demotion import ScopeFigure
from flywheel_pipeline.promotion.backtest import EpisodeLog, capped_sites
from flywheel_pipeline.promotion.gates import decide_pattern, decide_rule, is_healthy, within_limit
from flywheel_pipeline.promotion.policy import Policy, load_policy, parse_policy, policy_names

FOLDER = files("flywheel_pipeline.promotion") / "policies"


def text_of(name: str) -> str:
    return (FOLDER / f"{name}.yaml").read_text("utf-8")


def leaves(value: Any, path: str = "") -> Iterator[str]:
    """Dotted paths of the values that a policy file states; a list of texts is one value."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from leaves(inner, f"{path}.{key}" if path else str(key))
    elif isinstance(value, list) and value and isinstance(value[0], dict):
        for i, inner in enumerate(value):
            yield from leaves(inner, f"{path}.{i}")
    else:
        yield path


# ------------------------------------------------------------------------------- every value changes some decision

Decide = Callable[[Policy], Any]


def p(**evidence: Any) -> Decide:
    return lambda policy: (d := decide_pattern(pattern(**evidence), policy)).verdict + str(d.target_state)


def r(evidence: Any) -> Decide:
    return lambda policy: decide_rule(evidence, policy).verdict


def clean(n: int, **more: Any) -> Decide:
    """N clean episodes over sites of ten, at least five of them."""
    counts = [(10, 0)] * (n // 10) + ([(n % 10, 0)] if n % 10 else [])
    return p(sites=sites(*counts), **more)


ONE_HOST = EpisodeLog.of([(day, "site-01", "host-1", True) for day in range(20)])
MANY_HOSTS = EpisodeLog.of([(day, "site-01", f"host-{day}", True) for day in range(20)])
WAITING = [(f"pattern-{i}", n) for i, n in enumerate((5, 40, 30, 20, 10, 50, 60))]
NAMED: dict[str, Any] = {"approvers": ("ana",)}


def walked(site: str, outcomes: str, late: str = "") -> Decide:
    """A site that fails among 40 healthy episodes elsewhere; `late`: what two other sites report at the end."""
    elsewhere = [RatedEpisode(f"site-{1 + i % 9:02d}", "1.0.74", False) for i in range(40)]
    here = [RatedEpisode(site, "1.0.74", outcome == "F") for outcome in outcomes]
    after = [RatedEpisode(f"site-{5 + i:02d}", "1.0.74", outcome == "F") for i, outcome in enumerate(late)]
    return lambda policy: [
        (alarm.kind, alarm.value) for alarm in _all(attribute([*elsewhere, *here, *after], policy.demotion.cusum))
    ]


def _all(found: Attribution) -> list[Any]:
    return [*found.scopes, *([found.fleet] if found.fleet else [])]


def three_sites(policy: Policy) -> Any:
    """Three of ten sites die, one after the other, while the others heal."""
    episodes = [RatedEpisode(f"site-{3 + i % 7:02d}", "1.0.74", False) for i in range(40)]
    for site in range(3):
        episodes += [RatedEpisode(f"site-{site:02d}", "1.0.74", True)] * 7
        episodes += [RatedEpisode(f"site-{3 + i % 7:02d}", "1.0.74", False) for i in range(20)]
    return [(alarm.kind, alarm.value) for alarm in _all(attribute(episodes, policy.demotion.cusum))]


# (policy, path): (another value, the decision that shows it)
CHANGES: dict[tuple[str, str], tuple[Any, Decide]] = {
    ("standard", "stages.canary.floor"): (0.85, clean(25, stage="shadow")),
    ("standard", "stages.canary.alpha"): (0.10, clean(18, stage="shadow")),
    ("standard", "stages.ring.floor"): (0.94, clean(65, stage="canary")),
    ("standard", "stages.ring.alpha"): (0.10, clean(50, stage="canary")),
    ("standard", "stages.fleet.floor"): (0.94, clean(80)),
    ("standard", "stages.fleet.alpha"): (0.05, clean(60)),
    ("standard", "high_risk.floor"): (0.97, clean(150, is_disruptive=True, **NAMED)),
    ("standard", "high_risk.alpha"): (0.001, clean(150, is_disruptive=True, **NAMED)),
    ("standard", "evidence.episodes_per_host"): (4, lambda policy: capped_sites(ONE_HOST, policy)),
    ("standard", "evidence.episodes_per_site"): (11, lambda policy: capped_sites(MANY_HOSTS, policy)),
    ("standard", "admission.max_excluded_share"): (0.25, p(occurrences=100, excluded=22)),
    ("standard", "admission.min_selection_share"): (0.85, p(selected_incidents=87, type_incidents=100)),
    ("standard", "admission.min_capable_share"): (0.90, p(capable_share=0.93)),
    ("standard", "admission.min_matched_incidents"): (3, p(matched_incidents=2)),
    ("standard", "admission.healthy_rule_rate"): (0.90, lambda policy: is_healthy(0.85, policy)),
    ("standard", "quorum.min_sites"): (8, clean(70, stage="canary")),
    ("standard", "quorum.min_episodes_per_site"): (6, p(stage="canary", sites=sites(*[(5, 0)] * 20))),
    ("standard", "quorum.min_hosts"): (41, p(stage="canary", sites=sites(*[(10, 0, 4)] * 10))),
    ("standard", "quorum.leave_one_site_out"): (False, p(stage="canary", sites=sites(*[(10, 0)] * 4, (9, 0)))),
    ("standard", "shadow.min_would_fires"): (40, p(stage="shadow", would_fires=45, shadow_days=1.0)),
    ("standard", "shadow.min_days"): (7.0, p(stage="shadow", would_fires=1, shadow_days=8.0)),
    ("standard", "expiry.days"): (90.0, clean(50, days_observed=70.0)),
    ("standard", "expiry.episodes"): (40, clean(50)),
    ("standard", "limits.promotions_per_run"): (6, lambda policy: within_limit(WAITING, policy)),
    ("standard", "approval.required_always"): (True, p()),
    ("standard", "approval.required_for_disruptive"): (False, p(is_disruptive=True)),
    ("standard", "approval.min_active_sites_without"): (8, p(active_sites=9)),
    ("standard", "approval.high_risk_categories"): (["disk", "firewall"], p()),
    ("standard", "demotion.failing_rule"): ("warn", r(counted(16, 24))),
    ("standard", "demotion.floor"): (0.60, r(counted(16, 24))),
    ("standard", "demotion.alpha"): (0.0001, r(counted(16, 24))),
    ("standard", "demotion.warn_below"): (0.99, r(rule(matches=100, successes=98, failures=2))),
    ("standard", "demotion.min_matches"): (
        10,
        r(rule(matches=15, successes=3, failures=12, rated_successes=3, rated_failures=0)),
    ),
    ("standard", "demotion.spare_builtin"): (False, r(counted(0, 729, source="builtin"))),
    ("standard", "demotion.cusum.good"): (0.80, walked("site-00", "FFFFFFF")),
    ("standard", "demotion.cusum.bad"): (0.70, walked("site-00", "FFFFFFF")),
    ("standard", "demotion.cusum.warn_at"): (5.0, r(rule(scopes=(ScopeFigure("site", "s", 4, 4, 3.9, 3.9),)))),
    ("standard", "demotion.cusum.quarantine_at"): (7.0, walked("site-00", "FFFFFFF")),
    ("standard", "demotion.cusum.calm"): (2.0, walked("site-00", "FFFFF", late="FF")),
    ("standard", "demotion.cusum.rest_episodes"): (60, walked("site-00", "FFFFFFF")),
    ("standard", "demotion.cusum.min_sites"): (4, three_sites),
    ("standard", "demotion.cusum.site_share"): (0.5, three_sites),
    ("standard", "demotion.cusum.checkpoint_days"): (4, lambda policy: policy.demotion.cusum.checkpoint_days),
    ("standard", "rollout.one_site_days"): (3.0, p(stage="canary", step=1, step_days=2.0)),
    ("standard", "rollout.tenth_days"): (3.0, p(stage="canary", step=2, step_days=2.0)),
    ("standard", "rollout.quarter_days"): (3.0, p(stage="ring", step=1, step_days=2.0)),
    ("standard", "rollout.half_days"): (2.0, p(stage="ring", step=2, step_days=2.0)),
    ("standard", "rollout.widen_episodes"): (5, p(stage="canary", step=1, own_successes=4)),
    ("standard", "rollout.own_episodes"): (5, p(stage="canary", own_successes=7)),
    ("standard", "rollout.own_e_value"): (0.1, p(stage="canary", own_successes=17, own_failures=3)),
    ("standard", "rollout.own_sites"): (10, lambda policy: policy.rollout and policy.rollout.own_sites),
    ("standard", "overrides.0.incident_type"): ("firewall*", clean(80, stage="canary")),
    ("standard", "overrides.0.stages.canary.floor"): (0.90, clean(60, stage="shadow", incident_type="bitlocker")),
    ("standard", "overrides.0.stages.canary.alpha"): (0.01, clean(100, stage="shadow", incident_type="bitlocker")),
    ("standard", "overrides.0.stages.ring.floor"): (0.92, clean(80, stage="canary", incident_type="bitlocker")),
    ("standard", "overrides.0.stages.ring.alpha"): (0.01, clean(120, stage="canary", incident_type="bitlocker_status")),
    ("standard", "overrides.0.stages.fleet.floor"): (0.92, clean(110, incident_type="bitlocker")),
    ("standard", "overrides.0.stages.fleet.alpha"): (0.001, clean(150, incident_type="bitlocker")),
    ("high_risk", "stages.canary.floor"): (0.90, clean(80, stage="shadow", **NAMED)),
    ("high_risk", "stages.canary.alpha"): (0.05, clean(100, stage="shadow", **NAMED)),
    ("high_risk", "stages.ring.floor"): (0.90, clean(80, stage="canary", **NAMED)),
    ("high_risk", "stages.ring.alpha"): (0.05, clean(120, stage="canary", **NAMED)),
    ("high_risk", "stages.fleet.floor"): (0.90, clean(80, **NAMED)),
    ("high_risk", "stages.fleet.alpha"): (0.05, clean(120, **NAMED)),
    ("high_risk", "high_risk.floor"): (0.97, clean(150, is_disruptive=True, **NAMED)),
    ("high_risk", "high_risk.alpha"): (0.001, clean(150, is_disruptive=True, **NAMED)),
    ("high_risk", "limits.promotions_per_run"): (2, lambda policy: within_limit(WAITING, policy)),
    ("high_risk", "approval.required_always"): (False, p()),
    # Each of the next three matters once the one before no longer asks for a name anyway.
    ("high_risk", "approval.required_for_disruptive"): (False, p(is_disruptive=True)),
    ("high_risk", "approval.min_active_sites_without"): (8, p(active_sites=9)),
    ("high_risk", "approval.high_risk_categories"): (["firewall"], p()),
    ("high_risk", "demotion.failing_rule"): ("warn", r(counted(16, 24))),
    ("high_risk", "demotion.floor"): (0.60, r(counted(16, 24))),
    ("high_risk", "demotion.alpha"): (0.0001, r(counted(16, 24))),
    ("high_risk", "rollout.own_episodes"): (5, p(stage="canary", own_successes=7, **NAMED)),
    ("legacy", "threshold.min_occurrences"): (6, p(stage="none", occurrences=5, successes=5)),
    ("legacy", "threshold.min_success_rate"): (0.80, p(stage="none", occurrences=20, successes=17)),
    ("legacy", "demotion.failing_rule"): (
        "quarantine",
        r(counted(10, 100)),
    ),
    ("legacy", "demotion.floor"): (0.80, r(counted(65, 100))),
    ("legacy", "demotion.alpha"): (
        0.0001,
        r(rule(matches=8, successes=0, failures=8, rated_successes=0, rated_failures=8)),
    ),
}
WITHOUT_FIRST = {
    "approval.required_for_disruptive",
    "approval.min_active_sites_without",
    "approval.high_risk_categories",
}


@pytest.mark.parametrize("name", ["standard", "high_risk", "legacy"])
def test_no_policy_states_a_value_that_this_file_does_not_try(name):
    stated = {
        path for path in leaves(yaml.safe_load(text_of(name))) if path not in ("name", "version", "description", "kind")
    }
    assert stated == {path for policy, path in CHANGES if policy == name}


def model_leaves(annotation: Any, path: str = "") -> Iterator[str]:
    """Dotted paths of every value that a policy may state, by its declaration; of a list of parts, the first."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        for name, field in annotation.model_fields.items():
            yield from model_leaves(field.annotation, f"{path}.{name}" if path else name)
        return
    inner = [part for part in get_args(annotation) if part not in (type(None), Ellipsis)]
    models = [part for part in inner if isinstance(part, type) and issubclass(part, BaseModel)]
    if not models:
        yield path
    elif get_origin(annotation) is dict:
        for key in get_args(inner[0]):
            yield from model_leaves(models[0], f"{path}.{key}")
    elif get_origin(annotation) is tuple:
        yield from model_leaves(models[0], f"{path}.0")
    else:
        yield from model_leaves(models[0], path)


def test_no_value_that_a_policy_may_state_goes_untried():
    declared = set(model_leaves(Policy))
    assert {
        "quorum.min_sites",
        "high_risk.floor",
        "overrides.0.stages.fleet.alpha",
        "threshold.min_occurrences",
    } <= declared
    assert declared - {"name", "version", "description", "kind"} == {path for _, path in CHANGES}


def test_name_and_version_change_no_decision_but_the_hash_that_stands_on_each():
    policy = load_policy("standard")
    for path, value in (("name", "other"), ("version", 3), ("description", "other words")):
        other = changed(policy, path, value)
        assert decide_pattern(pattern(), other) == decide_pattern(pattern(), policy)
        assert other.policy_hash != policy.policy_hash


@pytest.mark.parametrize(("name", "path"), CHANGES.keys())
def test_changing_this_value_changes_a_decision(name, path):
    value, decide = CHANGES[name, path]
    policy = load_policy(name)
    if name == "high_risk" and path in WITHOUT_FIRST:
        policy = changed(policy, "approval.required_always", False)
    other = changed(policy, path, value)
    assert decide(other) != decide(policy), decide(policy)
    assert other.policy_hash != policy.policy_hash


# ------------------------------------------------------------------------------------------------- reading a policy


def test_the_package_carries_three_policies():
    assert policy_names() == ["high_risk", "legacy", "standard"]
    assert [load_policy(name).kind for name in policy_names()] == ["sequential", "threshold", "sequential"]


def test_the_standard_policy_says_what_the_design_says():
    policy = load_policy("standard")
    assert {s: (g.floor, g.alpha) for s, g in policy.stages.items()} == {
        "canary": (0.80, 0.05),
        "ring": (0.90, 0.05),
        "fleet": (0.90, 0.01),
    }
    assert (policy.high_risk.floor, policy.high_risk.alpha) == (0.95, 0.01)
    assert (policy.evidence.episodes_per_host, policy.evidence.episodes_per_site) == (3, 10)
    assert (policy.quorum.min_sites, policy.quorum.min_episodes_per_site, policy.quorum.min_hosts) == (5, 3, 10)
    assert policy.limits.promotions_per_run == 5


def test_the_legacy_policy_is_five_occurrences_at_ninety_percent():
    threshold = load_policy("legacy").threshold
    assert (threshold.min_occurrences, threshold.min_success_rate) == (5, 0.90)


@pytest.mark.parametrize(
    ("before", "after", "says"),
    [
        ("quorum: {min_sites: 5", "quorum: {min_sits: 5", "min_sits"),
        ("quorum: {min_sites: 5", "quorum: {min_sites: '5'", "min_sites"),
        ("quorum: {min_sites: 5", "quorum: {min_sites: 0", "min_sites"),
        ("floor: 0.80", "floor: 80", "stages.canary.floor"),
        ("floor: 0.80", "floor: .nan", "stages.canary.floor"),
        ("leave_one_site_out: true", "leave_one_site_out: 1", "leave_one_site_out"),
        ("expiry: {days: 60", "expiry: {days: 60, days: 90", "twice"),
        ("  ring: {floor: 0.90, alpha: 0.05}\n", "", "canary, ring and fleet"),
        ("  ring: {floor: 0.90, alpha: 0.05}\n", "  ring: {floor: 0.96, alpha: 0.05}\n", "looser"),
        ("      ring: {floor: 0.95, alpha: 0.05}", "      ring: {floor: 0.85, alpha: 0.05}", "looser"),
        ("name: standard", "name: strandard", "names itself"),
        ("version: 2", "version: [2", "not valid YAML"),
        ("limits:", "limit:", "limit"),
    ],
)
def test_a_wrong_policy_is_refused_by_name(before, after, says):
    text = text_of("standard")
    assert text.count(before) == 1
    with pytest.raises(PolicyError, match="standard") as refused:
        parse_policy(text.replace(before, after), "standard")
    assert says in str(refused.value)


@pytest.mark.parametrize("text", ["", "[]", "standard", "null"])
def test_what_is_no_policy_at_all_is_refused(text):
    with pytest.raises(PolicyError):
        parse_policy(text, "standard")


@pytest.mark.parametrize(
    "section", ["quorum: {min_sites: 50}", "expiry: {days: 1}", "high_risk: {floor: 0.99, alpha: 0.01}"]
)
def test_a_threshold_policy_refuses_what_it_would_not_read(section):
    with pytest.raises(PolicyError, match="does not read"):
        parse_policy(text_of("legacy") + section + "\n", "legacy")


def test_an_unknown_policy_is_refused_with_the_names_there_are():
    for name in ("strict", "../policies/standard", ""):
        with pytest.raises(PolicyError) as refused:
            load_policy(name)
        assert refused.value.hint == "The policies are: high_risk, legacy, standard."


def test_a_policy_survives_its_own_json():
    for name in policy_names():
        policy = load_policy(name)
        assert Policy.model_validate(policy.model_dump(mode="json")).policy_hash == policy.policy_hash


def test_overrides_match_the_incident_type_whatever_its_case():
    policy = load_policy("standard")
    for incident_type in ("bitlocker", "bitlocker_status", "BitLocker"):
        assert policy.stage_gate("ring", incident_type).floor == 0.95
    assert policy.stage_gate("ring", "my_bitlocker").floor == 0.90
    assert policy.stage_gate("ring", "firewall").floor == 0.90


def test_of_stage_override_and_class_the_strictest_counts():
    gate = load_policy("standard").stage_gate("canary", "bitlocker", high_risk=True)
    assert (gate.floor, gate.alpha) == (0.95, 0.01)


@pytest.mark.parametrize(
    ("stage", "floor"), [("none", 0.0), ("proposed", 0.0), ("shadow", 0.8), ("canary", 0.9), ("ring", 0.9)]
)
def test_the_interlock_asks_for_the_floor_of_the_stage_to_be_entered(stage, floor):
    assert load_policy("standard").success_floor("firewall", stage)[0] == floor
    assert load_policy("legacy").success_floor("firewall", stage) == (0.90, 5)


def test_every_high_risk_category_that_a_policy_names_is_known_to_the_catalogue_or_to_the_design():
    seeds = yaml.safe_load((files("flywheel_pipeline.database") / "seeds" / "runbooks.yaml").read_text("utf-8"))
    rows = seeds if isinstance(seeds, list) else next(iter(seeds.values()))
    known = {row["category"] for row in rows} | {"disk", "reboot", "credentials", "network"}
    for name in ("standard", "high_risk"):
        assert set(load_policy(name).approval.high_risk_categories) <= known
    risky = {row["runbook_id"] for row in rows if row["category"] == "network_security"}
    assert risky == {"RB-WIN-SEC-007", "RB-WIN-SEC-020"}
