"""Senders killed with -9 and a database restarted in the middle of a delivery: nothing lost, at most one repetition each."""

from __future__ import annotations

import datetime as dt
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from receiver import Receiver

from flywheel_pipeline.database import migrate
from flywheel_pipeline.database.embedded import EmbeddedServer
from flywheel_pipeline.database.engine import open_engine
from flywheel_pipeline.health.alerting.channels import Alerting, parse_channels
from flywheel_pipeline.health.alerting.outbox import drain
from flywheel_pipeline.health.alerting.record import Observation, lock_pass, record

SENDER = Path(__file__).with_name("send_alerts.py")
COUNT = 90  # more than two messages' worth


def raise_alerts(engine: sa.Engine, channels: Alerting, numbers: range, at: dt.datetime) -> None:
    observations = [
        Observation(f"check:x.flip_{n:03}", "check", "fail", "warning", at, f"flip_{n:03}", "It fails.")
        for n in numbers
    ]
    with engine.begin() as connection:
        assert lock_pass(connection)
        record(connection, observations, channels, at)


def times_told(receiver: Receiver) -> list[int]:
    return [receiver.text.count(f"FAILS (warning): flip_{n:03}") for n in range(COUNT)]


def test_a_receiver_down_for_an_hour_and_a_sender_killed_twice_in_its_send(engine: sa.Engine) -> None:
    """Killed at the worst point each time: the receiver has the message, and the sender has not noted it."""
    down = Receiver()
    channels, port = Alerting(parse_channels(f"a={down.url}", {})), down.port
    down.close()
    began = dt.datetime.now(dt.UTC)
    for hour in range(3):
        raise_alerts(engine, channels, range(hour * 30, hour * 30 + 30), began + dt.timedelta(minutes=hour))
    for minute in (3, 20, 40, 59):
        done = drain(engine, channels, clock=lambda m=minute: began + dt.timedelta(minutes=m))
        assert done.sent == 0
    # The processes' clock begins an hour later.
    epoch = time.time()
    environment = {
        **os.environ,
        "FLYWHEEL_DATABASE_URL": engine.url.render_as_string(hide_password=False),
        "FLYWHEEL_ALERT_URLS": f"a={down.url}",
        "FLYWHEEL_TEST_HASTE": "60",
        "FLYWHEEL_TEST_EPOCH": str(epoch),
    }
    with engine.begin() as connection:
        connection.execute(
            sa.text(
                "UPDATE notifications SET next_attempt_at = next_attempt_at - interval '1 hour', not_before = :now"
            ),
            {"now": began - dt.timedelta(hours=1)},
        )
    senders: list[subprocess.Popen[bytes]] = []
    killed: list[int] = []

    def kill_twice(_message: dict[str, Any]) -> None:
        if len(killed) < 2:
            killed.append(senders[-1].pid)
            senders[-1].kill()
            senders[-1].wait()

    with Receiver(port=port) as receiver:
        receiver.on_receive = kill_twice
        for expected in (-9, -9, 0):
            senders.append(subprocess.Popen([sys.executable, str(SENDER)], env=environment))
            assert senders[-1].wait(60) == expected
        told = times_told(receiver)
        assert min(told) == 1  # nothing lost
        assert max(told) == 2  # what was in flight, once more
        assert sum(told) - COUNT <= 80
        repeated = [body for body in receiver.bodies if body.startswith("This may be a repetition")]
        assert len(repeated) == 2
        with engine.connect() as connection:
            unsent, doubtful = connection.exec_driver_sql(
                "SELECT count(*) FILTER (WHERE sent_at IS NULL), count(*) FILTER (WHERE in_doubt) FROM notifications"
            ).one()
        assert (unsent, doubtful) == (0, sum(n == 2 for n in told))


@pytest.fixture
def own_server() -> Iterator[EmbeddedServer]:
    home = Path(tempfile.mkdtemp(prefix="fw-"))
    embedded = EmbeddedServer(home)
    embedded.ensure_running()
    yield embedded
    embedded.remove()
    shutil.rmtree(home)


def test_a_database_that_restarts_while_a_message_is_on_its_way_repeats_nothing(own_server: EmbeddedServer) -> None:
    engine = open_engine(own_server.url)
    migrate.upgrade(engine)
    now = dt.datetime.now(dt.UTC)
    restarted = threading.Event()

    def restart(_message: dict[str, Any]) -> None:
        if not restarted.is_set():
            own_server.stop()
            own_server.ensure_running()
            restarted.set()

    with Receiver() as receiver:
        receiver.on_receive = restart
        channels = Alerting(parse_channels(f"a={receiver.url}?rto=30", {}))
        raise_alerts(engine, channels, range(COUNT), now)
        done = drain(engine, channels, clock=lambda: now)
        assert restarted.is_set()
        assert (done.sent, done.failed, done.waiting) == (COUNT, 0, 0)
        assert times_told(receiver) == [1] * COUNT
    engine.dispose()
