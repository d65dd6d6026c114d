"""A rebuild over the archive: by DuckDB, by a query of DuckDB written by hand for the same result, by PostgreSQL, by Spark.

The hand-written query knows what this fleet sends (no aliases, one spelling of levels, no jsonb to look into) and gives the
same rows of every cell model of a day, compared with PostgreSQL's row by row; both are measured from the Parquet files to the
last Arrow batch. Bar: <= 1.3x. Beside it the whole rebuild of each engine, from empty tables to all rows in PostgreSQL with
their keys, at growing sizes: from which on DuckDB is ahead is the crossover. 10 M rows of 300 sites are a year. After each
rebuild every cell table must hold what PostgreSQL's own rebuild left there, to the last digit; else it stops with an error.
Spark runs in local mode, at each size, unless --quick or --no-spark leaves it out, or there is no Java: a line says so.

    python benchmarks/bench_engines.py [--quick] [--[no-]spark] [--rows N ...]
"""

from __future__ import annotations

import argparse
import datetime as dt
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import duckdb
import pyarrow as pa
import sqlalchemy as sa
from fleet import Line, database, load, server

from flywheel_pipeline.aggregates import refresh
from flywheel_pipeline.archive.export import export_due
from flywheel_pipeline.archive.layout import Archive
from flywheel_pipeline.engines.duck import BATCH_ROWS, DuckEngine
from flywheel_pipeline.engines.errors import EngineNotInstalled
from flywheel_pipeline.engines.job import Job
from flywheel_pipeline.engines.landing import land
from flywheel_pipeline.engines.plan import Step, build_plan
from flywheel_pipeline.engines.rebuild import rebuild
from flywheel_pipeline.engines.spark import SparkEngine
from flywheel_pipeline.engines.work import Computation
from flywheel_pipeline.sql_models.loader import load_models
from flywheel_pipeline.sql_models.relations import execute, literal

CELLS = [model for model in load_models() if model.cell]
TODAY = dt.date(2026, 2, 20)

_COUNTS = [
    "executions",
    "raw_successes",
    "raw_failures",
    "synthetic",
    "agent_unsupported",
    "not_applicable",
    "unreachable",
]
_COUNTS += ["escalated", "suppressed", "unverified", "failures", "successes", "refired"]
_SUMS = ", ".join(f"sum({name})::bigint AS {name}" for name in _COUNTS)
BY_HAND = {
    "telemetry_violations": """
SELECT * FROM (
  SELECT site_id, event_at::date AS day, execution_id, CASE
    WHEN event_at > created_at + INTERVAL 10 MINUTE OR event_at < created_at - INTERVAL 730 DAY THEN 'skewed_clock'
    WHEN trim(execution_id) = '' OR trim(site_id) = '' OR trim(hostname) = '' OR trim(runbook_id) = '' THEN 'blank_identity'
    WHEN resolution_level NOT IN ('L1', 'L2', 'L3') THEN 'unknown_level'
    WHEN duration_seconds < 0 OR completed_at < started_at THEN 'bad_duration'
    WHEN success <> (status = 'success') AND status IN ('success', 'failure') THEN 'contradiction' END AS problem,
    event_at, created_at, resolution_level, success, status
  FROM log
) WHERE problem IS NOT NULL""",
    "classes": """
CREATE TEMP TABLE classes AS
SELECT s.error_message, arg_min(r.outcome_class, list_position(
  ['synthetic', 'agent_unsupported', 'not_applicable', 'unreachable', 'escalated', 'suppressed'], r.outcome_class)) AS class
FROM (SELECT DISTINCT error_message FROM log WHERE error_message IS NOT NULL) AS s
JOIN rules AS r ON r.enabled AND r.field = 'error_message' AND lower(s.error_message) LIKE lower(r.pattern)
GROUP BY s.error_message""",
    "read": """
CREATE TEMP TABLE read AS
SELECT execution_id, site_id, appliance_id, hostname, lower(platform) AS platform, incident_type, agent_version, event_at,
  event_at::date AS day, created_at, success, resolution_level AS level, error_message,
  CASE resolution_level WHEN 'L1' THEN runbook_id ELSE '' END AS rule_id,
  CASE resolution_level WHEN 'L1' THEN '' ELSE regexp_replace(runbook_id, '^L2-run_windows_runbook:', '') END AS runbook_id,
  CASE WHEN chaos_campaign_id IS NOT NULL THEN 'synthetic' WHEN class IS NOT NULL THEN class
       WHEN NOT success OR NOT verification_passed THEN 'failure' WHEN verification_passed IS NULL THEN 'unverified'
       ELSE 'success' END AS outcome_class
FROM log LEFT JOIN classes USING (error_message)
WHERE event_at <= created_at + INTERVAL 10 MINUTE AND event_at >= created_at - INTERVAL 730 DAY""",
    "appliance_executions": """
SELECT site_id, day, rule_id, appliance_id, coalesce(agent_version, '') AS agent_version, '' AS refused_form,
  count(*) AS executions, min(event_at) AS first_at, max(event_at) AS last_at, list(event_at ORDER BY event_at) AS event_times
FROM read WHERE outcome_class <> 'synthetic' AND level = 'L1' GROUP BY ALL""",
    "episodes": """
CREATE TEMP TABLE episodes AS
SELECT site_id, day, level, rule_id, incident_type, runbook_id, platform, hostname,
  min(event_at) FILTER (outcome_class <> 'synthetic') AS first_at, max(event_at) FILTER (outcome_class <> 'synthetic') AS last_at,
  count(*) FILTER (outcome_class <> 'synthetic') AS executions,
  count(*) FILTER (outcome_class <> 'synthetic' AND success) AS raw_successes,
  count(*) FILTER (outcome_class <> 'synthetic' AND NOT success) AS raw_failures,
  count(*) FILTER (outcome_class = 'synthetic') AS synthetic,
  count(*) FILTER (outcome_class = 'agent_unsupported') AS agent_unsupported,
  count(*) FILTER (outcome_class = 'not_applicable') AS not_applicable, count(*) FILTER (outcome_class = 'unreachable') AS unreachable,
  count(*) FILTER (outcome_class = 'escalated') AS escalated, count(*) FILTER (outcome_class = 'suppressed') AS suppressed,
  count(*) FILTER (outcome_class = 'unverified') AS unverified, count(*) FILTER (outcome_class = 'failure') AS failures,
  count(*) FILTER (outcome_class = 'success') AS successes, count(*) FILTER (outcome_class = 'success' AND came_back) AS refired,
  CASE WHEN count(*) FILTER (outcome_class IN ('success', 'failure')) = 0 THEN 'unrated'
       WHEN bool_or(outcome_class = 'success' AND came_back) THEN 'failure'
       ELSE arg_max(outcome_class, (event_at, execution_id)) FILTER (outcome_class IN ('success', 'failure')) END AS outcome,
  coalesce(arg_max_null(agent_version, (event_at, execution_id)) FILTER (outcome_class IN ('success', 'failure')), 'unknown')
    AS agent_version
FROM (
  SELECT *, max(event_at) FILTER (outcome_class <> 'synthetic') OVER (PARTITION BY site_id, hostname, incident_type ORDER BY event_at
    RANGE BETWEEN CURRENT ROW AND INTERVAL 24 HOUR FOLLOWING) > event_at AS came_back FROM read
) GROUP BY site_id, day, level, rule_id, incident_type, runbook_id, platform, hostname""",
    "telemetry_daily_volume": """
SELECT site_id, day, level, coalesce(agent_version, 'unknown') AS agent_version, count(*) AS executions,
  count(*) FILTER (success) AS raw_successes, count(*) FILTER (outcome_class = 'synthetic') AS synthetic,
  max(event_at) FILTER (outcome_class <> 'synthetic') AS last_event_at, max(created_at) FILTER (outcome_class <> 'synthetic') AS last_arrival_at
FROM read GROUP BY ALL""",
    "rule_daily_stats": f"""
SELECT site_id, day, rule_id, {_SUMS}, count(*) FILTER (executions > 0) AS episodes, count(*) FILTER (outcome <> 'unrated') AS rated,
  count(*) FILTER (outcome = 'success') AS successful, min(first_at) AS first_at, max(last_at) AS last_at
FROM episodes WHERE level = 'L1' GROUP BY site_id, day, rule_id""",
    "pattern_daily_stats": f"""
SELECT site_id, day, incident_type || '~' || runbook_id || '~' || platform AS pattern_key, incident_type, runbook_id, platform, {_SUMS},
  count(*) FILTER (executions > 0) AS episodes, count(*) FILTER (outcome <> 'unrated') AS rated,
  count(*) FILTER (outcome = 'success') AS successful, min(first_at) AS first_at, max(last_at) AS last_at
FROM episodes WHERE level = 'L2' GROUP BY site_id, day, incident_type, runbook_id, platform""",
}
_LOGGED = (
    "execution_id, site_id, appliance_id, hostname, platform, incident_type, agent_version, success, resolution_level, "
    "runbook_id, error_message, chaos_campaign_id, verification_passed, status, duration_seconds, started_at, completed_at"
)


def counted(_name: str, batches: Iterable[pa.RecordBatch]) -> int:
    """Read the batches to the end; return how many rows there were."""
    return sum(batch.num_rows for batch in batches)


def by_hand(
    engine: sa.Engine, archive: Archive, take: Callable[[str, Iterable[pa.RecordBatch]], int] = counted
) -> tuple[float, dict[str, int]]:
    """Seconds of the hand-written query, to the last batch, and its rows by model, which `take` reads and counts."""
    with engine.connect() as connection:
        rules = connection.exec_driver_sql(
            "SELECT field, pattern, outcome_class, enabled FROM outcome_class_rules"
        ).all()
    files = [str(f.local_path) for day in archive.days() for f in archive.manifest(day).files("executions")]
    rows = {}
    begun = time.perf_counter()
    with tempfile.TemporaryDirectory() as spill, duckdb.connect() as session:
        session.execute(f"SET temp_directory = {literal(spill)}")
        session.execute("SET preserve_insertion_order = false")
        session.register("rules", pa.Table.from_pylist([dict(row._mapping) for row in rules]))
        session.execute(
            f"CREATE TEMP VIEW log AS SELECT {_LOGGED}, event_at::TIMESTAMP AS event_at, created_at::TIMESTAMP AS created_at "
            f"FROM read_parquet([{', '.join(map(literal, files))}], hive_partitioning = false)"
        )
        for name, query in BY_HAND.items():
            made = query.lstrip().startswith("CREATE")
            if made:
                session.execute(query)
            if name not in ("classes", "read"):
                rows[name] = take(name, session.sql(f"FROM {name}" if made else query).to_arrow_reader(BATCH_ROWS))
    return time.perf_counter() - begun, rows


def differing(engine: sa.Engine, archive: Archive) -> dict[str, int]:
    """Rows that the hand-written query gives and PostgreSQL's cells have not, or the reverse, by model; none where equal.

    Its columns are those that an engine gives, in their order; what PostgreSQL makes of an engine's, it makes of these.
    """
    steps = {step.name: step for step in build_plan(load_models(), "duckdb").landing}
    found = {}
    with engine.begin() as connection:

        def take(name: str, batches: Iterable[pa.RecordBatch]) -> int:
            step = steps[name]
            rows = land(connection, f"hand_{name}", step.typed, batches)
            columns = ", ".join(f'"{column}"' for column in load_models().models[name].columns)
            hand = f"SELECT {columns} FROM (WITH landed AS (SELECT * FROM pg_temp.hand_{name}) {step.last}) AS h"
            right = f"SELECT {columns} FROM {name}"
            differ = execute(
                connection,
                f"SELECT count(*) FROM (({hand} EXCEPT ALL {right}) UNION ALL ({right} EXCEPT ALL {hand})) AS d",
            ).scalar_one()
            if differ:
                found[name] = int(differ)
            connection.exec_driver_sql(f"DROP TABLE pg_temp.hand_{name}")
            return rows

        by_hand(engine, archive, take)
    return found


class Timed(DuckEngine):
    """DuckDB that notes the seconds spent in it, and its rows."""

    seconds = 0.0

    def compute(self, job: Job) -> Iterator[tuple[Step, Iterator[pa.RecordBatch]]]:
        """As DuckEngine, the clock running only while DuckDB has the word."""
        self.rows: dict[str, int] = {}
        steps = super().compute(job)
        while (found := self._next(steps)) is not None:
            step, batches = found
            yield step, self._counted(step.name, batches)

    def _next(self, source: Iterator[Any]) -> Any:
        begun = time.perf_counter()
        found = next(source, None)
        self.seconds += time.perf_counter() - begun
        return found

    def _counted(self, name: str, batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        self.rows[name] = 0
        while (batch := self._next(batches)) is not None:
            self.rows[name] += batch.num_rows
            yield batch


def empty(engine: sa.Engine) -> None:
    """No row in any cell, and nothing left to write of the run before."""
    with engine.begin() as connection:
        connection.exec_driver_sql(f"TRUNCATE {', '.join(model.name for model in CELLS)}")
    with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        connection.exec_driver_sql("CHECKPOINT")


def contents(engine: sa.Engine) -> dict[str, str]:
    """Count and content of every cell table."""
    with engine.connect() as connection:
        return {
            m.name: execute(
                connection,
                f"SELECT count(*) || ' ' || coalesce(sum(hashtextextended(t::text, 0)), 0) FROM {m.name} AS t",
            ).scalar_one()
            for m in CELLS
        }


def rebuilt(engine: sa.Engine, computation: Computation, right: dict[str, str]) -> float:
    """Seconds of a whole rebuild from empty tables.

    Raises:
        AssertionError: a cell table is not what PostgreSQL's rebuild made of it.
    """
    empty(engine)
    begun = time.perf_counter()
    rebuild(engine, computation, chunk_cells=10_000_000)
    seconds = time.perf_counter() - begun
    found = contents(engine)
    different = sorted(name for name in right if found[name] != right[name])
    assert not different, f"{computation.engine.name} and PostgreSQL differ in {', '.join(different)}"
    return seconds


def why_without_spark() -> str:
    """Why Spark cannot run here; empty where it can."""
    try:
        SparkEngine().check()
    except EngineNotInstalled as error:
        return str(error)
    return ""


def measure(sizes: list[int], spark: bool) -> list[Line]:
    """Measure each size and return the lines of the table."""
    lines = []
    ahead = None
    without = why_without_spark() if spark else "not asked for"
    with server() as embedded:
        for rows in sizes:
            engine = database(embedded, f"engines_{rows}")
            load(engine, rows)
            with tempfile.TemporaryDirectory() as folder:
                archive = Archive.open(Path(folder), create=True)
                begun = time.perf_counter()
                exported = export_due(engine, archive, today=TODAY, after_days=0)
                assert exported.rows == rows
                print(
                    f"  {rows:,} rows: {len(exported.exported)} days exported in {time.perf_counter() - begun:.0f} s",
                    flush=True,
                )
                empty(engine)
                begun = time.perf_counter()
                refresh.rebuild(engine)
                postgres = time.perf_counter() - begun
                right = contents(engine)
                cells = sum(int(told.split()[0]) for told in right.values())
                rounds = []
                for _ in range(3 if rows < 10_000_000 else 2):
                    timed = Timed()
                    rounds.append((rebuilt(engine, Computation(timed, archive), right), timed.seconds))
                hand, _ = min((by_hand(engine, archive) for _ in range(len(rounds))), key=lambda one: one[0])
                different = differing(engine, archive)
                assert not different, f"the hand-written query and PostgreSQL differ in rows of {different}"
                whole, computing = min(whole for whole, _ in rounds), min(seconds for _, seconds in rounds)
                print(
                    f"  {rows:,} rows: PostgreSQL {postgres:.1f} s, DuckDB {whole:.1f} s (of which computing {computing:.1f} s), "
                    f"by hand {hand:.1f} s; all {cells:,} rows of {len(right)} cell tables equal",
                    flush=True,
                )
                ahead = (ahead or rows) if whole < postgres else None
                if not without:
                    sparked = rebuilt(engine, Computation(SparkEngine(), archive), right)
                    print(f"  {rows:,} rows: Spark local[*] {sparked:.1f} s; all {cells:,} rows equal", flush=True)
                if rows == sizes[-1]:
                    measured = f"{computing:.1f} s / {hand:.1f} s"
                    lines.append(
                        Line(
                            f"rebuild over {rows:,} archived rows, DuckDB / by hand",
                            measured,
                            computing / hand,
                            "<=",
                            1.3,
                        )
                    )
                    measured = f"{postgres:.1f} s / {whole:.1f} s, all {cells:,} rows equal"
                    lines.append(
                        Line("the same, whole, PostgreSQL / DuckDB (stated)", measured, postgres / whole, ">=", 0)
                    )
                    if not without:
                        measured = f"{postgres:.1f} s / {sparked:.1f} s, all {cells:,} rows equal"
                        lines.append(
                            Line("the same, whole, PostgreSQL / Spark (stated)", measured, postgres / sparked, ">=", 0)
                        )
            engine.dispose()
    print(
        f"  crossover: DuckDB is ahead from {ahead:,} rows on"
        if ahead
        else "  crossover: DuckDB is ahead at none of these sizes"
    )
    if without:
        print(f"none Spark was left out: {without}")
    return lines


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument(
        "--spark", action=argparse.BooleanOptionalAction, help="Spark too; the default without --quick."
    )
    parser.add_argument("--rows", type=int, nargs="+", metavar="N", help="These sizes instead.")
    options = parser.parse_args()
    sizes = options.rows or ([50_000, 500_000] if options.quick else [100_000, 1_000_000, 10_000_000])
    lines = measure(sorted(sizes), not options.quick if options.spark is None else options.spark)
    print(*lines, sep="\n")
    raise SystemExit(0 if all(line.met for line in lines) else 1)
