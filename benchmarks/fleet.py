"""What the benchmarks share: a server of their own, a fleet of any size made inside PostgreSQL, a table of ratios.

Belongs here: set-up and printing. Does not belong here: measuring.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psycopg
import sqlalchemy as sa
from psycopg import sql

from flywheel_pipeline.database import migrate
from flywheel_pipeline.database.embedded import EmbeddedServer
from flywheel_pipeline.database.engine import open_engine

ROWS_A_DAY = 27_400  # 300 sites, 2,000 hosts; 10 million rows are a year
LAST = "2026-02-15 00:00:00+00"

# Rows number :first to :last, one every 86400 / 27400 s, the last of :total at LAST. A host stays on its site; rules are
# Zipf-like; a fifth of the executions fail, each failure naming one of some hundred errors.
FLEET_ROWS = """
SELECT 'fleet-' || to_char(n, 'FM000000000') AS execution_id,
  'site-' || to_char(host % 300, 'FM000') AS site_id,
  'site-' || to_char(host % 300, 'FM000') || '-appliance' AS appliance_id,
  CASE WHEN u.level < 93 THEN 'L1-RULE-' || to_char(u.rule, 'FM000') ELSE 'L2-run_windows_runbook:RB-' || u.rule % 50 END AS runbook_id,
  'host-' || host AS hostname,
  'windows' AS platform,
  'incident_' || u.rule % 60 AS incident_type,
  '1.0.' || 50 + u.rule % 7 AS agent_version,
  t.at AS started_at,
  t.at + interval '9 seconds' AS completed_at,
  9.0 AS duration_seconds,
  u.chance >= 20 AS success,
  CASE WHEN u.chance >= 20 THEN 'success' ELSE 'failure' END AS status,
  CASE WHEN u.chance >= 20 THEN u.chance < 95 END AS verification_passed,
  CASE WHEN u.level < 93 THEN 'L1' ELSE 'L2' END AS resolution_level,
  CASE WHEN u.chance < 6 THEN 'Execution timed out after ' || 30 + u.rule % 30 || ' s'
       WHEN u.chance < 20 THEN 'Phase ''verify'' failed: step ' || u.rule % 100 END AS error_message,
  '{"status": "non_compliant"}'::jsonb AS state_before,
  t.at + interval '1 minute' AS created_at
FROM generate_series(CAST(:first AS bigint), CAST(:last AS bigint)) AS n
CROSS JOIN LATERAL (SELECT abs(hashint8(n)) % 2000 AS host) AS h
CROSS JOIN LATERAL (
  SELECT (200 * power((abs(hashint8(n + 1000000007)) % 100000) / 100000.0, 3))::int % 200 AS rule,
    abs(hashint8(n + 2000000011)) % 100 AS chance, abs(hashint8(n + 3000000019)) % 100 AS level
) AS u
CROSS JOIN LATERAL (
  SELECT timestamptz '{last}' - (:total - n) * interval '3.1532846 seconds' AS at
) AS t
""".replace("{last}", LAST)
COLUMNS = (
    "execution_id, site_id, appliance_id, runbook_id, hostname, platform, incident_type, agent_version, started_at, "
    "completed_at, duration_seconds, success, status, verification_passed, resolution_level, error_message, "
    "state_before, created_at"
)


@dataclass(frozen=True)
class Line:
    """One line of the table: a ratio measured in one run and the bar it is held against (`<=` or `>=`)."""

    work: str
    measured: str
    ratio: float
    sign: str
    bar: float

    @property
    def met(self) -> bool:
        """Whether the ratio keeps the bar."""
        return self.ratio <= self.bar if self.sign == "<=" else self.ratio >= self.bar

    def __str__(self) -> str:
        return (
            f"{'ok  ' if self.met else 'MISS'} {self.work:<64} {self.ratio:>8.2f}x  (bar {self.sign} {self.bar:g}x)   "
            f"{self.measured}"
        )


@contextmanager
def server(**options: str) -> Iterator[EmbeddedServer]:
    """An embedded server with the product's own settings, removed at the end."""
    home = Path(tempfile.mkdtemp(prefix="fw-bench-"))
    embedded = EmbeddedServer(home, options=options or None)
    embedded.ensure_running()
    try:
        yield embedded
    finally:
        embedded.remove()
        shutil.rmtree(home, ignore_errors=True)


def database(embedded: EmbeddedServer, name: str) -> sa.Engine:
    """A fresh, upgraded database of this name."""
    where = psycopg.conninfo.make_conninfo(
        host=str(embedded.socket_directory), port=5432, user="flywheel", dbname="postgres"
    )
    with psycopg.connect(where, autocommit=True) as connection:
        connection.execute(sql.SQL("CREATE DATABASE {}").format(sql.Identifier(name)))
    engine = open_engine(embedded.url.set(database=name))
    migrate.upgrade(engine)
    return engine


def load(engine: sa.Engine, rows: int) -> None:
    """Fill telemetry with `rows` rows as a restore would: no triggers, indexes last, statistics made."""
    with engine.begin() as connection:
        connection.exec_driver_sql("SET LOCAL session_replication_role = replica")
        connection.exec_driver_sql("SET LOCAL maintenance_work_mem = '512MB'")
        connection.exec_driver_sql("DROP INDEX execution_telemetry_site_event_idx")
        connection.exec_driver_sql(
            "ALTER TABLE execution_telemetry DROP CONSTRAINT execution_telemetry_execution_id_key"
        )
        connection.execute(
            sa.text(f"INSERT INTO execution_telemetry ({COLUMNS}) {FLEET_ROWS}"),
            {"first": 1, "last": rows, "total": rows},
        )
        connection.exec_driver_sql("ALTER TABLE execution_telemetry ADD UNIQUE (execution_id)")
        connection.exec_driver_sql(
            "CREATE INDEX execution_telemetry_site_event_idx ON execution_telemetry (site_id, event_at)"
        )
    with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        connection.exec_driver_sql("VACUUM (ANALYZE) execution_telemetry")


def add(connection: sa.Connection, total: int, rows: int) -> None:
    """Insert the `rows` rows that follow the `total` ones of `load`, by the ordinary way, with triggers."""
    connection.execute(
        sa.text(f"INSERT INTO execution_telemetry ({COLUMNS}) {FLEET_ROWS}"),
        {"first": total + 1, "last": total + rows, "total": total},
    )
