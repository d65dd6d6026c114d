"""Contracts judged by Great Expectations: every expectation answers, planted rows are found, good rows pass."""

from __future__ import annotations

import subprocess
import sys
from datetime import UTC, datetime, timedelta
from typing import Any

import dagster as dg
import pandas as pd
import pytest
import sqlalchemy as sa

from flywheel_pipeline.aggregates.refresh import refresh
from flywheel_pipeline.build import CONTRACT_CHECKS, build_defs
from flywheel_pipeline.candidates.patterns import write_observed
from flywheel_pipeline.candidates.suite import CANDIDATES
from flywheel_pipeline.contracts.adapter import judge, judge_contract, read_rows, to_finding
from flywheel_pipeline.contracts.declared import Contract, Expectation, ExpectationResult
from flywheel_pipeline.contracts.defs import CHECK_NAME, CONTRACTS_JOB
from flywheel_pipeline.contracts.registry import CONTRACTS
from flywheel_pipeline.database.resource import FlywheelDatabase
from flywheel_pipeline.promotion.ledger import import_rules
from flywheel_pipeline.promotion.suite import RULES
from flywheel_pipeline.telemetry.suite import CATALOGUE, TELEMETRY

NOW = datetime(2026, 2, 15, 12, tzinfo=UTC)
GOOD = """
INSERT INTO execution_telemetry (execution_id, site_id, appliance_id, runbook_id, hostname, platform, incident_type,
  agent_version, started_at, completed_at, duration_seconds, success, status, verification_passed, resolution_level,
  confidence, created_at)
SELECT 'e-' || n, 'site-' || n % 4, 'site-' || n % 4 || '-01', CASE WHEN n % 2 = 0 THEN 'L1-FIREWALL-001'
    ELSE 'L2-run_windows_runbook:RB-WIN-SEC-001' END, 'ws-' || n % 9, 'windows', 'firewall', '1.0.70',
  :now - n * interval '40 minutes', :now - n * interval '40 minutes' + interval '9 seconds', 9, n % 5 > 0,
  CASE WHEN n % 5 > 0 THEN 'success' ELSE 'failure' END, n % 5 > 0, CASE WHEN n % 2 = 0 THEN 'L1' ELSE 'L2' END, 0.9,
  :now - n * interval '40 minutes' + interval '1 minute'
FROM generate_series(1, 200) AS n
"""


@pytest.fixture
def good(engine: sa.Engine) -> sa.Engine:
    """A database in which everything is as it should be."""
    with engine.begin() as connection:
        connection.execute(sa.text(GOOD), {"now": NOW})
        rule = {
            "rule_id": "RB-AUTO-FIREWALL",
            "incident_pattern": {"incident_type": "firewall"},
            "runbook_id": "RB-WIN-SEC-001",
            "platform": "windows",
            "pattern_key": "firewall~RB-WIN-SEC-001~windows",
            "confidence": 0.9,
            "enabled": True,
        }
        out = {**rule, "rule_id": "RB-AUTO-OLD", "enabled": False}
        import_rules(connection, [rule, out], actor="importer", reason="taken over for the test")
        refresh(connection)
        write_observed(connection)
    return engine


# What breaks each expectation, by its name: a column of one row, set to this. One row a case.
BAD: dict[str, dict[str, list[dict[str, Any]]]] = {
    TELEMETRY.asset: {
        "execution_id values to be unique": [{"execution_id": "twice"}, {"execution_id": "twice"}],
        "execution_id values to not be null": [{"execution_id": None}],
        "execution_id values to match regex": [{"execution_id": "  "}],
        "site_id values to not be null": [{"site_id": None}],
        "site_id values to match regex": [{"site_id": " "}],
        "hostname values to not be null": [{"hostname": None}],
        "hostname values to match regex": [{"hostname": ""}],
        "runbook_id values to not be null": [{"runbook_id": None}],
        "runbook_id values to match regex": [{"runbook_id": "\t"}],
        "appliance_id values to not be null": [{"appliance_id": None}],
        "success values to not be null": [{"success": None}],
        "created_at values to not be null": [{"created_at": pd.NaT}],
        "event_at values to not be null": [{"event_at": pd.NaT}],
        "event_at values to be between": [
            {"event_at": NOW + timedelta(days=2)},
            {"event_at": NOW - timedelta(days=999)},
        ],
        "resolution_level values to be in set": [{"resolution_level": "L9"}],
        "completed_at started_at values a to be greater than b": [{"completed_at": NOW - timedelta(days=99)}],
        "duration_seconds values to be between": [{"duration_seconds": -1.0}],
        "confidence values to be between": [{"confidence": 90.0}, {"confidence": -0.1}],
        "incident_type values to not be null": [{"incident_type": None}] * 20,
        "platform values to not be null": [{"platform": None}] * 70,
        "status values to be in set": [{"status": "queued"}] * 70,
        "agent_version values to not be null": [{"agent_version": None}] * 800,
    },
    CATALOGUE.asset: {
        "runbook_id values to be unique": [{"runbook_id": "RB-TWICE"}, {"runbook_id": "RB-TWICE"}],
        "runbook_id values to not be null": [{"runbook_id": None}],
        "placeholder values to be null": [{"placeholder": "AUTO-FIREWALL"}],
        "platform values to not be null": [{"platform": None}],
        "platform values to be in set": [{"platform": "plan9"}],
        "name values to match regex": [{"name": " "}],
        "is_disruptive values to not be null": [{"is_disruptive": None}],
        "steps_in_service values to be between": [{"steps_in_service": 0}],
        "category values to not be null": [{"category": None}] * 9,
        "check_type values to not be null": [{"check_type": None}] * 9,
        "severity values to be in set": [{"severity": "apocalyptic"}],
        "version values to not be null": [{"version": None}],
    },
    CANDIDATES.asset: {
        "pattern_key values to be unique": [{"pattern_key": "twice"}, {"pattern_key": "twice"}],
        "pattern_key values to not be null": [{"pattern_key": None}],
        "incident_type values to match regex": [{"incident_type": " "}],
        "runbook_id values to match regex": [{"runbook_id": ""}],
        "platform values to be in set": [{"platform": "plan9"}],
        "status values to be in set": [{"status": "perhaps"}],
        "executions values to be between": [{"executions": -1, "raw_successes": -2, "excluded": -3}],
        "excluded values to be between": [{"excluded": -1}],
        "raw_rate values to be between": [{"raw_rate": 97.0}],
        "selection_share values to be between": [{"selection_share": 1.01}],
        "executions raw_successes values a to be greater than b": [{"raw_successes": 10**6}],
        "executions excluded values a to be greater than b": [{"excluded": 10**6}],
        "rated_episodes successful_episodes values a to be greater than b": [{"successful_episodes": 10**6}],
        "type_episodes chosen_episodes values a to be greater than b": [{"chosen_episodes": 10**6}],
        "last_at first_at values a to be greater than b": [{"first_at": NOW + timedelta(days=9)}],
        "rate_over_nothing values to be null": [{"rate_over_nothing": 1.0}],
        "approved_but_cannot_run values to be null": [{"approved_but_cannot_run": "a placeholder"}],
        "id_of_observed values to not be null": [{"id_of_observed": None}],
    },
    RULES.asset: {
        "rule_id values to be unique": [{"rule_id": "twice"}, {"rule_id": "twice"}],
        "rule_id values to match regex": [{"rule_id": " "}],
        "state values to be in set": [{"state": "resting"}],
        "enabled_unlike_state values to be null": [{"enabled_unlike_state": "quarantined"}],
        "problem_in_service values to be null": [{"problem_in_service": "AUTO-X is a placeholder"}],
        "matches_everything values to be null": [{"matches_everything": "{}"}],
        "out_of_service_unsigned values to be null": [{"out_of_service_unsigned": "quarantined"}],
        "source values to be in set": [{"source": "folklore"}],
        "platform_in_service values to be in set": [{"platform_in_service": "none"}],
        "content_hash values to match regex": [{"content_hash": "deadbeef"}],
        "rule_version values to be between": [{"rule_version": 0}],
        "success_count values to be between": [{"success_count": -1}],
        "failure_count values to be between": [{"failure_count": -1}],
        "match_count counted values to be equal": [{"match_count": 10**6}],
        "success_rate values to be between": [{"success_rate": 97.0}],
        "rate_over_nothing values to be null": [{"rate_over_nothing": 1.0}],
        "confidence values to be between": [{"confidence": 90.0}],
        "pattern_of_promoted values to not be null": [{"pattern_of_promoted": None}] * 60,
    },
}


def judged(engine: sa.Engine, contract: Contract) -> dict[str, ExpectationResult]:
    with engine.connect() as connection:
        results, _rows = judge_contract(connection, contract, NOW)
    assert len(results) == len(contract.expectations(NOW))
    return {result.name: result for result in results}


@pytest.mark.parametrize("contract", CONTRACTS, ids=lambda contract: contract.asset)
def test_good_rows_keep_the_contract_and_one_planted_case_breaks_each_expectation(
    good: sa.Engine, contract: Contract
) -> None:
    assert [result for result in judged(good, contract).values() if not result.passed] == []
    with good.connect() as connection:
        frame = read_rows(connection, contract)
    # Not a single expectation goes untested; of the count of rows, below.
    names = [expectation.name for expectation in contract.expectations(NOW)]
    assert len(set(names)) == len(names)
    cases = BAD[contract.asset]
    assert set(names) - {"table row count to be between"} == cases.keys()
    key = contract.key[0]
    model = frame.to_dict("records")[0]
    planted = [
        {**model, key: f"planted {number}-{repeat}: {name}", **change}
        for number, (name, changes) in enumerate(cases.items())
        for repeat, change in enumerate(changes)
    ]
    frame = pd.concat([frame.astype(object), pd.DataFrame(planted, dtype=object)], ignore_index=True)
    results = judge(frame, contract.expectations(NOW), key=contract.key)
    for result in results:
        if result.name in cases:
            assert (result.passed, result.error) == (False, None), result
            assert result.offenders is not None
            assert result.offenders >= len(cases[result.name])
    # A warning of `mostly` breaks by many rows, the others by one: the sample names the row that was planted.
    for name, changes in cases.items():
        if len(changes) == 1 and key not in changes[0]:
            sample = next(result.sample for result in results if result.name == name)
            assert any(shown.endswith(name) or f": {name}: " in shown for shown in sample), (name, sample)


@pytest.mark.parametrize("contract", CONTRACTS, ids=lambda contract: contract.asset)
def test_a_table_without_rows_is_not_called_sound(good: sa.Engine, contract: Contract) -> None:
    with good.connect() as connection:
        frame = read_rows(connection, contract).iloc[:0]
    results = judge(frame, contract.expectations(NOW), key=contract.key)
    assert [result.name for result in results if not result.passed] == ["table row count to be between"]
    assert not to_finding(contract, results, 0).passed


def test_rows_planted_in_the_database_are_seen_through_the_queries(good: sa.Engine) -> None:
    with good.begin() as connection:
        for statement in (
            "SET LOCAL session_replication_role = replica",
            "UPDATE l1_rules SET runbook_id = 'AUTO-X' WHERE rule_id = 'RB-AUTO-FIREWALL'",
            "UPDATE l1_rules SET incident_pattern = '{}', platform = NULL WHERE rule_id = 'L1-NTP-001'",
            "UPDATE l1_rules SET enabled = true, state_reason = ' ' WHERE rule_id = 'RB-AUTO-OLD'",
            "UPDATE l1_rules SET match_count = match_count + 1 WHERE rule_id = 'L1-FIREWALL-001'",
            "UPDATE runbooks SET steps = '[]' WHERE runbook_id = 'RB-WIN-SEC-002'",
            "UPDATE runbooks SET runbook_id = 'AUTO-AUDIT' WHERE runbook_id = 'RB-WIN-SEC-003'",
            "UPDATE patterns SET status = 'approved'",
            "UPDATE runbooks SET enabled = false WHERE runbook_id = 'RB-WIN-SEC-001'",
        ):
            connection.exec_driver_sql(statement)
    rules = judged(good, RULES)
    assert rules["problem_in_service values to be null"].offenders == 4  # the two, and those of the disabled runbook
    assert rules["matches_everything values to be null"].sample == ("L1-NTP-001: matches_everything={}",)
    assert rules["platform_in_service values to be in set"].sample == ("L1-NTP-001: platform_in_service=none",)
    assert rules["enabled_unlike_state values to be null"].sample == ("RB-AUTO-OLD: enabled_unlike_state=quarantined",)
    assert not rules["out_of_service_unsigned values to be null"].passed
    assert rules["match_count counted values to be equal"].offenders == 1
    catalogue = judged(good, CATALOGUE)
    assert catalogue["steps_in_service values to be between"].offenders == 1
    assert catalogue["placeholder values to be null"].sample == ("AUTO-AUDIT: placeholder=AUTO-AUDIT",)
    assert not judged(good, CANDIDATES)["approved_but_cannot_run values to be null"].passed


WHY = "for the test"
HOLDS = Expectation("expect_column_values_to_not_be_null", {"column": "a"}, WHY)
NOT_JUDGED = [
    Expectation("expect_column_values_to_not_be_null", {"column": "no_such_column"}, WHY, "info"),
    Expectation("expect_the_impossible", {"column": "a"}, WHY),
    Expectation("expect_column_values_to_be_between", {"column": "a", "nonsense": 1}, WHY),
    # No quantile of text: Great Expectations 1.24 raises out of the middle of its own metrics.
    Expectation(
        "expect_column_quantile_values_to_be_between",
        {"column": "b", "quantile_ranges": {"quantiles": [0.5], "value_ranges": [[0, 1]]}},
        WHY,
        "warning",
    ),
]


def test_an_expectation_that_cannot_be_judged_is_an_error_and_hides_no_other() -> None:
    frame = pd.DataFrame({"a": [1, 2, 3], "b": ["x", None, "y"]})
    results = judge(frame, [HOLDS, *NOT_JUDGED, HOLDS])
    assert [result.passed for result in results] == [True, False, False, False, False, True]
    assert [result.error is not None for result in results] == [False, True, True, True, True, False]
    assert "no_such_column" in (results[1].error or "")
    for expectation, result in zip(NOT_JUDGED, results[1:5], strict=True):
        finding = to_finding(RULES, [results[0], result], 2)
        # However mild the expectation: nobody knows what it would have said.
        assert (finding.passed, finding.severe, finding.figures["not_judged"]) == (False, True, 1)
        assert expectation.name in finding.sentence


@pytest.mark.parametrize(("severity", "severe"), [("critical", True), ("warning", False), ("info", False)])
def test_a_broken_critical_expectation_is_an_error_and_any_other_a_warning(severity: Any, severe: bool) -> None:
    broken = ExpectationResult("a values to not be null", False, severity, "1 of 2 rows break it", 1, ("x: a=null",))
    finding = to_finding(RULES, [broken, ExpectationResult("b", True, "critical", "0 of 2", 0)], 2)
    assert (finding.passed, finding.severe, finding.offenders) == (False, severe, 1)
    assert finding.figures["offenders: a values to not be null"] == 1
    assert [row["expectation"] for row in finding.sample] == ["a values to not be null", "b"]
    assert finding.sample[0]["sample"] == "x: a=null"


def test_a_contract_that_expects_nothing_proves_nothing() -> None:
    assert judge(pd.DataFrame({"a": [1]}), []) == []
    finding = to_finding(RULES, [], 1)
    assert (finding.passed, finding.severe) == (False, True)


def test_the_job_answers_every_contract_with_one_check_and_its_severity(
    good: sa.Engine, monkeypatch: pytest.MonkeyPatch, tmp_path: Any
) -> None:
    monkeypatch.setenv("FLYWHEEL_HOME", str(tmp_path))
    with good.begin() as connection:
        connection.exec_driver_sql("UPDATE runbooks SET severity = 'apocalyptic' WHERE runbook_id = 'RB-WIN-SEC-002'")
        connection.exec_driver_sql("INSERT INTO execution_telemetry (execution_id, site_id, runbook_id, hostname, "
                                   "success, resolution_level) VALUES ('bad', 's', 'RB', 'h', true, 'L9')")  # fmt: skip
    database = FlywheelDatabase(url=good.url.render_as_string(hide_password=False))
    job = build_defs(resources={"database": database}).resolve_job_def(CONTRACTS_JOB)
    with dg.DagsterInstance.ephemeral() as instance:
        result = job.execute_in_process(
            instance=instance, run_config={"loggers": {"console": {"config": {"log_level": "CRITICAL"}}}}
        )
    found = {e.asset_key.to_user_string(): e for e in result.get_asset_check_evaluations()}
    assert found.keys() == {key.asset_key.to_user_string() for key in CONTRACT_CHECKS}
    assert {e.check_name for e in found.values()} == {CHECK_NAME}
    outcome = {name: (e.passed, e.severity.value) for name, e in found.items()}
    assert outcome["runbooks"] == (False, "WARN")
    assert outcome["execution_telemetry"] == (False, "ERROR")
    assert found["l1_rules"].passed
    assert found["pattern_candidates"].passed
    metadata = found["runbooks"].metadata
    assert "apocalyptic" in metadata["sample"].value
    assert metadata["offenders: severity values to be in set"].value == 1
    assert metadata["expectations"].value == len(CATALOGUE.expectations(NOW))
    assert metadata["data_docs"].value == str(tmp_path / "data_docs" / "runbooks.html")


def test_each_expectation_says_what_goes_wrong_without_it() -> None:
    for contract in CONTRACTS:
        for expectation in contract.expectations(NOW):
            assert expectation.why.endswith("."), expectation
            assert len(expectation.why) > 10, expectation


def test_it_judges_in_a_process_whose_main_module_is_no_file_and_loads_no_spark() -> None:
    program = (
        "import sys, types; sys.modules['__main__'] = types.ModuleType('__main__')\n"
        "import pandas as pd\n"
        "from flywheel_pipeline.contracts.adapter import judge\n"
        "judge(pd.DataFrame({'a': [1]}), [])\n"
        "print('judged', 'pyspark' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["judged", "False"], done.stderr
