"""One SQL text: what of it an engine gets, in its own words, and what is refused by name."""

from __future__ import annotations

from pathlib import Path

import pytest
from sqlglot import exp, parse_one

from flywheel_pipeline.engines.dialects import Dialect, render
from flywheel_pipeline.engines.errors import NotPortable
from flywheel_pipeline.engines.plan import Plan, build_plan
from flywheel_pipeline.engines.portable import Refusal, check, marked, qualified
from flywheel_pipeline.engines.routines import inline, routines
from flywheel_pipeline.sql_models.loader import load_models

TELEMETRY = {
    "execution_telemetry": {
        "execution_id": "varchar(255)",
        "action": "varchar(255)",
        "tags": "jsonb",
        "success": "boolean",
        "retry_count": "integer",
        "duration_seconds": "double precision",
        "event_at": "timestamptz",
        "created_at": "timestamptz",
    },
    "site_aliases": {"alias": "varchar(255)", "site_id": "varchar(255)"},
}


def translated(expression: str, dialect: Dialect) -> str:
    """One expression over telemetry in an engine's words, on one line."""
    tree = qualified(
        marked(inline(parse_one(f"SELECT {expression} AS x FROM execution_telemetry AS t", dialect="postgres"))),
        TELEMETRY,
    )
    check(tree)
    said = " ".join(render(tree, dialect).split())
    return said.removeprefix("SELECT ").removesuffix(" AS x FROM execution_telemetry AS t")


# (PostgreSQL, DuckDB, Spark): each of these is a place where the three differ in silence.
PINS = [
    ("lower(action)", "FLYWHEEL_LOWER(t.action)", "FLYWHEEL_LOWER(t.action)"),
    ("btrim(action)", "FLYWHEEL_BTRIM(t.action)", "FLYWHEEL_BTRIM(t.action)"),
    (
        "action ILIKE execution_id",
        "FLYWHEEL_LIKE(FLYWHEEL_LOWER(t.action), FLYWHEEL_LOWER(t.execution_id))",
        "FLYWHEEL_LIKE(FLYWHEEL_LOWER(t.action), FLYWHEEL_LOWER(t.execution_id))",
    ),
    ("action LIKE 'L1-%'", "t.action LIKE 'L1-%'", "t.action LIKE 'L1-%'"),
    (
        "action LIKE 'run\\_runbook:_%'",
        "( STARTS_WITH(t.action, 'run_runbook:') AND LENGTH(t.action) >= 13 )",
        "( STARTSWITH(t.action, 'run_runbook:') AND LENGTH(t.action) >= 13 )",
    ),
    ("substr(action, 13)", "SUBSTRING(t.action, 13)", "SUBSTRING(t.action, 13)"),
    ("(event_at AT TIME ZONE 'UTC')::date", "CAST(( ( t.event_at ) ) AS DATE)", "CAST(( ( t.event_at ) ) AS DATE)"),
    (
        "created_at - interval '730 days'",
        "t.created_at - INTERVAL '730' DAYS",
        "t.created_at - INTERVAL '730' DAYS",
    ),
    (
        "tags @> '{\"synthetic\": true}'",
        "( CASE WHEN CONTAINS(t.tags, '\"synthetic\": true') THEN COALESCE(( t.tags -> '$.synthetic' ) = 'true', FALSE) "
        "ELSE t.tags <> t.tags END )",
        "( CASE WHEN CONTAINS(t.tags, '\"synthetic\": true') THEN COALESCE( "
        "SCHEMA_OF_VARIANT(VARIANT_GET(TRY_PARSE_JSON(t.tags), '$.synthetic')) = 'BOOLEAN' "
        "AND GET_JSON_OBJECT(t.tags, '$.synthetic') = 'true', FALSE ) ELSE t.tags <> t.tags END )",
    ),
    (
        "substring(action FROM '^L2-(.+)$')",
        "( CASE WHEN STARTS_WITH(t.action, 'L2-') THEN NULLIF(REGEXP_EXTRACT(t.action, '\\AL2-((?s:.)+)\\z', 1), '') END )",
        "( CASE WHEN STARTSWITH(t.action, 'L2-') THEN NULLIF(REGEXP_EXTRACT(t.action, '\\\\AL2-((?s:.)+)\\\\z'), '') END )",
    ),
    (
        "array_position(ARRAY['a', 'b'], action)",
        "ARRAY_POSITION(['a', 'b'], t.action)",
        "NULLIF(ARRAY_POSITION(ARRAY('a', 'b'), t.action), 0)",
    ),
    (
        '(array_agg(action ORDER BY event_at DESC, execution_id COLLATE "C" DESC) FILTER (WHERE success))[1]',
        "ARG_MAX_NULL(t.action, ROW(t.event_at, t.execution_id)) FILTER(WHERE t.success)",
        "MAX_BY(t.action, STRUCT(t.event_at, t.execution_id)) FILTER(WHERE t.success)",
    ),
    (
        "array_agg(event_at ORDER BY event_at)",
        "ARRAY_AGG(t.event_at ORDER BY t.event_at)",
        "NULLIF(ARRAY_SORT(COLLECT_LIST(t.event_at)), ARRAY())",
    ),
    (
        "max(event_at) FILTER (WHERE success) OVER (ORDER BY event_at RANGE BETWEEN CURRENT ROW AND '24 hours' FOLLOWING)",
        "MAX(t.event_at) FILTER(WHERE t.success) OVER (ORDER BY t.event_at RANGE BETWEEN CURRENT ROW AND INTERVAL '24' HOUR FOLLOWING)",
        "MAX(CASE WHEN t.success THEN t.event_at END) OVER ( ORDER BY t.event_at NULLS LAST RANGE BETWEEN CURRENT ROW AND "
        "INTERVAL '24' HOUR FOLLOWING )",
    ),
    (
        "percentile_disc(0.5) WITHIN GROUP (ORDER BY duration_seconds)",
        "QUANTILE_DISC(t.duration_seconds, 0.5)",
        "CAST(percentile_disc(0.5) WITHIN GROUP (ORDER BY t.duration_seconds) AS DOUBLE)",
    ),
    ("sum(retry_count)::bigint", "CAST(SUM(t.retry_count) AS BIGINT)", "CAST(SUM(t.retry_count) AS BIGINT)"),
]


@pytest.mark.parametrize(("given", "duckdb", "spark"), PINS, ids=[pin[0][:40] for pin in PINS])
def test_what_differs_in_silence_is_said_in_each_engines_words(given: str, duckdb: str, spark: str) -> None:
    assert translated(given, "duckdb") == duckdb
    assert translated(given, "spark") == spark


@pytest.mark.parametrize(
    ("expression", "why"),
    [
        ("retry_count / 2", "Div"),
        ("avg(retry_count)", "Avg"),
        ("round(duration_seconds)", "Round"),
        ("sum(duration_seconds)", "only sums of integers and decimals"),
        ("percentile_cont(0.5) WITHIN GROUP (ORDER BY duration_seconds)", "interpolates"),
        ("event_at::text", "the cast is spelled"),
        ("(event_at AT TIME ZONE 'Europe/Berlin')::date", "times are UTC"),
        ("max(action)", "the order of text"),
        ("(array_agg(action ORDER BY execution_id))[1]", "the order of text"),
        ("(array_agg(action ORDER BY retry_count))[1]", "where its ORDER BY is null"),
        ("array_agg(action)", "its order is chance"),
        ("tags ->> 'os'", "JSONExtractScalar"),
        ("tags @> '{\"a\": 1.50}'", "of jsonb, only"),
        ("substring(action FROM 'L2-(.+?)$')", "a pattern begins with"),
        ("substring(action FROM '^L2-(.+?)$')", "not greedy"),
        ("substring(action FROM '^a(\\w+)')", "may not be empty"),
        ("action LIKE 'a\\_b'", "a backslash"),
        ("substr(action, 0)", "places before the first"),
        ("substr(action, 2, 3)", "only that FROM a place"),
        ("event_at + interval '1 month'", "an interval is so many"),
        ("flywheel_runbook_problem(action, action)", "a function of the database"),
        ("to_char(event_at, 'YYYY')", "not known to be the same"),
        ('action COLLATE "de_DE"', "only the collation C"),
        # decimal(18,3) in DuckDB, decimal(10,0) in Spark
        ("retry_count::numeric", "numeric without digits"),
        ("sum(retry_count)::numeric", "numeric without digits"),
        ("retry_count::numeric(50, 2)", "numeric without digits, or with more than 38"),
        ("retry_count::numeric(3, 5)", "numeric without digits"),
        ("retry_count::numeric(11, 2)", "may have more digits"),
        ("sum(retry_count)::numeric(20, 2)", "may have more digits"),
        ("sum(retry_count::bigint)::numeric(38, 0)", "may have more digits"),
        ("retry_count::numeric(12, 2)::numeric(12, 1)", "may have more digits"),
        # rounded in PostgreSQL, cut off in Spark
        ("retry_count::numeric(12, 2)::integer", "rounded to an integer"),
        ("sum(retry_count::numeric(12, 2))::bigint", "rounded to an integer"),
        ("retry_count::bit", "the cast is spelled"),
        ("action::varchar(3)", "cuts text to a length"),
        ("action::char(3)", "the cast is spelled"),
        ("action::char", "the cast is spelled"),
        # Spark: decimal(38,9)
        ("retry_count::numeric(38, 10) + retry_count::numeric(38, 10)", "loses some"),
        ("retry_count::numeric(38, 10) = retry_count::numeric(38, 0)", "of more than 38 digits together"),
        ("retry_count::smallint + 1", "in DuckDB a smallint still"),
        ("retry_count || action", "known to be text"),
        ("action || retry_count", "known to be text"),
        ("action || duration_seconds", "known to be text"),
        ("action || NULL", "known to be text"),
        ("ARRAY['a'] || ARRAY['b']", "known to be text"),
        ("action BETWEEN 'a' AND 'z'", "the order of text"),
        ("action COLLATE \"C\" BETWEEN 'a' AND 'z'", "the order of text"),
        ('action COLLATE "C" BETWEEN execution_id AND (\'z\' COLLATE "C")', "the order of text"),
        ("retry_count BETWEEN SYMMETRIC 9 AND 1", "BETWEEN SYMMETRIC"),
        # a text that PostgreSQL reads as a time or a number
        ("event_at = '2026-02-02 12:00+01'", "its sides are of different types"),
        ("event_at IN ('2026-02-02 12:00+01')", "its sides are of different types"),
        ("(event_at AT TIME ZONE 'UTC')::date = '2026-02-02'", "its sides are of different types"),
        ("retry_count = '3'", "its sides are of different types"),
        ("success IS DISTINCT FROM 't'", "its sides are of different types"),
        ("retry_count IN (3, '5')", "its sides are of different types"),
        ("CASE retry_count WHEN '3' THEN 'three' END", "its sides are of different types"),
        ("nullif(retry_count, '3')", "its sides are of different types"),
        # 1 in PostgreSQL, 1.0 elsewhere
        ("coalesce(retry_count, 1.5)", "its parts are of different types"),
        ("coalesce(retry_count, '5')", "its parts are of different types"),
        ("CASE WHEN success THEN 1 ELSE 2.5 END", "its parts are of different types"),
        ("CASE WHEN success THEN 0.5 ELSE 0.25 END", "its parts are of different types"),
        ("coalesce(sum(retry_count::numeric(12, 2)), 0)", "its parts are of different types"),
        ("coalesce(retry_count::numeric(12, 1), retry_count::numeric(12, 2))", "its parts are of different types"),
        ("1.5", "a fraction by itself"),
        ("1e3", "an exponent"),
        ("coalesce(duration_seconds, 0.12345678901234567)", "more than 15 digits"),
        ("duration_seconds > 123456789012345678901234567890.5", "more than 15 digits"),
        ("9223372036854775808", "more than 64 bits"),
        ("interval '1 day'", "an interval by itself"),
        ("coalesce(interval '1 day', interval '2 days')", "the type of a part|an interval by itself"),
        # null is FALSE in Spark
        ("retry_count IN (SELECT q.retry_count FROM execution_telemetry AS q)", "a null that IN meets"),
        ("retry_count NOT IN (SELECT q.retry_count FROM execution_telemetry AS q)", "a null that IN meets"),
        (
            "count(*) FILTER (WHERE retry_count IN (SELECT q.retry_count FROM execution_telemetry AS q))",
            "a null that IN",
        ),
        ("(action, retry_count) = (execution_id, 3)", "the type of a side|of rows with nulls"),
        ("(action, retry_count) IS NULL", "of rows with nulls"),
        ("(action, retry_count) IN (('a', 3))", "the type of a side|of rows with nulls"),
        ("count(t.*)", "a whole row"),
        ("array_position(ARRAY['a', NULL], action)", "where an array holds null"),
        ("array_position(ARRAY['a', execution_id], action)", "where an array holds null"),
        ("array_position(ARRAY['a', 'b', 'a'], 'a', 2)", "from a place on"),
        ("array_position(ARRAY['1', '2'], retry_count)", "its sides are of different types"),
        ("ARRAY['a', 'b']", "an array stands in array_position"),
        ('array_agg(execution_id COLLATE "C" ORDER BY execution_id COLLATE "C")', "only arrays of integers"),
        ('(array_agg(action ORDER BY event_at DESC, execution_id COLLATE "C" DESC))[2]', "only the first element"),
        # of equals, which comes first is chance in each of them
        ("(array_agg(action ORDER BY event_at DESC))[1]", "does not tell apart is chance"),
        ("row_number() OVER (ORDER BY event_at)", "does not tell apart is chance"),
        ("row_number() OVER (PARTITION BY action)", "does not tell apart is chance"),
        ("row_number() OVER ()", "does not tell apart is chance"),
        ("sum(retry_count) OVER (ORDER BY event_at ROWS BETWEEN 1 PRECEDING AND CURRENT ROW)", "stand in any order"),
        ("sum(retry_count) OVER (ORDER BY event_at GROUPS BETWEEN 1 PRECEDING AND CURRENT ROW)", "a frame is of RANGE"),
        (
            'count(*) OVER (ORDER BY execution_id COLLATE "C" ROWS BETWEEN 1 PRECEDING AND CURRENT ROW EXCLUDE CURRENT ROW)',
            "without EXCLUDE",
        ),
        # the 8th of 100 in PostgreSQL, the 7th in DuckDB
        ("percentile_disc(0.07) WITHIN GROUP (ORDER BY duration_seconds)", "no sum of halves"),
        ("percentile_disc(0.9) WITHIN GROUP (ORDER BY retry_count)", "no sum of halves"),
    ],
)
def test_what_an_engine_would_compute_differently_is_refused(expression: str, why: str) -> None:
    with pytest.raises(Refusal, match=why):
        translated(expression, "duckdb")


def checked(query: str) -> None:
    """Check one query over telemetry."""
    check(qualified(marked(inline(parse_one(query, dialect="postgres"))), TELEMETRY))


LATEST = '(array_agg({0}.action ORDER BY {0}.event_at DESC, {0}.execution_id COLLATE "C" DESC))[1]'


@pytest.mark.parametrize(
    ("query", "why"),
    [
        ("SELECT DISTINCT ON (action) action, event_at FROM execution_telemetry", "DISTINCT ON takes is chance"),
        ("SELECT DISTINCT duration_seconds FROM execution_telemetry", "-0 and 0"),
        ("SELECT count(*) AS n FROM execution_telemetry GROUP BY duration_seconds", "-0 and 0"),
        (
            "SELECT retry_count FROM execution_telemetry UNION SELECT duration_seconds FROM execution_telemetry",
            "-0 and 0",
        ),
        ("SELECT retry_count FROM execution_telemetry UNION ALL SELECT 1.5", "its parts are of different types"),
        ("SELECT success FROM execution_telemetry UNION ALL SELECT 't'", "its parts are of different types"),
        ("SELECT event_at FROM execution_telemetry LIMIT 1", "without ORDER BY, the rows"),
        ("SELECT retry_count FROM execution_telemetry ORDER BY retry_count LIMIT NULL", "a limit is a number"),
        ("SELECT retry_count, event_at FROM execution_telemetry ORDER BY event_at LIMIT 1", "order by retry_count too"),
        # PostgreSQL orders by the column action, sqlglot by what is called so
        (
            'SELECT execution_id AS action FROM execution_telemetry ORDER BY action COLLATE "C", execution_id COLLATE "C" LIMIT 1',
            "for the alias'",
        ),
        ("WITH RECURSIVE r AS (SELECT 1 AS n UNION ALL SELECT n + 1 FROM r WHERE n < 3) SELECT n FROM r", "recursion"),
        ('SELECT a."A" FROM (SELECT 1 AS a, 2 AS "A") AS a', "the same in capitals"),
        (
            "SELECT 1 AS n FROM execution_telemetry AS t WHERE success OR retry_count IN (SELECT 1 AS n)",
            "a null that IN",
        ),
        (
            "SELECT 1 AS n FROM execution_telemetry AS t WHERE NOT (success AND retry_count IN (SELECT 1 AS n))",
            "a null that",
        ),
        (
            "SELECT 1 AS n FROM execution_telemetry AS t WHERE (retry_count IN (SELECT 1 AS n)) IS NULL",
            "a null that IN",
        ),
        # a key of the order that may be null, though telemetry always has it
        (
            f"SELECT {LATEST.format('q')} AS x FROM site_aliases AS s LEFT JOIN execution_telemetry AS q ON q.action = s.alias",
            "where its ORDER BY is null",
        ),
        (
            f"SELECT {LATEST.format('q')} AS x FROM execution_telemetry AS q RIGHT JOIN site_aliases AS s ON q.action = s.alias",
            "where its ORDER BY is null",
        ),
        (
            f"SELECT {LATEST.format('q')} AS x FROM (SELECT action, execution_id, nullif(event_at, created_at) AS event_at "
            "FROM execution_telemetry) AS q",
            "where its ORDER BY is null",
        ),
        (
            f"WITH q AS (SELECT s.alias AS action, q.execution_id, q.event_at FROM site_aliases AS s "
            f"LEFT JOIN execution_telemetry AS q ON q.action = s.alias) SELECT {LATEST.format('q')} AS x FROM q",
            "where its ORDER BY is null",
        ),
    ],
)
def test_a_query_whose_rows_would_differ_is_refused(query: str, why: str) -> None:
    with pytest.raises(Refusal, match=why):
        checked(query)


@pytest.mark.parametrize(
    "query",
    [
        f"SELECT {LATEST.format('q')} AS x FROM execution_telemetry AS q LEFT JOIN site_aliases AS s ON q.action = s.alias",
        f"WITH q AS (SELECT action, execution_id::text AS execution_id, event_at FROM execution_telemetry) "
        f"SELECT {LATEST.format('q')} AS x FROM q",
        "SELECT retry_count FROM execution_telemetry ORDER BY retry_count LIMIT 1",
        'SELECT action FROM execution_telemetry ORDER BY event_at, execution_id COLLATE "C" LIMIT 1',
        'SELECT action FROM execution_telemetry ORDER BY action COLLATE "C" LIMIT 1',
        "SELECT 1 AS n FROM execution_telemetry AS t WHERE success AND NOT retry_count IN (SELECT 1 AS n)",
        "SELECT DISTINCT action, retry_count FROM execution_telemetry",
        "SELECT retry_count FROM execution_telemetry UNION ALL SELECT duration_seconds FROM execution_telemetry",
    ],
)
def test_the_like_of_it_that_is_equal_everywhere_passes(query: str) -> None:
    checked(query)


@pytest.mark.parametrize("dialect", ["duckdb", "spark"])
def test_every_model_of_a_day_goes_to_the_engine_and_only_small_tables_travel(dialect: Dialect) -> None:
    plan: Plan = build_plan(load_models(), dialect)
    assert {step.name for step in plan.landing} == {model.name for model in load_models() if model.cell == "day"}
    assert [step.name for step in plan.steps if not step.lands] == ["executions"]
    assert set(plan.references) == {"outcome_class_rules", "rule_aliases", "site_aliases"}
    assert not {"state_before", "state_after", "error_traceback"} & set(plan.telemetry)
    assert not any("flywheel_level" in step.sql.lower() for step in plan.steps)


@pytest.mark.parametrize(
    ("figure", "compared"),
    [
        ("count(*) FILTER (WHERE completed_at < started_at OR event_at >= completed_at)", True),
        ("count(*) FILTER (WHERE completed_at < started_at AND completed_at < created_at)", False),
        ("count(*) FILTER (WHERE completed_at < started_at + interval '1 hours')", False),
        ("max(completed_at)", False),
    ],
)
def test_a_time_that_is_only_held_against_the_event_is_known(tmp_path: Path, figure: str, compared: bool) -> None:
    kind = "timestamptz" if figure.startswith("max") else "bigint"
    plan = build_plan(load_models(model_folder(tmp_path, figure, kind)), "duckdb")
    assert ("completed_at" in plan.compared) is compared
    assert "event_at" not in plan.compared


def test_the_models_only_compare_when_an_execution_ended() -> None:
    plan = build_plan(load_models(), "duckdb")
    assert set(plan.telemetry) & plan.compared == {"completed_at"}


def test_a_time_as_text_stays_with_postgresql() -> None:
    (step,) = (step for step in build_plan(load_models(), "spark").steps if step.name == "telemetry_violations")
    assert "dated" not in step.sql
    assert "'dated '" in step.last
    assert "AT TIME ZONE 'UTC'" in step.last


def test_the_functions_of_identity_are_read_from_the_schema_itself() -> None:
    assert {"flywheel_level", "flywheel_rule_ref", "flywheel_runbook_ref", "flywheel_class_rank"} <= set(routines())
    called = inline(parse_one("SELECT flywheel_runbook_ref(flywheel_level(a, b, c), b, c, d)", dialect="postgres"))
    assert not list(called.find_all(exp.Anonymous))


HEADER = """/*---
name: {name}
room: aggregates
materialized: cell
cell: day
grain: one row per site and day
description: A model of a test.
owner: team:data-platform
key: [site_id, day]
consumers: [a test]
columns:
  site_id: [text, site]
  day: [date, day]
  figure: [{kind}, figure]
---*/
SELECT site_id, (event_at AT TIME ZONE 'UTC')::date AS day, {figure} AS figure
FROM execution_telemetry GROUP BY site_id, (event_at AT TIME ZONE 'UTC')::date
"""


def model_folder(tmp_path: Path, figure: str, kind: str = "double precision") -> Path:
    """A folder of one cell model with this figure."""
    folder = tmp_path / "aggregates"
    folder.mkdir()
    (folder / "figures.sql").write_text(HEADER.format(name="figures", figure=figure, kind=kind), encoding="utf-8")
    return tmp_path


def test_a_model_that_no_engine_computes_is_refused_by_name(tmp_path: Path) -> None:
    graph = load_models(model_folder(tmp_path, "sum(duration_seconds) * 2"))
    with pytest.raises(
        NotPortable, match=r"figures.sql:\d+: figures cannot be computed by spark: `SUM\(.*only sums of integers"
    ):
        build_plan(graph, "spark")


def test_of_a_rate_the_engine_counts_and_postgresql_divides(tmp_path: Path) -> None:
    rate = "count(*) FILTER (WHERE success)::double precision / nullif(count(*), 0)"
    (step,) = build_plan(load_models(model_folder(tmp_path, rate)), "duckdb").steps
    assert "/" not in step.sql
    assert "COUNT(*) FILTER(WHERE" in step.sql
    assert " / NULLIF(" in step.last
    assert "COUNT" not in step.last
