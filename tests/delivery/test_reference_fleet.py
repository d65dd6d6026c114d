"""100 reference appliances over a day of simulated time, against a real server, with faults: it ends with desired = reported.

The faults: requests and answers lost on their way, batches sent twice, appliances offline for hours, agents that claim a
form which they do not run, old agents, one that is upgraded, a rule that is withdrawn, and the server gone for a while.
Executions lie within the simulated day; what the server stamps itself has the real clock.
"""

from __future__ import annotations

import random
import socket
import threading
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import datetime, timedelta

import sqlalchemy as sa
import uvicorn
from fleet_database import Fleet

from flywheel_pipeline.aggregates.refresh import refresh
from flywheel_pipeline.delivery.api.app import create_app
from flywheel_pipeline.delivery.api.limits import Limits
from flywheel_pipeline.delivery.api.protocol import BoundedHttp
from flywheel_pipeline.delivery.publish import CommandReport, ManifestReport, queue_commands, write_manifests
from flywheel_pipeline.delivery.service_levels import appliances_run_what_they_should, commands_are_settled_in_time
from flywheel_pipeline.delivery.tokens import issue
from flywheel_pipeline.simulation.appliance import (
    Agent,
    Answer,
    HttpTransport,
    LossyTransport,
    Profile,
    Unreachable,
    one_day_until_now,
    run_agents,
)

APPLIANCES = 100
HOUR = timedelta(hours=1)
FIREWALL, SSH, BITLOCKER = "RB-AUTO-FIREWALL", "RB-AUTO-SSH_CONF", "RB-AUTO-BITLOCKE"
LIAR_KNOWS = frozenset({"escalate", "run_runbook"})


@contextmanager
def serving(engine: sa.Engine) -> Iterator[str]:
    """The agent API on a port of this machine; its address."""
    limits = Limits(requests_per_second=10_000.0, rows_per_second=1_000_000.0)
    listener = socket.create_server(("127.0.0.1", 0))
    server = uvicorn.Server(
        uvicorn.Config(create_app(engine, limits), http=BoundedHttp, ws="none", log_level="warning", access_log=False)
    )
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, name="agent-api")
    thread.start()
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(30)
        listener.close()
    assert not thread.is_alive()


class Network:
    """What lies between all appliances and the server; `down` while the server cannot be reached by anybody."""

    def __init__(self, url: str) -> None:
        self.down = False
        self.answers: Counter[int] = Counter()
        self._http = HttpTransport(url)

    def __call__(self, method: str, path: str, *, headers: Mapping[str, str], body: bytes | None = None) -> Answer:
        if self.down:
            raise Unreachable("Nobody answers.")
        answer = self._http(method, path, headers=headers, body=body)
        self.answers[answer.status] += 1
        return answer

    def close(self) -> None:
        self._http.close()


class Quiet(LossyTransport):
    """A lossy connection that is repaired at the end of the day."""

    def repair(self) -> None:
        self._requests = self._answers = 0.0


def test_a_hundred_appliances_end_a_day_of_faults_with_what_they_should_run(engine: sa.Engine) -> None:
    end = one_day_until_now(0)[1]
    start = end - 30 * HOUR  # the day, and six hours in which nothing goes wrong any more

    def publish(*, look: bool = True) -> tuple[ManifestReport, CommandReport]:
        with engine.begin() as connection:
            batch = Fleet(connection).batch(None)
            if look:
                refresh(connection)
            return write_manifests(connection, batch), queue_commands(connection, batch)

    with engine.begin() as connection:
        fleet = Fleet(connection)
        fleet.rule(FIREWALL, "RB-WIN-SEC-001")
        fleet.rule(BITLOCKER, "RB-WIN-SEC-005", incident_pattern={"incident_type": "bitlocker_status"})
        # Built-in rules stand before promoted ones: out of the way, so that the promoted ones are executed.
        builtins = connection.execute(
            sa.text("SELECT rule_id FROM l1_rules WHERE source = 'builtin' AND enabled")
        ).scalars()
        for rule_id in list(builtins):
            fleet.quarantine(rule_id)
        profiles = [profile(number, start) for number in range(APPLIANCES)]
        tokens = [
            issue(connection, p.appliance_id, site_id=p.site_id, actor="dana", reason="enrolled").token
            for p in profiles
        ]

    with serving(engine) as url:
        network = Network(url)
        lines = [Quiet(network, random.Random(n), requests=0.05, answers=0.05) for n in range(APPLIANCES)]
        agents = [
            Agent(p, token, line, seed=7, sync_every=4 * HOUR, resend_share=0.2)
            for p, token, line in zip(profiles, tokens, lines, strict=True)
        ]
        withdrawn_at: list[int] = []

        def pipeline() -> Iterator[None]:
            """What happens beside, after each hour."""
            for hour in range(30):
                if hour == 1:
                    assert publish(look=False)[0].rules == 0, "nothing is served to an agent before it said its release"
                if hour == 2:
                    publish(look=False)
                if hour == 6:
                    with engine.begin() as connection:
                        Fleet(connection).rule(
                            SSH, "LIN-SSH-001", platform="linux", incident_pattern={"incident_type": "ssh_config"}
                        )
                    publish(look=False)
                network.down = hour in (8, 9)
                if hour == 12:
                    withdrawn_at.append(sum(any(r["id"] == BITLOCKER for r in a.rules) for a in agents))
                    with engine.begin() as connection:
                        Fleet(connection).quarantine(BITLOCKER)
                    publish()
                if hour == 15:
                    agents[3].upgrade("1.0.74")
                if hour == 24:
                    for line in lines:
                        line.repair()
                if hour in (18, 24):
                    publish()
                yield

        counts = run_agents(agents, start, end, tick=HOUR, between=pipeline())
        network.close()
    last, commands = publish(look=False)

    # Every fault happened.
    assert sum(line.lost["requests"] for line in lines) > 50
    assert sum(line.lost["answers"] for line in lines) > 50
    for fault in ("steps_offline", "tries_in_vain", "resent", "unknown_action", "not_modified", "L2"):
        assert counts[fault] > 0, fault
    assert counts["row_unchanged"] > 0, "a batch whose answer was lost is sent again"
    assert withdrawn_at[0] > 20, "the rule was out there before it was withdrawn"

    # Nothing was lost, nothing counted twice.
    with engine.connect() as connection:
        stored = connection.execute(sa.text("SELECT count(*) FROM execution_telemetry")).scalar_one()
        refused = connection.execute(sa.text("SELECT count(*) FROM telemetry_rejects")).scalar_one()
        drift = connection.execute(
            sa.text(
                "SELECT appliance_id, drift, desired_hash, reported_hash, tombstones, never_delivered FROM appliance_drift"
            )
        ).all()
        findings = connection.execute(
            sa.text("SELECT appliance_id, action_form FROM capability_findings WHERE cardinality(open_on) > 0")
        ).all()
        open_commands = connection.execute(
            sa.text(
                "SELECT appliance_id, status FROM appliance_commands WHERE status IN ('pending', 'delivered', 'expired')"
            )
        ).all()
        assert appliances_run_what_they_should(connection, within_hours=0).passed
        assert commands_are_settled_in_time(connection, within_hours=0).passed
    assert (counts["waiting"], refused) == (0, 0)
    assert stored == sum(agent.executions for agent in agents) > 3 * APPLIANCES

    # Desired is reported is what runs, and nobody must still drop anything.
    assert (last.written, last.tombstones, commands.queued, commands.redelivered, commands.withdrawn) == (0, 0, 0, 0, 0)
    assert len(drift) == APPLIANCES
    running = {agent.profile.appliance_id: agent.rule_set_hash for agent in agents}
    assert [tuple(row)[1:] for row in drift] == [("in_step", running[d[0]], running[d[0]], 0, 0) for d in drift]
    assert open_commands == []

    # What each runs it can run, as far as anybody could know; the withdrawn rule runs nowhere.
    found = {tuple(row) for row in findings}
    for agent in agents:
        served = {(rule["id"], action.partition(":")[0]) for rule in agent.rules for action in rule["actions"]}
        assert BITLOCKER not in {rule_id for rule_id, _ in served}
        assert not {form for _, form in served} & {form for a, form in found if a == agent.profile.appliance_id}
    assert {a for a, _ in found} <= {p.appliance_id for p in profiles if p.knows is not None}
    by_release = {
        agent.profile.agent_version: {r["id"] for r in agent.rules} for agent in agents if not agent.profile.knows
    }
    assert by_release["1.0.30"] == set()
    assert by_release["1.0.56"] == by_release["1.0.74"] == {FIREWALL, SSH}
    assert {r["id"] for r in agents[3].rules} == {FIREWALL, SSH}, "an upgraded agent gets what it can run now"


def profile(number: int, start: datetime) -> Profile:
    """Appliance `number`: four to a site; every tenth old, every tenth a liar, every fifth away for some hours."""
    version = {0: "1.0.56", 3: "1.0.30"}.get(number % 10, "1.0.74")
    away = start + (4 + number % 7) * HOUR
    return Profile(
        f"site-{number // 4:02}-{number:03}",
        f"site-{number // 4:02}",
        version,
        knows=LIAR_KNOWS if number % 10 == 5 else None,
        reports_capabilities=number % 10 == 7,
        offline=((away, away + 5 * HOUR),) if number % 5 == 1 else (),
        success={"RB-WIN-SEC-005": 0.3},
    )
