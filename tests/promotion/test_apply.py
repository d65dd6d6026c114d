"""Applying decisions on a real database: the staged path, two promoters at once, limits, and evidence that changed."""

from __future__ import annotations

import datetime as dt
import random
import threading
from collections.abc import Callable

import pytest
import sqlalchemy as sa
from evidence import changed
from staged_fleet import AUDIT, FIRST_DAY, GRAPH, MANY, PASSWORDS, SPOOLER, Pattern, StagedFleet

from flywheel_pipeline.aggregates.refresh import refresh
from flywheel_pipeline.promotion.acts import act
from flywheel_pipeline.promotion.apply import Applied
from flywheel_pipeline.promotion.backtest import EpisodeLog, capped_sites
from flywheel_pipeline.promotion.certificate import verify
from flywheel_pipeline.promotion.decide import load_pattern_evidence
from flywheel_pipeline.promotion.gates import PatternEvidence
from flywheel_pipeline.promotion.policy import load_policy
from flywheel_pipeline.promotion.quality import registry_equals_ledger

STANDARD = load_policy("standard")


def loaded(fleet: StagedFleet, pattern: Pattern, day: float, policy=STANDARD) -> PatternEvidence:
    batch = fleet.refreshed(day)
    with fleet.engine.connect() as connection:
        (evidence,) = load_pattern_evidence(connection, batch, policy, [pattern.key])
    return evidence


# ------------------------------------------------------------------------------------------------ the staged path


def test_a_good_pattern_climbs_from_none_to_the_fleet_under_the_standard_policy(engine):
    fleet = StagedFleet(engine, 60)
    for day in (0, 2, 4):
        fleet.heal(AUDIT, day)
    first = fleet.run(4.1)  # the episodes of day 4 are not settled
    assert first.applied.moved == ((AUDIT.rule_id, "shadow"),)
    assert fleet.serving(AUDIT.rule_id) == []
    assert fleet.rows("SELECT status FROM patterns")[0].status == "pending"

    held = fleet.run(6)
    assert held.verdict(AUDIT) == ("hold", "In shadow for 1.9 days with 0 would-fires.")
    fleet.heal(AUDIT, 7)
    canary = fleet.run(9)
    assert canary.applied.moved == ((AUDIT.rule_id, "canary"),)
    one_site = fleet.serving(AUDIT.rule_id)
    assert len(one_site) == 1

    # From here on the rule's own episodes are needed; while few sites run it, L2's from before stand beside, elsewhere.
    fresh = fleet.run(10)
    assert fresh.verdict(AUDIT) == ("hold", "0 of 0 of the rule's own episodes held; 3 are needed.")
    beside = loaded(fleet, AUDIT, 10.1)
    assert {site.level for site in beside.sites} == {"L2"}
    assert {site.site_id for site in beside.sites} == set(fleet.sites) - set(one_site)
    fleet.heal(AUDIT, 11, sites=one_site, rule=True)
    tenth = fleet.run(13)
    assert tenth.applied.moved == ((AUDIT.rule_id, "canary"),)
    first_sites = fleet.serving(AUDIT.rule_id)
    assert len(first_sites) == 6
    assert set(one_site) < set(first_sites)

    fleet.heal(AUDIT, 13.1, sites=first_sites, rule=True)
    soaking = fleet.run(14.5)
    assert soaking.verdict(AUDIT) == ("hold", "At step 2 of the canary for 1.5 days, of 2 at least.")
    ring = fleet.run(16)
    assert ring.applied.moved == ((AUDIT.rule_id, "ring"),)
    quarter = fleet.serving(AUDIT.rule_id)
    assert len(quarter) == 15
    assert set(first_sites) < set(quarter)
    fleet.heal(AUDIT, 17, sites=quarter, rule=True)
    assert fleet.run(19).applied.moved == ((AUDIT.rule_id, "ring"),)
    half = fleet.serving(AUDIT.rule_id)
    assert len(half) == 30
    assert set(quarter) < set(half)

    # Thirty sites carry the test alone: L2 no longer counts.
    fleet.heal(AUDIT, 20, sites=half, rule=True)
    assert {site.level for site in loaded(fleet, AUDIT, 22).sites} == {"L1"}
    everywhere = fleet.run(25)
    assert everywhere.applied.moved == ((AUDIT.rule_id, "fleet"),)
    assert len(fleet.serving(AUDIT.rule_id)) == 60
    assert fleet.run(26).applied == Applied((), ())

    assert fleet.events(AUDIT.rule_id) == [
        ("proposed", "proposed"),
        ("advanced", "shadow"),
        ("advanced", "canary"),
        ("widened", "canary"),
        ("advanced", "ring"),
        ("widened", "ring"),
        ("advanced", "fleet"),
    ]
    promotions = fleet.rows("SELECT * FROM rule_events WHERE kind IN ('advanced', 'widened') ORDER BY event_id")
    assert len({row.decision_id for row in promotions}) == 6
    assert [row.rollout_step for row in promotions] == [None, 1, 2, 1, 2, None]
    for row in promotions:
        assert verify(row.certificate) == []
        assert row.certificate["target_state"] == row.to_state
        assert row.certificate["policy_hash"] == row.policy_hash == STANDARD.policy_hash
    # The clock of the staged days stands on the ledger, not that of the test.
    assert promotions[-1].occurred_at == FIRST_DAY + dt.timedelta(days=25, hours=4)
    pattern = fleet.rows("SELECT status, promoted_to_rule_id, promoted_at FROM patterns")[0]
    assert (pattern.status, pattern.promoted_to_rule_id) == ("promoted", AUDIT.rule_id)
    assert pattern.promoted_at == FIRST_DAY + dt.timedelta(days=9, hours=4)
    with engine.connect() as connection:
        assert registry_equals_ledger(connection).passed


def test_a_pattern_that_stayed_inconclusive_is_parked_until_somebody_approves_it(engine):
    fleet = StagedFleet(engine, 20)
    fleet.heal(AUDIT, 0, sites=fleet.sites[:1])
    assert fleet.run(2).applied.moved == ((AUDIT.rule_id, "shadow"),)
    assert fleet.run(70).verdict(AUDIT)[0] == "expired"
    for day in (71, 73, 75):
        fleet.heal(AUDIT, day)
    assert fleet.run(77).verdict(AUDIT) == ("expired", "Inconclusive for too long: parked until somebody approves it.")
    assert fleet.state(AUDIT) == "shadow"
    (report,) = act(engine, "approve", [AUDIT.key], actor="ana", reason="the clinics were closed")
    assert report.done
    assert fleet.run(78).applied.moved == ((AUDIT.rule_id, "canary"),)


def test_a_rule_that_fails_in_the_canary_goes_no_further_and_leaves_service(engine):
    fleet = StagedFleet(engine, 60)
    for day in (0, 2, 4):
        fleet.heal(AUDIT, day)
    fleet.run(6)
    fleet.heal(AUDIT, 7)
    fleet.run(9)
    sites = fleet.serving(AUDIT.rule_id)
    for day in (11, 13):
        fleet.heal(AUDIT, day, sites=sites, rule=True, good=lambda _, host: host == 1)
    ran = fleet.run(15)
    assert ran.quarantined.moved == ((AUDIT.rule_id, "quarantined"),)
    assert ran.applied.moved == ()
    assert AUDIT.key not in ran.decided
    assert fleet.serving(AUDIT.rule_id) == []
    # L2 goes on healing with it; that alone never brings the rule back.
    fleet.heal(AUDIT, 16)
    assert fleet.run(18).applied == Applied((), ())
    assert fleet.state(AUDIT) == "quarantined"


def test_a_high_risk_runbook_waits_for_a_name_and_a_name_given_in_the_canary_counts(engine):
    fleet = StagedFleet(engine, 60)
    for day in (0, 2, 4):
        fleet.heal(PASSWORDS, day)
    assert fleet.run(6).applied.moved == ((PASSWORDS.rule_id, "shadow"),)
    fleet.heal(PASSWORDS, 7)
    verdict, reason = fleet.run(9).verdict(PASSWORDS)
    assert verdict == "hold"
    assert "high-risk class" in reason
    (report,) = act(engine, "approve", [PASSWORDS.key], actor="dana", reason="reviewed the script")
    assert report.done
    assert fleet.run(10).applied.moved == ((PASSWORDS.rule_id, "canary"),)
    # Served, its pattern is promoted; a rejection then is a quarantine, an approval still an approval.
    (late,) = act(engine, "approve", [PASSWORDS.key], actor="ben", reason="second pair of eyes")
    assert late.done
    assert "is canary" in late.message
    assert loaded(fleet, PASSWORDS, 11).approvers == ("dana", "ben")
    (refused,) = act(engine, "reject", [PASSWORDS.key], actor="ben", reason="changed my mind")
    assert not refused.done


# ----------------------------------------------------------------------------------------- what the gates are shown


def test_the_caps_in_sql_are_those_of_the_backtest_whatever_the_order_of_arrival(engine):
    fleet = StagedFleet(engine, 4)
    pick = random.Random(20260215)
    rows = []
    days = list(range(0, 120, 2))
    pick.shuffle(days)
    for day in days:
        for site in fleet.sites:
            hosts = [h for h in (1, 2, 3, 4, 5, 6) if pick.random() < 0.12]
            if not hosts:
                continue
            outcome = {h: pick.random() < 0.7 for h in hosts}
            fleet.heal(AUDIT, day, sites=[site], hosts=hosts, good=lambda _, h, o=outcome: o[h])
            rows += [(float(day), site, f"HOST{h}", outcome[h]) for h in hosts]
    log = EpisodeLog.of(rows)
    for path, value in (
        (None, None),
        ("evidence.episodes_per_host", 1),
        ("evidence.episodes_per_host", 50),
        ("evidence.episodes_per_site", 2),
        ("evidence.episodes_per_site", 500),
    ):
        policy = STANDARD if path is None else changed(STANDARD, path, value)
        assert loaded(fleet, AUDIT, 130, policy).sites == capped_sites(log, policy), path
    # As of an earlier day only what had settled then counts.
    early = loaded(fleet, AUDIT, 60.5)
    assert early.sites == capped_sites(log, STANDARD, until=59.5)


def test_a_rule_that_heals_well_enough_is_shadowed_and_the_policy_says_how_well(engine):
    fleet = StagedFleet(engine, 10)
    fleet.heal(AUDIT, 0)
    fleet.execute(
        "INSERT INTO rule_events (rule_id, rule_version, kind, from_state, to_state, definition, content_hash, actor, reason) "
        "SELECT 'L1-AUDIT-001', 1, 'registered', 'none', 'fleet', d, flywheel_content_hash(d), 'test', 'built in' FROM ("
        "  SELECT jsonb_build_object('incident_pattern', jsonb_build_object('check_type', jsonb_build_array('audit_policy')),"
        "  'runbook_id', 'RB-WIN-SEC-002', 'platform', 'windows', 'source', 'builtin', 'promoted_from_l2', false) AS d) AS x"
    )
    assert loaded(fleet, AUDIT, 2).shadowed_rules == ("L1-AUDIT-001",)  # without evidence it counts as healthy
    built_in = {"rule_id": "L1-AUDIT-001", "runbook_id": "L1-AUDIT-001", "resolution_level": "L1"}
    fleet.heal(AUDIT, 3, good=lambda _, host: host != 1, **built_in)  # 75 %
    assert loaded(fleet, AUDIT, 5).shadowed_rules == ()
    lax = changed(STANDARD, "admission.healthy_rule_rate", 0.70)
    assert loaded(fleet, AUDIT, 6, lax).shadowed_rules == ("L1-AUDIT-001",)


def test_a_rule_of_unknown_platform_may_stand_on_any_and_shadows(engine):
    fleet = StagedFleet(engine, 10)
    fleet.heal(AUDIT, 0)
    fleet.execute(
        "INSERT INTO rule_events (rule_id, rule_version, kind, from_state, to_state, definition, content_hash, actor, reason) "
        "SELECT 'RB-AUTO-AUDIT_PO', 1, 'imported', 'none', 'fleet', d, flywheel_content_hash(d), 'test', 'as it stood' FROM ("
        "  SELECT jsonb_build_object('incident_pattern', jsonb_build_object('incident_type', 'audit_policy'),"
        "  'runbook_id', 'RB-WIN-SEC-002', 'platform', NULL, 'source', 'promoted', 'promoted_from_l2', true) AS d) AS x"
    )
    assert loaded(fleet, AUDIT, 2).shadowed_rules == ("RB-AUTO-AUDIT_PO",)


# ------------------------------------------------------------------------------------------- once, and not too many


def at_once(*calls: Callable[[], object]) -> list[object]:
    """Run calls in threads that start together; return what each returned or raised."""
    barrier = threading.Barrier(len(calls))
    found: list[object] = [None] * len(calls)

    def run(index: int, call: Callable[[], object]) -> None:
        barrier.wait()
        try:
            found[index] = call()
        except sa.exc.DBAPIError as error:
            found[index] = error

    threads = [threading.Thread(target=run, args=item) for item in enumerate(calls)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not any(thread.is_alive() for thread in threads)
    return found


def qualified(engine: sa.Engine, patterns: tuple[Pattern, ...], policy: str = "legacy") -> StagedFleet:
    """A fleet in which L2 healed each pattern 20 times and more, the later ones more often."""
    fleet = StagedFleet(engine, 10, policy=policy)
    for n, pattern in enumerate(patterns):
        fleet.heal(pattern, 0, sites=fleet.sites[: 5 + n % 6], hosts=(1, 2, 3, 4) if n % 6 == n else (1, 2, 3))
    return fleet


@pytest.mark.parametrize("round_", range(3))
def test_two_promoters_of_one_batch_at_once_promote_once(engine, round_):
    fleet = qualified(engine, (AUDIT, SPOOLER))
    batch = fleet.refreshed(2)
    fleet.decide(batch)
    found = at_once(*[lambda: fleet.apply(batch)] * 3)
    assert all(isinstance(applied, Applied) for applied in found), found
    moved = [rule for applied in found for rule, _ in applied.moved]
    assert sorted(moved) == sorted([AUDIT.rule_id, SPOOLER.rule_id])
    assert [n for (n,) in fleet.rows("SELECT count(*) FROM rule_events WHERE kind = 'promoted'")] == [2]


def test_two_promoters_of_two_batches_at_once_promote_once_and_the_older_batch_never(engine):
    fleet = qualified(engine, (AUDIT,))
    older, newer = fleet.refreshed(2), fleet.refreshed(3)
    fleet.decide(older)
    fleet.decide(newer)
    found = at_once(lambda: fleet.apply(older), lambda: fleet.apply(newer))
    assert isinstance(found[0], sa.exc.DBAPIError) or found[0].moved == ()
    assert "not the latest refresh" in str(found[0]) or found[0].held
    promoted = fleet.rows("SELECT batch_id FROM rule_events WHERE kind = 'promoted'")
    assert [row.batch_id for row in promoted] == [newer.batch_id]


def test_the_rate_limit_holds_over_two_promoters_and_over_a_retry(engine):
    fleet = qualified(engine, MANY)
    batch = fleet.refreshed(2)
    assert len(fleet.decide(batch)) == 8
    found = at_once(*[lambda: fleet.apply(batch)] * 2)
    assert sum(len(applied.moved) for applied in found) == 5
    again = fleet.apply(batch)
    assert again.moved == ()
    assert len(again.held) == 3
    assert {why for _, why in again.held} == {"the policy allows 5 new rules in one run"}
    assert len(fleet.run(3).applied.moved) == 3
    assert fleet.run(4).applied == Applied((), ())


def test_those_with_most_evidence_go_first(engine):
    fleet = qualified(engine, MANY)
    ran = fleet.run(2)
    counts = {
        key: fleet.rows("SELECT raw_successes AS n FROM pattern_candidates WHERE pattern_key = :k", k=key)[0].n
        for key in ran.decided
    }
    moved = [rule.removeprefix("RB-AUTO-") for rule, _ in ran.applied.moved]
    held = [key for key, _ in ran.applied.held]
    assert len(moved) == 5
    assert min(counts[key] for key in moved) >= max(counts[key] for key in held)


def test_a_batch_decided_twice_takes_one_step(engine):
    # A retried step decides again: the older of two decisions must not serve for a second step of the ladder.
    fleet = StagedFleet(engine, 60)
    for day in (0, 2, 4):
        fleet.heal(AUDIT, day)
    batch = fleet.refreshed(6)
    fleet.decide(batch)
    fleet.decide(batch)
    assert fleet.apply(batch).moved == ((AUDIT.rule_id, "shadow"),)
    fleet.heal(AUDIT, 7)  # by now it would have fired 240 times: the next step is due, but nobody decided it
    with engine.begin() as connection:
        refresh(connection, GRAPH)
    for _ in range(3):
        assert fleet.apply(batch) == Applied((), ())
    assert fleet.state(AUDIT) == "shadow"


# ---------------------------------------------------------------------------- decisions that no longer hold are held


def fail_on_every_host(fleet: StagedFleet) -> None:
    fleet.heal(AUDIT, 0.1, good=lambda *_: False)
    with fleet.engine.begin() as connection:
        refresh(connection, GRAPH)  # somebody's backfill, not a batch


CHANGES: dict[str, tuple[Callable[[StagedFleet], object], str]] = {
    "failures that arrived meanwhile": (fail_on_every_host, "its evidence changed since the decision"),
    "a runbook taken out of the catalogue": (
        lambda fleet: fleet.execute("UPDATE runbooks SET enabled = false WHERE runbook_id = 'RB-WIN-SEC-002'"),
        "RB-WIN-SEC-002 is disabled in the runbook catalogue",
    ),
    "a person's rejection": (
        lambda fleet: act(fleet.engine, "reject", [AUDIT.key], actor="dana", reason="wrong script"),
        "dana rejected it",
    ),
    "a freeze": (
        lambda fleet: act(fleet.engine, "freeze", [], actor="dana", reason="audit week"),
        "promotion is frozen by dana: audit week",
    ),
}


@pytest.mark.parametrize(("change", "says"), CHANGES.values(), ids=CHANGES.keys())
def test_a_decision_whose_evidence_changed_is_held(engine, change, says):
    fleet = qualified(engine, (AUDIT,))
    batch = fleet.refreshed(2)
    assert fleet.decide(batch)[AUDIT.key].decision.verdict == "promote"
    change(fleet)
    applied = fleet.apply(batch)
    assert applied.moved == ()
    assert [key for key, _ in applied.held] == [AUDIT.key]
    assert says in applied.held[0][1]
    assert fleet.state(AUDIT) == "none"


def test_a_rule_that_somebody_quarantined_since_the_decision_is_held_and_the_others_go_on(engine):
    fleet = StagedFleet(engine, 60)
    for day in (0, 2, 4):
        fleet.heal(AUDIT, day)
        fleet.heal(SPOOLER, day, hosts=(1, 2, 3))
    fleet.run(6)
    for pattern in (AUDIT, SPOOLER):
        fleet.heal(pattern, 7)
    batch = fleet.refreshed(9)
    fleet.decide(batch)
    (report,) = act(engine, "quarantine", [AUDIT.rule_id], actor="dana", reason="the script reboots")
    assert report.done
    applied = fleet.apply(batch)
    assert applied.moved == ((SPOOLER.rule_id, "canary"),)
    assert applied.held == ((AUDIT.key, "its rule is quarantined since the decision, which was taken at shadow"),)


@pytest.mark.parametrize("gate", ["telemetry_contract", "success_floor"])
@pytest.mark.parametrize("verdict", ["fail", "error", None])
def test_a_batch_that_misses_a_verdict_promotes_nothing_and_names_it(engine, gate, verdict):
    fleet = qualified(engine, (AUDIT,))
    batch = fleet.refreshed(2)
    fleet.decide(batch)
    if verdict is None:
        fleet.execute("INSERT INTO required_gates (gate, question) VALUES ('another', 'Was it asked?')")
        gate, verdict = "another", "missing"
    else:
        fleet.execute(
            "UPDATE gate_verdicts SET verdict = :v WHERE batch_id = :b AND gate = :g",
            v=verdict,
            b=batch.batch_id,
            g=gate,
        )
    applied = fleet.apply(batch)
    assert applied.gates_unmet
    assert applied.held == ((AUDIT.key, f"the batch did not pass its gates: {gate} {verdict}"),)
    assert fleet.state(AUDIT) == "none"


def test_a_retired_rule_stays_retired_and_stops_nobody_else(engine):
    # Its id is taken for ever: to propose it again would make the database refuse the whole run.
    fleet = qualified(engine, (AUDIT,), policy="standard")
    fleet.run(2)
    assert fleet.state(AUDIT) == "shadow"
    act(engine, "retire", [AUDIT.rule_id], actor="dana", reason="the vendor fixed it")
    fleet.heal(SPOOLER, 3)
    for policy in ("standard", "legacy"):
        fleet.policy = policy
        ran = fleet.run(5 if policy == "standard" else 6)
        assert AUDIT.key not in ran.decided
        assert fleet.state(AUDIT) == "retired"
    assert fleet.state(SPOOLER) in ("shadow", "canary", "fleet")


def test_a_change_of_policy_in_the_middle_of_the_ladder_takes_legal_steps_only(engine):
    fleet = qualified(engine, (AUDIT,), policy="standard")
    fleet.run(2)
    fleet.policy = "legacy"
    states = []
    for day in (3, 4, 5, 6):
        fleet.run(day)
        states.append(fleet.state(AUDIT))
    assert states == ["canary", "ring", "fleet", "fleet"]


def test_of_two_rules_with_one_pattern_the_one_in_service_stands(engine):
    fleet = qualified(engine, (AUDIT,), policy="legacy")
    for rule_id, state in (("RB-AUTO-AAA", "quarantined"), ("RB-AUTO-ZZZ", "fleet")):
        fleet.execute(
            "INSERT INTO rule_events (rule_id, rule_version, kind, from_state, to_state, definition, content_hash, actor, reason) "
            "SELECT :rule, 1, 'imported', 'none', :state, d, flywheel_content_hash(d), 'test', 'as it stood' FROM ("
            "  SELECT jsonb_build_object('incident_pattern', jsonb_build_object('incident_type', 'audit_policy'), "
            "  'runbook_id', 'RB-WIN-SEC-002', 'platform', 'windows', 'source', 'promoted', 'promoted_from_l2', true, "
            "  'pattern_key', CAST(:key AS text)) AS d) AS x",
            rule=rule_id,
            state=state,
            key=AUDIT.key,
        )
    ran = fleet.run(2)
    assert AUDIT.key not in ran.decided
    assert loaded(fleet, AUDIT, 3).stage == "fleet"
    assert fleet.state(AUDIT) == "none"


# -------------------------------------------------------------------------------------------------- the success floor


def test_from_the_canary_on_the_interlock_recounts_the_rules_own_executions(engine):
    # Little of L2, much of the rule: the recount must not look for the rule's evidence among the rows of L2.
    fleet = StagedFleet(engine, 60)
    fleet.heal(AUDIT, 0, sites=fleet.sites[:10], hosts=(1, 2, 3))
    fleet.run(2)
    assert fleet.run(17).applied.moved == ((AUDIT.rule_id, "canary"),)  # fourteen days of shadow
    sites = fleet.serving(AUDIT.rule_id)
    for day in (18, 20, 22):
        fleet.heal(AUDIT, day, sites=sites, rule=True)
    ran = fleet.run(24)
    assert fleet.verdicts(ran.batch)["success_floor"] == "pass"
    assert ran.applied.moved == ((AUDIT.rule_id, "canary"),)
    evidence = fleet.rows("SELECT evidence AS e FROM promotion_decisions ORDER BY decision_id DESC")[0].e
    assert {site["level"] for site in evidence["sites"]} == {"L1", "L2"}

    # The rule's claim is held against its own rows, however many of L2 there are.
    fleet.heal(AUDIT, 25, sites=fleet.serving(AUDIT.rule_id), rule=True)
    batch = fleet.refreshed(28)
    fleet.execute("UPDATE execution_telemetry SET success = false WHERE resolution_level = 'L1'")  # not refreshed
    assert fleet.decide(batch)[AUDIT.key].decision.verdict == "advance"
    assert fleet.verdicts(batch)["success_floor"] == "fail"


def test_the_interlock_fails_where_the_log_holds_less_than_the_evidence_claims(engine):
    fleet = StagedFleet(engine, 60)
    fleet.heal(AUDIT, 0, sites=fleet.sites[:10], hosts=(1, 2, 3))
    fleet.run(2)
    batch = fleet.refreshed(17)
    fleet.execute("UPDATE execution_telemetry SET success = false WHERE hostname = 'HOST1'")  # corrected, not refreshed
    assert fleet.decide(batch)[AUDIT.key].decision.verdict == "advance"
    assert fleet.verdicts(batch)["success_floor"] == "fail"
    assert fleet.apply(batch).moved == ()
    assert fleet.state(AUDIT) == "shadow"
