"""The ledger and its padlock, by plain SQL: what the database itself refuses, whoever writes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import sqlalchemy as sa
from hypothesis import given, settings
from hypothesis import strategies as st
from ledger_database import KEY, RULE, Ledger, content

from flywheel_pipeline.promotion.ledger import ENABLED_STATES, content_hash, fold
from flywheel_pipeline.promotion.quality import registry_equals_ledger

STATES = ("proposed", "shadow", "canary", "ring", "fleet", "quarantined", "retired")


@pytest.fixture
def ledger(shared_engine: sa.Engine) -> Iterator[Ledger]:
    """A ledger in a transaction that is rolled back."""
    with shared_engine.connect() as connection, connection.begin() as transaction:
        yield Ledger(connection)
        transaction.rollback()


def refused(ledger: Ledger, write: Callable[[], Any]) -> str:
    """Try a write that the database must refuse; return its words. The transaction goes on as if it had not been."""
    savepoint = ledger.connection.begin_nested()
    try:
        write()
    except sa.exc.DBAPIError as error:
        savepoint.rollback()
        return str(error.orig)
    raise AssertionError("the database accepted it")


def run(ledger: Ledger, statement: str) -> Callable[[], Any]:
    return lambda: ledger.connection.exec_driver_sql(statement)


def legal_steps(connection: sa.Connection) -> set[tuple[str, str, str]]:
    rows = connection.exec_driver_sql("SELECT kind, from_state, to_state FROM rule_transitions")
    return {tuple(row) for row in rows}


# ----------------------------------------------------------------------------------------------------------- edges


@pytest.mark.parametrize("state", ["none", *STATES])
def test_every_step_that_is_not_declared_is_refused_by_the_database(ledger, state):
    legal = legal_steps(ledger.connection)
    kinds = {kind for kind, _, _ in legal}
    states = {s for _, before, after in legal for s in (before, after)}
    assert states == {"none", *STATES}
    ledger.bring_to(state)
    before = ledger.state()
    illegal = [(k, state, to) for k in sorted(kinds) for to in sorted(states) if (k, state, to) not in legal]
    assert len(illegal) > 50
    for kind, from_state, to_state in illegal:
        words = refused(ledger, lambda k=kind, f=from_state, t=to_state: ledger.step(k, f, t))
        assert f"{kind} is no legal step from {from_state} to {to_state}" in words
    assert ledger.state() == before


def test_every_declared_step_is_taken(ledger):
    for number, (kind, before, after) in enumerate(sorted(legal_steps(ledger.connection))):
        rule_id = f"R-{number}"
        ledger.bring_to(before, rule_id)
        changes: dict[str, Any] = {"rule_id": rule_id}
        if kind == "readmitted":
            changes |= {"rule_version": 2, "definition": content(runbook_id="RB-WIN-SEC-003")}
        ledger.step(kind, before, after, **changes)
        if kind == "widened":
            assert "widened once" in refused(
                ledger, lambda k=kind, b=before, a=after, c=changes: ledger.step(k, b, a, **c)
            )
        rule = ledger.state(rule_id)
        assert (rule.state, rule.enabled) == (after, after in ENABLED_STATES)


@pytest.mark.parametrize("state", STATES)
def test_a_step_from_a_state_in_which_the_rule_is_not_is_refused(ledger, state):
    ledger.bring_to(state)
    for kind, before, after in sorted(legal_steps(ledger.connection)):
        if before != state:
            words = refused(ledger, lambda k=kind, b=before, a=after: ledger.step(k, b, a))
            assert f"rule {RULE} is {state}, not {before}" in words


@pytest.mark.parametrize(
    "statement",
    [
        "INSERT INTO rule_transitions VALUES ('promoted', 'quarantined', 'fleet', 'a short cut')",
        "UPDATE rule_transitions SET to_state = 'fleet' WHERE kind = 'readmitted'",
        "DELETE FROM rule_transitions",
        "TRUNCATE rule_transitions",
    ],
)
def test_no_step_is_made_legal_by_writing_it_down(ledger, statement):
    assert "the legal steps are part of the program" in refused(ledger, run(ledger, statement))


# ------------------------------------------------------------------------------------------- only ever grows


@pytest.mark.parametrize(
    "statement",
    [
        "UPDATE rule_events SET reason = 'another'",
        "UPDATE rule_events SET to_state = 'fleet' WHERE kind = 'quarantined'",
        "DELETE FROM rule_events",
        "DELETE FROM rule_events WHERE false",
        "TRUNCATE rule_events",
        "TRUNCATE rule_events CASCADE",
        "UPDATE human_acts SET actor = 'somebody else'",
        "DELETE FROM human_acts",
        "TRUNCATE human_acts",
        "DELETE FROM promotion_decisions",
        "TRUNCATE promotion_decisions CASCADE",
        "UPDATE policy_activations SET policy_name = 'legacy'",
        "DELETE FROM policy_activations",
        "DELETE FROM gate_verdicts",
        "TRUNCATE gate_verdicts",
        "DELETE FROM l1_rules",
        "TRUNCATE l1_rules",
    ],
)
def test_what_auditors_read_is_neither_changed_nor_deleted(ledger, statement):
    ledger.bring_to("fleet")
    ledger.event("quarantined", "fleet", "quarantined")
    assert "refused" in refused(ledger, run(ledger, statement))


def test_a_failed_verdict_stays_failed(ledger):
    batch = ledger.batch(verdict="fail")
    statement = f"UPDATE gate_verdicts SET verdict = 'pass' WHERE batch_id = {batch}"
    assert "stays fail" in refused(ledger, run(ledger, statement))


@pytest.mark.parametrize("column", ["verdict = 'advance'", "evidence = '{}'", "policy_hash = ''", "subject_id = 'x'"])
def test_a_decision_is_not_rewritten(ledger, column):
    ledger.decision(ledger.batch(), "none", verdict="hold")
    assert "kept for auditors" in refused(ledger, run(ledger, f"UPDATE promotion_decisions SET {column}"))


# --------------------------------------------------------------------------------------- l1_rules holds the fold only


@pytest.mark.parametrize("state", STATES)
@pytest.mark.parametrize(
    "change",
    [
        "enabled = NOT enabled",
        "state = CASE state WHEN 'fleet' THEN 'quarantined' ELSE 'fleet' END",
        "runbook_id = 'RB-WIN-SEC-003'",
        "incident_pattern = '{}'",
        "rule_version = rule_version + 1",
        "content_hash = repeat('0', 64)",
        "state_reason = 'nothing happened'",
        "state_actor = 'nobody'",
        "source = 'builtin'",
        "platform = 'linux'",
        "pattern_key = 'another'",
        "last_event_id = 0",
        "rule_id = 'R-OTHER'",
    ],
)
def test_no_folded_column_of_a_rule_is_written_past_the_ledger(ledger, state, change):
    ledger.bring_to(state)
    words = refused(ledger, run(ledger, f"UPDATE l1_rules SET {change} WHERE rule_id = '{RULE}'"))
    assert "l1_rules holds only what its ledger says" in words


def test_a_blanket_re_enable_is_refused_and_the_quarantined_rule_keeps_reason_actor_and_time(ledger):
    ledger.bring_to("fleet")
    ledger.event("quarantined", "fleet", "quarantined", actor="dana", reason="0 of 303 on every host")
    before = ledger.state()
    for statement in (
        "UPDATE l1_rules SET enabled = true",
        "UPDATE l1_rules SET enabled = true WHERE promoted_from_l2",
        "UPDATE l1_rules SET enabled = true, state = 'fleet' WHERE NOT enabled",
        "INSERT INTO l1_rules (rule_id, incident_pattern, state, content_hash, last_event_id) "
        "SELECT rule_id, incident_pattern, state, content_hash, last_event_id FROM l1_rules "
        "ON CONFLICT (rule_id) DO UPDATE SET enabled = true",
    ):
        assert "l1_rules holds only what its ledger says" in refused(ledger, run(ledger, statement))
    assert ledger.state() == before
    assert (before.enabled, before.state_actor, before.state_reason) == (False, "dana", "0 of 303 on every host")


def test_a_rule_that_the_ledger_does_not_know_cannot_be_inserted(ledger):
    words = refused(
        ledger,
        run(
            ledger,
            "INSERT INTO l1_rules (rule_id, incident_pattern, enabled, state, content_hash, last_event_id) "
            "VALUES ('R-NEW', '{\"incident_type\": \"firewall\"}', true, 'fleet', '', 0)",
        ),
    )
    assert "l1_rules holds only what its ledger says" in words


def test_counters_are_no_part_of_the_fold_and_may_be_set(ledger):
    ledger.bring_to("fleet")
    ledger.connection.exec_driver_sql("UPDATE l1_rules SET match_count = 20, success_count = 20")
    assert ledger.state().success_rate == 1.0


# ------------------------------------------------------------------------------------------------ first events, content


@pytest.mark.parametrize("column", ["actor", "reason"])
@pytest.mark.parametrize("value", ["", "   ", "\t\n"])
def test_an_event_without_actor_or_reason_is_refused(ledger, column, value):
    ledger.bring_to("fleet")
    words = refused(ledger, lambda: ledger.event("quarantined", "fleet", "quarantined", **{column: value}))
    assert "needs an actor and a reason" in words


def test_a_content_hash_that_is_not_that_of_the_content_is_refused(ledger):
    words = refused(ledger, lambda: ledger.event("proposed", "none", "proposed", content_hash="0" * 64))
    assert "not that of the definition" in words


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"runbook_id": "AUTO-FIREWALL"}, "is a placeholder"),
        ({"runbook_id": None}, "is a placeholder"),
        ({"runbook_id": "L2-restart_service"}, "is a placeholder"),
        ({"runbook_id": "RB-WIN-SCREENLOCK-001"}, "not in the runbook catalogue"),
        ({"runbook_id": "LIN-SSH-001"}, "is a runbook for linux"),
        ({"platform": None}, "no platform"),
        ({"incident_pattern": {}}, "empty match conditions"),
        ({"incident_pattern": []}, "empty match conditions"),
        ({"incident_pattern": [{}]}, "empty match conditions"),
        ({"incident_pattern": [[]]}, "empty match conditions"),
        ({"incident_pattern": "firewall"}, "empty match conditions"),
        ({"incident_pattern": None}, "empty match conditions"),
        ({"incident_pattern": {"incident_type": " "}}, "empty match conditions"),
        ({"incident_pattern": {"incident_type": None}}, "empty match conditions"),
        ({"incident_pattern": {"incident_type": []}}, "empty match conditions"),
        ({"incident_pattern": {"incident_type": ["firewall", ""]}}, "empty match conditions"),
        ({"incident_pattern": {"incident_type": {"not": "firewall"}}}, "empty match conditions"),
        ({"incident_pattern": {"hostname": "DC01"}}, "empty match conditions"),
        (
            {"incident_pattern": [{"field": "incident_type", "operator": "ne", "value": "x"}]},
            "empty match conditions",
        ),
        ({"incident_pattern": [{"field": "hostname", "value": "DC01"}]}, "empty match conditions"),
    ],
)
def test_a_rule_that_could_not_run_or_matches_everything_is_not_even_proposed(ledger, changes, says):
    words = refused(ledger, lambda: ledger.event("proposed", "none", "proposed", definition=content(**changes)))
    assert says in words


@pytest.mark.parametrize(
    "incident_pattern",
    [
        {"incident_type": "firewall"},
        {"check_type": "firewall"},
        {"incident_type": ["firewall", "firewall_status"]},
        [{"field": "incident_type", "operator": "eq", "value": "firewall"}],
        [{"field": "check_type", "operator": "in", "value": ["firewall"]}, {"field": "platform", "value": "windows"}],
    ],
)
def test_conditions_in_every_shape_found_in_production_may_be_proposed(ledger, incident_pattern):
    ledger.event("proposed", "none", "proposed", definition=content(incident_pattern=incident_pattern))
    assert ledger.state().incident_pattern == incident_pattern


def test_a_re_admission_needs_new_content_and_the_next_version(ledger):
    ledger.bring_to("quarantined")
    new = content(runbook_id="RB-WIN-SEC-003")
    back = ("readmitted", "quarantined", "proposed")
    assert "was in quarantine before" in refused(ledger, lambda: ledger.event(*back, rule_version=2))
    for version in (1, 3):
        words = refused(ledger, lambda v=version: ledger.event(*back, rule_version=v, definition=new))
        assert "a re-admission is version 2" in words
    ledger.event(*back, rule_version=2, definition=new)
    assert (ledger.state().state, ledger.state().rule_version, ledger.state().enabled) == ("proposed", 2, False)
    # Neither does the first content come back as the third version.
    ledger.event("quarantined", "proposed", "quarantined", rule_version=2, definition=new)
    for old in (content(), new):
        words = refused(ledger, lambda o=old: ledger.event(*back, rule_version=3, definition=o))
        assert "was in quarantine before" in words


@pytest.mark.parametrize("changes", [{"rule_version": 2}, {"definition": content(runbook_id="RB-WIN-SEC-003")}])
def test_version_and_content_change_by_re_admission_only(ledger, changes):
    ledger.bring_to("fleet")
    words = refused(ledger, lambda: ledger.event("quarantined", "fleet", "quarantined", **changes))
    assert "change by re-admission only" in words


# -------------------------------------------------------------------------------------------- promotions by hand

STEPS = [
    ("proposed", "fleet"),
    ("proposed", "shadow"),
    ("shadow", "canary"),
    ("canary", "canary"),
    ("canary", "ring"),
    ("ring", "ring"),
    ("ring", "fleet"),
]


def _unrefreshed(ledger: Ledger, row: dict[str, Any]) -> None:
    batch = ledger.batch(refreshed=False)
    row |= {"batch_id": batch, "decision_id": ledger.decision(batch, row["from_state"])}


def _stale(ledger: Ledger, row: dict[str, Any]) -> None:
    ledger.batch()


def _without_verdicts(ledger: Ledger, row: dict[str, Any]) -> None:
    batch = ledger.batch(verdict=None)
    row |= {"batch_id": batch, "decision_id": ledger.decision(batch, row["from_state"])}


def _one_missing(ledger: Ledger, row: dict[str, Any]) -> None:
    batch = ledger.batch(verdict=None)
    ledger.connection.exec_driver_sql(
        f"INSERT INTO gate_verdicts (batch_id, gate, verdict, sentence) SELECT {batch}, gate, 'pass', '' "
        "FROM required_gates ORDER BY gate OFFSET 1"
    )
    row |= {"batch_id": batch, "decision_id": ledger.decision(batch, row["from_state"])}


def _turned(verdict: str) -> Callable[[Ledger, dict[str, Any]], None]:
    def turn(ledger: Ledger, row: dict[str, Any]) -> None:
        ledger.connection.exec_driver_sql(
            f"UPDATE gate_verdicts SET verdict = '{verdict}' WHERE batch_id = {row['batch_id']} AND gate = "
            "(SELECT min(gate) FROM required_gates)"
        )

    return turn


def _frozen(ledger: Ledger, row: dict[str, Any]) -> None:
    ledger.insert("human_acts", "act_id", act="freeze", actor="dana", reason="audit week")


def _decided(**changes: Any) -> Callable[[Ledger, dict[str, Any]], None]:
    def decide(ledger: Ledger, row: dict[str, Any]) -> None:
        row["decision_id"] = ledger.decision(row["batch_id"], row["from_state"], **changes)

    return decide


def _decided_for(part: str, value: Any) -> Callable[[Ledger, dict[str, Any]], None]:
    def decide(ledger: Ledger, row: dict[str, Any]) -> None:
        written = ledger.connection.execute(
            sa.text("SELECT evidence FROM promotion_decisions WHERE decision_id = :d"), {"d": row["decision_id"]}
        ).scalar_one()
        evidence = {**written, part: value}
        verdict = "promote" if row["kind"] == "promoted" else "advance"
        row["decision_id"] = ledger.decision(row["batch_id"], "", evidence=evidence, verdict=verdict)

    return decide


def _other_batch(ledger: Ledger, row: dict[str, Any]) -> None:
    row["batch_id"] = row["certificate"]["batch_id"] = ledger.batch()


def _set(**values: Any) -> Callable[[Ledger, dict[str, Any]], None]:
    return lambda _, row: row.update(values)


def _certified(**values: Any) -> Callable[[Ledger, dict[str, Any]], None]:
    return lambda _, row: row["certificate"].update(values)


def _other_way(ledger: Ledger, row: dict[str, Any]) -> None:
    # The step out of proposed that the decision is not for: at once instead of by stages, or the other way round.
    if row["from_state"] == "proposed":
        verdict = "advance" if row["kind"] == "promoted" else "promote"
        row["decision_id"] = ledger.decision(row["batch_id"], "none", verdict=verdict)
    else:
        row["decision_id"] = ledger.decision(row["batch_id"], "none")


FLAWS: dict[str, tuple[Callable[[Ledger, dict[str, Any]], None], str]] = {
    "no batch": (_set(batch_id=None), "no batch with refreshed aggregates"),
    "a batch that does not exist": (_set(batch_id=10**9), "no batch with refreshed aggregates"),
    "a batch without a refresh": (_unrefreshed, "no batch with refreshed aggregates"),
    "a stale batch": (_stale, "is not the latest refresh"),
    "no verdict at all": (_without_verdicts, "did not pass its gates"),
    "one verdict missing": (_one_missing, "missing"),
    "a failed verdict": (_turned("fail"), "did not pass its gates"),
    "a verdict that is an error": (_turned("error"), "did not pass its gates"),
    "a freeze": (_frozen, "promotion is frozen"),
    "no decision": (_set(decision_id=None), "no decision of batch"),
    "a decision that does not exist": (_set(decision_id=10**9), "no decision of batch"),
    "a decision to hold": (_decided(verdict="hold"), "no decision of batch"),
    "a decision to reject": (_decided(verdict="reject"), "no decision of batch"),
    "a decision on another pattern": (_decided(subject_id="firewall~RB-WIN-SEC-003~windows"), "no decision of batch"),
    "a decision on another rule": (_decided(subject_kind="rule", subject_id="R-OTHER"), "no decision of batch"),
    "a decision of another batch": (_other_batch, "no decision of batch"),
    "a decision for another step": (_other_way, "is for another step"),
    "a decision from another stage": (_decided_for("stage", "fleet"), "is for another step"),
    "a decision on another runbook": (_decided_for("runbook_id", "RB-WIN-SEC-003"), "another runbook or platform"),
    "a decision on another platform": (_decided_for("platform", "linux"), "another runbook or platform"),
    "no certificate": (_set(certificate=None), "carries its certificate"),
    "a certificate of null": (_set(certificate="null"), "carries its certificate"),
    "a certificate that is a list": (_set(certificate=[]), "carries its certificate"),
    "an empty certificate": (_set(certificate={}), "of another promotion"),
    "a certificate of another rule": (_certified(rule_id="R-OTHER"), "differs in rule_id"),
    "a certificate of another version": (_certified(rule_version=2), "differs in rule_version"),
    "a certificate of other content": (_certified(content_hash="0" * 64), "differs in content_hash"),
    "a certificate under another policy": (_certified(policy_hash="0" * 64), "differs in policy_hash"),
    "a certificate for another state": (_certified(target_state="none"), "differs in target_state"),
    "a certificate of another batch": (_certified(batch_id=0), "differs in batch_id"),
}


@pytest.mark.parametrize(("before", "after"), STEPS)
def test_each_flaw_in_a_promotion_by_hand_is_refused_and_the_same_without_the_flaw_is_taken(ledger, before, after):
    ledger.bring_to(before)
    flaws = dict(FLAWS)
    if before in ("canary", "ring"):
        flaws["a decision at another step"] = (_decided_for("step", 3), "is for another step")
    for name, (spoil, says) in flaws.items():
        trial = ledger.connection.begin_nested()
        row = ledger.promotion(before, after)
        spoil(ledger, row)
        words = refused(ledger, lambda r=row: ledger.event(**r))
        assert says in words, name
        trial.rollback()
    ledger.event(**ledger.promotion(before, after))
    assert ledger.state().state == after


def test_one_decision_takes_one_step_once(ledger):
    ledger.bring_to("proposed")
    ledger.bring_to("proposed", "R-TWIN")
    row = ledger.promotion("proposed", "shadow")
    ledger.event(**row)
    # Neither the next step of the same rule nor the same step of another rule with this pattern.
    again = {**row, "from_state": "shadow", "to_state": "canary"}
    again["certificate"] = {**row["certificate"], "target_state": "canary"}
    assert "is for another step" in refused(ledger, lambda: ledger.event(**again))
    twin = {**row, "rule_id": "R-TWIN", "certificate": {**row["certificate"], "rule_id": "R-TWIN"}}
    assert "was applied already" in refused(ledger, lambda: ledger.event(**twin))


def test_a_thaw_ends_a_freeze_and_demotion_heeds_neither(ledger):
    ledger.bring_to("fleet")
    ledger.bring_to("proposed", "R-NEXT")
    ledger.insert("human_acts", "act_id", act="freeze", actor="dana", reason="audit week")
    ledger.event("quarantined", "fleet", "quarantined")
    row = ledger.promotion("proposed", "shadow", rule_id="R-NEXT")
    assert "promotion is frozen" in refused(ledger, lambda: ledger.event(**row))
    ledger.insert("human_acts", "act_id", act="thaw", actor="dana", reason="audit over")
    ledger.event(**row)
    assert ledger.state("R-NEXT").state == "shadow"


def test_without_declared_gates_nothing_is_promoted(ledger):
    ledger.bring_to("proposed")
    row = ledger.promotion("proposed", "shadow")
    ledger.connection.exec_driver_sql("DELETE FROM required_gates")
    assert "no gates are declared" in refused(ledger, lambda: ledger.event(**row))


def test_the_policy_hash_of_an_event_is_that_of_its_decision_whatever_the_writer_says(ledger):
    ledger.bring_to("proposed")
    ledger.event(**ledger.promotion("proposed", "shadow"), policy_hash="forged")
    found = ledger.connection.exec_driver_sql(
        "SELECT e.policy_hash = d.policy_hash FROM rule_events AS e JOIN promotion_decisions AS d USING (decision_id)"
    ).scalar_one()
    assert found is True


# --------------------------------------------------------------------------------------------- state equals fold


# Half of the steps go up where they can: walks that are drawn evenly hardly ever reach the ring.
WALK = st.lists(
    st.tuples(st.sampled_from(["R-1", "R-2"]), st.booleans(), st.integers(0, 1000)), min_size=8, max_size=30
)
UP = ("advanced", "proposed", "readmitted", "widened")


@given(WALK)
@settings(max_examples=100, deadline=None)
def test_after_any_legal_walk_the_registry_equals_the_fold_of_the_ledger(shared_engine, walk):
    with shared_engine.connect() as connection, connection.begin() as transaction:
        ledger = Ledger(connection)
        legal = sorted(legal_steps(connection))
        runbooks = [
            row.runbook_id
            for row in connection.exec_driver_sql(
                "SELECT runbook_id FROM runbooks WHERE platform = 'windows' AND enabled ORDER BY 1"
            )
        ]
        bodies: dict[str, dict[str, Any]] = {}
        expected: dict[str, tuple[str, int, str]] = {}
        steps: dict[str, int] = {}
        for rule_id, upwards, choice in walk:
            state, version, _ = expected.get(rule_id, ("none", 1, ""))
            possible = [step for step in legal if step[1] == state and (step[0] != "widened" or steps[rule_id] == 1)]
            possible = [step for step in possible if upwards and step[0] in UP] or possible
            if not possible:
                assert state == "retired"
                continue
            kind, before, after = possible[choice % len(possible)]
            if kind == "readmitted":
                version += 1
                bodies[rule_id] = content(runbook_id=runbooks[version % len(runbooks)], severity=f"version {version}")
            body = bodies.setdefault(rule_id, content())
            changes: dict[str, Any] = {"rule_id": rule_id, "rule_version": version, "definition": body}
            ledger.step(kind, before, after, **changes)
            steps[rule_id] = 2 if kind == "widened" else 1
            expected[rule_id] = (after, version, content_hash(body))

        events = connection.exec_driver_sql("SELECT * FROM rule_events ORDER BY event_id").mappings()
        folded = fold([dict(event) for event in events])
        for rule_id, (state, version, digest) in expected.items():
            rule = ledger.state(rule_id)
            assert (rule.state, rule.rule_version, rule.content_hash) == (state, version, digest)
            assert rule.enabled == (state in ENABLED_STATES)
            assert {column: getattr(rule, column) for column in folded[rule_id]} == folded[rule_id]
        finding = registry_equals_ledger(connection)
        assert finding.passed, finding.sample
        transaction.rollback()


def test_the_key_of_the_rule_is_that_of_the_pattern(ledger):
    ledger.bring_to("fleet")
    assert ledger.state().pattern_key == KEY
