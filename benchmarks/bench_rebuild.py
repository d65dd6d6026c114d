"""Rebuild of all cells against the bare GROUP BY of the same result.

Bare: each cell model's own SELECT, over everything, as CREATE TABLE AS, in the order of the models; no keys, no
comparison, no outbox. Ours: `rebuild`, from empty tables, and again over tables that are right already (it compares
every row and writes none). 1 M rows of 300 sites. Bar: <= 2x, for both. Each is the best of three: what else runs on
the machine only ever adds, and in rounds of a minute it adds to one and not to the other.

    python benchmarks/bench_rebuild.py [--quick]
"""

from __future__ import annotations

import argparse
import time

import sqlalchemy as sa
from fleet import Line, database, load, server

from flywheel_pipeline.aggregates.refresh import RefreshReport, rebuild
from flywheel_pipeline.sql_models.loader import ModelGraph, load_models
from flywheel_pipeline.sql_models.relations import execute


def bare(engine: sa.Engine, graph: ModelGraph) -> float:
    """Seconds of the bare SELECTs; a model reads the bare result of the one before it."""
    with engine.begin() as connection:
        connection.exec_driver_sql("DROP SCHEMA IF EXISTS bare CASCADE")
        connection.exec_driver_sql("CREATE SCHEMA bare")
    begun = time.perf_counter()
    with engine.begin() as connection:
        connection.exec_driver_sql("SET LOCAL search_path = bare, public")
        connection.exec_driver_sql("SET LOCAL work_mem = '64MB'")
        for model in graph:
            if model.cell:
                execute(connection, f"CREATE TABLE bare.{model.name} AS\n{model.sql}")
    return time.perf_counter() - begun


def ours(engine: sa.Engine) -> tuple[float, list[RefreshReport]]:
    """Seconds of a rebuild, and its reports."""
    begun = time.perf_counter()
    reports = rebuild(engine)
    return time.perf_counter() - begun, reports


def checkpoint(engine: sa.Engine) -> None:
    """Let no measurement pay for the writes of the one before."""
    with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        connection.exec_driver_sql("CHECKPOINT")


def measure(quick: bool) -> list[Line]:
    """Measure alternately and return two lines of the table."""
    rows = 200_000 if quick else 1_000_000
    graph = load_models()
    seconds: dict[str, list[float]] = {"bare": [], "empty": [], "again": []}
    shown: dict[str, dict[str, float]] = {}
    with server() as embedded:
        engine = database(embedded, "rebuild")
        load(engine, rows)
        for _ in range(3):
            checkpoint(engine)
            seconds["bare"].append(bare(engine, graph))
            with engine.begin() as connection:
                for model in graph:
                    if model.cell:
                        connection.exec_driver_sql(f"TRUNCATE {model.name}")
            for name in ("empty", "again"):
                checkpoint(engine)
                took, reports = ours(engine)
                seconds[name].append(took)
                shown[name] = reports[0].seconds_by_model
                written = sum(report.rows_written for report in reports)
                assert (written > 0) == (name == "empty")
            with engine.connect() as connection:
                for model in graph:
                    if model.cell:
                        columns = ", ".join(model.columns)
                        differing = (
                            f"SELECT {columns} FROM public.{model.name} EXCEPT SELECT {columns} FROM bare.{model.name}"
                        )
                        assert connection.exec_driver_sql(f"SELECT count(*) FROM ({differing}) d").scalar_one() == 0
        engine.dispose()
    for name, models in shown.items():
        print(f"  {name:<6}", "  ".join(f"{model} {value:.1f} s" for model, value in models.items()))
    print(
        "  rounds",
        "  ".join(f"{name} {', '.join(f'{value:.1f}' for value in values)} s" for name, values in seconds.items()),
    )
    best = {name: min(values) for name, values in seconds.items()}
    return [
        Line(
            f"{what}, {rows:,} rows / bare GROUP BY of the same result",
            f"{best[name]:.1f} s / {best['bare']:.1f} s",
            best[name] / best["bare"],
            "<=",
            2,
        )
        for name, what in (
            ("empty", "rebuild of all cells from nothing"),
            ("again", "rebuild of all cells, nothing wrong"),
        )
    ]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    lines = measure(parser.parse_args().quick)
    print(*lines, sep="\n")
    raise SystemExit(0 if all(line.met for line in lines) else 1)
