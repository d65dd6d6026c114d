"""Export of a day: the archive's own way against pandas read_sql + to_parquet, on one day of a large fleet.

Both read every column of the day's rows and write Parquet into memory-backed files, each in a process of its own, in turn.
Ours also counts in PostgreSQL what it wrote, hashes it and publishes a manifest; pandas does not. Memory is the peak of the
whole process, interpreter and imports included; a day three times as large must fit as well. Bars: >= 5x the rows a second,
<= 300 MB.

    python benchmarks/bench_archive.py [--quick]
"""

from __future__ import annotations

import argparse
import datetime as dt
import json
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import fleet
import sqlalchemy as sa
from fleet import Line, database, load, server

from flywheel_pipeline.database.engine import open_engine

DAY = dt.date(2026, 2, 14)  # the day before fleet.LAST
LIMIT_MB = 300
OF_THE_DAY = "SELECT * FROM execution_telemetry WHERE event_at >= '2026-02-14 00:00:00+00' AND event_at < '2026-02-15 00:00:00+00'"


def export(way: str, url: str, folder: Path) -> int:
    """Export the day in this process; return its rows."""
    engine = open_engine(url)
    if way == "pandas":
        import pandas as pd

        with engine.connect() as connection:
            frame = pd.read_sql(sa.text(OF_THE_DAY), connection)
        frame.to_parquet(folder / "day.parquet")
        return len(frame)
    from flywheel_pipeline.archive.export import export_day
    from flywheel_pipeline.archive.layout import Archive

    return export_day(engine, Archive.open(folder / "archive", create=True), DAY).rows


def answer(way: str, url: str) -> None:
    """Export in this process and print rows, seconds and peak memory as JSON."""
    if way == "pandas":
        import pandas  # noqa: F401 (not part of the time)
    else:
        import flywheel_pipeline.archive.export  # noqa: F401
    with open_engine(url).connect() as connection:
        connection.exec_driver_sql("SELECT 1")
    folder = Path(tempfile.mkdtemp(prefix="fw-archive-"))
    try:
        begun, used = time.perf_counter(), time.process_time()
        rows = export(way, url, folder)
        seconds, used = time.perf_counter() - begun, time.process_time() - used
        size = sum(path.stat().st_size for path in folder.rglob("*.parquet"))
    finally:
        shutil.rmtree(folder)
    megabytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(json.dumps({"rows": rows, "seconds": seconds, "cpu": used, "mb": megabytes, "bytes": size}))


def run(way: str, url: str) -> dict[str, Any]:
    """The same in a process of its own."""
    done = subprocess.run([sys.executable, __file__, "--answer", way, url], check=True, capture_output=True)
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def measure(quick: bool) -> list[Line]:
    """Export in turn and return two lines of the table."""
    rows = 200_000 if quick else 1_000_000
    found: dict[str, list[dict[str, Any]]] = {"ours": [], "pandas": []}
    with server() as embedded:
        for name, size in (("day", rows), ("large_day", 3 * rows)):
            # All rows of the fleet on one day.
            fleet.FLEET_ROWS, kept = (
                fleet.FLEET_ROWS.replace("3.1532846 seconds", f"{86_399 / size:.9f} seconds"),
                fleet.FLEET_ROWS,
            )
            engine = database(embedded, name)
            load(engine, size)
            fleet.FLEET_ROWS = kept
            url = engine.url.render_as_string(hide_password=False)
            engine.dispose()
            if name == "day":
                for _ in range(3):
                    for way, answers in found.items():
                        answers.append(run(way, url))
            else:
                large = run("ours", url)
    speed = {way: statistics.median(a["rows"] / a["seconds"] for a in answers) for way, answers in found.items()}
    assert {a["rows"] for answers in found.values() for a in answers} == {found["ours"][0]["rows"]}
    peak = {way: max(a["mb"] for a in answers) for way, answers in found.items()}
    for way, answers in found.items():
        cpu = statistics.median(a["cpu"] for a in answers)
        print(
            f"  {way:<7}{speed[way]:>10,.0f} rows/s {cpu:6.1f} s of CPU {peak[way]:8,.0f} MB {answers[0]['bytes'] / 1e6:6.1f} MB of Parquet"
        )
    print(f"  ours on {large['rows']:,} rows: {large['rows'] / large['seconds']:,.0f} rows/s, {large['mb']:,.0f} MB")
    return [
        Line(
            f"archive of a day, {rows:,} rows: rows/s, ours / pandas",
            f"{speed['ours']:,.0f} rows/s / {speed['pandas']:,.0f} rows/s",
            speed["ours"] / speed["pandas"],
            ">=",
            5,
        ),
        Line(
            f"archive of a day, {large['rows']:,} rows: peak memory / {LIMIT_MB} MB",
            f"{large['mb']:,.0f} MB (pandas, a third of the rows: {peak['pandas']:,.0f} MB)",
            max(large["mb"], peak["ours"]) / LIMIT_MB,
            "<=",
            1,
        ),
    ]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--answer", nargs=2, metavar=("WAY", "URL"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.answer:
        answer(*options.answer)
        raise SystemExit(0)
    lines = measure(options.quick)
    print(*lines, sep="\n")
    raise SystemExit(0 if all(line.met for line in lines) else 1)
