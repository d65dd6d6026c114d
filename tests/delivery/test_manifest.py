from __future__ import annotations

import dataclasses
import hashlib
import json
import random
from typing import Any

import pytest
import sqlalchemy as sa
from hypothesis import given
from hypothesis import strategies as st

from flywheel_pipeline.delivery.capability import supports
from flywheel_pipeline.delivery.manifest import (
    ApplianceRow,
    RuleRow,
    RunbookRow,
    UnservableRule,
    build_manifests,
    cohort,
    manifest_hash,
    normalise_conditions,
    runbook_problem,
    unservable_rules,
)
from flywheel_pipeline.promotion.runbook_ids import is_placeholder

CATALOGUE = {
    "RB-WIN-SEC-001": RunbookRow("RB-WIN-SEC-001", "Windows Firewall", "windows", "high"),
    "RB-WIN-SEC-005": RunbookRow("RB-WIN-SEC-005", "BitLocker resume", "windows", None),
    "LIN-SSH-001": RunbookRow("LIN-SSH-001", "SSH hardening", "linux", "medium"),
    "MAC-FV-001": RunbookRow("MAC-FV-001", "FileVault", "macos", "high"),
    "RB-WIN-SVC-004": RunbookRow("RB-WIN-SVC-004", "Withdrawn", "windows", "low", enabled=False),
}
PLACEHOLDERS = [
    "AUTO-SMB_SIGNING",
    "L2-restart",
    "ESCALATE",
    "ESC-1",
    "UNASSIGNED-RB-AUTO-X",
    "general",
    "unknown",
    "",
    None,
]


def rule(rule_id: str = "RB-AUTO-FIREWALL", **changes: Any) -> RuleRow:
    base = RuleRow(
        rule_id=rule_id,
        rule_version=1,
        incident_pattern={"incident_type": "firewall"},
        runbook_id="RB-WIN-SEC-001",
        platform="windows",
        source="promoted",
        state="fleet",
        enabled=True,
        content_hash="0" * 64,
    )
    return dataclasses.replace(base, **changes)


def appliance(appliance_id: str = "site-a-00:11", **changes: Any) -> ApplianceRow:
    base = ApplianceRow(appliance_id, appliance_id.rsplit("-", 1)[0], "1.0.70")
    return dataclasses.replace(base, **changes)


incident_types = st.sampled_from(["firewall", "bitlocker", "ssh_config", "audit_policy"])
conditions = st.one_of(
    st.builds(lambda t: {"incident_type": t}, incident_types),
    st.builds(lambda t: {"check_type": t, "platform": "windows"}, incident_types),
    st.builds(lambda t: [{"field": "incident_type", "operator": "eq", "value": t}], incident_types),
)
runbooks_served = st.sampled_from(["RB-WIN-SEC-001", "RB-WIN-SEC-005", "LIN-SSH-001", "MAC-FV-001"])
rules_served = st.builds(
    lambda n, version, pattern, runbook, source, state, failing: rule(
        f"RB-AUTO-{n}",
        rule_version=version,
        incident_pattern=pattern,
        runbook_id=runbook,
        platform=CATALOGUE[runbook].platform,
        source=source,
        state=state,
        enabled=state in ("canary", "ring", "fleet"),
        failing=failing,
    ),
    st.integers(0, 40),
    st.integers(1, 3),
    conditions,
    runbooks_served,
    st.sampled_from(["promoted", "builtin"]),
    st.sampled_from(["canary", "ring", "fleet", "quarantined", "proposed"]),
    st.booleans(),
)
rule_sets = st.lists(rules_served, max_size=12, unique_by=lambda r: r.rule_id)
fleets = st.lists(
    st.builds(
        lambda n, site, version, reports: ApplianceRow(f"site-{site}-{n:02x}", f"site-{site}", version, reports),
        st.integers(0, 40),
        st.integers(0, 6),
        st.sampled_from([None, "unknown", "1.0.30", "1.0.56", "1.0.69", "1.0.70", "1.0.74"]),
        st.sampled_from([None, [], ["run_runbook"], ["run_windows_runbook", "run_linux_runbook"]]),
    ),
    max_size=10,
    unique_by=lambda a: a.appliance_id,
)


@given(rule_sets, fleets, st.randoms(use_true_random=False))
def test_manifests_are_the_same_under_any_order_of_the_input(
    rules: list[RuleRow], fleet: list[ApplianceRow], rng: random.Random
) -> None:
    first = build_manifests(rules, fleet, CATALOGUE)
    shuffled_rules = rng.sample(rules, len(rules))
    shuffled_fleet = rng.sample(fleet, len(fleet))
    shuffled_catalogue = dict(rng.sample(list(CATALOGUE.items()), len(CATALOGUE)))
    assert build_manifests(shuffled_rules, shuffled_fleet, shuffled_catalogue) == first


@given(rule_sets, fleets, rule_sets, fleets)
def test_the_hash_differs_exactly_where_the_rules_differ(
    rules: list[RuleRow],
    fleet: list[ApplianceRow],
    other_rules: list[RuleRow],
    other_fleet: list[ApplianceRow],
) -> None:
    every = build_manifests(rules, fleet, CATALOGUE) + build_manifests(other_rules, other_fleet, CATALOGUE)
    for one in every:
        for two in every:
            assert (one.manifest_hash == two.manifest_hash) == (one.rules == two.rules)


@given(rule_sets, fleets)
def test_the_hash_can_be_recomputed_from_the_manifest_after_a_journey_through_json(
    rules: list[RuleRow], fleet: list[ApplianceRow]
) -> None:
    for manifest in build_manifests(rules, fleet, CATALOGUE):
        text = json.dumps(
            json.loads(json.dumps(manifest.rules)), sort_keys=True, separators=(",", ":"), ensure_ascii=False
        )
        assert hashlib.sha256(text.encode()).hexdigest() == manifest.manifest_hash


@given(rule_sets, fleets)
def test_every_enabled_rule_in_scope_is_either_served_or_withheld_with_a_reason(
    rules: list[RuleRow], fleet: list[ApplianceRow]
) -> None:
    sites = {a.site_id for a in fleet}
    for manifest in build_manifests(rules, fleet, CATALOGUE):
        served, withheld = {r["id"] for r in manifest.rules}, {w["rule_id"] for w in manifest.withheld}
        in_scope = {
            r.rule_id
            for r in rules
            if r.enabled and manifest.site_id in cohort(r.rule_id, r.rule_version, r.state, sites)
        }
        assert served | withheld == in_scope
        assert not served & withheld
        assert all(w["reason"] for w in manifest.withheld)


@given(rule_sets, fleets)
def test_an_appliance_gets_only_actions_that_its_agent_supports(
    rules: list[RuleRow], fleet: list[ApplianceRow]
) -> None:
    agents = {a.appliance_id: a for a in fleet}
    for manifest in build_manifests(rules, fleet, CATALOGUE):
        agent = agents[manifest.appliance_id]
        for entry in manifest.rules:
            for action in entry["actions"]:
                assert supports(agent.agent_version, action, agent.capabilities).ok


@given(
    rule_sets,
    st.lists(
        st.builds(
            lambda n, runbook, enabled: rule(f"RB-AUTO-BAD{n}", runbook_id=runbook, enabled=enabled),
            st.integers(0, 9),
            st.sampled_from([*PLACEHOLDERS, "RB-WIN-SCREENLOCK-001", "LIN-SSH-001", "RB-WIN-SVC-004", "auto-x"]),
            st.booleans(),
        ),
        max_size=4,
        unique_by=lambda r: r.rule_id,
    ),
    fleets,
)
def test_no_runbook_that_is_a_placeholder_or_not_in_the_catalogue_is_ever_in_a_manifest(
    good: list[RuleRow], bad: list[RuleRow], fleet: list[ApplianceRow]
) -> None:
    rules = good + bad
    for manifest in build_manifests(rules, fleet, CATALOGUE, on_unservable="leave_out"):
        for entry in manifest.rules:
            runbook_id = entry["actions"][0].split(":", 1)[1]
            assert not is_placeholder(runbook_id)
            assert CATALOGUE[runbook_id].enabled
            assert not entry["id"].startswith("RB-AUTO-BAD")
    if any(r.enabled for r in bad):
        with pytest.raises(UnservableRule):
            build_manifests(rules, fleet, CATALOGUE)
    else:
        build_manifests(rules, fleet, CATALOGUE)


@pytest.mark.parametrize("runbook_id", PLACEHOLDERS)
def test_an_enabled_rule_on_a_placeholder_stops_the_build_and_is_named(runbook_id: str | None) -> None:
    with pytest.raises(UnservableRule, match=r"RB-AUTO-SMB_SIGN: .* placeholder"):
        build_manifests([rule("RB-AUTO-SMB_SIGN", runbook_id=runbook_id)], [appliance()], CATALOGUE)


def test_the_placeholder_test_spares_rule_ids() -> None:
    [manifest] = build_manifests([rule("RB-AUTO-FIREWALL"), rule("AUTO-LOOKING-RULE")], [appliance()], CATALOGUE)
    assert [r["id"] for r in manifest.rules] == ["AUTO-LOOKING-RULE", "RB-AUTO-FIREWALL"]


def test_a_disabled_rule_is_in_no_manifest_whatever_its_runbook() -> None:
    rules = [rule("RB-AUTO-A", enabled=False, state="quarantined", runbook_id="AUTO-A")]
    [manifest] = build_manifests(rules, [appliance()], CATALOGUE)
    assert manifest.rules == ()
    assert manifest.withheld == ()


def test_an_entry_has_the_agents_sync_format_and_the_version() -> None:
    [manifest] = build_manifests([rule(rule_version=3)], [appliance()], CATALOGUE)
    assert manifest.rules == (
        {
            "id": "RB-AUTO-FIREWALL",
            "name": "Windows Firewall",
            "conditions": [
                {"field": "incident_type", "operator": "eq", "value": "firewall"},
                {"field": "platform", "operator": "eq", "value": "windows"},
            ],
            "actions": ["run_windows_runbook:RB-WIN-SEC-001"],
            "severity": "high",
            "cooldown_seconds": 300,
            "max_retries": 1,
            "source": "promoted",
            "version": 3,
        },
    )


def test_the_agent_of_2026_02_15_gets_the_form_it_knows_and_an_older_one_nothing() -> None:
    old, older = (
        appliance("site-a-01", agent_version="1.0.56"),
        appliance("site-a-02", agent_version="1.0.30"),
    )
    first, second = build_manifests([rule()], [old, older], CATALOGUE)
    assert first.rules[0]["actions"] == ["run_runbook:RB-WIN-SEC-001"]
    assert second.rules == ()
    assert second.withheld[0]["rule_id"] == "RB-AUTO-FIREWALL"
    assert "older than 1.0.44" in second.withheld[0]["reason"]


def test_a_promoted_rule_never_stands_before_a_healthier_built_in_and_takes_over_from_a_failing_one() -> None:
    rules = [
        rule("RB-AUTO-A"),
        rule("RB-AUTO-B", failing=True),
        rule("L1-C", source="builtin"),
        rule("L1-D", source="builtin", failing=True),
    ]
    [manifest] = build_manifests(rules, [appliance()], CATALOGUE)
    assert [r["id"] for r in manifest.rules] == ["L1-C", "RB-AUTO-A", "L1-D", "RB-AUTO-B"]


@pytest.mark.parametrize(
    ("pattern", "field", "value"),
    [
        ({"incident_type": "firewall"}, "incident_type", "firewall"),
        ({"check_type": "firewall"}, "check_type", "firewall"),
        ([{"incident_type": "firewall"}], "incident_type", "firewall"),
        ([{"field": "check_type", "operator": "eq", "value": "firewall"}], "check_type", "firewall"),
        ([{"field": "check_type", "value": "firewall"}], "check_type", "firewall"),
    ],
)
def test_every_shape_of_conditions_found_in_production_is_read(pattern: Any, field: str, value: str) -> None:
    assert normalise_conditions(pattern, "windows") == [
        {"field": field, "operator": "eq", "value": value},
        {"field": "platform", "operator": "eq", "value": "windows"},
    ]


def test_a_list_of_types_becomes_one_condition_and_a_stated_platform_is_kept() -> None:
    assert normalise_conditions({"platform": "linux", "incident_type": ["a", "b"]}, "linux") == [
        {"field": "incident_type", "operator": "in", "value": ["a", "b"]},
        {"field": "platform", "operator": "eq", "value": "linux"},
    ]


@pytest.mark.parametrize(
    "pattern",
    [
        {},
        [],
        None,
        "firewall",
        [{}],
        [None],
        {"incident_type": ""},
        {"incident_type": "  "},
        {"incident_type": None},
        {"incident_type": []},
        {"host": "ws01"},
        [{"field": "host", "value": "ws01"}],
        [{"field": "incident_type", "operator": "ne", "value": "firewall"}],
        [{"field": "incident_type", "operator": "regex", "value": ".*"}],
        [{"field": "incident_type", "operator": "maybe", "value": "firewall"}],
        [{"field": "incident_type"}],
        [{"field": "incident_type", "value": "firewall", "or": True}],
    ],
)
def test_conditions_that_might_match_everything_or_cannot_be_read_are_refused(pattern: Any) -> None:
    with pytest.raises(UnservableRule):
        normalise_conditions(pattern, "windows")
    assert unservable_rules([rule(incident_pattern=pattern)], CATALOGUE) != []


def test_a_platform_no_agent_serves_is_refused_even_if_the_catalogue_has_it() -> None:
    catalogue = {"RB-NET-001": RunbookRow("RB-NET-001", "Switch", "network")}
    found = unservable_rules([rule(runbook_id="RB-NET-001", platform="network")], catalogue)
    assert found == [("RB-AUTO-FIREWALL", "no agent runs runbooks for network")]


def test_a_rule_or_an_appliance_given_twice_is_refused() -> None:
    with pytest.raises(ValueError, match="rule given twice: RB-AUTO-FIREWALL"):
        build_manifests([rule(), rule()], [appliance()], CATALOGUE)
    with pytest.raises(ValueError, match="appliance given twice"):
        build_manifests([rule()], [appliance(), appliance()], CATALOGUE)


@given(st.text(max_size=20), st.integers(1, 9), st.sets(st.text(min_size=1, max_size=6), min_size=1, max_size=60))
def test_the_cohort_of_a_stage_contains_those_before_it_and_keeps_its_share(
    rule_id: str, version: int, sites: set[str]
) -> None:
    canary, ring, fleet = (cohort(rule_id, version, state, sites) for state in ("canary", "ring", "fleet"))
    assert canary <= ring <= fleet == sites
    assert 1 <= len(canary) <= max(1, len(sites) * 0.10)
    assert 1 <= len(ring) <= max(1, len(sites) * 0.25)
    assert cohort(rule_id, version, "shadow", sites) == cohort(rule_id, version, "quarantined", sites) == frozenset()


def test_a_canary_reaches_one_of_eight_sites_and_all_its_appliances() -> None:
    fleet = [appliance(f"site-{n}-{m:02x}") for n in range(8) for m in range(2)]
    reached = [m for m in build_manifests([rule(state="canary")], fleet, CATALOGUE) if m.rules]
    assert len(reached) == 2
    assert len({m.site_id for m in reached}) == 1
    assert not any(m.withheld for m in build_manifests([rule(state="canary")], fleet, CATALOGUE))


def test_the_hash_of_nothing_is_that_of_an_empty_list() -> None:
    assert manifest_hash([]) == hashlib.sha256(b"[]").hexdigest()


def test_ten_thousand_appliances_share_their_manifests() -> None:
    fleet = [appliance(f"site-{n % 3000}-{n:05x}", agent_version=f"1.0.{40 + n % 35}") for n in range(10_000)]
    rules = [rule(f"RB-AUTO-{n}") for n in range(500)]
    manifests = build_manifests(rules, fleet, CATALOGUE)
    assert len(manifests) == 10_000
    assert len({id(m.rules) for m in manifests}) <= 35


def test_the_database_gives_the_same_problem_for_every_runbook_and_platform(engine: sa.Engine) -> None:
    runbook_ids = [
        *PLACEHOLDERS,
        " AUTO-X ",
        "auto-x",
        "RB-WIN-SCREENLOCK-001",
        "RB-AUTO-FIREWALL",
        "LIN-SSH-001",
        "RB-OFF",
    ]
    with engine.begin() as conn:
        conn.execute(
            sa.text(
                "INSERT INTO runbooks (runbook_id, name, platform, enabled) VALUES ('RB-OFF', 'Off', 'windows', false)"
            )
        )
        rows = conn.execute(sa.text("SELECT runbook_id, name, platform, severity, enabled FROM runbooks")).mappings()
        catalogue = {row["runbook_id"]: RunbookRow(**row) for row in rows}
        for runbook_id in [*runbook_ids, *catalogue]:
            for platform in ("windows", "linux", "macos", None):
                theirs = conn.execute(
                    sa.text("SELECT flywheel_runbook_problem(:runbook, :platform)"),
                    {"runbook": runbook_id, "platform": platform},
                ).scalar_one()
                assert runbook_problem(runbook_id, platform, catalogue) == theirs
