"""A rule's cells as arrays say what SQL says of them, whatever agents left out."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import sqlalchemy as sa

from flywheel_pipeline.health import rule_cells, segments
from flywheel_pipeline.health.rule_cells import RuleCells
from flywheel_pipeline.health.segments import Condition

RULES = ("L1-A", "L1-B")
ROWS = """
INSERT INTO execution_telemetry (execution_id, site_id, runbook_id, hostname, platform, incident_type, agent_version,
  started_at, success, verification_passed, resolution_level, error_message, error_step, tags, created_at)
SELECT 'x-' || n, site, rule, host, 'windows', 'drift', agent, at, success, success, 'L1',
  CASE WHEN NOT success THEN error END, CASE WHEN NOT success THEN step END, jsonb_build_object('os', os, 'hardware', hardware),
  at + interval '1 minute'
FROM jsonb_to_recordset(CAST(:rows AS jsonb)) AS r
  (n integer, site text, rule text, host text, agent text, at timestamptz, success boolean, error text, step integer,
   os text, hardware text)
"""


@pytest.fixture
def conn(engine: sa.Engine) -> Iterator[sa.Connection]:
    """Six hundred executions of two rules over four months, with all that agents send or leave out."""
    pick = random.Random(3)
    rows = [
        {
            "n": n,
            "site": f"site-{pick.randrange(4)}",
            "rule": pick.choice(RULES),
            "host": f"h {pick.randrange(5)}",
            "agent": pick.choice([None, "", "1.0.56", "1.0.70"]),
            "at": f"{pick.choice(['1999-12-31', '2026-01-01', '2026-02-15', '2026-05-01'])}T{pick.randrange(10, 20)}:00:00Z",
            "success": pick.random() < 0.5,
            "error": pick.choice([None, "Unknown action: x", "connection timed out", "it broke"]),
            "step": pick.choice([None, -(2**31), 0, 1, 2**31 - 1]),
            "os": pick.choice([None, "Windows 10", "Windows 11"]),
            "hardware": pick.choice([None, "vm"]),
        }
        for n in range(600)
    ]
    with engine.connect() as connection, connection.begin() as transaction:
        connection.execute(sa.text(ROWS), {"rows": json.dumps(rows)})
        yield connection
        transaction.rollback()


def ask(conn: sa.Connection, rule_id: str, columns: str, having: str = "true", **values: Any) -> set[tuple[Any, ...]]:
    """Sums of executions and successes by these columns, in plain SQL."""
    query = (
        f"SELECT {columns}, sum(executions)::bigint, sum(successes)::bigint FROM rule_failure_cells "
        f"WHERE rule_id = :id AND {having} GROUP BY {columns}"
    )
    return {tuple(row) for row in conn.execute(sa.text(query), {"id": rule_id, **values})}


def both(conn: sa.Connection) -> dict[str, RuleCells]:
    found = rule_cells.read(conn, [*RULES, "L1-NEVER-RAN"])
    assert set(found) == set(RULES)
    return found


def test_sums_are_those_of_sql(conn: sa.Connection) -> None:
    for rule_id, cells in both(conn).items():
        assert set(cells.days()) == ask(conn, rule_id, "day")
        assert [row[0] for row in cells.days()] == sorted(row[0] for row in cells.days())
        assert {(name, *counts) for name, counts in cells.classes().items()} == ask(conn, rule_id, "outcome_class")
        assert {(site, host, n, n - f) for site, host, n, f in cells.hosts()} == ask(conn, rule_id, "site_id, hostname")
        failed = ask(conn, rule_id, "error_step", "executions > successes")
        assert set(cells.steps()) == {(step, n - good) for step, n, good in failed}
        assert {step for step, _ in cells.steps()} >= {None, -(2**31), 2**31 - 1}
        query = "SELECT site_id, agent_version, min(day) FROM rule_failure_cells WHERE rule_id = :id GROUP BY 1, 2"
        first = {tuple(row) for row in conn.execute(sa.text(query), {"id": rule_id}) if row[1] is not None}
        assert set(cells.first_seen()) == first


def test_a_search_gets_the_rows_that_sql_would_give_it_in_their_order(conn: sa.Connection) -> None:
    for rule_id, cells in both(conn).items():
        days = cells.days()
        width, starts = segments.buckets(days[0][0], days[-1][0])
        assert width > 1
        rows = conn.execute(
            sa.text(
                "SELECT site_id, hostname, agent_version, os, hardware, (day - :first) / :width, "
                "sum(executions)::bigint, sum(executions - successes)::bigint FROM rule_failure_cells "
                'WHERE rule_id = :id GROUP BY 1, 2, 3, 4, 5, 6 ORDER BY site_id COLLATE "C", hostname COLLATE "C", '
                'agent_version COLLATE "C", os COLLATE "C", hardware COLLATE "C", 6'
            ),
            {"id": rule_id, "first": days[0][0], "width": width},
        ).all()
        wanted = segments.from_rows([tuple(row) for row in rows], starts)
        found = cells.searched(width, starts)
        assert (found.labels, found.bucket_days) == (wanted.labels, wanted.bucket_days)
        for name in ("host", "bucket", "executions", "failures"):
            assert np.array_equal(getattr(found, name), getattr(wanted, name)), name
        for name in segments.DIMENSIONS:
            assert np.array_equal(found.codes[name], wanted.codes[name]), name


def test_the_steps_of_a_segment_are_those_of_its_rows_alone(conn: sa.Connection) -> None:
    cells = both(conn)["L1-A"]
    days = cells.days()
    width, starts = segments.buckets(days[0][0], days[-1][0])
    since = starts[len(starts) // 2]
    rows = segments.matches(
        cells.unsummed(width, starts), (Condition("os", "Windows 10"), Condition("since", since.isoformat()))
    )
    failed = ask(
        conn, "L1-A", "error_step", "executions > successes AND os = 'Windows 10' AND day >= :since", since=since
    )
    assert failed
    assert set(cells.steps(rows)) == {(step, n - good) for step, n, good in failed}


def test_an_outcome_class_that_nobody_knows_is_an_error(conn: sa.Connection, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rule_cells, "_CLASSES", ("", "failure", "success"))
    with pytest.raises(ValueError, match="unknown outcome class"):
        rule_cells.read(conn, RULES)
