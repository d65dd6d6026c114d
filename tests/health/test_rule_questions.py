"""Rules in service: do they match, do their successes hold."""

from __future__ import annotations

import datetime as dt
from collections.abc import Iterator
from typing import Any

import pytest
import sqlalchemy as sa

from flywheel_pipeline.aggregates.quality import exclusions_are_few
from flywheel_pipeline.aggregates.refresh import refresh
from flywheel_pipeline.health.quality import rules_in_service_match, successes_are_verified_and_last
from flywheel_pipeline.promotion.ledger import import_rules

NOW = dt.datetime.now(dt.UTC)
LATER = NOW + dt.timedelta(days=30)  # when the rules registered with the database are 30 days in service
RULE = "L1-FIREWALL-001"


@pytest.fixture
def conn(engine: sa.Engine) -> Iterator[sa.Connection]:
    with engine.connect() as connection, connection.begin() as transaction:
        yield connection
        transaction.rollback()


def report(conn: sa.Connection, name: str, executions: int, **fields: Any) -> None:
    """Executions on hosts of their own, from NOW back, one host each so that nothing recurs, unless said otherwise."""
    row = {
        "site_id": "site-a",
        "runbook_id": RULE,
        "hostname": "",
        "platform": "windows",
        "incident_type": "firewall",
        "success": True,
        "verification_passed": True,
        "resolution_level": "L1",
        "at": NOW - dt.timedelta(days=1),
        **fields,
    }
    hostname = row.pop("hostname") or None
    at = row.pop("at")
    columns = ", ".join(row)
    conn.execute(
        sa.text(
            f"INSERT INTO execution_telemetry (execution_id, hostname, started_at, created_at, {columns}) "
            f"SELECT CAST(:name AS text) || n, coalesce(CAST(:hostname AS text), :name || n), CAST(:at AS timestamptz) + n * interval '1 minute', "
            f"CAST(:at AS timestamptz) + n * interval '1 minute' + interval '10 seconds', "
            + ", ".join(f":{column}" for column in row)
            + " FROM generate_series(1, :executions) AS n"
        ),
        {**row, "name": name, "hostname": hostname, "at": at, "executions": executions},
    )
    refresh(conn)


def promote(conn: sa.Connection, rule_id: str, incident_type: str, since: dt.datetime) -> None:
    rule = {
        "rule_id": rule_id,
        "incident_pattern": {"check_type": incident_type},
        "runbook_id": "RB-WIN-SEC-001",
        "platform": "windows",
        "enabled": True,
        "created_at": since,
    }
    import_rules(conn, [rule], actor="importer", reason="taken over for the test")


def test_a_promoted_rule_without_a_match_for_14_days_is_named_and_a_younger_one_is_not(conn: sa.Connection) -> None:
    report(conn, "e", 3)
    promote(conn, "RB-AUTO-OLD", "smb_signing", NOW - dt.timedelta(days=15))
    promote(conn, "RB-AUTO-YOUNG", "smb_signing", NOW - dt.timedelta(days=13))
    finding = rules_in_service_match(conn, NOW)
    assert (finding.passed, finding.offenders) == (False, 1)
    assert finding.sample[0]["rule"] == "RB-AUTO-OLD"
    assert (finding.sample[0]["last match"], finding.figures["never_matched"]) == ("never", 1)
    report(conn, "x", 1, runbook_id="RB-AUTO-OLD", incident_type="smb_signing")
    assert rules_in_service_match(conn, NOW).passed


def test_a_built_in_rule_is_named_only_where_its_drift_occurred_and_l2_healed_it(conn: sa.Connection) -> None:
    report(conn, "e", 3, at=LATER - dt.timedelta(days=1))
    quiet = rules_in_service_match(conn, LATER)
    assert quiet.passed
    assert quiet.figures["builtin_without_incident"] == quiet.figures["rules_in_service_14_days"] - 1
    report(
        conn,
        "l2-",
        7,
        at=LATER - dt.timedelta(days=2),
        runbook_id="L2-run_windows_runbook:RB-WIN-SEC-020",
        incident_type="smb1_protocol",
        resolution_level="L2",
    )
    finding = rules_in_service_match(conn, LATER)
    assert not finding.passed
    assert [(o["rule"], o["healed by L2 instead"]) for o in finding.sample] == [("L1-SMB1-001", 7)]
    assert "while L2 healed smb1_protocol 7 times" in finding.sentence


def test_an_old_match_is_no_match_and_chaos_rows_are_none(conn: sa.Connection) -> None:
    promote(conn, "RB-AUTO-OLD", "smb_signing", NOW - dt.timedelta(days=40))
    report(conn, "e", 3)
    report(conn, "x", 5, runbook_id="RB-AUTO-OLD", incident_type="smb_signing", at=NOW - dt.timedelta(days=20))
    report(conn, "c", 5, runbook_id="RB-AUTO-OLD", incident_type="smb_signing", chaos_campaign_id="c1")
    finding = rules_in_service_match(conn, NOW)
    assert (finding.offenders, finding.figures["never_matched"]) == (1, 0)


def test_without_telemetry_nobody_can_tell_and_that_is_no_pass(conn: sa.Connection) -> None:
    young = rules_in_service_match(conn, NOW)
    assert (young.passed, young.sample) == (True, ())
    assert "nothing to judge" in young.sentence
    silent = rules_in_service_match(conn, LATER)
    assert not silent.passed
    assert "cannot be told" in silent.sentence


def test_verified_successes_that_last_are_in_no_doubt(conn: sa.Connection) -> None:
    report(conn, "e", 40)
    finding = successes_are_verified_and_last(conn, NOW)
    assert finding.passed
    assert (finding.figures["unverified_share"], finding.figures["recurring_share"]) == (0.0, 0.0)


def test_unverified_successes_are_named_with_their_share(conn: sa.Connection) -> None:
    report(conn, "e", 15)
    report(conn, "u", 5, verification_passed=None)
    finding = successes_are_verified_and_last(conn, NOW)
    assert (finding.passed, finding.offenders) == (False, 1)
    assert finding.sample[0]["unverified_share"] == 0.25
    assert finding.figures["unverified_share"] == 0.25
    assert f"{RULE}: 25% were not verified" in finding.sentence


def test_recurring_successes_are_named_with_their_share(conn: sa.Connection) -> None:
    report(conn, "e", 14)
    report(conn, "r", 7, hostname="flapping")
    finding = successes_are_verified_and_last(conn, NOW)
    assert (finding.passed, finding.offenders) == (False, 1)
    assert finding.sample[0]["recurring"] == 6  # the last of the seven did not come back
    assert finding.sample[0]["recurring_share"] == 6 / 21
    assert "29% came back within 24 hours" in finding.sentence


def test_twenty_percent_or_fewer_than_twenty_successes_raise_no_doubt(conn: sa.Connection) -> None:
    report(conn, "e", 16)
    report(conn, "u", 4, verification_passed=None)
    report(conn, "few", 19, runbook_id="L1-NTP-001", verification_passed=None)
    assert successes_are_verified_and_last(conn, NOW).passed


def test_shares_over_nothing_are_null(conn: sa.Connection) -> None:
    finding = successes_are_verified_and_last(conn, NOW)
    assert (finding.figures["unverified_share"], finding.figures["recurring_share"]) == (None, None)
    assert "nothing to judge" in finding.sentence
    empty = exclusions_are_few(conn)
    assert (empty.figures["share excluded"], empty.figures["share unreachable"]) == (None, None)
    assert "nothing to judge" in empty.sentence


def test_exclusions_are_shown_by_rule_and_by_class(conn: sa.Connection) -> None:
    report(conn, "e", 15)
    report(conn, "u", 4, verification_passed=None)
    report(conn, "x", 6, success=False, verification_passed=None, error_message="Execution timed out after 60s")
    finding = exclusions_are_few(conn)
    assert (finding.passed, finding.offenders) == (False, 1)
    assert (finding.sample[0]["rule_id"], finding.sample[0]["mostly"]) == (RULE, "unreachable 24%")
    assert (finding.figures["share unreachable"], finding.figures["share unverified"]) == (6 / 25, 4 / 25)
    assert finding.figures["share excluded"] == 10 / 25
    report(conn, "more", 30)
    assert exclusions_are_few(conn).passed
