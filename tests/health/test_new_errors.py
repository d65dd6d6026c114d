"""Errors never seen before."""

from __future__ import annotations

import datetime as dt
from collections.abc import Iterator
from typing import Any

import pytest
import sqlalchemy as sa

from flywheel_pipeline.health.new_errors import no_new_errors

NOW = dt.datetime(2026, 2, 15, 12, tzinfo=dt.UTC)


@pytest.fixture
def conn(engine: sa.Engine) -> Iterator[sa.Connection]:
    with engine.connect() as connection, connection.begin() as transaction:
        yield connection
        transaction.rollback()


def fail(conn: sa.Connection, days_ago: float, message: str | None, **fields: Any) -> None:
    at = NOW - dt.timedelta(days=days_ago)
    row = {
        "execution_id": f"{at.isoformat()} {message} {sorted(fields.items())}",
        "site_id": "site-a",
        "runbook_id": "L1-FIREWALL-001",
        "hostname": "ws-01",
        "started_at": at,
        "success": False,
        "resolution_level": "L1",
        "error_message": message,
        "failure_type": "script_error",
        "agent_version": "1.0.74",
        "chaos_campaign_id": None,
        "created_at": at,
        **fields,
    }
    columns, places = ", ".join(row), ", ".join(f":{c}" for c in row)
    conn.execute(sa.text(f"INSERT INTO execution_telemetry ({columns}) VALUES ({places})"), row)


def test_a_template_that_no_older_row_resembles_is_named_and_numbers_make_no_new_one(conn: sa.Connection) -> None:
    fail(conn, 20, "Execution timed out after 60s")
    fail(conn, 0.5, "Execution timed out after 75s")
    assert no_new_errors(conn, NOW).passed
    fail(conn, 0.3, "Unknown action: run_windows_runbook:RB-WIN-SEC-016", hostname="ws-02")
    finding = no_new_errors(conn, NOW)
    assert (finding.passed, finding.offenders) == (False, 1)
    assert finding.sample[0]["kind"] == "template"
    assert "Unknown action" in finding.sample[0]["what"]
    assert (finding.figures["new_templates"], finding.figures["new_executions"]) == (1, 1)
    assert "agent 1.0.74" in finding.sentence
    # A day later it has been seen.
    assert no_new_errors(conn, NOW + dt.timedelta(days=1)).passed


def test_a_failure_class_never_seen_is_named_even_under_a_known_message(conn: sa.Connection) -> None:
    fail(conn, 20, "Phase 'verify' failed")
    fail(conn, 0.5, "Phase 'verify' failed", failure_type="quantum_decoherence")
    finding = no_new_errors(conn, NOW)
    assert [(o["kind"], o["what"]) for o in finding.sample] == [("class", "quantum_decoherence")]


def test_a_host_that_only_the_old_rows_knew_is_masked_and_the_template_is_not_new(conn: sa.Connection) -> None:
    fail(conn, 20, "Linux target not found: web-7", hostname="web-7")
    fail(conn, 0.5, "Linux target not found: db-3", hostname="db-3")
    finding = no_new_errors(conn, NOW)
    assert finding.passed, finding.sample


def test_late_rows_are_judged_by_their_arrival_and_chaos_rows_never(conn: sa.Connection) -> None:
    fail(conn, 20, "Phase 'verify' failed")
    fail(conn, 9, "planted", chaos_campaign_id="c1", created_at=NOW - dt.timedelta(hours=1))
    assert no_new_errors(conn, NOW).passed
    fail(conn, 9, "delivered late", created_at=NOW - dt.timedelta(hours=1))
    assert no_new_errors(conn, NOW).sample[0]["what"] == "delivered late"


def test_failures_without_a_message_or_class_are_a_template_like_any_other(conn: sa.Connection) -> None:
    fail(conn, 20, "Phase 'verify' failed")
    fail(conn, 0.5, None, failure_type=None)
    assert [(o["kind"], o["what"]) for o in no_new_errors(conn, NOW).sample] == [
        ("class", "no class"),
        ("template", "(no message)"),
    ]


def test_an_empty_or_a_young_log_calls_nothing_new_and_says_so(conn: sa.Connection) -> None:
    assert no_new_errors(conn, NOW).sentence.startswith("Not judged: the log is empty")
    fail(conn, 0.5, "first of all")
    young = no_new_errors(conn, NOW)
    assert young.passed
    assert young.sentence.startswith("Not judged: the log begins 2026-02-15")
    assert dict(young.figures) == {}
