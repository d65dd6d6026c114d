"""Commit of telemetry to promoted rule, through the running daemon and its waiting sensor.

Starts a database, the UI-less daemon side of `flywheel up` and, for each trial, inserts by plain SQL the executions that
bring one more pattern over the legacy threshold; the clock runs from that commit to the commit of the rule's promotion
in the ledger. Bar: p95 <= 10 s (the system before: 5 minutes and more).

    python benchmarks/bench_latency.py [--trials 12]
"""

from __future__ import annotations

import argparse
import datetime as dt
import statistics
import tempfile
import time
from pathlib import Path

import sqlalchemy as sa

from flywheel_pipeline.aggregates.batches import activate_policy
from flywheel_pipeline.database.embedded import EmbeddedServer
from flywheel_pipeline.database.engine import open_engine
from flywheel_pipeline.database.migrate import upgrade
from flywheel_pipeline.database.settings import Settings
from flywheel_pipeline.serve import start

TIMEOUT_SECONDS = 90.0


def _insert(engine: sa.Engine, trial: int, incident_type: str, runbook: str, platform: str) -> dt.datetime:
    """Insert six healed executions of one pattern; return the commit's time by this process's clock."""
    with engine.begin() as connection:
        connection.execute(
            sa.text(
                "INSERT INTO execution_telemetry (execution_id, site_id, appliance_id, runbook_id, hostname, platform, "
                "incident_type, started_at, completed_at, success, status, verification_passed, resolution_level, agent_version) "
                "SELECT format('bench-%s-%s', CAST(:trial AS int), n), 'bench-site', 'bench-site-1', 'L2-run_runbook:' || :runbook, "
                "'host-' || n, :platform, :type, now() - interval '1 minute', now(), true, 'success', true, 'L2', '1.0.74' "
                "FROM generate_series(1, 6) AS n"
            ),
            {"trial": trial, "runbook": runbook, "platform": platform, "type": incident_type},
        )
    return dt.datetime.now(dt.UTC)


def _wait(engine: sa.Engine, key: str) -> dt.datetime:
    deadline = time.monotonic() + TIMEOUT_SECONDS
    while time.monotonic() < deadline:
        with engine.connect() as connection:
            promoted = connection.execute(
                sa.text("SELECT r.rule_id FROM l1_rules AS r WHERE r.pattern_key = :key AND r.enabled"), {"key": key}
            ).first()
        if promoted:
            return dt.datetime.now(dt.UTC)
        time.sleep(0.05)
    raise SystemExit(f"{key} was not promoted within {TIMEOUT_SECONDS:.0f} s: read the daemon's log")


def main() -> None:
    """Run the trials and print each latency, the median and the 95th percentile."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=12)
    parser.add_argument("--port", type=int, default=3987)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="flywheel-bench-") as directory:
        settings = Settings(home=Path(directory))
        server = EmbeddedServer(settings.home)
        url = server.ensure_running()
        services = None
        try:
            engine = open_engine(url)
            upgrade(engine)
            with engine.begin() as connection:
                activate_policy(connection, "legacy", actor="bench", reason="the gate that five executions can pass")
                runbooks = connection.execute(
                    sa.text("SELECT runbook_id, platform FROM runbooks WHERE platform = 'windows' ORDER BY runbook_id")
                ).all()
            services = start(settings, url, host="127.0.0.1", port=arguments.port)
            seconds = []
            for trial in range(arguments.trials + 1):
                runbook = runbooks[trial % len(runbooks)]
                incident_type = f"bench_type_{trial}"
                committed = _insert(engine, trial, incident_type, runbook.runbook_id, runbook.platform)
                promoted = _wait(engine, f"{incident_type}~{runbook.runbook_id}~{runbook.platform}")
                latency = (promoted - committed).total_seconds()
                if trial:  # the first one warms up the daemon
                    seconds.append(latency)
                print(f"trial {trial:2}: {latency:5.1f} s" + ("" if trial else "  (warm-up, not counted)"), flush=True)
                time.sleep(1.0)
            p95 = statistics.quantiles(seconds, n=20, method="inclusive")[-1]
            verdict = "met" if p95 <= 10 else "MISSED"
            print(
                f"commit to promoted rule: median {statistics.median(seconds):.1f} s, p95 {p95:.1f} s; bar p95 <= 10 s {verdict}"
            )
            if p95 > 10:
                raise SystemExit(1)
        finally:
            if services is not None:
                services.stop()
            server.stop()


if __name__ == "__main__":
    main()
