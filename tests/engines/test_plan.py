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
    }
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
        "ARRAY_SORT(COLLECT_LIST(t.event_at))",
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
    ],
)
def test_what_an_engine_would_compute_differently_is_refused(expression: str, why: str) -> None:
    with pytest.raises(Refusal, match=why):
        translated(expression, "duckdb")


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
