"""Conflicts between served rules: who wins is who the agent tries first; who never fires is named."""

from __future__ import annotations

import dataclasses
from typing import Any

import sqlalchemy as sa
from fleet_database import NOON, Fleet
from hypothesis import given, settings
from hypothesis import strategies as st

from flywheel_pipeline.delivery.conflicts import find_conflicts
from flywheel_pipeline.delivery.manifest import ApplianceRow, RuleRow, RunbookRow, build_manifests
from flywheel_pipeline.delivery.publish import is_failing, write_manifests
from flywheel_pipeline.delivery.quality import no_rule_is_shadowed
from flywheel_pipeline.health.failing_rules import AT_LEAST, BELOW
from flywheel_pipeline.simulation.appliance import rule_matches

CATALOGUE = {
    runbook_id: RunbookRow(runbook_id, runbook_id, platform)
    for runbook_id, platform in (("RB-1", "windows"), ("RB-2", "windows"), ("LIN-1", "linux"))
}
FLEET = [ApplianceRow("site-a-01", "site-a", "1.0.74"), ApplianceRow("site-b-01", "site-b", "1.0.74")]


def rule(rule_id: str, pattern: Any, **changes: Any) -> RuleRow:
    base = RuleRow(rule_id, 1, pattern, "RB-1", "windows", "promoted", "fleet", True, "0" * 64)
    return dataclasses.replace(base, **changes)


def listed(*rules: RuleRow) -> list[tuple[str, str, str, str]]:
    found = find_conflicts(rules, build_manifests(rules, FLEET, CATALOGUE))
    return [(c.key.winner_id, c.key.loser_id, c.key.incident_type, c.kind) for c in found]


def test_of_two_rules_with_one_condition_the_second_is_shadowed() -> None:
    rules = [rule("A", {"incident_type": "firewall"}), rule("B", {"check_type": "firewall"}, runbook_id="RB-2")]
    [found] = find_conflicts(rules, build_manifests(rules, FLEET, CATALOGUE))
    assert (found.key.winner_id, found.key.loser_id, found.kind) == ("A", "B", "shadowed")
    assert (found.same_runbook, found.appliances) == (False, 2)


def test_a_narrower_rule_before_a_wider_one_overlaps_and_behind_it_is_shadowed() -> None:
    narrow, wide = {"incident_type": "firewall", "os": "server"}, {"incident_type": "firewall"}
    assert listed(rule("A", narrow), rule("B", wide)) == [("A", "B", "firewall", "overlaps")]
    assert listed(rule("A", wide), rule("B", narrow)) == [("A", "B", "firewall", "shadowed")]


def test_a_healthy_builtin_shadows_a_promoted_rule_and_a_failing_one_stands_behind_it() -> None:
    promoted = rule("RB-AUTO-FIREWALL", {"incident_type": "firewall"})
    builtin = rule("L1-FIREWALL-001", {"incident_type": "firewall"}, source="builtin")
    assert listed(promoted, builtin) == [("L1-FIREWALL-001", "RB-AUTO-FIREWALL", "firewall", "shadowed")]
    failing = dataclasses.replace(builtin, failing=True)
    assert listed(promoted, failing) == [("RB-AUTO-FIREWALL", "L1-FIREWALL-001", "firewall", "shadowed")]


def test_other_platforms_other_types_and_rules_out_of_service_are_no_conflict() -> None:
    assert (
        listed(
            rule("A", {"incident_type": "firewall"}),
            rule("B", {"incident_type": "firewall"}, runbook_id="LIN-1", platform="linux"),
            rule("C", {"incident_type": "audit"}),
            rule("D", {"incident_type": "firewall"}, enabled=False, state="quarantined"),
        )
        == []
    )


@given(
    st.integers(0, 2 * AT_LEAST),
    st.none() | st.floats(0, 1),
    st.none() | st.floats(0, 1),
    st.integers(0, 2 * AT_LEAST),
    st.none() | st.floats(0, 1),
    st.none() | st.floats(0, 1),
)
def test_a_promoted_rule_stands_before_a_builtin_only_where_that_one_fails(
    rated: int,
    raw: float | None,
    rate: float | None,
    other: int,
    other_raw: float | None,
    other_rate: float | None,
) -> None:
    promoted = rule("A", {"incident_type": "x"}, failing=is_failing("promoted", rated, raw, rate))
    builtin = rule(
        "B", {"incident_type": "x"}, source="builtin", failing=is_failing("builtin", other, other_raw, other_rate)
    )
    [manifest] = build_manifests([promoted, builtin], FLEET[:1], CATALOGUE)
    if manifest.rules[0]["id"] == "A":
        assert builtin.failing
        assert not promoted.failing
        assert other >= AT_LEAST
        assert other_rate is not None
        assert other_rate < BELOW
        # Measured as well, the one in front is never the one with the lower rate.
        assert rated < AT_LEAST or rate is None or rate > other_rate


values = st.sampled_from(["firewall", "audit"])
patterns = st.one_of(
    st.builds(lambda t: {"incident_type": t}, values),
    st.just({"incident_type": ["firewall", "audit"]}),
    st.builds(lambda t, o: {"check_type": t, "os": o}, values, st.sampled_from(["server", "client"])),
)


@settings(max_examples=60)
@given(st.lists(st.tuples(patterns, st.booleans()), min_size=1, max_size=6))
def test_a_rule_is_listed_as_shadowed_exactly_where_no_incident_reaches_it(drawn: list[tuple[Any, bool]]) -> None:
    rules = [
        rule(f"R{n}", pattern, source="builtin" if builtin else "promoted")
        for n, (pattern, builtin) in enumerate(drawn)
    ]
    manifests = build_manifests(rules, FLEET[:1], CATALOGUE)
    shadowed = {(c.key.loser_id, c.key.incident_type) for c in find_conflicts(rules, manifests) if c.kind == "shadowed"}
    fires: dict[tuple[str, str], bool] = {}
    for incident_type in ("firewall", "audit"):
        for os in ("server", "client", None):
            incident = {"incident_type": incident_type, "platform": "windows", **({"os": os} if os else {})}
            matching = [entry["id"] for entry in manifests[0].rules if rule_matches(entry, incident)]
            for place, rule_id in enumerate(matching):
                fires[rule_id, incident_type] = fires.get((rule_id, incident_type), False) or place == 0
    # A rule that two narrower ones cover together never fires either; only single rules are compared.
    assert shadowed <= {key for key, first in fires.items() if not first}
    for rule_id, incident_type in {key for key, first in fires.items() if first}:
        assert (rule_id, incident_type) not in shadowed


def test_conflicts_are_kept_told_by_the_check_and_gone_with_the_rule(fleet: Fleet) -> None:
    pattern = {"incident_type": "matched_by_no_builtin"}
    fleet.rule("RB-AUTO-ONE", incident_pattern=pattern)
    fleet.rule("RB-AUTO-TWO", runbook_id="RB-WIN-SEC-007", incident_pattern=pattern)
    first = write_manifests(fleet.conn, fleet.batch())
    assert (first.shadowed, first.overlaps) == (1, 0)
    found = no_rule_is_shadowed(fleet.conn)
    assert not found.passed
    assert "RB-AUTO-TWO" in found.sentence
    assert found.figures["shadowed_with_another_runbook"] == 1
    rows = "SELECT xmin::text, * FROM rule_conflicts ORDER BY loser_id"
    before = fleet.conn.execute(sa.text(rows)).all()
    write_manifests(fleet.conn, fleet.batch(NOON))
    assert fleet.conn.execute(sa.text(rows)).all() == before, "what is right already is not written again"
    fleet.quarantine("RB-AUTO-ONE")
    write_manifests(fleet.conn, fleet.batch())
    assert no_rule_is_shadowed(fleet.conn).passed
