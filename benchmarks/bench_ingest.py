"""Writing telemetry: our outbox triggers against no trigger, and against the legacy per-row counter trigger.

Batches: 1,000 rows an INSERT by one writer, alternately into the same schema with and without our triggers; every
index, key and the generated column are there in both. Bar: <= 1.3x the time.
Throughput: 8 writers, 100 rows a transaction by COPY, five hot rules. The legacy trigger updates the rule's counters
for every row. Transactions lost to deadlocks are tried again, as its callers had to. Bar: >= 50x the rows a second.

    python benchmarks/bench_ingest.py [--quick]
"""

from __future__ import annotations

import argparse
import random
import statistics
import threading
import time
from typing import Any

import psycopg
import sqlalchemy as sa
from fleet import COLUMNS, FLEET_ROWS, Line, database, load, server

BATCH = 1_000
WRITERS = 8
ROWS_A_TRANSACTION = 100
OUTBOX = ("flywheel_touch_inserted", "flywheel_touch_updated", "flywheel_touch_deleted", "flywheel_touch_truncated")

# The counter trigger of the system before, as its migration created it (rule id in runbook_id, one UPDATE a row).
LEGACY = """
CREATE TABLE legacy_rules (
  rule_id text PRIMARY KEY, match_count integer NOT NULL DEFAULT 0, success_count integer NOT NULL DEFAULT 0,
  failure_count integer NOT NULL DEFAULT 0, success_rate double precision
);
INSERT INTO legacy_rules (rule_id) SELECT 'L1-RULE-' || to_char(n, 'FM000') FROM generate_series(0, 4) n;
CREATE FUNCTION legacy_count() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
  UPDATE legacy_rules SET
    match_count = match_count + 1,
    success_count = success_count + CASE WHEN NEW.success THEN 1 ELSE 0 END,
    failure_count = failure_count + CASE WHEN NEW.success THEN 0 ELSE 1 END,
    success_rate = (success_count + CASE WHEN NEW.success THEN 1 ELSE 0 END)::double precision / (match_count + 1) * 100
  WHERE rule_id = NEW.runbook_id;
  RETURN NEW;
END $$;
CREATE TRIGGER legacy_count AFTER INSERT ON execution_telemetry FOR EACH ROW EXECUTE FUNCTION legacy_count();
"""


def triggers(engine: sa.Engine, enabled: bool) -> None:
    """Switch our triggers on telemetry on or off."""
    with engine.begin() as connection:
        for name in OUTBOX:
            connection.exec_driver_sql(
                f"ALTER TABLE execution_telemetry {'ENABLE' if enabled else 'DISABLE'} TRIGGER {name}"
            )


def batches(rounds: int) -> Line:
    """Time INSERTs of 1,000 rows, in pairs, on a table that holds 100,000 already."""
    seconds: dict[bool, list[float]] = {True: [], False: []}
    with server() as embedded:
        engine = database(embedded, "batches")
        load(engine, 100_000)
        # The rows stand in a table beside it, so that neither way pays for making them.
        with engine.begin() as connection:
            connection.execute(
                sa.text(f"CREATE TABLE prepared AS SELECT row_number() OVER () AS n, r.* FROM ({FLEET_ROWS}) AS r"),
                {"first": 100_001, "last": 100_000 + 2 * rounds * BATCH, "total": 100_000},
            )
            connection.exec_driver_sql("CREATE INDEX ON prepared (n)")
        with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
            connection.exec_driver_sql("VACUUM (ANALYZE) prepared")
            connection.exec_driver_sql("CHECKPOINT")
        statement = sa.text(
            f"INSERT INTO execution_telemetry ({COLUMNS}) SELECT {COLUMNS} FROM prepared WHERE n > :n AND n <= :n + {BATCH}"
        )
        for number in range(2 * rounds):
            ours = number % 2 == 0
            triggers(engine, ours)
            with engine.connect() as connection:
                begun = time.perf_counter()
                connection.execute(statement, {"n": number * BATCH})
                connection.commit()
                seconds[ours].append(time.perf_counter() - begun)
        engine.dispose()
    ours, none = statistics.median(seconds[True]), statistics.median(seconds[False])
    return Line(
        "ingest, 1,000 rows an insert: our triggers / none",
        f"{ours * 1000:.1f} ms / {none * 1000:.1f} ms",
        ours / none,
        "<=",
        1.3,
    )


def write(url: str, number: int, until: float, counts: list[int], deadlocks: list[int]) -> None:
    """Write transactions of 100 rows by COPY until the clock says so."""
    pick = random.Random(number)
    with psycopg.connect(url) as connection:
        sent = 0
        while time.perf_counter() < until:
            sent += 1
            rows: list[tuple[Any, ...]] = [
                (f"w{number}-{sent}-{n}", f"site-{pick.randrange(300)}", f"host-{pick.randrange(2000)}",
                 f"L1-RULE-{pick.randrange(5):03d}", "L1", pick.random() < 0.8, "2026-02-15T10:00:00Z")
                for n in range(ROWS_A_TRANSACTION)
            ]  # fmt: skip
            while time.perf_counter() < until:
                try:
                    with (
                        connection.transaction(),
                        connection.cursor() as cursor,
                        cursor.copy(
                            "COPY execution_telemetry (execution_id, site_id, hostname, runbook_id, resolution_level, "
                            "success, started_at) FROM STDIN"
                        ) as copy,
                    ):
                        for row in rows:
                            copy.write_row(row)
                    counts[number] += len(rows)
                    break
                except psycopg.errors.DeadlockDetected:
                    deadlocks[number] += 1


def throughput(seconds: float) -> Line:
    """Rows a second of eight writers, one way after the other in fresh databases."""
    rates: dict[str, float] = {}
    fell: dict[str, int] = {}
    with server() as embedded:
        for name in ("none", "ours", "legacy"):
            engine = database(embedded, name)
            if name != "ours":
                triggers(engine, enabled=False)
            if name == "legacy":
                with engine.begin() as connection:
                    connection.exec_driver_sql(LEGACY)
            url = engine.url.set(drivername="postgresql").render_as_string(hide_password=False)
            counts, deadlocks = [0] * WRITERS, [0] * WRITERS
            begun = time.perf_counter()
            threads = [
                threading.Thread(target=write, args=(url, n, begun + seconds, counts, deadlocks))
                for n in range(WRITERS)
            ]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            rates[name] = sum(counts) / (time.perf_counter() - begun)
            fell[name] = sum(deadlocks)
            engine.dispose()
    print(
        f"  8 writers x {ROWS_A_TRANSACTION} rows: "
        + ", ".join(f"{n} {r:,.0f} rows/s ({fell[n]} deadlocks)" for n, r in rates.items())
    )
    if fell["ours"]:
        raise SystemExit(f"our triggers deadlocked {fell['ours']} times")
    return Line(
        "8 writers x 100 rows, five hot rules: ours / legacy counter trigger",
        f"{rates['ours']:,.0f} / {rates['legacy']:,.0f} rows/s",
        rates["ours"] / rates["legacy"],
        ">=",
        50,
    )


def measure(quick: bool) -> list[Line]:
    """Both lines of the table."""
    return [batches(25 if quick else 80), throughput(5 if quick else 20)]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    lines = measure(parser.parse_args().quick)
    print(*lines, sep="\n")
    raise SystemExit(0 if all(line.met for line in lines) else 1)
