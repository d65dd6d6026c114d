"""What imported patterns claimed against what telemetry shows."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import sqlalchemy as sa

from flywheel_pipeline.aggregates.refresh import refresh
from flywheel_pipeline.candidates.quality import reported_rates_are_observed


@pytest.fixture
def conn(engine: sa.Engine) -> Iterator[sa.Connection]:
    with engine.connect() as connection, connection.begin() as transaction:
        yield connection
        transaction.rollback()


def imported(conn: sa.Connection, incident_type: str, reported: int, successes: int) -> None:
    conn.execute(
        sa.text(
            "INSERT INTO patterns (pattern_id, pattern_signature, incident_type, runbook_id, platform, pattern_key, "
            "occurrences, success_count, status) SELECT t, t, t, 'RB-WIN-SEC-001', 'windows', "
            "flywheel_pattern_key(t, 'RB-WIN-SEC-001', 'windows'), :reported, :successes, 'promoted' "
            "FROM CAST(:type AS text) AS t"
        ),
        {"type": incident_type, "reported": reported, "successes": successes},
    )


def observed(conn: sa.Connection, incident_type: str, successes: int, failures: int) -> None:
    conn.execute(
        sa.text(
            "INSERT INTO execution_telemetry (execution_id, site_id, runbook_id, hostname, platform, incident_type, "
            "success, verification_passed, resolution_level, started_at) "
            "SELECT t || n, 's', 'L2-run_windows_runbook:RB-WIN-SEC-001', 'h' || n, 'windows', t, "
            "n <= :successes, n <= :successes, 'L2', now() FROM generate_series(1, :executions) AS n, CAST(:type AS text) AS t"
        ),
        {"type": incident_type, "successes": successes, "executions": successes + failures},
    )
    refresh(conn)


def test_a_pattern_reported_as_perfect_that_fails_in_telemetry_is_named(conn: sa.Connection) -> None:
    imported(conn, "firewall", 166, 166)
    observed(conn, "firewall", 39, 1)
    assert reported_rates_are_observed(conn).passed
    imported(conn, "bitlocker", 500, 500)
    observed(conn, "bitlocker", 12, 28)
    finding = reported_rates_are_observed(conn)
    assert (finding.passed, finding.offenders) == (False, 1)
    assert (finding.sample[0]["pattern"], finding.sample[0]["reported_rate"]) == ("bitlocker", 1.0)
    assert finding.sample[0]["observed_rate"] == 0.3
    assert "bitlocker: reported 100%, observed 30% of 40" in finding.sentence


def test_a_gap_of_ten_points_few_rows_or_a_better_rate_are_no_offence(conn: sa.Connection) -> None:
    imported(conn, "firewall", 100, 100)
    observed(conn, "firewall", 36, 4)
    imported(conn, "cron", 100, 100)
    observed(conn, "cron", 0, 19)
    imported(conn, "kernel", 100, 20)
    observed(conn, "kernel", 40, 0)
    finding = reported_rates_are_observed(conn)
    assert finding.passed, finding.sample
    assert (finding.figures["imported_patterns"], finding.figures["compared"]) == (3, 2)


def test_nothing_imported_or_nothing_observed_is_not_called_sound(conn: sa.Connection) -> None:
    assert "nothing to judge" in reported_rates_are_observed(conn).sentence
    imported(conn, "firewall", 0, 0)
    imported(conn, "kernel", 10, 10)
    finding = reported_rates_are_observed(conn)
    assert (finding.passed, finding.figures["compared"], finding.figures["never_observed"]) == (True, 0, 1)
    assert "nothing to judge" in finding.sentence
