"""Every way around the gates that a Dagster user has, tried for real: each promotes nothing and says so.

The staged day holds three patterns that qualify, so a bypass that worked would show. Quarantines are the
counter-proof: what takes rules out of service heeds no gate.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import dagster as dg
import pytest
import sqlalchemy as sa
from dagster._core.definitions.reconstruct import ReconstructableRepository
from graph_runs import QUIET, Environment, Graph, failed_steps, finished_steps

from flywheel_pipeline.aggregates.checks import FULL_RECOUNT_TAG
from flywheel_pipeline.aggregates.refresh import refresh
from flywheel_pipeline.build import PIPELINE_JOB
from flywheel_pipeline.database.settings import get_settings
from flywheel_pipeline.promotion.acts import act
from flywheel_pipeline.run import dagster_instance

#: Every gate that promotion requires, and the step that answers it.
STEP_OF_GATE = {
    "telemetry_contract": "telemetry_checks",
    "telemetry_freshness": "telemetry_checks",
    "counters_equal_recount": "aggregates_checks",
    "executable_runbooks_only": "promotion_gates",
    "success_floor": "promotion_gates",
}


def _everything(graph: Graph) -> list[str]:
    """Every asset of the job `pipeline`, by name."""
    job = graph.definitions.resolve_job_def(PIPELINE_JOB)
    return sorted(key.to_user_string() for key in job.asset_layer.executable_asset_keys)


def _events(graph: Graph) -> int:
    return int(graph.value("SELECT count(*) FROM rule_events"))


def test_without_a_bypass_the_same_day_promotes_three_rules(graph: Graph) -> None:
    result = graph.run()
    assert result.success
    assert len(graph.promotions()) == 3
    assert graph.quarantines() == 11
    assert set(graph.verdicts().values()) == {"pass"}


@pytest.mark.long
def test_materialising_the_ledger_alone_promotes_nothing(graph: Graph) -> None:
    events = _events(graph)
    result = graph.run(assets=["rule_events", "l1_rules"])
    assert graph.promotions() == []
    assert _events(graph) == events
    assert result.success  # nothing was decided in this batch, so there was nothing to do


def test_deciding_and_applying_without_a_refresh_promotes_nothing(graph: Graph) -> None:
    graph.run(assets=[name for name in _everything(graph) if name not in ("rule_events", "l1_rules")])
    assert graph.promotions() == []
    result = graph.run(assets=["promotion_decisions", "rule_events", "l1_rules"])
    assert graph.promotions() == []
    assert failed_steps(result) == {"apply"}


def test_a_run_with_the_checks_left_out_promotes_nothing_and_names_the_missing_verdicts(graph: Graph) -> None:
    result = graph.run(assets=_everything(graph))
    assert list(result.get_asset_check_evaluations()) == []
    assert graph.promotions() == []
    assert graph.verdicts() == {}
    assert failed_steps(result) == {"apply"}
    failure = result.failure_data_for_node("apply")
    assert failure is not None
    assert failure.user_failure_data is not None
    sentence = failure.user_failure_data.description or ""
    for gate in graph.rows("SELECT gate FROM required_gates"):
        assert f"{gate['gate']} missing" in sentence
    # What protects appliances is not held up by that.
    assert graph.quarantines() == 11
    # Neither does a later apply make use of the decisions of a batch that had no verdicts.
    graph.run(assets=["rule_events", "l1_rules"])
    assert graph.promotions() == []


#: Sabotage of the database, and the gate whose question can no longer be answered then.
CRASHES = {
    "counters_equal_recount": "ALTER FUNCTION flywheel_level(text, text, text) RENAME TO gone",
    "success_floor": "ALTER FUNCTION flywheel_runbook_ref(text, text, text, text) RENAME TO gone",
}


def first_and_long(gates: list[str]) -> list[Any]:
    """Every gate is asked the same way: one of them each time, all of them in `make faults`."""
    return [gates[0], *(pytest.param(gate, marks=pytest.mark.long) for gate in gates[1:])]


@pytest.mark.parametrize("gate", first_and_long(sorted(CRASHES)))
def test_a_gate_that_cannot_ask_its_question_leaves_an_error_and_promotes_nothing(graph: Graph, gate: str) -> None:
    with graph.engine.begin() as connection:
        refresh(connection)  # the views keep the function they were made with, a gate's own text does not find it
    graph.execute(CRASHES[gate])
    result = graph.run()
    assert not result.success
    assert failed_steps(result) == {STEP_OF_GATE[gate]}
    assert graph.verdicts()[gate] == "error"
    assert "apply" not in finished_steps(result)
    assert graph.promotions() == []
    assert graph.quarantines() == 11


@pytest.mark.parametrize("gate", first_and_long(["success_floor", "telemetry_freshness", "counters_equal_recount"]))
@pytest.mark.long
def test_a_gate_whose_verdict_cannot_be_written_promotes_nothing(graph: Graph, gate: str) -> None:
    graph.execute(
        "CREATE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN RAISE EXCEPTION 'disk full'; END $$"
    )
    graph.execute(
        f"CREATE TRIGGER refuse BEFORE INSERT ON gate_verdicts FOR EACH ROW WHEN (NEW.gate = '{gate}') "
        "EXECUTE FUNCTION refuse()"
    )
    result = graph.run()
    assert not result.success
    assert failed_steps(result) == {STEP_OF_GATE[gate]}
    assert gate not in graph.verdicts()
    assert graph.promotions() == []
    assert graph.quarantines() == 11


@pytest.mark.long
def test_a_check_that_crashes_before_the_gate_leaves_it_without_a_verdict(graph: Graph) -> None:
    graph.execute("ALTER TABLE telemetry_violations RENAME TO gone")
    result = graph.run()
    assert not result.success
    assert "refresh" in failed_steps(result)
    assert graph.promotions() == []


#: What happens to the data, and the gate that then says no.
FAILURES = {
    "telemetry_contract": (
        "INSERT INTO execution_telemetry (execution_id, site_id, runbook_id, hostname, success, status, resolution_level, "
        "started_at, created_at) VALUES ('x-1', 'site-x', 'L2-run', 'host', true, 'failure', 'L2', "
        "'2026-02-15 17:00Z', '2026-02-15 17:00Z')"
    ),
    "telemetry_freshness": (
        "INSERT INTO policy_activations (policy_name, as_of, actor, reason) "
        "VALUES ('legacy', '2026-02-18 18:00Z', 'test', 'three days later')"
    ),
    # Somebody writes past the refresh, into the figures that the gates judge by.
    "counters_equal_recount": (
        "CREATE FUNCTION tamper() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN "
        "UPDATE rule_daily_stats SET executions = executions + 1, raw_successes = raw_successes + 1; RETURN NULL; END $$;"
        "CREATE TRIGGER tamper AFTER UPDATE OF refreshed_at ON refresh_batches FOR EACH STATEMENT "
        "EXECUTE FUNCTION tamper()"
    ),
    # Between decision and gate, somebody takes a script out of the catalogue ...
    "executable_runbooks_only": (
        "CREATE FUNCTION withdraw() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN "
        "UPDATE runbooks SET enabled = false WHERE runbook_id = 'RB-WIN-SEC-017'; RETURN NULL; END $$;"
        "CREATE TRIGGER withdraw AFTER INSERT ON promotion_decisions FOR EACH ROW WHEN (NEW.subject_kind = 'pattern') "
        "EXECUTE FUNCTION withdraw()"
    ),
    # ... or an agent corrects what it reported.
    "success_floor": (
        "CREATE FUNCTION correct() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN "
        "UPDATE execution_telemetry SET success = false, status = 'failure' "
        "WHERE incident_type = 'defender_exclusions' AND resolution_level = 'L2'; RETURN NULL; END $$;"
        "CREATE TRIGGER correct AFTER INSERT ON promotion_decisions FOR EACH ROW WHEN (NEW.subject_kind = 'pattern') "
        "EXECUTE FUNCTION correct()"
    ),
}


@pytest.mark.parametrize("gate", sorted(STEP_OF_GATE))
def test_a_failed_gate_promotes_nothing_and_stops_no_quarantine(graph: Graph, gate: str) -> None:
    with graph.engine.begin() as connection:
        connection.exec_driver_sql(FAILURES[gate])
    result = graph.run(**{FULL_RECOUNT_TAG: "true"})
    assert not result.success
    assert {name for name, verdict in graph.verdicts().items() if verdict == "fail"} == {gate}
    assert failed_steps(result) == {STEP_OF_GATE[gate]}
    assert not {"apply", "deliver"} & finished_steps(result)
    assert {"demote", "health_checks"} <= finished_steps(result)
    assert graph.promotions() == []
    assert graph.quarantines() == 11
    # What is out of service is out of every manifest, although nothing was delivered in this run.
    served = graph.rows("SELECT DISTINCT r ->> 'id' AS id FROM rule_manifests, jsonb_array_elements(rules) AS r")
    out_of_service = graph.rows("SELECT rule_id AS id FROM l1_rules WHERE state = 'quarantined'")
    assert served
    assert not [rule for rule in out_of_service if rule in served]
    # Applying by hand afterwards, as the UI offers it, does not get past the verdict either.
    graph.run(assets=["promotion_decisions", "rule_events", "l1_rules"])
    assert graph.promotions() == []


def test_a_required_gate_that_nobody_answers_blocks(graph: Graph) -> None:
    graph.execute("INSERT INTO required_gates (gate, question) VALUES ('second_pair_of_eyes', 'Did somebody look?')")
    result = graph.run()
    assert failed_steps(result) == {"apply"}
    failure = result.failure_data_for_node("apply")
    assert failure is not None
    assert failure.user_failure_data is not None
    assert "second_pair_of_eyes missing" in (failure.user_failure_data.description or "")
    assert graph.promotions() == []
    assert graph.quarantines() == 11


@pytest.mark.long
def test_no_required_gates_at_all_is_no_open_door(graph: Graph) -> None:
    graph.execute("DELETE FROM required_gates")
    result = graph.run()
    assert failed_steps(result) == {"apply"}
    assert graph.promotions() == []
    assert graph.quarantines() == 11


@pytest.mark.long
def test_a_refresh_in_between_makes_the_verdicts_those_of_another_day(graph: Graph) -> None:
    graph.execute(
        "CREATE FUNCTION overtake() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN "
        "INSERT INTO refresh_batches (run_id, policy_name, policy_hash, refreshed_at, refresh_seq) "
        "SELECT 'another', policy_name, policy_hash, now(), refresh_seq + 1 FROM refresh_batches "
        "ORDER BY batch_id DESC LIMIT 1 ON CONFLICT DO NOTHING; RETURN NULL; END $$"
    )
    graph.execute(
        "CREATE TRIGGER overtake AFTER INSERT ON promotion_decisions FOR EACH ROW WHEN (NEW.subject_kind = 'pattern') "
        "EXECUTE FUNCTION overtake()"
    )
    result = graph.run()
    assert failed_steps(result) == {"apply"}
    assert graph.promotions() == []
    assert graph.quarantines() == 11


@pytest.mark.long
def test_a_freeze_stops_promotion_and_not_demotion_and_a_thaw_lets_the_next_run_promote(graph: Graph) -> None:
    act(graph.engine, "freeze", [], actor="on-call", reason="a bad agent release")
    result = graph.run()
    assert result.success  # a freeze is a decision, not a failure
    assert graph.promotions() == []
    assert graph.quarantines() == 11
    (ledger,) = (
        m for m in result.asset_materializations_for_node("apply") if m.asset_key == dg.AssetKey("rule_events")
    )
    assert str(ledger.metadata["held_because"].value).count("promotion is frozen by on-call: a bad agent release") == 3
    act(graph.engine, "thaw", [], actor="on-call", reason="rolled back")
    assert graph.run().success
    assert len(graph.promotions()) == 3


@pytest.mark.long
def test_re_executing_a_failed_run_from_its_failure_promotes_nothing(
    staged: sa.Engine, environment: Environment, tmp_path: Path
) -> None:
    with environment(staged, tmp_path), dagster_instance(staged.url, get_settings()) as instance:
        graph = Graph(staged, instance)
        graph.execute(FAILURES["telemetry_freshness"])
        job = ReconstructableRepository.for_module("flywheel_pipeline.definitions", "defs").get_reconstructable_job(
            PIPELINE_JOB
        )
        first = dg.execute_job(job, instance, run_config=dict(QUIET))
        assert not first.success
        assert graph.verdicts()["telemetry_freshness"] == "fail"
        # The clock is set right again, and the user clicks "re-execute from failure".
        graph.execute(
            "INSERT INTO policy_activations (policy_name, as_of, actor, reason) "
            "VALUES ('legacy', '2026-02-15 18:00Z', 'test', 'the day itself')"
        )
        again = dg.execute_job(
            job,
            instance,
            run_config=dict(QUIET),
            reexecution_options=dg.ReexecutionOptions.from_failure(first.run_id, instance),
        )
        assert not again.success
        assert graph.promotions() == []
        assert graph.quarantines() == 11
        # A run of the whole graph is the way out, and the old verdict is no burden to it.
        assert dg.execute_job(job, instance, run_config=dict(QUIET)).success
        assert len(graph.promotions()) == 3
