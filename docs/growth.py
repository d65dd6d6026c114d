"""What growth costs, on paper: unit costs measured on a simulated fleet, multiplied out to a hundred million executions a day.

    python docs/growth.py            # growth.md and growth.png from the unit costs in growth.json
    python docs/growth.py --measure  # measures them first, in a scratch database: two minutes of two cores

Belongs here: measuring what one row, one site-day, one appliance, one run costs; the arithmetic; the page. Does not belong
here: bars (`benchmarks/`). Bytes hold on any machine. Seconds are CPU seconds of client and server together, so that what else runs
meanwhile does not count; they hold on a machine like the one that the page names.
"""

from __future__ import annotations

import argparse
import datetime as dt
import itertools
import json
import math
import os
import platform
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import sqlalchemy as sa

HERE: Final = Path(__file__).parent
STORED: Final = HERE / "growth.json"
PAGE: Final = HERE / "growth.md"
PLOT: Final = HERE / "growth.png"
sys.path.insert(0, str(HERE.parent / "benchmarks"))

# -- assumptions: change one and render the page again --------------------------------------------------------------
EXECUTIONS_AN_APPLIANCE_A_DAY: Final = 100
APPLIANCES_A_SITE: Final = 3
PEAK: Final = 3.0  # the busiest minute against the mean
SHORTEST_TICK_SECONDS: Final = 10.0  # a run starts no sooner after the one before
TELEMETRY_DAYS: Final = 90  # kept in PostgreSQL; older days are in the archive
AGGREGATE_DAYS: Final = 730
RUN_DAYS: Final = 30  # FLYWHEEL_RUN_DAYS
SCALES: Final = (100_000, 1_000_000, 10_000_000, 100_000_000)
DISK_MARGIN: Final = 1.5  # write-ahead log, vacuum, a rebuild beside what stands
LEAST_MEMORY_GB: Final = 4.0  # else twice the index that every insert reads
GB: Final = 1e9

# -- the fleets that are measured: the same executions a day, on many small sites and on a few large ones ------------
SCENARIO: Final = "to_the_fleet"
FLEETS: Final = {"small sites": {"sites": 400, "windows": 4}, "large sites": {"sites": 40, "windows": 40}}
DAYS: Final = 3
TICK_HOURS: Final = (0.1, 0.4, 1.5, 4.0)
LARGER_ROWS: Final = 300_000  # the fit is held against a fleet that it was not made from
MANIFESTS: Final = (400, 1_600)
RULES: Final = 200


@dataclass(frozen=True)
class Units:
    """What one of each costs: bytes as PostgreSQL counts them, seconds of CPU time of client and server."""

    heap_bytes_a_row: float
    index_bytes_a_row: float
    id_index_bytes_a_row: float
    wal_bytes_a_row: float
    import_seconds_a_row: float
    aggregate_bytes_a_site_day: float
    aggregate_bytes_a_row: float
    refresh_wal_bytes_a_site_day: float
    refresh_wal_bytes_a_new_row: float
    refresh_seconds: float
    refresh_seconds_a_site_day: float
    refresh_seconds_a_row: float
    rest_of_a_run_seconds: float
    event_log_bytes_a_run: float
    publish_seconds: float
    publish_seconds_an_appliance: float
    publish_wal_bytes_an_appliance: float
    manifest_bytes_an_appliance: float


# -- the arithmetic -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Projection:
    """What so many executions a day cost. `tick` is the time from one run's start to the next one's, self-clocked."""

    executions: float
    appliances: float
    sites: float
    rows_a_second: float
    tick_seconds: float
    site_days_a_tick: float
    import_cores: float
    outbox_rows: float
    telemetry_gb: float
    indexes_gb: float
    id_index_gb: float
    aggregates_gb: float
    wal_mb_a_second: float
    runs_a_day: float
    event_log_gb: float
    publish_seconds: float
    publish_wal_gb: float
    manifests_gb: float
    day_rebuild_seconds: float
    disk_gb: float
    memory_gb: float
    cores: float
    cells_a_thousand_rows: float


def touched(rows: float, sites: float) -> float:
    """How many of `sites` have at least one of `rows` executions that fall on them at random."""
    return sites * -math.expm1(-rows / sites)


def refresh_seconds(units: Units, rows: float, sites: float, rows_a_site_day: float) -> float:
    """Seconds of the refresh that takes `rows` new executions: their site-days, each with the day before it.

    Of today a site has half its executions on average, of yesterday all.
    """
    cells = 2 * touched(rows, sites)
    return (
        units.refresh_seconds
        + units.refresh_seconds_a_site_day * cells
        + units.refresh_seconds_a_row * cells / 2 * 1.5 * rows_a_site_day
    )


def project(units: Units, executions: float) -> Projection:
    """Multiply the unit costs out for so many executions a day."""
    appliances = executions / EXECUTIONS_AN_APPLIANCE_A_DAY
    sites = appliances / APPLIANCES_A_SITE
    rate = executions / 86_400
    a_site_day = executions / sites
    # A run takes what waits, and the next one starts when it is done: the tick grows until it holds its own cost.
    tick = SHORTEST_TICK_SECONDS
    for _ in range(200):
        cost = refresh_seconds(units, rate * tick, sites, a_site_day) + units.rest_of_a_run_seconds
        if abs(max(cost, SHORTEST_TICK_SECONDS) - tick) < 1e-9 * tick:
            break
        tick = max(cost, SHORTEST_TICK_SECONDS)
    cells = touched(rate * tick, sites)
    runs = 86_400 / tick * -math.expm1(-rate * tick)  # none where nothing waits
    wal = executions * (units.wal_bytes_a_row + units.refresh_wal_bytes_a_new_row)
    wal += runs * 2 * cells * units.refresh_wal_bytes_a_site_day
    telemetry = executions * TELEMETRY_DAYS * units.heap_bytes_a_row / GB
    indexes = executions * TELEMETRY_DAYS * units.index_bytes_a_row / GB
    aggregates = (
        AGGREGATE_DAYS * (sites * units.aggregate_bytes_a_site_day + executions * units.aggregate_bytes_a_row) / GB
    )
    event_log = runs * RUN_DAYS * units.event_log_bytes_a_run / GB
    manifests = units.manifest_bytes_an_appliance * appliances / GB
    id_index = executions * TELEMETRY_DAYS * units.id_index_bytes_a_row / GB
    importing = PEAK * rate * units.import_seconds_a_row
    return Projection(
        executions=executions,
        appliances=appliances,
        sites=sites,
        rows_a_second=rate,
        tick_seconds=tick,
        site_days_a_tick=cells,
        import_cores=importing,
        outbox_rows=PEAK * rate * tick,
        telemetry_gb=telemetry,
        indexes_gb=indexes,
        id_index_gb=id_index,
        aggregates_gb=aggregates,
        wal_mb_a_second=wal / 86_400 / 1e6,
        runs_a_day=runs,
        event_log_gb=event_log,
        publish_seconds=units.publish_seconds + units.publish_seconds_an_appliance * appliances,
        publish_wal_gb=units.publish_wal_bytes_an_appliance * appliances / GB,
        manifests_gb=manifests,
        day_rebuild_seconds=executions * units.refresh_seconds_a_row + sites * units.refresh_seconds_a_site_day,
        disk_gb=DISK_MARGIN * (telemetry + indexes + aggregates + event_log + manifests),
        memory_gb=max(LEAST_MEMORY_GB, 2 * id_index),
        cores=2 + math.ceil(importing),
        cells_a_thousand_rows=1000 * cells / (rate * tick),
    )


@dataclass(frozen=True)
class Limit:
    """Where a part stops: the figure of a projection that must not pass the bar, and what takes over from there."""

    part: str
    says: str
    bar: float
    figure: Callable[[Projection], float]
    takes_over: str


LIMITS: Final = (
    Limit(
        "the minute path",
        "a run follows the one before within a minute",
        60.0,
        lambda p: p.tick_seconds,
        "first a longer tick (nothing to do: it is self-clocked, promotions wait that long); then a database for each "
        "region: sites share no cell, so that a fleet divides by site without a seam",
    ),
    Limit(
        "intake",
        "one core imports the busiest minute (by files; posts one by one cost the agent API more)",
        1.0,
        lambda p: p.import_cores,
        "more processes of the agent API (`FLYWHEEL_API_WORKERS`, then pods): writers never wait for each other",
    ),
    Limit(
        "telemetry on disk",
        f"{TELEMETRY_DAYS} days with indexes stay under 1 TB",
        1000.0,
        lambda p: p.telemetry_gb + p.indexes_gb,
        "the archive: closed days as Parquet, `flywheel db purge` behind it; fewer days in PostgreSQL",
    ),
    Limit(
        "aggregates on disk",
        f"{AGGREGATE_DAYS} days stay under 1 TB",
        1000.0,
        lambda p: p.aggregates_gb,
        "nothing in this release: figures of purged days stay (they are the history), episodes first among them; a "
        "tablespace on cheaper disks, or a database for each region",
    ),
    Limit(
        "the index on execution_id",
        "it stays in 64 GB of memory",
        64.0,
        lambda p: p.id_index_gb,
        "fewer days in PostgreSQL: ids come in any order, and an index on disk turns each insert into a read",
    ),
    Limit(
        "write-ahead log",
        "50 MB/s, which a replica and an archive of it follow",
        50.0,
        lambda p: p.wal_mb_a_second,
        "a longer tick, since the same site-days are written again in each; then a database for each region",
    ),
    Limit(
        "rebuild of one day in PostgreSQL",
        "ten minutes",
        600.0,
        lambda p: p.day_rebuild_seconds,
        "DuckDB over the archive, a day a run; over several hosts by Celery or Kubernetes; Spark where a day is more "
        "than one machine holds",
    ),
    Limit(
        "manifests",
        "a rule of the whole fleet reaches all manifests in five minutes",
        300.0,
        lambda p: p.publish_seconds,
        "a database for each region; within one, contents are shared already, and what is left is a row an appliance",
    ),
    Limit(
        "event log of Dagster",
        f"{RUN_DAYS} days of runs stay under 100 GB",
        100.0,
        lambda p: p.event_log_gb,
        "fewer days of runs (`FLYWHEEL_RUN_DAYS`); it shrinks by itself as ticks grow longer",
    ),
)
NEVER: Final = 1e12


def stops_at(limit: Limit, units: Units) -> float | None:
    """The executions a day at which this part first passes its bar; None: it does not below a trillion."""

    def passed(executions: float) -> bool:
        return limit.figure(project(units, executions)) > limit.bar

    scales = [float(scale) for scale in np.geomspace(1_000.0, NEVER, 200)]
    first = next((number for number, scale in enumerate(scales) if passed(scale)), None)
    if first is None:
        return None
    if first == 0:
        return scales[0]
    low, high = scales[first - 1], scales[first]
    while high / low > 1.0001:
        middle = math.sqrt(low * high)
        low, high = (low, middle) if passed(middle) else (middle, high)
    return low


# -- measuring ------------------------------------------------------------------------------------------------------


def _scalar(connection: sa.Connection, statement: str, **values: object) -> float:
    return float(connection.execute(sa.text(statement), values).scalar_one())


class Wal:
    """Bytes of write-ahead log between two looks."""

    def __init__(self, engine: sa.Engine) -> None:
        self._engine = engine
        self._from = self._now()

    def _now(self) -> float:
        with self._engine.connect() as connection:
            return _scalar(connection, "SELECT pg_wal_lsn_diff(pg_current_wal_insert_lsn(), '0/0')")

    def since(self) -> float:
        """Bytes since the look before this one."""
        before, self._from = self._from, self._now()
        return self._from - before


class Cpu:
    """CPU seconds of this process and of every process of a PostgreSQL server, between two looks."""

    def __init__(self, engine: sa.Engine) -> None:
        with engine.connect() as connection:
            backend = int(_scalar(connection, "SELECT pg_backend_pid()"))
            self._postmaster = int(Path(f"/proc/{backend}/stat").read_text().rpartition(")")[2].split()[1])
        self._from = self._now()

    def _now(self) -> float:
        ticks = 0
        for entry in Path("/proc").iterdir():
            if not entry.name.isdigit():
                continue
            try:
                after_name = (entry / "stat").read_text().rpartition(")")[2].split()
            except (FileNotFoundError, ProcessLookupError):
                continue  # it ended meanwhile; its parent has its time
            if int(entry.name) == self._postmaster:
                ticks += sum(map(int, after_name[11:15]))  # its own, and that of children that ended
            elif int(after_name[1]) == self._postmaster:
                ticks += sum(map(int, after_name[11:13]))
        return ticks / os.sysconf("SC_CLK_TCK") + time.process_time()

    def since(self) -> float:
        """Seconds since the look before this one."""
        before, self._from = self._from, self._now()
        return self._from - before


def fit(points: list[tuple[float, ...]]) -> tuple[float, ...]:
    """Least relative squares of y = b1 * x1 + b2 * x2 + … over points (x1, x2, …, y), no b negative."""
    table = np.array(points, dtype=float)
    full, wanted = table[:, :-1] / table[:, -1:], np.ones(len(table))
    width = full.shape[1]
    best: tuple[float, np.ndarray[Any, Any]] = (math.inf, np.zeros(width))
    for size in range(1, width + 1):
        for chosen in itertools.combinations(range(width), size):
            found, *_ = np.linalg.lstsq(full[:, chosen], wanted, rcond=None)
            if (found >= 0).all():
                values = np.zeros(width)
                values[list(chosen)] = found
                off = float(((full @ values - 1) ** 2).sum())
                if off < best[0]:
                    best = (off, values)
    return tuple(float(value) for value in best[1])


#: Rows that the refresh will read: those of the waiting site-days and of the day before each.
_WAITING = """
WITH taken AS (SELECT DISTINCT site_id, day FROM touched_cells),
cells AS (SELECT site_id, day FROM taken UNION SELECT site_id, day - 1 FROM taken)
SELECT (SELECT count(*) FROM cells) AS cells, (SELECT count(*) FROM execution_telemetry AS t JOIN cells AS c
  ON t.site_id = c.site_id AND (t.event_at AT TIME ZONE 'UTC')::date = c.day) AS rows
"""


def measure_fleet(embedded: Any, name: str, size: Mapping[str, int], days: int) -> Iterator[tuple[str, Any]]:
    """Let a simulated fleet report for some days, then tick by tick; yield (what, measured)."""
    from fleet import database

    from flywheel_pipeline.aggregates.refresh import refresh
    from flywheel_pipeline.simulation.fleet.database import deliver, put_fleet
    from flywheel_pipeline.simulation.fleet.scenario import load_scenario
    from flywheel_pipeline.simulation.fleet.stream import FleetStream
    from flywheel_pipeline.sql_models.loader import load_models

    graph = load_models()
    scenario = load_scenario(SCENARIO)
    scenario = scenario.model_copy(
        update={"fleet": scenario.fleet.model_copy(update=dict(size)), "days": days + 1, "acts": ()}
    )
    engine = database(embedded, name.replace(" ", "_"))
    stream = FleetStream(scenario, 1)

    put_fleet(engine, stream, as_of=scenario.begins + dt.timedelta(days=days + 1))
    wal, cpu = Wal(engine), Cpu(engine)

    def land(until_ms: int) -> int:
        clock = dt.datetime.fromtimestamp(until_ms / 1000, dt.UTC)
        return deliver(engine, stream.advance(until_ms), source=f"growth-{until_ms}", received_at=clock).inserted

    def refreshed(what: str, new_rows: int) -> tuple[str, dict[str, Any]]:
        with engine.connect() as connection:
            waiting = connection.exec_driver_sql(_WAITING).one()
        wal.since(), cpu.since()
        with engine.begin() as connection:
            refresh(connection, graph)
        return "refresh", {
            "fleet": name,
            "what": what,
            "site_days": waiting.cells,
            "rows": waiting.rows,
            "new_rows": new_rows,
            "seconds": cpu.since(),
            "wal_bytes": wal.since(),
        }

    history_ms = stream.begin_ms + days * 86_400_000
    wal.since(), cpu.since()
    rows = land(history_ms)
    written, spent = wal.since(), cpu.since()
    for _ in FleetStream(scenario, 1).advance(history_ms):
        pass  # the simulator's own time for as much
    yield "wal_bytes_a_row", written / rows
    yield "import_seconds_a_row", (spent - cpu.since()) / rows
    yield refreshed(f"the first {days} days", rows)
    with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        connection.exec_driver_sql("VACUUM (ANALYZE)")
        total = _scalar(connection, "SELECT count(*) FROM execution_telemetry")
        yield "heap_bytes_a_row", _scalar(connection, "SELECT pg_table_size('execution_telemetry')") / total
        yield "index_bytes_a_row", _scalar(connection, "SELECT pg_indexes_size('execution_telemetry')") / total
        id_index = "SELECT pg_relation_size('execution_telemetry_execution_id_key')"
        yield "id_index_bytes_a_row", _scalar(connection, id_index) / total
        tables = [model.name for model in graph.models.values() if model.materialized != "view"]
        size_of = "SELECT sum(pg_total_relation_size(CAST(t AS regclass))) FROM unnest(CAST(:tables AS text[])) AS t"
        yield "aggregates", (size["sites"] * days, total, _scalar(connection, size_of, tables=tables))
    for number, hours in enumerate(TICK_HOURS):
        new = land(int(history_ms + sum(TICK_HOURS[: number + 1]) * 3_600_000))
        yield refreshed(f"{hours:g} hours", new)
    with engine.begin() as connection:
        connection.exec_driver_sql("SELECT flywheel_touch_all()")
    yield refreshed("all of it again", 0)
    if name == next(iter(FLEETS)):
        yield from measure_runs(engine, cpu)
    engine.dispose()


def measure_runs(engine: sa.Engine, cpu: Cpu) -> Iterator[tuple[str, Any]]:
    """Run the whole graph, with nothing new to count, on Dagster's real storage; yield what a run costs and leaves there."""
    from flywheel_pipeline.database.settings import Settings
    from flywheel_pipeline.run import dagster_instance, run_pipeline

    size = (
        "SELECT coalesce(sum(pg_total_relation_size(c.oid)), 0) FROM pg_class AS c "
        "WHERE c.relkind = 'r' AND c.relnamespace = to_regnamespace('dagster')"
    )
    with tempfile.TemporaryDirectory() as home:
        os.environ["FLYWHEEL_HOME"] = home
        with dagster_instance(engine.url, Settings(home=Path(home))) as instance:
            run_pipeline(instance)
            with engine.connect() as connection:
                before = _scalar(connection, size)
            seconds = []
            for _ in range(3):
                cpu.since()
                run_pipeline(instance)
                seconds.append(cpu.since())
            with engine.connect() as connection:
                yield "event_log_bytes_a_run", (_scalar(connection, size) - before) / len(seconds)
            yield "rest_of_a_run_seconds", min(seconds)


def measure_manifests(embedded: Any) -> Iterator[tuple[str, Any]]:
    """Publish a changed rule of the whole fleet to fleets of two sizes; yield what it took."""
    from bench_manifests import prepare, publish
    from fleet import database

    for appliances in MANIFESTS:
        engine = database(embedded, f"manifests_{appliances}")
        with engine.begin() as connection:
            prepare(connection, appliances, RULES)
        with engine.begin() as connection:
            publish(connection, "first")
        with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
            connection.exec_driver_sql("VACUUM (ANALYZE)")
        with engine.begin() as connection:
            connection.exec_driver_sql("SET LOCAL session_replication_role = replica")
            connection.exec_driver_sql(
                "UPDATE l1_rules SET rule_version = rule_version + 1 WHERE rule_id = 'RB-AUTO-0007'"
            )
        wal, cpu = Wal(engine), Cpu(engine)
        with engine.begin() as connection:
            publish(connection, "change")
        seconds = cpu.since()
        with engine.connect() as connection:
            held = "SELECT pg_total_relation_size('appliance_manifests') + pg_total_relation_size('appliance_commands')"
            yield (
                "publish",
                {
                    "appliances": appliances,
                    "seconds": seconds,
                    "wal_bytes": wal.since(),
                    "held_bytes": _scalar(connection, held),
                },
            )
        engine.dispose()


def measure_larger(embedded: Any) -> dict[str, Any]:
    """Count a fleet some twenty times as large as those of the fit, for the first time; return what it took."""
    from fleet import database, load

    from flywheel_pipeline.aggregates.refresh import refresh

    engine = database(embedded, "larger")
    load(engine, LARGER_ROWS)
    with engine.begin() as connection:
        connection.exec_driver_sql("SELECT flywheel_touch_all()")
    with engine.connect() as connection:
        waiting = connection.exec_driver_sql(_WAITING).one()
    cpu = Cpu(engine)
    with engine.begin() as connection:
        refresh(connection)
    seconds = cpu.since()
    engine.dispose()
    return {"site_days": waiting.cells, "rows": waiting.rows, "seconds": round(seconds, 4)}


def measure() -> dict[str, Any]:
    """Measure every unit cost in a scratch database; return them with the machine and the points behind the fits."""
    from fleet import server

    found: dict[str, list[Any]] = {}
    with server() as embedded:
        for name, size in FLEETS.items():
            for what, value in measure_fleet(embedded, name, size, DAYS):
                found.setdefault(what, []).append(value)
        for what, value in measure_manifests(embedded):
            found.setdefault(what, []).append(value)
        larger = measure_larger(embedded)
        engine = sa.create_engine(embedded.url)
        with engine.connect() as connection:
            version = str(connection.exec_driver_sql("SHOW server_version").scalar_one())
        engine.dispose()
    points = found.pop("refresh")
    fixed, a_cell, a_row = fit([(1, p["site_days"], p["rows"], p["seconds"]) for p in points])
    wal_cell, wal_row = fit([(p["site_days"], p["new_rows"], p["wal_bytes"]) for p in points if p["new_rows"]])
    held_cell, held_row = fit(found.pop("aggregates"))
    small, large = found.pop("publish")
    grown = large["appliances"] - small["appliances"]
    an_appliance = (large["seconds"] - small["seconds"]) / grown
    units = Units(
        **{what: sum(values) / len(values) for what, values in found.items()},
        aggregate_bytes_a_site_day=held_cell,
        aggregate_bytes_a_row=held_row,
        refresh_wal_bytes_a_site_day=wal_cell,
        refresh_wal_bytes_a_new_row=wal_row,
        refresh_seconds=fixed,
        refresh_seconds_a_site_day=a_cell,
        refresh_seconds_a_row=a_row,
        publish_seconds=max(small["seconds"] - an_appliance * small["appliances"], 0.0),
        publish_seconds_an_appliance=an_appliance,
        publish_wal_bytes_an_appliance=(large["wal_bytes"] - small["wal_bytes"]) / grown,
        manifest_bytes_an_appliance=(large["held_bytes"] - small["held_bytes"]) / grown,
    )
    return {
        "machine": {
            "cores": os.cpu_count(),
            "memory_gb": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / GB),
            "system": f"{platform.system()} {platform.machine()}",
            "python": platform.python_version(),
            "postgresql": version,
            "measured_on": dt.datetime.now(dt.UTC).date().isoformat(),
        },
        "units": {name: float(f"{value:.4g}") for name, value in asdict(units).items()},
        "refresh": [{**point, "seconds": round(point["seconds"], 4)} for point in points],
        "larger": larger,
        "publish": [{**point, "seconds": round(point["seconds"], 4)} for point in (small, large)],
    }


# -- the page -------------------------------------------------------------------------------------------------------


def said(value: float) -> str:
    """A number as people read it: three digits that count."""
    if value >= 100:
        digits = max(3 - len(str(int(value))), 0)
        return f"{round(value, digits - 0 if digits else 3 - len(str(int(value)))):,.0f}"
    return f"{value:.3g}"


def short(executions: float) -> str:
    """As 100 k, 1 M, 7.2 bn."""
    for unit, word in ((1e9, "bn"), (1e6, "M"), (1e3, "k")):
        if executions >= unit:
            return f"{executions / unit:.3g} {word}"
    return f"{executions:.0f}"


ROWS: Final[tuple[tuple[str, Callable[[Projection], float]], ...]] = (
    ("appliances", lambda p: p.appliances),
    ("sites", lambda p: p.sites),
    ("executions a second, mean", lambda p: p.rows_a_second),
    ("**PostgreSQL: disk to provide, GB**", lambda p: p.disk_gb),
    ("**memory, GB**", lambda p: p.memory_gb),
    ("**cores: one for the refresh, one for the rest, intake's**", lambda p: p.cores),
    ("cores that importing takes in the busiest minute", lambda p: p.import_cores),
    ("seconds from one run to the next", lambda p: p.tick_seconds),
    ("site-days a tick touches", lambda p: p.site_days_a_tick),
    ("site-days for 1,000 executions", lambda p: p.cells_a_thousand_rows),
    ("outbox rows that wait at most (posts one by one)", lambda p: p.outbox_rows),
    (f"telemetry, {TELEMETRY_DAYS} days, GB", lambda p: p.telemetry_gb),
    ("its indexes, GB", lambda p: p.indexes_gb),
    ("of them the one on execution_id, GB", lambda p: p.id_index_gb),
    (f"aggregates, {AGGREGATE_DAYS} days, GB", lambda p: p.aggregates_gb),
    ("write-ahead log, MB a second", lambda p: p.wal_mb_a_second),
    ("runs a day", lambda p: p.runs_a_day),
    (f"event log, {RUN_DAYS} days, GB", lambda p: p.event_log_gb),
    ("seconds to bring a changed rule to every manifest", lambda p: p.publish_seconds),
    ("write-ahead log of that, GB", lambda p: p.publish_wal_gb),
    (f"manifests and commands of {RULES} rules, GB", lambda p: p.manifests_gb),
    ("seconds to rebuild one day in PostgreSQL", lambda p: p.day_rebuild_seconds),
)
UNIT_WORDS: Final = {
    "heap_bytes_a_row": "telemetry, bytes a row",
    "index_bytes_a_row": "its indexes, bytes a row",
    "id_index_bytes_a_row": "of them the one on execution_id, bytes a row",
    "wal_bytes_a_row": "write-ahead log of intake, bytes a row",
    "import_seconds_a_row": "intake, seconds a row",
    "aggregate_bytes_a_site_day": "aggregates, bytes a site-day",
    "aggregate_bytes_a_row": "aggregates, bytes a row beside that",
    "refresh_wal_bytes_a_site_day": "write-ahead log of the refresh, bytes a site-day",
    "refresh_wal_bytes_a_new_row": "write-ahead log of the refresh, bytes a new row",
    "refresh_seconds": "refresh, seconds whatever it takes",
    "refresh_seconds_a_site_day": "refresh, seconds a site-day",
    "refresh_seconds_a_row": "refresh, seconds a row that it reads",
    "rest_of_a_run_seconds": "the rest of a run, seconds",
    "event_log_bytes_a_run": "event log, bytes a run",
    "publish_seconds": "publication, seconds whatever the fleet",
    "publish_seconds_an_appliance": "publication, seconds an appliance",
    "publish_wal_bytes_an_appliance": "publication, bytes of write-ahead log an appliance",
    "manifest_bytes_an_appliance": "manifest and commands, bytes an appliance",
}


def fitted(units: Units, point: Mapping[str, Any]) -> float:
    """Seconds of a refresh of so many site-days and rows, as the unit costs have it."""
    return (
        units.refresh_seconds
        + units.refresh_seconds_a_site_day * point["site_days"]
        + units.refresh_seconds_a_row * point["rows"]
    )


def render(stored: Mapping[str, Any]) -> str:
    """The page, from what was measured: the same text for the same measurements."""
    units, machine = Units(**stored["units"]), stored["machine"]
    columns = [project(units, scale) for scale in SCALES]
    lines = [
        "# What growth costs",
        "",
        "Made by `docs/growth.py` from `docs/growth.json`; `python docs/growth.py --measure` measures it anew. Bytes hold on",
        f"any machine. Seconds are CPU seconds of client and server on {machine['cores']} cores and {machine['memory_gb']} GB "
        f"({machine['system']}, Python {machine['python']}, PostgreSQL {machine['postgresql']}, {machine['measured_on']}).",
        'Only what stands under "Measured" was measured; the rest is multiplied out, and no fleet of the last columns was run.',
        "",
        "## Sizes",
        "",
        "| executions a day | " + " | ".join(short(scale) for scale in SCALES) + " |",
        "|---|" + "---:|" * len(SCALES),
    ]
    lines += [f"| {name} | " + " | ".join(said(figure(p)) for p in columns) + " |" for name, figure in ROWS]
    lines += [
        "",
        "![How the figures grow, each as a share of where it stops](growth.png)",
        "",
        f"Assumed: {EXECUTIONS_AN_APPLIANCE_A_DAY} executions an appliance a day, {APPLIANCES_A_SITE} appliances a site, the "
        f"busiest minute {PEAK:g} times the mean, a run",
        f"at most every {SHORTEST_TICK_SECONDS:g} s, {TELEMETRY_DAYS} days of telemetry in PostgreSQL, {RUN_DAYS} days of runs. "
        "A run takes all that waits and the next one",
        "starts when it is done, so the tick grows until it holds its own cost; once it touches every site, it grows no more.",
        "The agent API's own processes are not among the cores: `python benchmarks/bench_api.py` measures them.",
        "",
        "## Where each part stops, and what takes over",
        "",
        "| part | holds as long as | executions a day | then |",
        "|---|---|---:|---|",
    ]
    for limit in LIMITS:
        found = stops_at(limit, units)
        where = "not in sight" if found is None else short(float(f"{found:.2g}"))
        lines.append(f"| {limit.part} | {limit.says} | {where} | {limit.takes_over} |")
    lines += ["", "## Measured", "", "| unit | cost |", "|---|---:|"]
    lines += [f"| {words} | {getattr(units, name):.3g} |" for name, words in UNIT_WORDS.items()]
    lines += [
        "",
        f"Refresh, on the scenario `{SCENARIO}` with "
        + " and ".join(f"{size['sites']} sites of {size['windows']} hosts" for size in FLEETS.values())
        + ", tick by tick; `fitted` is what the three unit costs say:",
        "",
        "| fleet | reported | site-days | rows read | seconds | fitted |",
        "|---|---|---:|---:|---:|---:|",
    ]
    for point in stored["refresh"]:
        lines.append(
            f"| {point['fleet']} | {point['what']} | {point['site_days']:,} | {point['rows']:,} | {point['seconds']:.2f} "
            f"| {fitted(units, point):.2f} |"
        )
    larger = stored["larger"]
    lines += [
        "",
        f"Held against a fleet that the fit was not made from: {larger['rows']:,} rows on {larger['site_days']:,} site-days, "
        f"counted for the first",
        f"time, took {larger['seconds']:.1f} s; the unit costs say {fitted(units, larger):.1f} s.",
    ]
    lines += [
        "",
        f"A changed rule of the whole fleet, {RULES} rules: "
        + "; ".join(f"{p['appliances']:,} appliances {p['seconds']:.2f} s" for p in stored["publish"])
        + ".",
        "",
    ]
    return "\n".join(lines)


def draw(stored: Mapping[str, Any], path: Path) -> None:
    """Each limited figure as a share of its bar, over executions a day: 1 is where it stops."""
    from matplotlib.figure import Figure

    units = Units(**stored["units"])
    scales = np.logspace(5, 9, 60)
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    for limit in LIMITS:
        axes.loglog(scales, [limit.figure(project(units, s)) / limit.bar for s in scales], label=limit.part, lw=1.6)
    axes.axhline(1, color="black", lw=1)
    for scale in SCALES:
        axes.axvline(scale, color="0.85", lw=0.8, zorder=0)
    axes.set(xlabel="executions a day", ylabel="share of where it stops", ylim=(1e-3, 1e2), xlim=(1e5, 1e9))
    axes.legend(fontsize=7, loc="upper left")
    figure.savefig(path, dpi=110, metadata={"Software": None})


def main() -> None:
    """Measure if asked to, then write the page and its picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--measure", action="store_true", help="measure the unit costs anew")
    if parser.parse_args().measure:
        STORED.write_text(json.dumps(measure(), indent=1) + "\n", "utf-8")
    stored = json.loads(STORED.read_text("utf-8"))
    PAGE.write_text(render(stored), "utf-8")
    draw(stored, PLOT)
    print(f"{PAGE}: {len(SCALES)} scales, {len(LIMITS)} limits")


if __name__ == "__main__":
    main()
