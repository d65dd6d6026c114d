"""Cells: any part computed alone equals the same part of the whole, and only differences are written."""

from __future__ import annotations

import datetime as dt

import pytest
import sqlalchemy as sa
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from model_folder import ModelFolder, bring_in_line, telemetry_row

from flywheel_pipeline.errors import ModelError
from flywheel_pipeline.sql_models.cells import (
    CellCounts,
    cell_query,
    recompute,
    shared_views,
    take_empty,
    view_columns,
    view_query,
)
from flywheel_pipeline.sql_models.loader import ModelGraph, SqlModel, load_models
from flywheel_pipeline.sql_models.relations import execute

FIRST_DAY = dt.date(2026, 2, 1)
Cell = tuple[str, dt.date]


@pytest.fixture
def small(folder: ModelFolder) -> ModelFolder:
    """Telemetry -> view -> cell of a day -> view -> cell of a day -> cell of a site; with a look ahead of a
    day.
    """
    folder.write(
        "events",
        "SELECT t.execution_id::text AS execution_id,\n"
        "  coalesce(a.site_id, t.site_id)::text AS site_id,\n"
        "  t.hostname::text AS hostname, (t.event_at AT TIME ZONE 'UTC')::date AS day, t.event_at, t.success\n"
        "FROM execution_telemetry AS t\n"
        "LEFT JOIN site_aliases AS a ON a.alias = t.site_id -- as of today",
        {
            "execution_id": "text",
            "site_id": "text",
            "hostname": "text",
            "day": "date",
            "event_at": "timestamptz",
            "success": "boolean",
        },
        key=["execution_id"],
    )
    folder.write(
        "daily",
        "WITH marked AS (\n"
        "  SELECT e.*, lead(e.event_at) OVER w <= e.event_at + interval '24 hours' AS came_back\n"
        "  FROM events AS e\n"
        "  WINDOW w AS (PARTITION BY e.site_id, e.hostname ORDER BY e.event_at, e.execution_id)\n"
        ")\n"
        "SELECT site_id, day, hostname, count(*) AS n, count(*) FILTER (WHERE success) AS good,\n"
        "  count(*) FILTER (WHERE success AND came_back) AS refired\n"
        "FROM marked GROUP BY site_id, day, hostname",
        {
            "site_id": "text",
            "day": "date",
            "hostname": "text",
            "n": "bigint",
            "good": "bigint",
            "refired": "bigint",
        },
        key=["hostname", "day", "site_id"],
        materialized="cell",
        cell="day",
    )
    folder.write(
        "bad_hosts",
        "SELECT site_id, day, hostname FROM daily WHERE good < n",
        {"site_id": "text", "day": "date", "hostname": "text"},
        key=["site_id", "day", "hostname"],
    )
    folder.write(
        "site_days",
        "SELECT d.site_id, d.day, sum(d.n)::bigint AS n, sum(d.refired)::bigint AS refired,\n"
        "  (SELECT count(*) FROM bad_hosts AS b WHERE b.site_id = d.site_id AND b.day = d.day) AS bad_hosts\n"
        "FROM daily AS d GROUP BY d.site_id, d.day",
        {"site_id": "text", "day": "date", "n": "bigint", "refired": "bigint", "bad_hosts": "bigint"},
        key=["site_id", "day"],
        materialized="cell",
        cell="day",
    )
    folder.write(
        "site_totals",
        "SELECT site_id, sum(n)::bigint AS n, sum(bad_hosts)::bigint AS bad_hosts, max(day) AS last_day\n"
        "FROM site_days GROUP BY site_id",
        {"site_id": "text", "n": "bigint", "bad_hosts": "bigint", "last_day": "date"},
        key=["site_id"],
        materialized="cell",
        cell="site",
    )
    return folder


def cells_of(graph: ModelGraph) -> list[SqlModel]:
    return [model for model in graph if model.cell]


def set_scope(connection: sa.Connection, cells: set[Cell]) -> None:
    """Make the scope tables for these cells, with the day after each as input, under every name of the
    site.
    """
    for table in ("scope_days", "scope_input", "scope_months", "scope_sites"):
        execute(connection, f"DROP TABLE IF EXISTS pg_temp.{table}")
    execute(connection, "CREATE TEMP TABLE scope_days (site_id text, day date) ON COMMIT DROP")
    if cells:
        connection.execute(
            sa.text("INSERT INTO scope_days VALUES (:site, :day)"),
            [{"site": site, "day": day} for site, day in sorted(cells)],
        )
    execute(
        connection,
        "CREATE TEMP TABLE scope_input ON COMMIT DROP AS "
        "SELECT n.site_id, s.day + f.ahead AS day FROM scope_days s CROSS JOIN (VALUES (0), (1)) f (ahead) "
        "CROSS JOIN LATERAL (SELECT s.site_id UNION "
        "SELECT a.alias FROM site_aliases a WHERE a.site_id = s.site_id) n",
    )
    execute(
        connection,
        "CREATE TEMP TABLE scope_months ON COMMIT DROP AS "
        "SELECT site_id, date_trunc('month', day::timestamp)::date AS month FROM scope_days",
    )
    execute(connection, "CREATE TEMP TABLE scope_sites ON COMMIT DROP AS SELECT site_id FROM scope_days")
    for table in ("scope_days", "scope_input", "scope_months", "scope_sites"):
        execute(connection, f"ANALYZE pg_temp.{table}")


def recompute_all(connection: sa.Connection, graph: ModelGraph) -> dict[str, CellCounts]:
    return {model.name: recompute(connection, graph, model, everything=True) for model in cells_of(graph)}


def recompute_scope(connection: sa.Connection, graph: ModelGraph, cells: set[Cell]) -> dict[str, CellCounts]:
    set_scope(connection, cells)
    return {model.name: recompute(connection, graph, model) for model in cells_of(graph)}


def sorted_rows(connection: sa.Connection, query: str) -> list[tuple[object, ...]]:
    return sorted((tuple(row) for row in execute(connection, query)), key=repr)


# ------------------------------------------------------------------------------------------- differences only


def test_a_recompute_writes_what_differs_and_a_second_one_nothing(bare_engine: sa.Engine, small: ModelFolder) -> None:
    graph = small.load()
    day = FIRST_DAY
    with bare_engine.begin() as connection:
        bring_in_line(connection, graph)
        telemetry_row(connection, "e1", "a", "2026-02-01 10:00", hostname="h1")
        telemetry_row(connection, "e2", "a", "2026-02-01 11:00", hostname="h2")
        telemetry_row(connection, "e3", "b", "2026-02-01 11:00", hostname="h3")
        scope = {("a", day), ("b", day)}
        first = recompute_scope(connection, graph, scope)
        assert first["daily"] == CellCounts(inserted=3, updated=0, deleted=0, unchanged=0)
        assert first["site_days"] == CellCounts(2, 0, 0, 0)
        assert first["site_totals"] == CellCounts(2, 0, 0, 0)
        second = recompute_scope(connection, graph, scope)
        assert second["daily"] == CellCounts(inserted=0, updated=0, deleted=0, unchanged=3)
        assert second["daily"].written == 0

        execute(connection, "DELETE FROM execution_telemetry WHERE execution_id = 'e1'")
        execute(connection, "UPDATE execution_telemetry SET success = false WHERE execution_id = 'e2'")
        telemetry_row(connection, "e4", "a", "2026-02-01 12:00", hostname="h4")
        third = recompute_scope(connection, graph, {("a", day)})
        assert third["daily"] == CellCounts(inserted=1, updated=1, deleted=1, unchanged=0)
        assert third["daily"].written == 3
        assert third["site_days"] == CellCounts(inserted=0, updated=1, deleted=0, unchanged=0)
        assert recompute_all(connection, graph)["daily"] == CellCounts(0, 0, 0, unchanged=3)


def test_a_second_recompute_leaves_every_row_version_where_it_is(bare_engine: sa.Engine, small: ModelFolder) -> None:
    graph = small.load()
    where = "SELECT site_id, day, hostname, ctid::text, xmin::text, xmax::text FROM daily"
    with bare_engine.begin() as connection:
        bring_in_line(connection, graph)
        for number in range(50):
            telemetry_row(connection, f"e{number}", "a", f"2026-02-0{1 + number % 3} 10:00", hostname=f"h{number}")
        recompute_all(connection, graph)
    with bare_engine.begin() as connection:
        before = sorted_rows(connection, where)
        recompute_scope(connection, graph, {("a", FIRST_DAY), ("a", FIRST_DAY + dt.timedelta(days=1))})
        recompute_all(connection, graph)
        assert sorted_rows(connection, where) == before, "no row was written, not even locked"


def test_a_cell_whose_telemetry_is_gone_is_emptied_and_others_stay(bare_engine: sa.Engine, small: ModelFolder) -> None:
    graph = small.load()
    with bare_engine.begin() as connection:
        bring_in_line(connection, graph)
        telemetry_row(connection, "e1", "a", "2026-02-01 10:00")
        telemetry_row(connection, "e2", "b", "2026-02-01 10:00")
        recompute_all(connection, graph)
        execute(connection, "DELETE FROM execution_telemetry")
        counts = recompute_scope(connection, graph, {("a", FIRST_DAY)})
        assert counts["daily"] == CellCounts(0, 0, 1, 0)
        assert sorted_rows(connection, "SELECT site_id FROM daily") == [("b",)]
        assert sorted_rows(connection, "SELECT site_id FROM site_totals") == [("b",)]


def test_a_null_in_a_value_that_stays_null_is_unchanged(bare_engine: sa.Engine, folder: ModelFolder) -> None:
    folder.write(
        "daily",
        "SELECT site_id::text AS site_id, (event_at AT TIME ZONE 'UTC')::date AS day,\n"
        "  max(error_message) AS error\n"
        "FROM execution_telemetry GROUP BY 1, 2",
        {"site_id": "text", "day": "date", "error": "text"},
        key=["site_id", "day"],
        materialized="cell",
        cell="day",
    )
    graph = folder.load()
    with bare_engine.begin() as connection:
        bring_in_line(connection, graph)
        telemetry_row(connection, "e1", "a", "2026-02-01 10:00")
        recompute_all(connection, graph)
        assert recompute_all(connection, graph)["daily"] == CellCounts(0, 0, 0, 1)
        execute(connection, "UPDATE execution_telemetry SET error_message = 'timeout: 100 %s'")
        assert recompute_all(connection, graph)["daily"] == CellCounts(0, 1, 0, 0)
        execute(connection, "UPDATE execution_telemetry SET error_message = NULL")
        assert recompute_all(connection, graph)["daily"] == CellCounts(0, 1, 0, 0)


def test_a_model_whose_key_is_all_its_columns_is_recomputed(bare_engine: sa.Engine, folder: ModelFolder) -> None:
    folder.write(
        "seen",
        "SELECT DISTINCT site_id::text AS site_id, (event_at AT TIME ZONE 'UTC')::date AS day\n"
        "FROM execution_telemetry",
        {"site_id": "text", "day": "date"},
        key=["site_id", "day"],
        materialized="cell",
        cell="day",
    )
    graph = folder.load()
    with bare_engine.begin() as connection:
        bring_in_line(connection, graph)
        telemetry_row(connection, "e1", "a", "2026-02-01 10:00")
        assert recompute_scope(connection, graph, {("a", FIRST_DAY)})["seen"] == CellCounts(1, 0, 0, 0)
        assert recompute_scope(connection, graph, {("a", FIRST_DAY)})["seen"] == CellCounts(0, 0, 0, 1)


# ------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize("standing", ["empty table", "filled table", "table taken"])
@pytest.mark.parametrize(
    "select",
    ["site_id::text AS site_id, 1::bigint AS n", "NULL::text AS site_id, count(*) OVER () AS n"],
    ids=["two rows of one key", "null in the key"],
)
def test_rows_that_do_not_fit_the_key_are_refused(
    select: str, standing: str, bare_engine: sa.Engine, folder: ModelFolder
) -> None:
    folder.write(
        "daily",
        f"SELECT {select}, (event_at AT TIME ZONE 'UTC')::date AS day FROM execution_telemetry",
        {"site_id": "text", "n": "bigint", "day": "date"},
        key=["site_id", "day"],
        materialized="cell",
        cell="day",
    )
    graph = folder.load()
    with bare_engine.begin() as connection:
        bring_in_line(connection, graph)
        telemetry_row(connection, "e1", "a", "2026-02-01 10:00")
        telemetry_row(connection, "e2", "a", "2026-02-01 11:00")
        if standing == "filled table":
            execute(connection, "INSERT INTO daily (site_id, day, n) VALUES ('a', '2026-02-01', 1)")
    with bare_engine.connect() as connection:
        taken = standing == "table taken" and take_empty(connection, [graph.models["daily"]])
        assert taken == (standing == "table taken")
        with pytest.raises(ModelError, match=r"do not fit the key \(site_id, day\)"):
            recompute(connection, graph, graph.models["daily"], everything=True, taken=taken)
    with bare_engine.connect() as connection:
        assert len(sorted_rows(connection, "SELECT * FROM daily")) == int(standing == "filled table")
        assert sorted_rows(connection, "SELECT indexname FROM pg_indexes WHERE tablename = 'daily'") == [
            ("daily_pkey",)
        ]


def test_only_cell_models_are_recomputed(bare_engine: sa.Engine, small: ModelFolder) -> None:
    graph = small.load()
    with pytest.raises(ModelError, match="only cell models are computed by cells"):
        cell_query(graph, graph.models["events"])


def test_each_text_stands_word_for_word_in_the_query(small: ModelFolder) -> None:
    graph = small.load()
    query = cell_query(graph, graph.models["daily"])
    assert graph.models["daily"].sql in query
    assert graph.models["events"].sql in query
    assert cell_query(graph, graph.models["daily"], everything=True) == graph.models["daily"].sql


def test_telemetry_columns_that_nobody_reads_are_not_fetched(small: ModelFolder) -> None:
    graph = small.load()
    assert '"executed_steps"' not in cell_query(graph, graph.models["daily"])
    star = "SELECT q.site_id::text AS site_id, q.event_at::date AS day FROM (SELECT t.* FROM {} AS t) AS q"
    whole = "SELECT t.site_id::text AS site_id, (to_jsonb(t) ->> 'event_at')::date AS day FROM {} AS t"
    for name, sql in {"star": star, "whole": whole}.items():
        small.write(
            name,
            sql.format("execution_telemetry"),
            {"site_id": "text", "day": "date"},
            key=["site_id", "day"],
            materialized="cell",
            cell="day",
        )
        graph = small.load()
        assert '"executed_steps"' in cell_query(graph, graph.models[name])


def test_columns_of_a_shared_view_that_no_cell_model_reads_are_not_computed(small: ModelFolder) -> None:
    small.write(
        "volume",
        "SELECT e.site_id, e.day, count(e.hostname) AS n FROM events AS e GROUP BY e.site_id, e.day",
        {"site_id": "text", "day": "date", "n": "bigint"},
        key=["site_id", "day"],
        materialized="cell",
        cell="day",
    )
    graph = small.load()
    assert [view.name for view in shared_views(graph)] == ["events"]
    assert view_columns(graph, graph.models["events"]) == list(graph.models["events"].columns), "daily takes a star"
    daily = small.root / "aggregates" / "daily.sql"
    daily.write_text(daily.read_text().replace("SELECT e.*,", "SELECT e.site_id, e.hostname, e.day, e.success,"))
    graph = small.load()
    assert view_columns(graph, graph.models["events"]) == [
        "execution_id",
        "site_id",
        "hostname",
        "day",
        "event_at",
        "success",
    ]
    daily.write_text(daily.read_text().replace(", e.execution_id)", ")"))
    graph = small.load()
    assert view_columns(graph, graph.models["events"]) == ["site_id", "hostname", "day", "event_at", "success"]
    assert view_query(graph, graph.models["events"], "t").endswith(
        'SELECT "site_id", "hostname", "day", "event_at", "success" FROM events'
    )


# ------------------------------------------------------------------------------- the part equals the whole

sites = st.sampled_from(["a", "b", "old-a"])  # old-a is an alias of a
rows_strategy = st.lists(
    st.tuples(
        st.integers(0, 60),  # execution id: later rows of the same id correct the first
        sites,
        st.sampled_from(["h1", "h2"]),
        st.integers(0, 4 * 24 * 2),  # half hours since the first day
        st.booleans(),
    ),
    max_size=30,
)
some_cells = st.sets(
    st.tuples(st.sampled_from(["a", "b"]), st.integers(-1, 5).map(lambda n: FIRST_DAY + dt.timedelta(days=n))),
    max_size=6,
)
PROPERTY = settings(
    max_examples=40,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


def put(connection: sa.Connection, rows: list[tuple[int, str, str, int, bool]]) -> set[Cell]:
    """Insert rows or correct those with the same id; return the cells touched, as written."""
    touched: set[Cell] = set()
    for number, site, host, half_hours, success in rows:
        at = dt.datetime.combine(FIRST_DAY, dt.time(), dt.UTC) + dt.timedelta(minutes=30 * half_hours)
        old = connection.execute(
            sa.text("DELETE FROM execution_telemetry WHERE execution_id = :id RETURNING site_id, event_at"),
            {"id": f"e{number}"},
        ).one_or_none()
        if old is not None:
            touched.add((old.site_id, old.event_at.astimezone(dt.UTC).date()))
        telemetry_row(connection, f"e{number}", site, at.strftime("%Y-%m-%d %H:%M"), success=success, hostname=host)
        touched.add((site, at.date()))
    return touched


def widen(touched: set[Cell]) -> set[Cell]:
    """Each cell under the site's name of today, and the day before it, which looks ahead."""
    named = {("a" if site == "old-a" else site, day) for site, day in touched}
    return named | {(site, day - dt.timedelta(days=1)) for site, day in named}


def prepare(connection: sa.Connection, graph: ModelGraph) -> None:
    bring_in_line(connection, graph)
    execute(
        connection,
        "INSERT INTO site_aliases (alias, site_id, actor, reason) VALUES ('old-a', 'a', 'test', 'renamed')",
    )


@PROPERTY
@given(rows=rows_strategy, scope=some_cells)
def test_the_rows_of_a_scope_equal_those_rows_of_the_full_result(
    bare_engine: sa.Engine, small: ModelFolder, rows: list[tuple[int, str, str, int, bool]], scope: set[Cell]
) -> None:
    graph = small.load()
    with bare_engine.connect() as connection:
        prepare(connection, graph)
        put(connection, rows)
        recompute_all(connection, graph)
        set_scope(connection, scope)
        for model in cells_of(graph):
            part = sorted_rows(connection, cell_query(graph, model))
            inside = {
                "day": "(site_id, day) IN (SELECT site_id, day FROM scope_days)",
                "month": "(site_id, month) IN (SELECT site_id, month FROM scope_months)",
                "site": "site_id IN (SELECT site_id FROM scope_sites)",
            }[str(model.cell)]
            whole = sorted_rows(connection, f"SELECT * FROM (\n{model.sql}\n) AS q WHERE {inside}")
            assert part == whole, model.name
        connection.rollback()


@PROPERTY
@given(first=rows_strategy, second=rows_strategy)
def test_recomputing_the_touched_cells_after_any_change_equals_a_full_recompute(
    bare_engine: sa.Engine,
    small: ModelFolder,
    first: list[tuple[int, str, str, int, bool]],
    second: list[tuple[int, str, str, int, bool]],
) -> None:
    graph = small.load()
    with bare_engine.connect() as connection:
        prepare(connection, graph)
        recompute_scope(connection, graph, widen(put(connection, first)))
        recompute_scope(connection, graph, widen(put(connection, second)))
        for model in cells_of(graph):
            assert sorted_rows(connection, f"SELECT {', '.join(model.columns)} FROM {model.name}") == sorted_rows(
                connection, model.sql
            ), model.name
        for name, counts in recompute_all(connection, graph).items():
            assert counts.written == 0, name
        connection.rollback()


@settings(PROPERTY, max_examples=15)
@given(rows=rows_strategy, scope=some_cells)
@example(  # the second day undoes the success of the first, from outside the scope and under the old name
    rows=[(1, "a", "h1", 40, True), (2, "old-a", "h1", 50, True)], scope={("a", FIRST_DAY)}
)
@pytest.mark.long
def test_the_rows_of_a_scope_equal_those_of_the_full_result_for_the_shipped_models(
    engine: sa.Engine, rows: list[tuple[int, str, str, int, bool]], scope: set[Cell]
) -> None:
    graph = load_models()
    with engine.connect() as connection:
        execute(
            connection,
            "INSERT INTO site_aliases (alias, site_id, actor, reason) VALUES ('old-a', 'a', 'test', 'renamed')",
        )
        put(connection, rows)
        recompute_all(connection, graph)
        set_scope(connection, scope)
        for model in cells_of(graph):
            part = sorted_rows(connection, cell_query(graph, model))
            inside = {
                "day": "(site_id, day) IN (SELECT site_id, day FROM scope_days)",
                "month": "(site_id, month) IN (SELECT site_id, month FROM scope_months)",
                "site": "site_id IN (SELECT site_id FROM scope_sites)",
            }[str(model.cell)]
            whole = sorted_rows(connection, f"SELECT * FROM (\n{model.sql}\n) AS q WHERE {inside}")
            assert part == whole, model.name
        connection.rollback()
