"""What the watch sees: real runs on a real Dagster instance, the ledger, the patterns; and the commands over it."""

from __future__ import annotations

import datetime as dt
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import dagster as dg
import pytest
import sqlalchemy as sa
from dagster._daemon.types import DaemonHeartbeat
from graph_runs import QUIET, Environment, Flywheel

from flywheel_pipeline.build import build_defs
from flywheel_pipeline.database.resource import FlywheelDatabase
from flywheel_pipeline.health.alerting import observe
from flywheel_pipeline.health.alerting.channels import Alerting, AlertRules, parse_channels
from flywheel_pipeline.health.alerting.record import Observation
from flywheel_pipeline.health.alerting.watch import DaemonWatch, Look, everything, look
from flywheel_pipeline.promotion.acts import act
from flywheel_pipeline.run import dagster_instance

sys.path.insert(0, str(Path(__file__).parents[1] / "health"))
from receiver import Receiver

WORLD: dict[str, str] = {}


def answer(name: str) -> dg.AssetCheckResult:
    """As WORLD says: pass, fail, or a step that crashes."""
    if WORLD.get(name) == "crash":
        raise RuntimeError(f"cannot read WS-0042 at 10.1.2.3 for {name}")
    bad = WORLD.get(name) == "fail"
    return dg.AssetCheckResult(
        passed=not bad,
        severity=dg.AssetCheckSeverity.WARN if name == "soft" else dg.AssetCheckSeverity.ERROR,
        description="RB-AUTO-X succeeded in 3 of 9." if bad else "All is well.",
        metadata={
            "observed": "1 rule",
            "required": "none",
            "offenders": 1,
            "sample": dg.MetadataValue.md("| rule | rate |\n|---|---|\n| RB-AUTO-X | 33% |"),
        },
    )


@dg.asset
def source() -> None:
    """The asset that the gate guards."""


@dg.asset(deps=[source])
def guarded() -> None:
    """What stands behind the gate."""


@dg.asset_check(asset=source, blocking=True, description="The gate holds.")
def gate() -> dg.AssetCheckResult:
    return answer("gate")


@dg.asset_check(asset=source, description="No rule fails.")
def soft() -> dg.AssetCheckResult:
    return answer("soft")


@dg.asset_check(asset=guarded, description="What is guarded is sound.")
def behind() -> dg.AssetCheckResult:
    return answer("behind")


DEFINITIONS = dg.Definitions(
    assets=[source, guarded],
    asset_checks=[gate, soft, behind],
    jobs=[dg.define_asset_job("work", selection=dg.AssetSelection.all() | dg.AssetSelection.all_asset_checks())],
)


class World:
    """A code location of two assets and three checks on a real instance, watched."""

    def __init__(self, engine: sa.Engine, instance: dg.DagsterInstance) -> None:
        self.engine, self.instance = engine, instance
        self.repository = DEFINITIONS.get_repository_def()
        self.alerting = Alerting()

    def run(self, **answers: str) -> dg.ExecuteInProcessResult:
        WORLD.clear()
        WORLD.update(answers)
        job = DEFINITIONS.resolve_job_def("work")
        return job.execute_in_process(instance=self.instance, raise_on_error=False, run_config=dict(QUIET))

    def look(self) -> list[tuple[str, str, str]]:
        """One look at checks and runs; return the events it wrote as (transition, observed, key)."""
        with self.engine.connect() as connection:
            last = connection.exec_driver_sql("SELECT coalesce(max(event_id), 0) FROM alert_events").scalar_one()

        def seen(connection: sa.Connection) -> Sequence[Observation]:
            return [
                *observe.observe_checks(connection, self.instance, self.repository.asset_graph),
                *observe.observe_runs(connection, self.instance, observe.graph_jobs(self.repository)),
            ]

        look(self.engine, seen, self.alerting)
        with self.engine.connect() as connection:
            return [
                tuple(row)
                for row in connection.execute(
                    sa.text(
                        "SELECT transition, observed, alert_key FROM alert_events WHERE event_id > :last ORDER BY event_id"
                    ),
                    {"last": last},
                )
            ]

    def alert(self, key: str) -> dict[str, Any]:
        with self.engine.connect() as connection:
            query = sa.text("SELECT * FROM alerts WHERE alert_key = :key")
            return dict(connection.execute(query, {"key": key}).mappings().one())


@pytest.fixture
def world(engine: sa.Engine, environment: Environment, tmp_path: Path) -> Iterator[World]:
    with environment(engine, tmp_path / "home"), dagster_instance(engine.url) as instance:
        yield World(engine, instance)


def test_checks_gates_and_crashes_alert_once_each_and_the_cause_alone(world: World) -> None:
    assert world.look() == []
    world.run()
    assert world.look() == []

    # A failing gate stops the run: the gate alerts, and neither the run nor what stands behind it.
    assert not world.run(gate="fail", soft="fail").success
    assert sorted(world.look()) == [("raised", "fail", "check:source.gate"), ("raised", "fail", "check:source.soft")]
    assert world.look() == []
    soft_alert = world.alert("check:source.soft")
    assert (soft_alert["severity"], world.alert("check:source.gate")["severity"]) == ("warning", "critical")
    assert soft_alert["sentence"] == "RB-AUTO-X succeeded in 3 of 9."
    details = soft_alert["details"]
    assert details["statement"] == "No rule fails."
    assert (details["offenders"], details["offender_count"], details["explain"]) == (["RB-AUTO-X"], 1, "RB-AUTO-X")

    # Recovered and failed again between two looks: both are told.
    world.run()
    world.run(soft="fail")
    assert sorted(world.look()) == [
        ("raised", "fail", "check:source.soft"),
        ("recovered", "pass", "check:source.gate"),
        ("recovered", "pass", "check:source.soft"),
    ]

    # A crash: the check could not be evaluated, and the run failed.
    world.run(soft="crash")
    assert sorted(world.look()) == [
        ("changed", "error", "check:source.soft"),
        ("raised", "fail", "run:work"),
    ]
    crashed = world.alert("run:work")["sentence"]
    assert "The run failed at source_soft: RuntimeError: cannot read <host> at <ip> for soft" in crashed
    world.run()
    assert sorted(world.look()) == [
        ("recovered", "pass", "check:source.soft"),
        ("recovered", "pass", "run:work"),
    ]

    # A check that is no longer in the graph cannot recover by itself.
    world.run(soft="fail")
    world.look()
    world.repository = dg.Definitions(
        assets=[source, guarded], asset_checks=[gate, behind], jobs=[]
    ).get_repository_def()
    assert world.look() == [("recovered", "pass", "check:source.soft")]


@pytest.mark.long
def test_a_fresh_watch_on_an_old_history_tells_the_present_alone(world: World) -> None:
    for state in ("fail", "pass", "fail", "pass"):
        world.run(soft=state, behind=state)
    world.run(soft="fail")
    assert world.look() == [("raised", "fail", "check:source.soft")]


@pytest.mark.long
def test_quarantines_and_stuck_patterns_are_told_and_recover(engine: sa.Engine) -> None:
    with Receiver() as receiver:
        alerting = Alerting(parse_channels(f"a={receiver.url}", {}), AlertRules(stuck_after_days=10))

        def pass_(now: dt.datetime) -> Look:
            def seen(connection: sa.Connection) -> Sequence[Observation]:
                return [
                    *observe.observe_quarantines(connection, now),
                    *observe.observe_candidates(connection, 10, now),
                ]

            return look(engine, seen, alerting)

        with engine.begin() as connection:
            connection.exec_driver_sql(
                "INSERT INTO patterns (pattern_id, pattern_signature, incident_type, runbook_id, platform, pattern_key, "
                "created_at, last_seen) VALUES "
                "('p1', 's1', 'firewall', 'RB-WIN-SEC-001', 'windows', 'firewall~RB-WIN-SEC-001~windows', now() - interval '11 days', now()),"
                "('p2', 's2', 'kernel', 'LIN-KERN-001', 'linux', 'kernel~LIN-KERN-001~linux', now() - interval '9 days', now()),"
                "('p3', 's3', 'cron', 'LIN-CRON-001', 'linux', 'cron~LIN-CRON-001~linux', now() - interval '90 days', now() - interval '80 days')"
            )
        act(engine, "quarantine", ["L1-FIREWALL-001"], actor="ana", reason="breaks <b>VPN</b>")
        now = dt.datetime.now(dt.UTC)
        for _ in range(2):
            pass_(now)
        assert receiver.messages[0]["title"] == "[Flywheel] 2 raised"
        assert "FAILS (warning): rule L1-FIREWALL-001\nWhy: Quarantined by ana: breaks ‹b›VPN‹/b›" in receiver.text
        assert "Pending for 11 days: no decision was made" in receiver.text
        assert "Explain: flywheel explain 'firewall~RB-WIN-SEC-001~windows'" in receiver.text
        act(engine, "retire", ["L1-FIREWALL-001"], actor="ana", reason="replaced")
        act(engine, "reject", ["firewall~RB-WIN-SEC-001~windows"], actor="ana", reason="unsafe")
        with engine.begin() as connection:
            connection.exec_driver_sql("UPDATE patterns SET status = 'rejected' WHERE pattern_id = 'p1'")
        for _ in range(2):
            pass_(dt.datetime.now(dt.UTC))
        assert [m["title"] for m in receiver.messages] == ["[Flywheel] 2 raised", "[Flywheel] 2 recovered"]
        # A quarantine of long ago, seen for the first time, is history.
        assert pass_(now + dt.timedelta(days=2)).observations == 1  # p2 is stuck by then


@pytest.mark.long
def test_a_silent_daemon_is_told_by_its_parent_and_its_return_by_itself(world: World) -> None:
    def beat(seconds_ago: float) -> None:
        for daemon in observe.WATCHED_DAEMONS:
            world.instance.add_daemon_heartbeat(DaemonHeartbeat(time.time() - seconds_ago, daemon, "test"))

    with Receiver() as receiver:
        alerting = Alerting(parse_channels(f"a={receiver.url}", {}))
        watch = DaemonWatch(world.engine, world.instance, alerting)
        assert watch.tick() is None  # not before the daemon had time to start
        watch._next = 0.0
        beat(10)
        assert watch.tick() is None
        assert watch.problem is None
        for _ in range(3):
            beat(200)
            watch._next = 0.0
            assert watch.tick() is not None
        assert watch.problem == "The Dagster daemon last reported 3 min ago; it reports every 30 s."
        # The daemon's own sensor does not judge it by the beat of the daemon before it.
        young = everything(world.instance, world.repository, alerting, watching_seconds=5)
        old = everything(world.instance, world.repository, alerting, watching_seconds=500)
        with world.engine.connect() as connection:
            assert [o.kind for o in young(connection)] == []
            assert [o.outcome for o in old(connection) if o.kind == "daemon"] == ["fail"]
        beat(1)
        look(world.engine, young, alerting)
        assert [m["title"] for m in receiver.messages] == [
            "[Flywheel] FAILS (critical): Dagster daemon",
            "[Flywheel] RECOVERED: Dagster daemon",
        ]


def test_the_sensor_tells_in_numbers_what_it_saw(world: World) -> None:
    for daemon in observe.WATCHED_DAEMONS:
        world.instance.add_daemon_heartbeat(DaemonHeartbeat(time.time(), daemon, "test"))
    repository = build_defs().get_repository_def()
    with dg.build_sensor_context(
        instance=world.instance,
        repository_def=repository,
        sensor_name="alerts",
        resources={"database": FlywheelDatabase(url=world.engine.url.render_as_string(hide_password=False))},
    ) as context:
        tick = repository.get_sensor_def("alerts").evaluate_tick(context)
    assert not tick.run_requests
    assert tick.skip_message is not None
    assert "0 raised, 0 changed, 0 recovered, 0 escalated; 0 alerts open; 0 notifications sent" in tick.skip_message


@pytest.mark.long
def test_the_commands_list_acknowledge_test_and_send(
    world: World, run_command: Flywheel, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert run_command("alerts", "list").out == "No alert is open.\n"
    assert run_command("alerts", "test").code == 2
    assert "Set FLYWHEEL_ALERT_URLS" in run_command("alerts", "send").err
    world.run(soft="fail")
    with Receiver() as receiver:
        monkeypatch.setenv("FLYWHEEL_ALERT_URLS", f"team={receiver.url} json://127.0.0.1:1/nobody")
        world.alerting = Alerting(parse_channels(f"team={receiver.url}", {}))
        receiver.status = 503
        world.look()
        listed = run_command("alerts", "list")
        assert "warning  open" in listed.out
        assert "check:source.soft" in listed.out
        assert "RB-AUTO-X succeeded in 3 of 9." in listed.out
        assert run_command("alerts", "list", "--json").json[0]["alert_key"] == "check:source.soft"
        assert run_command("alerts", "list", "--state", "loud").code == 2
        assert run_command("alerts", "channels", "--json").json == [
            {"channel": "team", "hears": "info and above", "waiting": 1},
            {"channel": "json", "hears": "info and above", "waiting": 0},
        ]

        tried = run_command("alerts", "test", "--channel", "team")
        assert (tried.code, "503" in tried.out, receiver.token in tried.out + tried.err) == (1, True, False)
        receiver.status = 200
        tested = run_command("alerts", "test", "--json")
        assert tested.code == 1
        assert [(r["channel"], r["delivered"]) for r in tested.json] == [("team", True), ("json", False)]
        assert run_command("alerts", "test", "--channel", "team").out == "✓ team: delivered\n"
        assert run_command("alerts", "test", "--channel", "nobody").code == 2
        with world.engine.begin() as connection:
            connection.exec_driver_sql("UPDATE notifications SET next_attempt_at = now()")
        sent = run_command("alerts", "send")
        assert (sent.code, sent.out) == (0, "1 sent in 1 messages, 0 failed, 0 waiting.\n")
        assert "FAILS (warning): soft on source" in receiver.bodies[-1]

        signed = ("--actor", "ana", "--reason", "on it")
        assert run_command("alerts", "ack", "check:source.soft", *signed).code == 0
        assert "acknowledged by ana: on it" in run_command("alerts", "list").out
        again = run_command("alerts", "ack", "check:source.soft", *signed)
        assert (again.code, "acknowledged by ana already" in again.err) == (2, True)
        watched = run_command("alerts", "watch", "--once")
        assert watched.code == 0
        # The watch knows the real graph, which has no check of this test.
        assert "1 recovered" in watched.out
