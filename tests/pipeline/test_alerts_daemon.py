"""The real thing: `flywheel up` with a receiver, a check that flips and recovers, and a daemon that dies."""

from __future__ import annotations

import datetime as dt
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psycopg
import pytest
import sqlalchemy as sa
from test_daemon import INSERT, free_port, processes_of

sys.path.insert(0, str(Path(__file__).parents[1] / "health"))
from receiver import Receiver

pytestmark = [pytest.mark.long, pytest.mark.daemon, pytest.mark.timeout(300)]

CHECK = "no_open_rejects on telemetry_violations"
REJECT = (
    "INSERT INTO telemetry_rejects (source, line_number, reason_code, reason, payload, payload_bytes, payload_hash) "
    "VALUES ('posts.ndjson', 1, 'missing', 'hostname is missing <!channel>', '', 0, 'x')"
)


@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="needs /proc to find the daemon's process")
def test_a_flip_is_told_within_a_minute_once_its_recovery_once_and_the_death_of_the_daemon_by_its_parent(
    engine: sa.Engine, tmp_path: Path
) -> None:
    home, port = tmp_path / "home", free_port()
    url = engine.url.set(drivername="postgresql").render_as_string(hide_password=False)
    with Receiver() as receiver, psycopg.connect(url, autocommit=True) as operator:
        environment = {
            **os.environ,
            "FLYWHEEL_HOME": str(home),
            "FLYWHEEL_DATABASE_URL": url,
            "FLYWHEEL_ALERT_URLS": f"team={receiver.url}",
        }
        up = subprocess.Popen(
            [str(Path(sys.executable).with_name("flywheel")), "up", "--port", str(port)],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

        def wait_for(what: str, question: Callable[[], bool], seconds: float) -> None:
            deadline = time.monotonic() + seconds
            while not question():
                if time.monotonic() > deadline or up.poll() is not None:
                    up.terminate()  # a kill would leave its children behind
                    logs = "\n".join(log.read_text(errors="replace")[-2000:] for log in (home / "logs").glob("*.log"))
                    pytest.fail(f"{what} did not happen: {up.communicate()}\n{receiver.text}\n{logs}")
                time.sleep(0.2)

        def evaluated(passed: bool) -> dt.datetime | None:
            """When the check was last evaluated so."""
            with engine.connect() as connection:
                if not connection.dialect.has_table(connection, "asset_check_executions", schema="dagster"):
                    return None
                last = connection.execute(
                    sa.text(
                        "SELECT execution_status, evaluation_event_timestamp FROM dagster.asset_check_executions "
                        "WHERE check_name = 'no_open_rejects' ORDER BY id DESC LIMIT 1"
                    )
                ).one_or_none()
            if last is None or last.execution_status != ("SUCCEEDED" if passed else "FAILED"):
                return None
            return last.evaluation_event_timestamp.replace(tzinfo=dt.UTC)

        def report(name: str) -> None:
            operator.execute(INSERT, {"id": name, "host": "WS-1"})

        try:
            operator.execute("INSERT INTO sites (site_id) VALUES ('clinic-north')")
            operator.execute(REJECT)
            report("exec-1")
            wait_for("the failing check", lambda: evaluated(passed=False) is not None, 150)
            failed = evaluated(passed=False)
            wait_for("the alert", lambda: CHECK in receiver.text, 60)
            assert failed is not None
            assert (dt.datetime.now(dt.UTC) - failed).total_seconds() < 60
            report("exec-2")  # a second failing evaluation of the same check is no news
            with engine.connect() as connection:
                before = connection.exec_driver_sql("SELECT count(*) FROM refresh_batches").scalar_one()

            def another_batch() -> bool:
                with engine.connect() as connection:
                    return bool(
                        connection.exec_driver_sql(
                            "SELECT count(*) FROM refresh_batches WHERE decided_at IS NOT NULL"
                        ).scalar_one()
                        >= before + 1
                    )

            wait_for("the second run", another_batch, 60)
            operator.execute("UPDATE telemetry_rejects SET status = 'discarded'")
            report("exec-3")
            wait_for("the recovering check", lambda: evaluated(passed=True) is not None, 60)
            passed = evaluated(passed=True)
            wait_for("the recovery", lambda: f"RECOVERED: {CHECK}" in receiver.text, 60)
            assert passed is not None
            assert (dt.datetime.now(dt.UTC) - passed).total_seconds() < 60
            assert receiver.text.count(f"FAILS (warning): {CHECK}") == 1
            assert receiver.text.count(f"RECOVERED: {CHECK}") == 1
            assert "<!channel>" not in receiver.text

            (daemon,) = [pid for pid, line in processes_of(home).items() if "dagster._daemon" in line and "run" in line]
            os.kill(daemon, signal.SIGKILL)
            assert up.wait(60) == 1
            assert "FAILS (critical): Dagster daemon" in receiver.bodies[-1]
            assert "The daemon's process ended by itself." in receiver.bodies[-1].replace("ʼ", "'")
        finally:
            if up.poll() is None:
                up.terminate()
                up.wait(60)
        logs = "".join(log.read_text(errors="replace") for log in (home / "logs").glob("*.log"))
        with engine.connect() as connection:
            stored = (
                connection.exec_driver_sql("SELECT string_agg(t.event, '') FROM dagster.event_logs t").scalar_one()
                + str(connection.exec_driver_sql("SELECT json_agg(t)::text FROM notifications t").scalar_one())
                + str(connection.exec_driver_sql("SELECT json_agg(t)::text FROM dagster.job_ticks t").scalar_one())
            )
        assert receiver.token not in logs + stored
        assert "1 raised" in stored  # the tick says it in numbers
