"""What people do: signed, each subject atomic, and what leaves service leaves every manifest."""

from __future__ import annotations

import threading
from typing import Any, get_args

import pytest
import sqlalchemy as sa
from staged_fleet import AUDIT, PASSWORDS, SPOOLER, StagedFleet

from flywheel_pipeline.candidates.keys import pattern_key
from flywheel_pipeline.candidates.patterns import pattern_id_of
from flywheel_pipeline.errors import UsageError
from flywheel_pipeline.promotion.acts import Act, ActReport, act
from flywheel_pipeline.promotion.apply import Applied
from flywheel_pipeline.promotion.decide import load_pattern_evidence
from flywheel_pipeline.promotion.evalue import spent_alpha
from flywheel_pipeline.promotion.gates import PatternEvidence
from flywheel_pipeline.promotion.policy import load_policy
from flywheel_pipeline.promotion.quality import registry_equals_ledger

SIGNED: dict[str, Any] = {"actor": "dana", "reason": "ticket 4711"}


@pytest.fixture
def fleet(engine: sa.Engine) -> StagedFleet:
    """Ten sites on which legacy has put two rules into service."""
    made = StagedFleet(engine, 10, policy="legacy")
    made.heal(AUDIT, 0)
    made.heal(SPOOLER, 0, hosts=(1, 2))
    made.run(2)
    assert {made.state(AUDIT), made.state(SPOOLER)} == {"fleet"}
    return made


def acts_of(fleet: StagedFleet) -> list[tuple[str, str | None, str, str]]:
    return [tuple(r) for r in fleet.rows("SELECT act, subject_id, actor, reason FROM human_acts ORDER BY act_id")]


def evidence_of(fleet: StagedFleet, key: str, day: float) -> PatternEvidence:
    batch = fleet.refreshed(day)
    with fleet.engine.connect() as connection:
        (evidence,) = load_pattern_evidence(connection, batch, load_policy("standard"), [key])
    return evidence


def one(reports: list[ActReport]) -> ActReport:
    (report,) = reports
    return report


# ---------------------------------------------------------------------------------------------------------- signed


def test_no_act_without_actor_and_reason(fleet):
    for what in get_args(Act):
        subjects = [] if what in ("freeze", "thaw") else [AUDIT.rule_id]
        for actor, reason in (("", "why"), ("dana", ""), ("  ", "why"), ("dana", "\n\t")):
            with pytest.raises(UsageError, match="needs an actor and a reason"):
                act(fleet.engine, what, subjects, actor=actor, reason=reason)
    assert acts_of(fleet) == []
    assert fleet.state(AUDIT) == "fleet"


def test_subjects_that_do_not_fit_the_act_are_refused_as_usage(fleet):
    with pytest.raises(UsageError, match="needs at least one subject"):
        act(fleet.engine, "quarantine", [], **SIGNED)
    with pytest.raises(UsageError, match="takes no subject"):
        act(fleet.engine, "freeze", [AUDIT.rule_id], **SIGNED)
    with pytest.raises(UsageError, match="There is no act enable"):
        act(fleet.engine, "enable", [AUDIT.rule_id], **SIGNED)  # type: ignore[arg-type]
    assert acts_of(fleet) == []


def test_every_act_is_on_record_with_actor_reason_and_time(fleet):
    act(fleet.engine, "freeze", [], **SIGNED)
    act(fleet.engine, "quarantine", [AUDIT.rule_id], actor="ben", reason="fails on every host")
    assert acts_of(fleet) == [
        ("freeze", None, "dana", "ticket 4711"),
        ("quarantine", AUDIT.rule_id, "ben", "fails on every host"),
    ]
    event = fleet.rows("SELECT * FROM rule_events ORDER BY event_id DESC LIMIT 1")[0]
    assert (event.kind, event.actor, event.reason) == ("quarantined", "ben", "fails on every host")
    assert event.run_id.startswith("act:")
    assert event.batch_id is not None


# ------------------------------------------------------------------------------------------ quarantine and retirement


@pytest.mark.parametrize(("what", "state"), [("quarantine", "quarantined"), ("retire", "retired")])
def test_a_rule_taken_out_of_service_is_in_no_manifest_the_moment_the_act_returns(fleet, what, state):
    assert len(fleet.serving(AUDIT.rule_id)) == 10
    assert one(act(fleet.engine, what, [AUDIT.rule_id], **SIGNED)).done
    assert fleet.serving(AUDIT.rule_id) == []
    assert len(fleet.serving(SPOOLER.rule_id)) == 10
    rule = fleet.rows("SELECT * FROM l1_rules WHERE rule_id = :id", id=AUDIT.rule_id)[0]
    assert (rule.state, rule.enabled, rule.state_actor, rule.state_reason) == (state, False, "dana", "ticket 4711")
    # Neither does the pipeline bring it back, under any policy, whatever its evidence.
    for day, policy in ((3, "legacy"), (4, "standard"), (5, "legacy")):
        fleet.policy = policy
        assert fleet.run(day).applied == Applied((), ())
        assert fleet.serving(AUDIT.rule_id) == []


def test_several_at_once_are_each_done_or_refused_on_their_own(fleet):
    subjects = [AUDIT.rule_id, "RB-AUTO-UNKNOWN", SPOOLER.rule_id, AUDIT.rule_id]
    reports = act(fleet.engine, "quarantine", subjects, **SIGNED)
    assert [(r.subject, r.done) for r in reports] == [
        (AUDIT.rule_id, True),
        ("RB-AUTO-UNKNOWN", False),
        (SPOOLER.rule_id, True),
        (AUDIT.rule_id, False),
    ]
    assert reports[0].message == "quarantined, version 1"
    assert "There is no rule RB-AUTO-UNKNOWN." in reports[1].message
    assert "no legal step from quarantined to quarantined" in reports[3].message
    # What was refused left nothing behind: neither an act nor an event nor a batch.
    assert [subject for _, subject, _, _ in acts_of(fleet)] == [AUDIT.rule_id, SPOOLER.rule_id]
    assert fleet.rows("SELECT count(*) AS n FROM refresh_batches WHERE run_id LIKE 'act:%'")[0].n == 2
    with fleet.engine.connect() as connection:
        assert registry_equals_ledger(connection).passed


def test_two_people_who_quarantine_one_rule_at_once_quarantine_it_once(fleet):
    barrier = threading.Barrier(2)
    found: dict[str, ActReport] = {}

    def quarantine(actor: str) -> None:
        barrier.wait()
        found[actor] = one(act(fleet.engine, "quarantine", [AUDIT.rule_id], actor=actor, reason="fails"))

    threads = [threading.Thread(target=quarantine, args=(actor,)) for actor in ("ana", "ben")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert sorted(report.done for report in found.values()) == [False, True]
    winner = next(actor for actor, report in found.items() if report.done)
    assert fleet.events(AUDIT.rule_id)[-1] == ("quarantined", "quarantined")
    assert [kind for kind, _ in fleet.events(AUDIT.rule_id)].count("quarantined") == 1
    assert [actor for _, _, actor, _ in acts_of(fleet)] == [winner]


def test_a_built_in_rule_leaves_service_by_a_person_only(fleet):
    before = len(fleet.serving("L1-FIREWALL-001"))
    assert before == 10
    assert one(act(fleet.engine, "quarantine", ["L1-FIREWALL-001"], **SIGNED)).done
    assert fleet.serving("L1-FIREWALL-001") == []


def test_a_retired_rule_comes_back_by_no_act(fleet):
    act(fleet.engine, "retire", [AUDIT.rule_id], **SIGNED)
    for what in ("quarantine", "readmit", "retire"):
        report = one(act(fleet.engine, what, [AUDIT.rule_id], change={"runbook_id": "RB-WIN-SEC-001"}, **SIGNED))
        assert not report.done
        assert "no legal step from retired" in report.message
    assert fleet.state(AUDIT) == "retired"


# ------------------------------------------------------------------------------------------------------ re-admission


def quarantined(fleet: StagedFleet, incident_pattern: str, *, runbook: str | None = "RB-WIN-SEC-002") -> str:
    """A rule out of service, as an import leaves it, with match conditions of any shape."""
    fleet.execute(
        "INSERT INTO rule_events (rule_id, rule_version, kind, from_state, to_state, definition, content_hash, actor, reason) "
        "SELECT 'RB-AUTO-OLD', 1, 'imported', 'none', 'quarantined', d, flywheel_content_hash(d), 'test', 'as it stood' "
        "FROM (SELECT jsonb_build_object('incident_pattern', CAST(:pattern AS jsonb), 'runbook_id', CAST(:runbook AS text), "
        "  'platform', 'windows', 'source', 'promoted', 'promoted_from_l2', true, 'pattern_key', 'a~b~c') AS d) AS x",
        pattern=incident_pattern,
        runbook=runbook,
    )
    return "RB-AUTO-OLD"


def test_a_re_admission_with_the_same_content_is_refused(fleet):
    act(fleet.engine, "quarantine", [AUDIT.rule_id], **SIGNED)
    for change in (None, {}, {"runbook_id": AUDIT.runbook_id}, {"platform": "windows"}):
        report = one(act(fleet.engine, "readmit", [AUDIT.rule_id], change=change, **SIGNED))
        assert not report.done
        assert "this content was in quarantine before" in report.message
    assert fleet.state(AUDIT) == "quarantined"


def test_a_re_admitted_rule_is_a_new_version_that_no_machine_runs(fleet):
    act(fleet.engine, "quarantine", [AUDIT.rule_id], **SIGNED)
    change = {"runbook_id": "RB-WIN-SEC-018"}
    report = one(act(fleet.engine, "readmit", [AUDIT.rule_id], change=change, **SIGNED))
    assert report == ActReport(AUDIT.rule_id, True, "proposed, version 2")
    rule = fleet.rows("SELECT * FROM l1_rules WHERE rule_id = :id", id=AUDIT.rule_id)[0]
    assert (rule.state, rule.enabled, rule.rule_version) == ("proposed", False, 2)
    assert (rule.runbook_id, rule.pattern_key) == (
        "RB-WIN-SEC-018",
        pattern_key("audit_policy", "RB-WIN-SEC-018", "windows"),
    )
    assert fleet.serving(AUDIT.rule_id) == []


def test_a_re_admitted_rule_begins_with_fresh_evidence_and_less_alpha(fleet):
    other = type(AUDIT)("audit_policy", "RB-WIN-SEC-018")
    for day in (3, 5):
        fleet.heal(other, day)
    assert sum(evidence_of(fleet, other.key, 7).rated) == 80
    act(fleet.engine, "quarantine", [AUDIT.rule_id], **SIGNED)
    act(fleet.engine, "readmit", [AUDIT.rule_id], change={"runbook_id": other.runbook_id}, **SIGNED)
    second = evidence_of(fleet, other.key, 8)
    assert (second.stage, second.attempt, second.sites) == ("proposed", 2, ())
    fleet.heal(other, 9)
    assert evidence_of(fleet, other.key, 11).rated == (40, 0)

    # The third attempt at the rule is the third whichever runbook it names.
    act(fleet.engine, "quarantine", [AUDIT.rule_id], **SIGNED)
    act(fleet.engine, "readmit", [AUDIT.rule_id], change={"runbook_id": "RB-WIN-SEC-019"}, **SIGNED)
    third = type(AUDIT)("audit_policy", "RB-WIN-SEC-019")
    fleet.heal(third, 12)
    found = evidence_of(fleet, third.key, 14)
    assert (found.attempt, found.rated) == (3, (40, 0))
    assert spent_alpha(0.05, 3) < spent_alpha(0.05, 2) < 0.05


def test_a_re_admitted_rule_climbs_again_under_its_own_id(fleet):
    act(fleet.engine, "quarantine", [AUDIT.rule_id], **SIGNED)
    act(fleet.engine, "readmit", [AUDIT.rule_id], change={"runbook_id": "RB-WIN-SEC-018"}, **SIGNED)
    other = type(AUDIT)("audit_policy", "RB-WIN-SEC-018")
    fleet.heal(other, 3)
    ran = fleet.run(5)
    assert ran.applied.moved == ((AUDIT.rule_id, "fleet"),)
    rule = fleet.rows("SELECT * FROM l1_rules WHERE rule_id = :id", id=AUDIT.rule_id)[0]
    assert (rule.rule_version, rule.runbook_id) == (2, "RB-WIN-SEC-018")
    event = fleet.rows("SELECT certificate FROM rule_events ORDER BY event_id DESC LIMIT 1")[0]
    assert event.certificate["rule_version"] == 2
    assert event.certificate["definition"]["runbook_id"] == "RB-WIN-SEC-018"


@pytest.mark.parametrize(
    ("incident_pattern", "key"),
    [
        ('{"incident_type": "audit_policy"}', "audit_policy~RB-WIN-SEC-018~windows"),
        ('{"check_type": "audit_policy"}', "audit_policy~RB-WIN-SEC-018~windows"),
        (
            '[{"field": "incident_type", "operator": "eq", "value": "audit_policy"}]',
            "audit_policy~RB-WIN-SEC-018~windows",
        ),
        ('{"incident_type": ["audit_policy", "logging"]}', None),
    ],
)
def test_the_evidence_that_promotes_a_re_admitted_rule_is_of_its_new_runbook(fleet, incident_pattern, key):
    # With the key of its old runbook, the good name of one script would promote another.
    rule_id = quarantined(fleet, incident_pattern)
    assert one(act(fleet.engine, "readmit", [rule_id], change={"runbook_id": "RB-WIN-SEC-018"}, **SIGNED)).done
    assert fleet.rows("SELECT pattern_key FROM l1_rules WHERE rule_id = :id", id=rule_id)[0].pattern_key == key


def test_a_re_admission_may_change_the_conditions_or_the_platform(fleet):
    rule_id = quarantined(fleet, '{"incident_type": "audit_policy"}', runbook="LIN-AUDIT-001")
    report = one(act(fleet.engine, "readmit", [rule_id], **SIGNED))
    assert "is a runbook for linux" in report.message or "in quarantine before" in report.message
    change = {"platform": "linux", "incident_pattern": {"incident_type": "audit"}}
    assert one(act(fleet.engine, "readmit", [rule_id], change=change, **SIGNED)).done
    found = fleet.rows("SELECT pattern_key, platform FROM l1_rules WHERE rule_id = :id", id=rule_id)[0]
    assert (found.pattern_key, found.platform) == ("audit~LIN-AUDIT-001~linux", "linux")


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"runbook_id": "AUTO-AUDIT_POLICY"}, "is a placeholder"),
        ({"runbook_id": "RB-WIN-SCREENLOCK-001"}, "not in the runbook catalogue"),
        ({"runbook_id": "LIN-SSH-001"}, "is a runbook for linux"),
        ({"incident_pattern": {}}, "empty match conditions"),
        ({"incident_pattern": [{}]}, "empty match conditions"),
        ({"enabled": True}, "A rule has no enabled to change"),
        ({"confidence": 1.0, "source": "builtin"}, "A rule has no confidence, source to change"),
    ],
)
def test_a_re_admission_to_something_that_must_not_run_is_refused_and_the_others_go_on(fleet, change, says):
    act(fleet.engine, "quarantine", [AUDIT.rule_id], **SIGNED)
    before = acts_of(fleet)
    report = one(act(fleet.engine, "readmit", [AUDIT.rule_id], change=change, **SIGNED))
    assert not report.done
    assert says in report.message
    assert fleet.state(AUDIT) == "quarantined"
    assert acts_of(fleet) == before


def test_a_rule_without_a_runbook_is_refused_in_words(fleet):
    rule_id = quarantined(fleet, '{"incident_type": "audit_policy"}', runbook=None)
    reports = act(fleet.engine, "readmit", [rule_id, AUDIT.rule_id], change={"platform": "linux"}, **SIGNED)
    assert [report.done for report in reports] == [False, False]
    assert "is a placeholder" in reports[0].message
    assert "no legal step from fleet to proposed" in reports[1].message


# ------------------------------------------------------------------------------------------------ approve and reject


def test_an_approval_is_evidence_for_the_next_run_and_promotes_nothing_by_itself(fleet):
    fleet.heal(PASSWORDS, 3, hosts=(1,), sites=fleet.sites[:3])
    fleet.refreshed(5)
    report = one(act(fleet.engine, "approve", [PASSWORDS.key], **SIGNED))
    assert report == ActReport(PASSWORDS.key, True, "approved; the next run decides with it")
    assert fleet.state(PASSWORDS) == "none"
    assert fleet.rows("SELECT status FROM patterns WHERE pattern_key = :k", k=PASSWORDS.key)[0].status == "approved"
    assert evidence_of(fleet, PASSWORDS.key, 6).approvers == ("dana",)
    # Three executions are too few for legacy, approved or not.
    assert fleet.run(7).verdict(PASSWORDS)[0] == "hold"


@pytest.mark.parametrize("by", ["key", "id"])
def test_a_pattern_is_named_by_key_or_by_id(fleet, by):
    fleet.heal(PASSWORDS, 3)
    fleet.refreshed(5)
    subject = PASSWORDS.key if by == "key" else pattern_id_of(PASSWORDS.key)
    assert one(act(fleet.engine, "reject", [subject], **SIGNED)).done
    assert [
        row.status for row in fleet.rows("SELECT status FROM patterns WHERE pattern_key = :k", k=PASSWORDS.key)
    ] == ["rejected"]
    assert acts_of(fleet) == [("reject", PASSWORDS.key, "dana", "ticket 4711")]


def test_a_rejected_pattern_is_decided_no_more_until_somebody_approves_it(fleet):
    fleet.heal(PASSWORDS, 3)
    fleet.refreshed(5)
    act(fleet.engine, "reject", [PASSWORDS.key], **SIGNED)
    ran = fleet.run(6)
    assert PASSWORDS.key not in ran.decided
    assert fleet.state(PASSWORDS) == "none"
    assert evidence_of(fleet, PASSWORDS.key, 7).rejected_by == "dana"
    act(fleet.engine, "approve", [PASSWORDS.key], actor="ben", reason="looked again")
    assert evidence_of(fleet, PASSWORDS.key, 8).rejected_by is None
    assert fleet.run(9).applied.moved == ((PASSWORDS.rule_id, "fleet"),)


def test_a_rejection_ends_the_approvals_before_it(fleet):
    fleet.heal(PASSWORDS, 3)
    fleet.refreshed(5)
    for what, actor in (("approve", "ana"), ("approve", "ana"), ("reject", "ben"), ("approve", "cara")):
        assert one(act(fleet.engine, what, [PASSWORDS.key], actor=actor, reason="as seen")).done
    found = evidence_of(fleet, PASSWORDS.key, 6)
    assert (found.approvers, found.rejected_by) == (("cara",), None)


@pytest.mark.parametrize("what", ["approve", "reject"])
def test_patterns_that_are_unknown_or_serve_the_fleet_are_refused_one_by_one(fleet, what):
    fleet.heal(PASSWORDS, 3)
    fleet.refreshed(5)
    reports = act(fleet.engine, what, ["nothing~like~it", AUDIT.key, PASSWORDS.key], **SIGNED)
    assert [report.done for report in reports] == [False, False, True]
    assert "There is no pattern nothing~like~it" in reports[0].message
    assert "is promoted" in reports[1].message
    assert [subject for _, subject, _, _ in acts_of(fleet)] == [PASSWORDS.key]


# ---------------------------------------------------------------------------------------------------- freeze and thaw


def test_a_freeze_stops_promotion_and_never_demotion_and_a_thaw_ends_it(fleet):
    fleet.heal(PASSWORDS, 3)
    assert one(act(fleet.engine, "freeze", [], **SIGNED)) == ActReport("promotion", True, "frozen")
    frozen = fleet.run(5)
    assert frozen.verdict(PASSWORDS)[0] == "promote"  # deciding goes on, and says what would happen
    assert frozen.applied.held == ((PASSWORDS.key, "promotion is frozen by dana: ticket 4711"),)
    assert one(act(fleet.engine, "quarantine", [AUDIT.rule_id], **SIGNED)).done
    fleet.execute("UPDATE runbooks SET enabled = false WHERE runbook_id = :r", r=SPOOLER.runbook_id)
    assert fleet.run(6).quarantined.moved == ((SPOOLER.rule_id, "quarantined"),)
    assert one(act(fleet.engine, "thaw", [], **SIGNED)).message == "no longer frozen"
    assert fleet.run(7).applied.moved == ((PASSWORDS.rule_id, "fleet"),)


def test_of_freezes_and_thaws_the_last_one_holds(fleet):
    fleet.heal(PASSWORDS, 3)
    for what in ("freeze", "freeze", "thaw", "freeze"):
        act(fleet.engine, what, [], **SIGNED)
    assert fleet.run(5).applied.moved == ()
    act(fleet.engine, "thaw", [], **SIGNED)
    assert fleet.run(6).applied.moved == ((PASSWORDS.rule_id, "fleet"),)
