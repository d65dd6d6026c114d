"""What passes the check is equal: each construct by itself, computed by PostgreSQL and by an engine over the same rows.

Belongs here: constructs, and values that tell engines apart. Does not belong here: whole models (`test_duckdb_digits.py`,
`test_spark_digits.py`), and what is refused (`test_plan.py`).
"""

from __future__ import annotations

import datetime as dt
from collections.abc import Iterator
from pathlib import Path

import pytest
import sqlalchemy as sa
from digits import NOON, row, write
from sqlalchemy.dialects import postgresql
from sqlglot import exp, parse_one

from flywheel_pipeline.database.tables import execution_telemetry
from flywheel_pipeline.engines import portable
from flywheel_pipeline.engines.dialects import preamble, render
from flywheel_pipeline.engines.duck import DuckEngine
from flywheel_pipeline.engines.errors import EngineError
from flywheel_pipeline.engines.job import ComputeEngine, Job
from flywheel_pipeline.engines.landing import land
from flywheel_pipeline.engines.plan import Plan, Step
from flywheel_pipeline.engines.portable import check, marked, qualified
from flywheel_pipeline.engines.source import database_casing, export_live
from flywheel_pipeline.engines.spark import SparkEngine

COLUMNS = tuple(column.name for column in execution_telemetry.columns if column.name not in ("id", "tags"))
SCHEMA = {
    "execution_telemetry": {
        name: execution_telemetry.columns[name].type.compile(dialect=postgresql.dialect())  # type: ignore[no-untyped-call]
        for name in COLUMNS
    }
}
TEXTS = [
    "", " ", "plain", "ÄÖÜ straße", "İstanbul ı", "ΣΊΣΥΦΟΣ ς", "𐐀𐐨", "back\\slash", "comma, {b}", "%_", "a\tb\n", "🙂x", "Plain",
    "abc", "e\u0301 é", "NULL",
]  # fmt: skip

# Each a value over telemetry, or a query by itself.
EQUAL = [
    # casts
    "retry_count::numeric(12, 2)", "retry_count::numeric(38, 0)", "sum(retry_count)::numeric(21, 2)", "retry_count::bigint",
    "sum(retry_count)::bigint", "sum(retry_count::bigint)::bigint", "max(retry_count)::smallint", "action::text", "action::varchar",
    "(event_at AT TIME ZONE 'UTC')::date", "(success AND success)::boolean",
    # sums
    "retry_count + 1", "retry_count - 100", "retry_count + retry_count::bigint", "sum(retry_count) + sum(retry_count)",
    "retry_count::numeric(12, 2) + 1", "retry_count::numeric(12, 2) - retry_count::numeric(14, 4)", "sum(retry_count::numeric(12, 2))",
    "sum(DISTINCT retry_count)", "min(retry_count::numeric(12, 2) + 1)", "sum(retry_count) FILTER (WHERE retry_count = 99)",
    # text
    "lower(action)", "upper(action)", "upper(error_message) = upper(rule_id)", "upper('ß' || action)", "action ILIKE 'PLAIN'",
    "action ILIKE '%STRASSE%'", "action ILIKE '%straße%'", "action ILIKE 'i%'", "action LIKE 'İ%'", "action LIKE '%_'",
    "action NOT LIKE 'a_c'", "action LIKE action", "replace(action, '', 'x')", "replace(action, 'a', '')", "replace(action, 'a', 'aa')",
    "replace(action, '\\', '/')", "replace(action, error_message, 'x')", "action || error_message", "action || '~' || hostname",
    "substr(action, 2)", "btrim(action)", "action IN ('abc', 'plain')", "action NOT IN ('abc', NULL)", "action = 'abc '",
    'action COLLATE "C" < hostname COLLATE "C"', 'max(action COLLATE "C")', 'min(action COLLATE "C")',
    'action COLLATE "C" BETWEEN (\'Z\' COLLATE "C") AND (hostname COLLATE "C")',
    # text of literals
    "'a\\b'", "'a\\nb\\'", "'it''s'", "'a\nb'", "'${env:HOME}'", "'${spark.sql.ansi.enabled}'", "'--no /* c */;'", "'𐐀 ''\" $1 %s {}'",
    # numbers
    "2147483648", "9223372036854775807", "duration_seconds > 0.1", "duration_seconds = 0.1", "retry_count = 3.0", "retry_count IN (1.0, 3)",
    "retry_count BETWEEN 0.5 AND 10", "retry_count = duration_seconds", "duration_seconds BETWEEN 0 AND 10", "duration_seconds = 0",
    "duration_seconds IN (0.1, 2.5)", "retry_count::numeric(12, 2) > 2.5", "duration_seconds = duration_seconds",
    "coalesce(duration_seconds, 0)", "coalesce(duration_seconds, 0.1)", "coalesce(duration_seconds, retry_count)",
    "nullif(duration_seconds, 0)", "nullif(retry_count, 0)", "coalesce(retry_count, 9223372036854775807)",
    "CASE WHEN success THEN retry_count ELSE duration_seconds END", "CASE WHEN success THEN 1 ELSE 2147483648 END",
    "max(duration_seconds)", "percentile_disc(0.5) WITHIN GROUP (ORDER BY retry_count)",
    "percentile_disc(0) WITHIN GROUP (ORDER BY retry_count)", "percentile_disc(1) WITHIN GROUP (ORDER BY duration_seconds)",
    # truth and null
    "NULL", "success = verification_passed", "success AND verification_passed", "success OR verification_passed", "NOT verification_passed",
    "verification_passed IS NOT TRUE", "verification_passed IS UNKNOWN", "success IN (true)", "success <> verification_passed", "retry_count IS DISTINCT FROM 3",
    "error_message IS DISTINCT FROM rule_id", "error_message IS NOT DISTINCT FROM rule_id", "duration_seconds IS DISTINCT FROM 0",
    "success IS DISTINCT FROM NULL", "nullif(action, '')", "coalesce(error_message, rule_id, 'x')", "coalesce(NULL, action)",
    "CASE hostname WHEN 'h1' THEN 'x' ELSE error_message END", "CASE success WHEN true THEN event_at END",
    "array_position(ARRAY['abc', 'plain'], error_message)", "array_position(ARRAY[7, 3], retry_count)",
    # counts, and aggregates of nothing
    "count(*)", "count(NULL)", "count(error_message)", "count(DISTINCT duration_seconds)", "count(DISTINCT (error_message, rule_id))",
    "count(DISTINCT retry_count) FILTER (WHERE success)", "bool_or(success)", "bool_and(verification_passed)",
    "bool_or(success) FILTER (WHERE retry_count = 99)", "array_agg(event_at ORDER BY event_at)",
    "array_agg(event_at ORDER BY event_at) FILTER (WHERE retry_count = 99)",
    '(array_agg(error_message ORDER BY event_at DESC, execution_id COLLATE "C" DESC))[1]',
    '(array_agg(rule_id ORDER BY event_at, execution_id COLLATE "C") FILTER (WHERE retry_count = 99))[1]',
    "(array_agg(event_at ORDER BY event_at))[1]",
    "SELECT count(*) AS n, sum(retry_count) AS s, array_agg(event_at ORDER BY event_at) AS a FROM execution_telemetry WHERE retry_count = 99",
    "SELECT hostname, array_agg(event_at ORDER BY event_at) FILTER (WHERE retry_count > 7) AS a FROM execution_telemetry GROUP BY hostname",
    # windows
    "sum(retry_count) OVER (ORDER BY event_at)", "count(*) OVER (PARTITION BY hostname ORDER BY retry_count)",
    "count(*) OVER (PARTITION BY duration_seconds)", "count(*) OVER (ORDER BY retry_count DESC)",
    "sum(retry_count) OVER (ORDER BY event_at DESC RANGE BETWEEN CURRENT ROW AND '2 minutes' FOLLOWING)",
    "sum(retry_count) OVER (ORDER BY event_at RANGE BETWEEN '2 minutes' PRECEDING AND '1 minute' PRECEDING)",
    "sum(retry_count) OVER (ORDER BY retry_count RANGE BETWEEN 3 PRECEDING AND CURRENT ROW)",
    'sum(retry_count) OVER (ORDER BY execution_id COLLATE "C" ROWS BETWEEN 1 PRECEDING AND CURRENT ROW)',
    "count(*) FILTER (WHERE success) OVER (PARTITION BY hostname)",
    "bool_or(verification_passed) FILTER (WHERE success) OVER (PARTITION BY hostname)",
    'row_number() OVER (PARTITION BY hostname ORDER BY retry_count DESC, execution_id COLLATE "C")',
    # times
    "event_at + interval '1 day'", "event_at - interval '90 minutes' < created_at", "event_at BETWEEN created_at AND event_at",
    "event_at <= created_at", "created_at - interval '1 minute' >= event_at", "event_at AT TIME ZONE 'UTC'", "(event_at AT TIME ZONE 'UTC') = (created_at AT TIME ZONE 'UTC')",
    # queries
    "SELECT DISTINCT hostname, verification_passed FROM execution_telemetry",
    "SELECT retry_count, count(*) AS n FROM execution_telemetry GROUP BY retry_count HAVING count(*) > 1",
    "SELECT error_message FROM execution_telemetry UNION SELECT hostname FROM execution_telemetry",
    "SELECT retry_count FROM execution_telemetry UNION ALL SELECT duration_seconds FROM execution_telemetry",
    "SELECT success FROM execution_telemetry UNION SELECT NULL",
    'SELECT execution_id FROM execution_telemetry ORDER BY retry_count, execution_id COLLATE "C" LIMIT 4',
    'SELECT execution_id FROM execution_telemetry ORDER BY retry_count DESC, execution_id COLLATE "C" LIMIT 4',
    'SELECT execution_id FROM execution_telemetry ORDER BY retry_count NULLS FIRST, execution_id COLLATE "C" LIMIT 4',
    'SELECT execution_id FROM execution_telemetry ORDER BY retry_count DESC NULLS LAST, execution_id COLLATE "C" LIMIT 4',
    'SELECT execution_id FROM execution_telemetry ORDER BY duration_seconds DESC, execution_id COLLATE "C" LIMIT 7',
    'SELECT execution_id FROM execution_telemetry ORDER BY verification_passed, execution_id COLLATE "C" LIMIT 9',
    "SELECT t.execution_id FROM execution_telemetry AS t WHERE t.retry_count IN (SELECT q.retry_count FROM execution_telemetry AS q)",
    "SELECT t.execution_id FROM execution_telemetry AS t WHERE t.retry_count NOT IN (SELECT q.retry_count FROM execution_telemetry AS q)",
    "EXISTS (SELECT 1 FROM execution_telemetry AS q WHERE q.hostname = t.hostname AND q.retry_count > t.retry_count)",
    "(SELECT count(*) FROM execution_telemetry AS q WHERE q.retry_count = t.retry_count)",
    "(SELECT q.action FROM execution_telemetry AS q WHERE q.execution_id = t.rule_id)",
    "SELECT a.execution_id, b.action FROM execution_telemetry AS a LEFT JOIN execution_telemetry AS b ON a.duration_seconds = b.duration_seconds",
    "SELECT a.execution_id, b.action FROM execution_telemetry AS a FULL JOIN execution_telemetry AS b ON a.rule_id = b.action",
    "SELECT a.execution_id, b.action FROM execution_telemetry AS a LEFT JOIN LATERAL (SELECT q.action FROM execution_telemetry AS q "
    'WHERE q.retry_count < a.retry_count ORDER BY q.retry_count DESC, q.execution_id COLLATE "C" LIMIT 1) AS b ON true',
    "WITH r AS MATERIALIZED (SELECT hostname, count(*) AS n FROM execution_telemetry GROUP BY hostname) SELECT hostname FROM r WHERE n > 4",
]  # fmt: skip


@pytest.fixture
def telemetry(engine: sa.Engine) -> sa.Engine:
    """Rows with odd text, nulls, ties, and doubles that are not numbers."""
    write(
        engine,
        [
            row(
                at=NOON + dt.timedelta(minutes=number // 2),
                hostname=f"h{number % 3}",
                action=text,
                error_message=None if number % 4 == 0 else text,
                rule_id=None if number % 3 == 0 else TEXTS[number * 5 % len(TEXTS)],
                success=number % 3 != 0,
                verification_passed=(True, False, None)[number % 3],
                retry_count=(None, 0, 3, 7, 32767, -5, 10)[number % 7],
                duration_seconds=(None, 0.1, -0.5, float("nan"), float("inf"), 2.5, -0.0)[number % 7],
            )
            for number, text in enumerate(TEXTS)
        ],
    )
    return engine


def query_of(construct: str) -> str:
    """A query of its own, or that of a value over telemetry."""
    whole = construct.startswith(("SELECT", "WITH"))
    return construct if whole else f"SELECT {construct} AS x FROM execution_telemetry AS t"


def step(number: int, construct: str, compute: ComputeEngine) -> Step:
    """A construct that passed the check, in the engine's words."""
    tree = qualified(marked(parse_one(query_of(construct), dialect="postgres")), SCHEMA)
    check(tree)
    # A column without a type is text to PostgreSQL.
    typed = tree.sql(dialect="postgres").replace("FLYWHEEL_BYTES", "")
    return Step(f"construct_{number}", render(tree, compute.dialect), lands=True, typed=typed)


def landed(
    connection: sa.Connection, constructs: list[str], compute: ComputeEngine, folder: Path
) -> Iterator[tuple[str, list[str]]]:
    """Each construct by the engine, with the rows that came back to PostgreSQL, as text."""
    connection.exec_driver_sql(
        "CREATE TEMP TABLE scope_input ON COMMIT DROP AS SELECT DISTINCT site_id, (event_at AT TIME ZONE 'UTC')::date AS day "
        "FROM execution_telemetry"
    )
    days = connection.exec_driver_sql("SELECT DISTINCT day FROM scope_input").scalars().all()
    live = folder / "live.parquet"
    steps = [step(number, construct, compute) for number, construct in enumerate(constructs)]
    plan = Plan(compute.dialect, tuple(steps), COLUMNS, {}, compared=frozenset())
    assert export_live(connection, days, plan, live) == len(TEXTS)
    job = Job(
        plan=plan,
        preamble=tuple(preamble(compute.dialect, database_casing(connection))),
        archive=None,
        archived=(),
        live=live,
        tables={},
        sites=None,
        scratch=folder,
    )
    for construct, (made, batches) in zip(constructs, compute.compute(job), strict=True):
        land(connection, made.name, made.typed, batches)
        yield construct, texts(connection, f"SELECT * FROM {made.name}")


def texts(connection: sa.Connection, query: str) -> list[str]:
    """Rows as PostgreSQL writes them, in any order."""
    return sorted(connection.exec_driver_sql(f"SELECT r::text FROM ({query.replace('%', '%%')}) AS r").scalars().all())


def assert_equal(engine: sa.Engine, constructs: list[str], compute: ComputeEngine, folder: Path) -> None:
    """Every construct gives PostgreSQL's rows, to the last digit."""
    with engine.begin() as connection:
        differing = {
            construct: (found, wanted)
            for construct, found in landed(connection, constructs, compute, folder)
            if found != (wanted := texts(connection, query_of(construct)))
        }
    assert differing == {}


def test_each_construct_is_equal_on_duckdb(telemetry: sa.Engine, tmp_path: Path) -> None:
    assert_equal(telemetry, EQUAL, DuckEngine(), tmp_path)


@pytest.mark.long
@pytest.mark.timeout(900)
@pytest.mark.usefixtures("spark_on_loopback")
def test_each_construct_is_equal_on_spark(telemetry: sa.Engine, tmp_path: Path) -> None:
    assert_equal(telemetry, EQUAL, SparkEngine("local[2]"), tmp_path)


# What is too large for a type is an error everywhere, never another number.
TOO_LARGE = [
    "retry_count + 2147483647",
    "(retry_count + 2147450880)::smallint",
    "sum(retry_count + 9223372036854740000)::bigint",
]


@pytest.mark.parametrize("construct", TOO_LARGE)
def test_what_is_too_large_is_an_error_and_no_other_number(
    telemetry: sa.Engine, tmp_path: Path, construct: str
) -> None:
    with telemetry.connect() as connection, pytest.raises(sa.exc.DataError, match="out of range"):
        texts(connection, query_of(construct))
    with pytest.raises(EngineError, match="DuckDB could not compute the models: "):
        assert_equal(telemetry, [construct], DuckEngine(), tmp_path)


@pytest.mark.long
@pytest.mark.timeout(900)
@pytest.mark.usefixtures("spark_on_loopback")
def test_what_is_too_large_is_an_error_on_spark_too(telemetry: sa.Engine, tmp_path: Path) -> None:
    # The sum, which Spark would wrap around to another number if it were not told otherwise.
    with pytest.raises(EngineError, match=r"Spark at local\[1\] could not compute the models: .*OVERFLOW"):
        assert_equal(telemetry, TOO_LARGE[-1:], SparkEngine("local[1]"), tmp_path)


def test_every_kind_of_construct_that_may_pass_stands_in_the_list() -> None:
    trees = [qualified(marked(parse_one(query_of(one), dialect="postgres")), SCHEMA) for one in EQUAL]
    seen = {type(node) for tree in trees for node in tree.walk()}
    elsewhere = {exp.ArrayContainsAll, exp.Bracket, exp.PercentileCont, exp.Interval, exp.Substring}
    assert {kind.__name__ for kind in (*portable._PLAIN, *portable._RULES) if kind not in seen | elsewhere} == set()
