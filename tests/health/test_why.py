"""`why` on telemetry in PostgreSQL: the golden day with its five causes, a planted fleet, and the kept answers."""

from __future__ import annotations

import datetime as dt
import json
import subprocess
import sys
import time
from collections.abc import Iterator

import pytest
import sqlalchemy as sa

from flywheel_pipeline.aggregates.refresh import refresh
from flywheel_pipeline.errors import FlywheelError
from flywheel_pipeline.health import report
from flywheel_pipeline.health.checks import no_failing_rules
from flywheel_pipeline.health.segments import Condition
from flywheel_pipeline.health.stored import kept_attributions, update_attributions
from flywheel_pipeline.health.why import attribute, why
from flywheel_pipeline.simulation import planted
from flywheel_pipeline.simulation.replay import build_replay

RULE = "L1-BITLOCKER-001"


@pytest.fixture
def conn(engine: sa.Engine) -> Iterator[sa.Connection]:
    with engine.connect() as connection, connection.begin() as transaction:
        yield connection
        transaction.rollback()


def insert(conn: sa.Connection, executions: list[planted.Execution], rule_id: str = RULE, label: str = "p") -> None:
    rows = [
        {
            "execution_id": f"{label}-{i}",
            "site_id": e.site,
            "runbook_id": rule_id,
            "hostname": e.host,
            "platform": "windows",
            "incident_type": "bitlocker_status",
            "agent_version": e.agent_version,
            "started_at": f"{e.day.isoformat()}T08:00:00+00:00",
            "success": e.success,
            "verification_passed": True if e.success else None,
            "resolution_level": "L1",
            "error_message": e.error,
            "error_step": e.step,
            "tags": {"os": e.os, "hardware": e.hardware},
            "created_at": f"{e.day.isoformat()}T09:00:00+00:00",
        }
        for i, e in enumerate(executions)
    ]
    columns = ", ".join(rows[0])
    conn.execute(
        sa.text(
            f"INSERT INTO execution_telemetry ({columns}) "
            f"SELECT {columns} FROM jsonb_populate_recordset(null::execution_telemetry, CAST(:rows AS jsonb))"
        ),
        {"rows": json.dumps(rows)},
    )


@pytest.fixture
def day(conn: sa.Connection) -> sa.Connection:
    """A connection on a database that holds the final version of every execution of 2026-02-15."""
    replay = build_replay()
    latest = {}
    for post in sorted(
        replay.morning_posts + replay.evening_posts, key=lambda p: dt.datetime.fromisoformat(p["reported_at"])
    ):
        row = {"appliance_id": "unknown", **post["execution"], "site_id": post["site_id"]}
        latest[row["execution_id"]] = row | {"reported_at": post["reported_at"], "created_at": post["reported_at"]}
    columns = ", ".join(sorted({column for row in latest.values() for column in row}))
    conn.execute(
        sa.text(
            f"INSERT INTO execution_telemetry ({columns}) "
            f"SELECT {columns} FROM jsonb_populate_recordset(null::execution_telemetry, CAST(:rows AS jsonb))"
        ),
        {"rows": json.dumps(list(latest.values()))},
    )
    refresh(conn)
    return conn


def test_bitlocker_at_thirty_percent_has_five_causes_a_bad_week_and_seven_dead_hosts(day: sa.Connection) -> None:
    found = why(day, "RB-AUTO-BITLOCKE")
    assert (found.executions, found.successes, found.failures) == (3057, 917, 2140)
    assert [(f.family, f.failures) for f in found.families] == [
        ("not_applicable", 760),
        ("escalated", 520),
        ("no_runbook", 350),
        ("missing_component", 290),
        ("unreachable", 220),
    ]
    assert found.families[-1].rate_if_fixed == 1.0
    assert found.rated_rate == pytest.approx(0.60, abs=0.01)
    [week] = found.segments
    assert week.conditions == (Condition("since", "2026-01-18"), Condition("until", "2026-01-24"))
    assert (week.executions, week.rate) == (697, 0.0)
    assert found.concentration.dead_hosts == 7
    assert found.concentration.share_of_dead == pytest.approx(0.78, abs=0.005)
    assert found.flapping.share == pytest.approx(0.99, abs=0.005)
    assert found.suggestion is None
    assert found.no_suggestion.startswith("too few sites")
    sentence = report.sentence(found)
    assert sentence.startswith("Causes, most failures first: the host cannot have this control (35.5 %); ")
    assert "It fails on all hosts from 2026-01-18 to 2026-01-24" in sentence
    assert "7 hosts that never succeeded make 78.0 % of the failures" in sentence


def test_the_planted_fleet_reads_the_same_from_the_database_as_from_memory(conn: sa.Connection) -> None:
    executions = planted.golden_fleet()
    insert(conn, executions)
    started = time.process_time()
    found = why(conn, RULE)
    assert time.process_time() - started <= 2.0
    assert [report.segment_words(s.conditions) for s in found.segments] == [
        "agent 1.0.56",
        "hardware vm-no-tpm",
        "Windows 10 since 2026-01-05",
    ]
    for count, segment in enumerate(found.segments, 1):
        truth = planted.true_rate_without(executions, set(range(count)))
        assert segment.rate_if_fixed == pytest.approx(truth, abs=0.03)
    # The step at which each cause was planted.
    assert [step.step if step else None for step in found.segment_steps] == [1, 2, 3]
    assert sum(d.executions for d in found.days) == 3057
    assert sum(s.failures for s in found.error_steps) == found.failures
    document = report.as_json(found)
    assert json.loads(json.dumps(document))["segments"][0]["words"] == "agent 1.0.56"
    assert all(
        uri.startswith("data:image/png;base64,") and len(uri) <= 30 * 1024 for uri in report.plots(found).values()
    )


def test_an_upgrade_on_the_day_of_a_drop_is_joined_to_it(conn: sa.Connection) -> None:
    made = [
        planted.Execution(
            site=f"site-{s}",
            host=f"h{s}-{h}",
            agent_version="1.0.56" if d < 20 else "1.0.74",
            os="Windows 11",
            hardware="laptop",
            day=planted.FIRST_DAY + dt.timedelta(days=d),
            success=(d + h + s) % 10 > (0 if d < 20 else 6),
            error=None,
            step=None,
            causes=(),
            base_failure=False,
        )
        for d in range(40)
        for s in range(3)
        for h in range(4)
    ]
    insert(conn, made)
    change = why(conn, RULE).change
    assert change is not None
    assert change.day == planted.FIRST_DAY + dt.timedelta(days=20)
    assert [event.what for event in change.events] == ["agent 1.0.74 reached 3 sites"]


def test_a_rule_without_executions_says_so_and_is_left_out_of_many(conn: sa.Connection) -> None:
    with pytest.raises(FlywheelError, match=r"There are no executions of L1-X\."):
        why(conn, "L1-X")
    assert attribute(conn, ["L1-X", "L1-Y"]) == {}
    assert attribute(conn, []) == {}


def test_an_answer_is_kept_until_the_evidence_changes_and_dropped_when_the_rule_heals(conn: sa.Connection) -> None:
    bad = planted.fleet(executions=400, base=0.5, seed=3)
    insert(conn, bad)
    refresh(conn)
    first = update_attributions(conn)
    assert (first.failing, first.computed, first.dropped) == ((RULE,), (RULE,), ())
    kept = kept_attributions(conn)[RULE]
    assert kept.result["executions"] == 400
    assert kept.sentence == kept.result["sentence"]
    assert set(kept.plots) == {"waterfall", "rate"}
    finding = no_failing_rules(conn)
    assert kept.sentence in finding.sentence
    # The same evidence: nothing is computed.
    assert update_attributions(conn).computed == ()
    assert kept_attributions(conn)[RULE].computed_at == kept.computed_at
    # One execution of 400 is below 1 % ...
    insert(conn, planted.fleet(executions=1, seed=4), label="q")
    refresh(conn)
    assert update_attributions(conn).computed == ()
    # ... but an answer that no longer fits is told for a quarter of an hour at most.
    conn.execute(sa.text("UPDATE rule_attributions SET computed_at = computed_at - interval '16 minutes'"))
    assert update_attributions(conn).computed == (RULE,)
    assert kept_attributions(conn, [RULE])[RULE].result["executions"] == 401
    insert(conn, planted.fleet([], executions=1000, base=0.0, seed=6), label="s")
    refresh(conn)
    assert update_attributions(conn).dropped == (RULE,)
    assert kept_attributions(conn) == {}


def test_a_run_in_which_nothing_fails_imports_neither_numpy_nor_matplotlib() -> None:
    code = "import sys, flywheel_pipeline.health.stored; print({'numpy', 'matplotlib'} & set(sys.modules))"
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert answer.stdout.strip() == "set()"
