"""Refresh after 1,000 new rows: a long history against a short one of the same fleet.

Both hold 300 sites at 27,400 rows a day; the long one is a year (10 M rows; --quick: 1 M), the short one 3.6 days
(100,000 rows). New rows come as they do, from all sites, dated now. Bar: <= 1.3x.

    python benchmarks/bench_refresh.py [--quick]
"""

from __future__ import annotations

import argparse
import statistics
import time

import sqlalchemy as sa
from fleet import Line, add, database, load, server

from flywheel_pipeline.aggregates.refresh import refresh
from flywheel_pipeline.sql_models.loader import load_models

SHORT, NEW, ROUNDS = 100_000, 1_000, 9


def prepare(embedded: object, name: str, rows: int) -> sa.Engine:
    """A database with `rows` rows, all of them counted."""
    engine = database(embedded, name)  # type: ignore[arg-type]
    begun = time.perf_counter()
    load(engine, rows)
    loaded = time.perf_counter()
    with engine.begin() as connection:
        connection.exec_driver_sql("SELECT flywheel_touch_all()")
        refresh(connection)
    print(f"  {rows:>10,} rows: loaded in {loaded - begun:.0f} s, counted in {time.perf_counter() - loaded:.1f} s")
    with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        connection.exec_driver_sql("VACUUM (ANALYZE)")
    return engine


def measure(quick: bool) -> list[Line]:
    """Measure alternately on both databases and return the line of the table."""
    history = 1_000_000 if quick else 10_000_000
    graph = load_models()
    seconds: dict[str, list[float]] = {"long": [], "short": []}
    by_model: dict[str, dict[str, float]] = {"long": {}, "short": {}}
    with server() as embedded:
        engines = {"long": prepare(embedded, "long", history), "short": prepare(embedded, "short", SHORT)}
        totals = {"long": history, "short": SHORT}
        for number in range(ROUNDS + 1):
            for name, engine in engines.items():
                with engine.begin() as connection:
                    add(connection, totals[name], NEW)
                totals[name] += NEW
                begun = time.perf_counter()
                with engine.begin() as connection:
                    report = refresh(connection, graph)
                if number:  # the first one fills caches
                    seconds[name].append(time.perf_counter() - begun)
                    by_model[name] = report.seconds_by_model
        for engine in engines.values():
            engine.dispose()
    for name, models in by_model.items():
        print(f"  {name:<6}", "  ".join(f"{model} {value * 1000:.0f} ms" for model, value in models.items()))
    long, short = statistics.median(seconds["long"]), statistics.median(seconds["short"])
    return [
        Line(
            f"refresh after {NEW:,} new rows, {history:,} rows of history / {SHORT:,}",
            f"{long * 1000:.0f} ms / {short * 1000:.0f} ms",
            long / short,
            "<=",
            1.3,
        )
    ]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    lines = measure(parser.parse_args().quick)
    print(*lines, sep="\n")
    raise SystemExit(0 if all(line.met for line in lines) else 1)
