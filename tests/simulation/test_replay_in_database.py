"""The replay as the database reads it: identities, classes and patterns of the SQL models."""

from __future__ import annotations

import json
from collections.abc import Iterator
from datetime import datetime
from typing import Any

import pytest
import sqlalchemy as sa

from flywheel_pipeline.simulation.replay import GOLDEN, build_replay
from flywheel_pipeline.simulation.replay_patterns import PENDING

_INSERT = """
INSERT INTO execution_telemetry ({columns})
SELECT {columns} FROM jsonb_populate_recordset(null::execution_telemetry, CAST(:rows AS jsonb))
"""


@pytest.fixture
def loaded(engine: sa.Engine) -> Iterator[sa.Connection]:
    """A connection on a database that holds the final version of every execution of the day."""
    replay = build_replay()
    latest: dict[str, dict[str, Any]] = {}
    for post in sorted(
        replay.morning_posts + replay.evening_posts, key=lambda p: datetime.fromisoformat(p["reported_at"])
    ):
        row = {"appliance_id": "unknown", **post["execution"], "site_id": post["site_id"]}
        row |= {"reported_at": post["reported_at"], "created_at": post["reported_at"]}
        latest[row["execution_id"]] = row
    columns = ", ".join(sorted({column for row in latest.values() for column in row}))
    with engine.begin() as connection:
        connection.execute(sa.text(_INSERT.format(columns=columns)), {"rows": json.dumps(list(latest.values()))})
        yield connection


def test_levels_successes_and_rules_are_those_of_the_golden_table(loaded: sa.Connection) -> None:
    rows, l1, successful = loaded.execute(
        sa.text(
            "SELECT count(*), count(*) FILTER (WHERE level = 'L1'), count(*) FILTER (WHERE success) FROM executions"
        )
    ).one()
    golden = GOLDEN["telemetry"]
    assert (rows, l1, successful) == (golden["rows"], golden["l1"], golden["successful"])
    for rule in GOLDEN["top_rules"] + GOLDEN["builtin_rules"]:
        matches, successes = loaded.execute(
            sa.text("SELECT count(*), count(*) FILTER (WHERE success) FROM executions WHERE rule_id = :rule"),
            {"rule": rule["rule_id"]},
        ).one()
        assert (matches, successes) == (rule["matches"], rule["successes"])


def test_bitlocker_rows_fall_into_the_classes_that_explain_them(loaded: sa.Connection) -> None:
    rows = loaded.execute(
        sa.text(
            "SELECT outcome_class, count(*) FROM executions WHERE rule_id = 'RB-AUTO-BITLOCKE' GROUP BY outcome_class"
        )
    )
    classes: dict[str, int] = dict(rows.all())
    contradicted = classes["failure"] - (350 + 80 + 70 + 50)  # successes against their own verification
    assert 0 <= contradicted <= 10
    assert classes["success"] + classes["unverified"] + contradicted == 917
    assert classes["not_applicable"] == 540 + 220 + 90
    assert classes["escalated"] == 520
    assert classes["unreachable"] == 110 + 70 + 40


def test_l2_patterns_are_read_with_their_runbook_from_every_form(loaded: sa.Connection) -> None:
    counts = {
        (incident_type, runbook_id, platform): (executions, successes)
        for incident_type, runbook_id, platform, executions, successes in loaded.execute(
            sa.text(
                "SELECT incident_type, runbook_id, platform, count(*), count(*) FILTER (WHERE success) "
                "FROM executions WHERE level = 'L2' GROUP BY incident_type, runbook_id, platform"
            )
        )
    }
    assert len(counts) == len(PENDING) + 3
    for pattern in PENDING:
        successes = pattern.successes + pattern.evening_successes
        key = (pattern.incident_type, pattern.runbook_id, pattern.platform)
        assert counts[key] == (successes + pattern.failures, successes)
