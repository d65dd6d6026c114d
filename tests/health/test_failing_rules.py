from __future__ import annotations

import json
from collections.abc import Iterator
from datetime import datetime
from typing import Any

import pytest
import sqlalchemy as sa

from flywheel_pipeline.aggregates.refresh import refresh
from flywheel_pipeline.health.attribution import ErrorTemplate
from flywheel_pipeline.health.failing_rules import describe, failing_rules, failures_of, outcome_counts
from flywheel_pipeline.promotion.ledger import import_rules
from flywheel_pipeline.simulation.replay import build_replay

_INSERT = """
INSERT INTO execution_telemetry (execution_id, site_id, runbook_id, hostname, platform, incident_type,
  started_at, success, verification_passed, resolution_level, error_message, chaos_campaign_id)
SELECT :rule || ':' || :label || ':' || n, 'site-a', :rule, 'ws-' || n % 3, 'windows', 'firewall', now(),
  :success, CASE WHEN :success THEN true END, 'L1', replace(:error, '#', n::text), :campaign
FROM generate_series(1, :executions) AS n
"""


@pytest.fixture
def conn(engine: sa.Engine) -> Iterator[sa.Connection]:
    with engine.connect() as connection, connection.begin() as transaction:
        yield connection
        transaction.rollback()


def report(
    conn: sa.Connection,
    rule_id: str,
    executions: int,
    *,
    success: bool = False,
    error: str | None = None,
    campaign: str | None = None,
) -> None:
    values = {"rule": rule_id, "label": f"{success}{error}{campaign}", "executions": executions}
    conn.execute(sa.text(_INSERT), {**values, "success": success, "error": error, "campaign": campaign})
    refresh(conn)


def test_a_rule_below_the_floor_is_listed_with_its_errors_and_what_to_do(conn: sa.Connection) -> None:
    report(conn, "L1-FIREWALL-001", 6, success=True)
    report(conn, "L1-FIREWALL-001", 9, error="create shell: http response error: 401 - invalid content type")
    report(conn, "L1-FIREWALL-001", 5, error="Phase 'verify' failed on ws-1 after #s")
    [rule] = failing_rules(conn)
    assert (rule.rule_id, rule.source, rule.runbook_id) == ("L1-FIREWALL-001", "builtin", "RB-WIN-SEC-001")
    assert (rule.matches, rule.successes, rule.failures, rule.rate) == (20, 6, 14, 0.3)
    assert rule.rated_rate == 6 / 11
    assert rule.top_errors == (
        ("create shell: http response error: 401 - invalid content type", 9),
        ("Phase 'verify' failed on <host> after <n>s", 5),
    )
    assert [(s.label, s.executions, s.successes) for s in rule.steps] == [
        ("all executions", 20, 6),
        ("unreachable", 11, 6),
    ]
    assert rule.sentence == (
        "L1-FIREWALL-001 succeeded in 6 of 20 executions (30.0 %); where it could, 54.5 %. "
        "Of 14 failures 9 (64.3 %) are unreachable, most often "
        "“create shell: http response error: 401 - invalid content type” (9 on 3 hosts): "
        "restore access to these hosts: network, WinRM or SSH, credentials."
    )


@pytest.mark.parametrize(
    ("successes", "failures", "below", "at_least", "listed"),
    [
        (9, 11, 0.5, 20, True),
        (10, 10, 0.5, 20, False),
        (0, 19, 0.5, 20, False),
        (0, 19, 0.5, 19, True),
        (0, 1, 0.5, 1, True),
        (19, 1, 1.0, 20, True),
        (20, 0, 1.0, 20, False),
        (0, 20, 0.0, 20, False),
    ],
)
def test_the_floor_and_the_volume_decide(
    conn: sa.Connection, successes: int, failures: int, below: float, at_least: int, listed: bool
) -> None:
    report(conn, "L1-FIREWALL-001", successes, success=True)
    report(conn, "L1-FIREWALL-001", failures, error="x")
    assert bool(failing_rules(conn, below=below, at_least=at_least)) is listed


def test_a_quarantined_rule_is_no_longer_listed(conn: sa.Connection) -> None:
    rule = {
        "rule_id": "RB-AUTO-SMB_SIGN",
        "incident_pattern": {"incident_type": "smb_signing"},
        "runbook_id": "AUTO-SMB_SIGNING",
        "platform": "windows",
        "enabled": False,
    }
    import_rules(conn, [rule], actor="importer", reason="out of service")
    report(conn, "RB-AUTO-SMB_SIGN", 50, error="Runbook not found: AUTO-SMB_SIGNING")
    assert failing_rules(conn) == []


def test_chaos_rows_neither_make_a_rule_fail_nor_explain_it(conn: sa.Connection) -> None:
    report(conn, "L1-FIREWALL-001", 50, error="planted", campaign="c1")
    assert failing_rules(conn) == []
    report(conn, "L1-FIREWALL-001", 20, error="real")
    [rule] = failing_rules(conn)
    assert rule.top_errors == (("real", 20),)
    assert rule.matches == rule.steps[0].executions == 20


def test_the_rule_with_most_failures_comes_first(conn: sa.Connection) -> None:
    report(conn, "L1-NTP-001", 25, error="x")
    report(conn, "L1-DISK-001", 40, error="x")
    report(conn, "L1-SERVICE-001", 25, error="x")
    assert [r.rule_id for r in failing_rules(conn)] == ["L1-DISK-001", "L1-NTP-001", "L1-SERVICE-001"]


def test_at_most_five_errors_are_on_top_and_all_of_them_are_kept(conn: sa.Connection) -> None:
    for word in ("one", "two", "three", "four", "five", "six", "seven"):
        report(conn, "L1-NTP-001", 3, error=word)
    [rule] = failing_rules(conn)
    assert len(rule.top_errors) == 5
    assert sum(e.count for e in rule.errors) == rule.failures == 21


def test_no_rules_no_answers(conn: sa.Connection) -> None:
    assert failing_rules(conn) == []
    assert failures_of(conn, []) == {}
    assert outcome_counts(conn, ["L1-NTP-001"]) == {}


@pytest.mark.parametrize("below", [-0.1, 1.1, 50, float("nan")])
def test_a_floor_in_percent_or_beyond_is_refused(conn: sa.Connection, below: float) -> None:
    with pytest.raises(ValueError, match="fraction"):
        failing_rules(conn, below=below)


def test_a_volume_of_zero_is_refused(conn: sa.Connection) -> None:
    with pytest.raises(ValueError, match="at least one"):
        failing_rules(conn, at_least=0)


def test_the_sentence_says_when_nothing_could_be_rated() -> None:
    errors = [ErrorTemplate("no ssh credentials", "unreachable", 20, 1, 1.0)]
    text = describe("L1-SSH-001", 0, 20, None, errors)
    assert "none of them could be rated." in text
    assert "(20 on 1 host)" in text


def test_a_rule_that_fails_only_by_missing_reports_has_a_sentence_too() -> None:
    assert describe("L1-SSH-001", 0, 20, None, []).endswith("none of them could be rated.")


@pytest.fixture
def golden_day(conn: sa.Connection) -> sa.Connection:
    """The evening of 2026-02-15, its rules as imported."""
    replay = build_replay()
    latest: dict[str, dict[str, Any]] = {}
    posts = replay.morning_posts + replay.evening_posts
    for post in sorted(posts, key=lambda p: datetime.fromisoformat(p["reported_at"])):
        row = {"appliance_id": "unknown", **post["execution"], "site_id": post["site_id"]}
        row |= {"reported_at": post["reported_at"], "created_at": post["reported_at"]}
        latest[row["execution_id"]] = row
    columns = ", ".join(sorted({column for row in latest.values() for column in row}))
    conn.execute(
        sa.text(
            f"INSERT INTO execution_telemetry ({columns}) SELECT {columns} "
            "FROM jsonb_populate_recordset(null::execution_telemetry, CAST(:rows AS jsonb))"
        ),
        {"rows": json.dumps(list(latest.values()))},
    )
    import_rules(conn, replay.rules, actor="importer", reason="the day of 2026-02-15")
    refresh(conn)
    return conn


def test_on_the_golden_day_bitlocker_fails_at_thirty_percent_for_five_causes(
    golden_day: sa.Connection,
) -> None:
    found = {rule.rule_id: rule for rule in failing_rules(golden_day)}
    assert {"RB-AUTO-BITLOCKE", "L1-LIN-CRYPTO-001"} <= set(found)
    assert not {"RB-AUTO-FIREWALL", "RB-AUTO-SSH_CONF", "RB-AUTO-AUDIT_PO", "RB-AUTO-BACKUP_S"} & set(found)
    assert found["L1-LIN-CRYPTO-001"].rate == 0.0

    bitlocker = found["RB-AUTO-BITLOCKE"]
    assert next(iter(found)) == "RB-AUTO-BITLOCKE"
    assert (bitlocker.matches, bitlocker.successes, bitlocker.failures) == (3057, 917, 2140)
    assert sum(e.count for e in bitlocker.errors) == 2140
    text = " / ".join(e.template for e in bitlocker.errors)
    for cause in (
        "Trusted Platform Module",
        "Drive not encrypted - manual intervention required",
        "Runbook not found: AUTO-BITLOCKER_STATUS",
        "WMI query failed",
        "http response error: 401",
    ):
        assert cause in text
    assert len(bitlocker.errors) <= 20
    assert [s.label for s in bitlocker.steps][:2] == ["all executions", "not_applicable"]
    assert bitlocker.steps[-1].executions == sum(
        counts[0]
        for outcome_class, counts in outcome_counts(golden_day, ["RB-AUTO-BITLOCKE"])["RB-AUTO-BITLOCKE"].items()
        if outcome_class in ("failure", "success")
    )
    assert "not applicable" in bitlocker.sentence


def test_on_the_golden_day_no_template_names_a_host(golden_day: sa.Connection) -> None:
    hosts = golden_day.execute(sa.text("SELECT DISTINCT hostname FROM execution_telemetry")).scalars().all()
    rules = golden_day.execute(sa.text("SELECT rule_id FROM l1_rules")).scalars().all()
    templates = [e.template.lower() for errors in failures_of(golden_day, rules).values() for e in errors]
    assert len(templates) > 20
    assert len(hosts) > 5
    for host in hosts:
        assert not [template for template in templates if host.lower() in template]
