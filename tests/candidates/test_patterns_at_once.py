"""Two runs that write observed patterns at the same time."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import sqlalchemy as sa

from flywheel_pipeline.aggregates.refresh import refresh
from flywheel_pipeline.candidates.patterns import write_observed

WAITING = sa.text("SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND NOT granted")


def test_the_second_run_waits_and_finds_the_patterns_of_the_first(engine: sa.Engine) -> None:
    with engine.begin() as connection:
        connection.exec_driver_sql(
            "INSERT INTO execution_telemetry (execution_id, site_id, runbook_id, hostname, platform, incident_type, "
            "success, verification_passed, resolution_level, started_at) "
            "SELECT 'e' || n, 's', 'L2-run_windows_runbook:RB-WIN-SEC-001', 'h', 'windows', 'firewall', true, true, 'L2', now() "
            "FROM generate_series(1, 3) AS n"
        )
        refresh(connection)

    def run() -> dict[str, int]:
        with engine.begin() as connection:
            return write_observed(connection)

    with ThreadPoolExecutor(1) as pool:
        with engine.begin() as first:
            assert write_observed(first)["inserted"] == 1
            second = pool.submit(run)
            with engine.connect() as looking:
                while not looking.execute(WAITING).scalar_one():
                    assert not second.done(), second.result()
        assert second.result(timeout=60)["inserted"] == 0
    with engine.connect() as connection:
        assert connection.exec_driver_sql("SELECT count(*) FROM patterns").scalar_one() == 1
