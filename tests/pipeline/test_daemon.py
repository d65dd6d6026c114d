"""The real thing: webserver and daemon as `flywheel up` starts them, telemetry by plain SQL, a promoted rule."""

from __future__ import annotations

import datetime as dt
import json
import time
from pathlib import Path

import psycopg
import pytest
import sqlalchemy as sa
from service_processes import free_port, processes_of, wait_for

from flywheel_pipeline.aggregates.batches import activate_policy
from flywheel_pipeline.database.settings import Settings
from flywheel_pipeline.errors import PortInUse
from flywheel_pipeline.serve import require_free_port, start

pytestmark = [pytest.mark.daemon, pytest.mark.timeout(180)]

PATTERN = "defender_exclusions~RB-WIN-SEC-017~windows"
#: What an operator types into psql: one healed incident, dated now; everything else by the table's defaults.
INSERT = """
INSERT INTO execution_telemetry
    (execution_id, incident_id, site_id, appliance_id, hostname, platform, incident_type, runbook_id, resolution_level,
     agent_version, started_at, completed_at, success, status)
VALUES
    (%(id)s, %(id)s, 'clinic-north', 'clinic-north-appliance', %(host)s, 'windows', 'defender_exclusions',
     'L2-run_windows_runbook:RB-WIN-SEC-017', 'L2', '1.0.70', now() - interval '1 minute', now(), true, 'success')
"""


@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="needs /proc to see what a process left behind")
def test_telemetry_by_plain_sql_becomes_a_promoted_rule_and_stopping_leaves_nothing_behind(
    engine: sa.Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FRESHNESS_DAEMON_INTERVAL_SECONDS", "5")  # of Dagster: 30 s unless somebody says so
    with engine.begin() as connection:
        activate_policy(connection, "legacy", actor="test", reason="five occurrences suffice")
        connection.exec_driver_sql("INSERT INTO sites (site_id) VALUES ('clinic-north')")
        connection.exec_driver_sql(
            "INSERT INTO appliances (appliance_id, site_id, agent_version, last_checkin) "
            "VALUES ('clinic-north-appliance', 'clinic-north', '1.0.70', now())"
        )
    settings = Settings(home=tmp_path / "home")
    port = free_port()
    services = start(settings, engine.url, host="127.0.0.1", port=port)
    try:
        with pytest.raises(PortInUse):
            start(settings, engine.url, host="127.0.0.1", port=port)

        url = engine.url.set(drivername="postgresql").render_as_string(hide_password=False)
        with psycopg.connect(url, autocommit=True) as operator:
            for number in range(5):
                operator.execute(INSERT, {"id": f"exec-{number}", "host": f"WS-{number}"})
        inserted = dt.datetime.now(dt.UTC)

        def promoted() -> sa.Row[tuple[object, ...]] | None:
            with engine.connect() as connection:
                return connection.execute(
                    sa.text(
                        "SELECT e.rule_id, e.occurred_at, e.run_id, r.enabled, r.state FROM rule_events AS e "
                        "JOIN l1_rules AS r ON r.rule_id = e.rule_id "
                        "WHERE e.kind = 'promoted' AND r.pattern_key = :pattern"
                    ),
                    {"pattern": PATTERN},
                ).one_or_none()

        def delivered() -> int | None:
            with engine.connect() as connection:
                return (
                    connection.exec_driver_sql(
                        "SELECT count(*) FROM appliance_commands WHERE command_type = 'sync_promoted_rule'"
                    ).scalar_one()
                    or None
                )

        def fresh() -> bool | None:
            with engine.connect() as connection:
                found = connection.exec_driver_sql(
                    "SELECT DISTINCT ON (asset_key) asset_key, event FROM dagster.event_logs "
                    "WHERE dagster_event_type = 'FRESHNESS_STATE_CHANGE' ORDER BY asset_key, id DESC"
                ).all()
            badges = {json.loads(row.asset_key)[0] for row in found if '"FreshnessState.PASS"}, "prev' in row.event}
            return {"execution_telemetry", "rule_daily_stats", "l1_rules", "rule_manifests", "alerts"} <= badges or None

        rule = wait_for(promoted, seconds=90, what="the promotion", services=services)
        assert (rule.enabled, rule.state) == (True, "fleet")
        # The first run after the start also pays for first imports; the bar of 10 s is benchmarks/'s to hold.
        assert (rule.occurred_at - inserted).total_seconds() < 60
        wait_for(fresh, seconds=60, what="the badges of freshness", services=services)
        assert wait_for(delivered, seconds=30, what="the command", services=services) == 1
        with engine.connect() as connection:
            run = connection.exec_driver_sql(
                "SELECT run_id, status FROM dagster.runs WHERE run_id = %s", (rule.run_id,)
            ).one()
        assert run.run_id == rule.run_id

        assert len(processes_of(settings.home)) >= 2
    finally:
        services.stop()
    deadline = time.monotonic() + 10
    while (left := processes_of(settings.home)) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert left == {}
    require_free_port("127.0.0.1", port)  # the port can be had again at once
