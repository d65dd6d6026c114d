"""Backtests on the history of a real database, and the command `flywheel backtest`."""

from __future__ import annotations

import datetime as dt
import json
import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from staged_fleet import AUDIT, FIRST_DAY, MANY, SPOOLER, StagedFleet

from flywheel_pipeline.promotion.explain import current_batch
from flywheel_pipeline.promotion.history import backtest_history, load_history
from flywheel_pipeline.promotion.policy import load_policy

LEGACY, STANDARD = load_policy("legacy"), load_policy("standard")
MIDNIGHT = 0.5  # StagedFleet heals at 08:00 and runs four hours after the day it is given


def replayed(fleet: StagedFleet, *policies: Any, **days: Any) -> dict[tuple[str, str], dict[str, Any]]:
    with fleet.engine.connect() as connection:
        rows = backtest_history(connection, current_batch(connection), policies or (LEGACY, STANDARD), **days)
    return {(row["pattern"], row["policy"]): row for row in rows}


def day_of(day: float) -> str:
    return (FIRST_DAY + dt.timedelta(days=day)).date().isoformat()


@pytest.fixture
def told(engine: sa.Engine) -> StagedFleet:
    """Sixty sites over a month: auditing healed always, the spooler in 85 % of the cases, unluckily late."""
    fleet = StagedFleet(engine, 60)
    for day in range(0, 30, 3):
        fleet.heal(AUDIT, day, hosts=(1, 2))
        fleet.heal(SPOOLER, day, hosts=(1, 2), good=lambda site, host, d=day: d == 0 or hash_of(site, host, d) >= 15)
    fleet.refreshed(32)
    return fleet


def hash_of(*parts: Any) -> int:
    """A number from 0 to 99, the same in every process."""
    return random.Random(repr(parts)).randrange(100)


def test_on_the_same_history_legacy_promotes_the_85_percent_runbook_and_standard_does_not(told):
    found = replayed(told)
    bad = found[SPOOLER.key, "legacy"]
    assert (bad["served_day"], bad["fleet_day"]) == (day_of(0), day_of(0))
    assert bad["later_episodes"] == 1080
    assert 0.10 < bad["later_failures"] / bad["later_episodes"] < 0.20
    held = found[SPOOLER.key, "standard"]
    assert held["fleet_day"] is None
    good = found[AUDIT.key, "standard"]
    assert [step["to"] for step in good["steps"]] == ["shadow", "canary", "canary", "ring", "ring", "fleet"]
    assert good["later_failures"] == 0
    assert found[AUDIT.key, "legacy"]["served_day"] == day_of(0)


def test_only_the_days_asked_for_are_replayed_and_both_ends_are_in(told):
    every = load(told)
    assert len(every.candidates[0].log) == 60 * 2 * 10
    some = load(told, since=dt.date(2026, 1, 8), until=dt.date(2026, 1, 14))  # days 3, 6 and 9
    assert [len(candidate.log) for candidate in some.candidates] == [60 * 2 * 3] * 2
    assert some.day(1.0) == "2026-01-08"
    assert load(told, since=dt.date(2027, 1, 1)).candidates == ()
    assert replayed(told, since=dt.date(2027, 1, 1)) == {}


def load(fleet: StagedFleet, **days: Any) -> Any:
    with fleet.engine.connect() as connection:
        return load_history(connection, current_batch(connection), STANDARD, **days)


def test_a_backtest_finds_what_the_pipeline_did_on_the_same_days(engine):
    # Five patterns of different quality, healed in a different rhythm, some unrated; a run at every midnight.
    fleet = StagedFleet(engine, 20, policy="legacy")
    pick = random.Random(7)
    rates = dict(zip(MANY[:5], (0.55, 0.85, 0.9, 0.95, 1.0), strict=True))
    for day in range(9):
        for pattern, rate in rates.items():
            hosts = [h for h in (1, 2, 3, 4) if pick.random() < 0.5]
            sites = pick.sample(fleet.sites, pick.randrange(0, 2))
            if hosts and sites:
                fleet.heal(pattern, day, hosts=hosts, sites=sites, good=lambda *_, r=rate: pick.random() < r)
            if pick.random() < 0.3:
                fleet.heal(pattern, day, hosts=[9], sites=fleet.sites[:1], verification_passed=None)
        fleet.run(day + MIDNIGHT)
    served = {
        row.rule_id: row.day
        for row in fleet.rows(
            "SELECT rule_id, ((occurred_at - interval '1 day') AT TIME ZONE 'UTC')::date::text AS day "
            "FROM rule_events WHERE kind = 'promoted'"
        )
    }
    found = replayed(fleet, LEGACY)
    assert len(served) >= 2
    assert len(set(served.values())) >= 2
    for pattern in rates:
        row = found.get((pattern.key, "legacy"), {"served_day": None})
        assert row["served_day"] == served.get(pattern.rule_id), pattern


def test_the_ladder_up_to_the_canary_is_that_of_the_pipeline(engine):
    fleet = StagedFleet(engine, 20)
    for day in range(8):
        fleet.heal(AUDIT, day, hosts=[1 + day % 4], sites=fleet.sites[day % 2 :: 2])
        # Reported as success by agents that verify nothing: executions that no rate counts, neither way.
        fleet.heal(AUDIT, day, hosts=[9], sites=fleet.sites[:3], verification_passed=None)
        fleet.run(day + MIDNIGHT)
    steps = fleet.rows(
        "SELECT to_state, ((occurred_at - interval '1 day') AT TIME ZONE 'UTC')::date::text AS day "
        "FROM rule_events WHERE kind = 'advanced' ORDER BY event_id"
    )
    assert [row.to_state for row in steps] == ["shadow", "canary"]
    found = replayed(fleet, STANDARD)[AUDIT.key, "standard"]["steps"]
    assert [(step["to"], step["day"]) for step in found[:2]] == [(row.to_state, row.day) for row in steps]
    (candidate,) = load(fleet).candidates
    assert candidate.log.succeeded.count(None) == 8 * 3
    assert candidate.log.succeeded.count(True) == 8 * 10


# ------------------------------------------------------------------------------------------------------- the command


def flywheel(*arguments: str, url: str, home: Path) -> subprocess.CompletedProcess[str]:
    program = "from flywheel_pipeline.cli import main; main()"
    environment = {**os.environ, "FLYWHEEL_DATABASE_URL": url, "FLYWHEEL_HOME": str(home)}
    return subprocess.run(
        [sys.executable, "-c", program, "backtest", *arguments],
        capture_output=True,
        text=True,
        env=environment,
        check=False,
    )


def test_the_command_prints_a_table_one_json_document_and_a_plot(told, database_url, tmp_path):
    plot = tmp_path / "policies.png"
    done = flywheel("--json", "--runs", "40", "--plot", str(plot), url=database_url, home=tmp_path)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert [policy["name"] for policy in found["policies"]] == ["legacy", "standard"]
    simulated = {(row["fleet"], row["policy"]): row for row in found["simulation"]}
    assert simulated["every site 85%", "legacy"]["false_promotion"] >= 0.5
    assert simulated["every site 85%", "standard"]["false_promotion"] == 0.0
    assert simulated["every site 98%", "standard"]["promoted"] >= 0.9
    assert {row["average"] for row in found["simulation"]} >= {0.70, 0.80, 0.85, 0.90, 0.95, 0.98}
    served = {(row["pattern"], row["policy"]) for row in found["history"] if row["fleet_day"]}
    assert served == {(AUDIT.key, "legacy"), (SPOOLER.key, "legacy"), (AUDIT.key, "standard")}
    assert plot.read_bytes().startswith(b"\x89PNG\r\n\x1a\n")

    table = flywheel("--policy", "standard", "--runs", "5", "--from", "2026-01-08", url=database_url, home=tmp_path)
    assert table.returncode == 0, table.stderr
    assert "Fleets of 40 sites with planted truth" in table.stdout
    assert "standard: 1 of 2 patterns served." in table.stdout or "standard: 2 of 2" in table.stdout
    assert "legacy" not in table.stdout


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (["--policy", "strict"], 8, "There is no policy strict."),
        (["--from", "2026-02-01", "--to", "2026-01-01"], 2, "--from is after --to."),
        (["--from", "yesterday"], 2, "yesterday"),
        (["--plot", "/no/such/directory/x.png"], 2, "There is no directory"),
    ],
)
def test_a_wrong_call_says_what_is_wrong(database_url, tmp_path, arguments, code, says):
    done = flywheel(*arguments, url=database_url, home=tmp_path)
    assert done.returncode == code, done.stderr
    assert says in done.stderr
    assert "Traceback" not in done.stderr


def test_without_telemetry_there_is_no_history_to_replay_and_the_simulation_stands(database_url, tmp_path):
    done = flywheel("--runs", "5", url=database_url, home=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "The database holds no L2 execution in these days." in done.stdout
