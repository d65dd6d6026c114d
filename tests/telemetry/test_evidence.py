"""Evidence bundles against telemetry."""

from __future__ import annotations

import datetime as dt
from collections.abc import Iterator

import pytest
import sqlalchemy as sa

from flywheel_pipeline.telemetry.evidence import evidence_agrees

NOW = dt.datetime(2026, 2, 15, 12, tzinfo=dt.UTC)


@pytest.fixture
def conn(engine: sa.Engine) -> Iterator[sa.Connection]:
    with engine.connect() as connection, connection.begin() as transaction:
        yield connection
        transaction.rollback()


def bundle(
    conn: sa.Connection, name: str, outcome: str | None, *, hours_ago: float = 30, incident: str | None = None
) -> None:
    conn.execute(
        sa.text(
            "INSERT INTO evidence_bundles (bundle_id, appliance_id, incident_id, check_type, outcome, created_at) "
            "VALUES (:name, 'site-a-01', :incident, 'firewall', :outcome, :at)"
        ),
        {"name": name, "incident": incident, "outcome": outcome, "at": NOW - dt.timedelta(hours=hours_ago)},
    )


def execution(
    conn: sa.Connection,
    name: str,
    success: bool,
    *,
    bundle: str | None = None,
    incident: str | None = None,
    appliance: str = "site-a-01",
) -> None:
    conn.execute(
        sa.text(
            "INSERT INTO execution_telemetry (execution_id, site_id, appliance_id, runbook_id, hostname, success, "
            "started_at, created_at, evidence_bundle_id, incident_id) "
            "VALUES (:name, 'site-a', :appliance, 'R', 'h', :success, :at, :at, :bundle, :incident)"
        ),
        {"name": name, "success": success, "bundle": bundle, "incident": incident, "appliance": appliance, "at": NOW},
    )


def test_evidence_that_says_the_same_agrees(conn: sa.Connection) -> None:
    bundle(conn, "b1", "success")
    execution(conn, "e1", True, bundle="b1")
    bundle(conn, "b2", "failed")
    execution(conn, "e2", False, bundle="b2")
    bundle(conn, "b3", " Success ", incident="i3")
    execution(conn, "e3", True, incident="i3", appliance="unknown")
    bundle(conn, "b4", "failed", incident="i4")  # two attempts: the report of one failure tells of it
    execution(conn, "e4", False, incident="i4")
    execution(conn, "e5", True, incident="i4")
    finding = evidence_agrees(conn, NOW)
    assert finding.passed, finding.sample
    assert (finding.figures["compared"], finding.figures["disagreeing_share"]) == (4, 0.0)


@pytest.mark.parametrize("outcome", ["failed", "reverted", "partial", "a word nobody knows"])
def test_a_success_that_the_evidence_denies_is_named(conn: sa.Connection, outcome: str) -> None:
    bundle(conn, "b1", outcome)
    execution(conn, "e1", True, bundle="b1")
    finding = evidence_agrees(conn, NOW)
    assert (finding.passed, finding.offenders, finding.figures["reported_as_success"]) == (False, 1, 1)
    assert (finding.sample[0]["bundle_id"], finding.sample[0]["execution_id"]) == ("b1", "e1")
    assert f"first b1 of site-a-01, outcome {outcome}" in finding.sentence


def test_a_failure_in_evidence_that_telemetry_never_heard_of_is_a_success_only_report(conn: sa.Connection) -> None:
    bundle(conn, "b1", "failed", incident="i1")
    bundle(conn, "b2", "success", incident="i2")
    execution(conn, "e9", True, incident="i1", appliance="another-site-01")
    finding = evidence_agrees(conn, NOW)
    assert (finding.offenders, finding.sample[0]["verdict"]) == (1, "failure never reported")
    assert finding.figures["success_never_reported"] == 1
    assert finding.figures["compared"] == 1


def test_a_failure_reported_where_the_evidence_shows_success_disagrees_too(conn: sa.Connection) -> None:
    bundle(conn, "b1", "success")
    execution(conn, "e1", False, bundle="b1")
    assert evidence_agrees(conn, NOW).figures["reported_as_failure"] == 1


def test_bundles_without_outcome_too_young_or_too_old_are_not_compared_and_nothing_is_no_share(
    conn: sa.Connection,
) -> None:
    bundle(conn, "b1", None)
    bundle(conn, "b2", " ")
    bundle(conn, "b3", "failed", hours_ago=1)
    bundle(conn, "b4", "failed", hours_ago=24 * 8)
    finding = evidence_agrees(conn, NOW)
    assert (finding.passed, finding.figures["compared"], finding.figures["disagreeing_share"]) == (True, 0, None)
    assert "nothing to judge" in finding.sentence
