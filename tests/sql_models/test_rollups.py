"""Roll-ups by month and site: declared, checked, indexed, filled, and recomputed for given keys alone."""

from __future__ import annotations

import pytest
import sqlalchemy as sa
from model_folder import ModelFolder, bring_in_line

from flywheel_pipeline.errors import ModelError
from flywheel_pipeline.sql_models.cells import Scope, cell_query, recompute
from flywheel_pipeline.sql_models.relations import execute

DAILY = {"site_id": "text", "day": "date", "rule_id": "text", "n": "bigint"}
MONTHLY = {"site_id": "text", "month": "date", "rule_id": "text", "n": "bigint"}
TOTAL = {"site_id": "text", "rule_id": "text", "n": "bigint"}
MONTH_SQL = (
    "SELECT site_id, date_trunc('month', day::timestamp)::date AS month, rule_id, {n} AS n FROM daily GROUP BY 1, 2, 3"
)


@pytest.fixture
def rolled_up(folder: ModelFolder) -> ModelFolder:
    """Days, months and totals of rules at sites."""
    folder.write(
        "daily",
        "SELECT site_id::text AS site_id, (event_at AT TIME ZONE 'UTC')::date AS day, "
        "runbook_id::text AS rule_id, count(*) AS n FROM execution_telemetry GROUP BY 1, 2, 3",
        DAILY,
        key=["site_id", "day", "rule_id"],
        materialized="cell",
        cell="day",
        extra="indexes: [[site_id, rule_id, day]]",
    )
    write_monthly(folder, "sum(n)::bigint")
    folder.write(
        "totals",
        "SELECT site_id, rule_id, sum(n)::bigint AS n FROM monthly GROUP BY site_id, rule_id",
        TOTAL,
        key=["site_id", "rule_id"],
        materialized="cell",
        cell="site",
    )
    return folder


def write_monthly(folder: ModelFolder, n: str) -> None:
    folder.write(
        "monthly",
        MONTH_SQL.format(n=n),
        MONTHLY,
        key=["site_id", "month", "rule_id"],
        materialized="cell",
        cell="month",
    )


def contents(connection: sa.Connection, table: str) -> list[tuple[object, ...]]:
    return sorted(tuple(map(str, row)) for row in execute(connection, f"SELECT * FROM {table}"))


DAYS = (
    "INSERT INTO daily VALUES ('a', '2026-01-31', 'r1', 1), ('a', '2026-02-01', 'r1', 2), "
    "('a', '2026-02-28', 'r1', 3), ('a', '2026-03-01', 'r1', 4), ('a', '2026-02-01', 'r2', 5), ('b', '2026-02-01', 'r1', 6)"
)


def test_a_changed_roll_up_is_filled_at_once_from_the_rows_below_it(
    bare_engine: sa.Engine, rolled_up: ModelFolder
) -> None:
    with bare_engine.begin() as connection:
        bring_in_line(connection, rolled_up.load())
        execute(connection, DAYS)
    write_monthly(rolled_up, "max(n)")
    with bare_engine.begin() as connection:
        bring_in_line(connection, rolled_up.load())
        assert contents(connection, "monthly") == [
            ("a", "2026-01-01", "r1", "1"),
            ("a", "2026-02-01", "r1", "3"),
            ("a", "2026-02-01", "r2", "5"),
            ("a", "2026-03-01", "r1", "4"),
            ("b", "2026-02-01", "r1", "6"),
        ]
        assert bring_in_line(connection, rolled_up.load()) == []


def test_the_indexes_of_the_header_are_created_and_added_to_a_table_that_stays(
    bare_engine: sa.Engine, rolled_up: ModelFolder
) -> None:
    listed = "SELECT indexname FROM pg_indexes WHERE tablename IN ('daily', 'monthly') ORDER BY 1"
    with bare_engine.begin() as connection:
        bring_in_line(connection, rolled_up.load())
        assert contents(connection, f"({listed}) i") == [
            ("daily_pkey",),
            ("daily_site_id_rule_id_day_idx",),
            ("monthly_pkey",),
        ]
        path = rolled_up.root / "aggregates" / "monthly.sql"
        path.write_text(path.read_text().replace("consumers:", "indexes: [[site_id, rule_id, month]]\nconsumers:"))
        assert "changed cell monthly" in bring_in_line(connection, rolled_up.load())
        assert ("monthly_site_id_rule_id_month_idx",) in contents(connection, f"({listed}) i")


def test_only_the_given_keys_of_a_roll_up_are_added_up(bare_engine: sa.Engine, rolled_up: ModelFolder) -> None:
    graph = rolled_up.load()
    with bare_engine.begin() as connection:
        bring_in_line(connection, graph)
        execute(connection, DAYS)
        for name in ("monthly", "totals"):
            recompute(connection, graph, graph.models[name], everything=True)
        execute(connection, "UPDATE daily SET n = n + 10 WHERE day = '2026-02-28' OR site_id = 'b'")
        execute(connection, "CREATE TEMP TABLE keys (site_id text, month date, rule_id text) ON COMMIT DROP")
        execute(connection, "INSERT INTO keys VALUES ('a', '2026-02-01', 'r1')")
        scope = Scope("keys", ("site_id", "month", "rule_id"))
        assert contents(connection, f"({cell_query(graph, graph.models['monthly'], scope=scope)}) q") == [
            ("a", "2026-02-01", "r1", "15")
        ]
        counts = recompute(connection, graph, graph.models["monthly"], scope=scope, changed="changed_monthly")
        assert (counts.inserted, counts.updated, counts.deleted, counts.unchanged) == (0, 1, 0, 0)
        assert contents(connection, "changed_monthly") == [("a", "2026-02-01", "r1")]
        assert ("b", "2026-02-01", "r1", "6") in contents(connection, "monthly")
        totals = Scope("changed_monthly", ("site_id", "rule_id"))
        recompute(connection, graph, graph.models["totals"], scope=totals)
        assert contents(connection, "totals") == [("a", "r1", "20"), ("a", "r2", "5"), ("b", "r1", "6")]


def test_every_key_that_is_written_is_noted(bare_engine: sa.Engine, rolled_up: ModelFolder) -> None:
    graph = rolled_up.load()
    with bare_engine.begin() as connection:
        bring_in_line(connection, graph)
        execute(connection, DAYS)
        recompute(connection, graph, graph.models["monthly"], everything=True)
        execute(connection, "DELETE FROM daily WHERE site_id = 'b'")
        execute(connection, "UPDATE daily SET n = 9 WHERE rule_id = 'r2'")
        execute(connection, "INSERT INTO daily VALUES ('c', '2026-05-05', 'r9', 1)")
        counts = recompute(connection, graph, graph.models["monthly"], everything=True, changed="noted")
        assert (counts.inserted, counts.updated, counts.deleted, counts.unchanged) == (1, 1, 1, 3)
        assert contents(connection, "noted") == [
            ("a", "2026-02-01", "r2"),
            ("b", "2026-02-01", "r1"),
            ("c", "2026-05-01", "r9"),
        ]


@pytest.mark.parametrize(
    ("cell", "sql", "columns", "key", "said"),
    [
        ("month", "SELECT site_id, day, rule_id, n FROM daily", DAILY, ["site_id", "day"], "needs month in its key"),
        ("day", "SELECT site_id, month AS day FROM monthly", {"site_id": "text", "day": "date"}, ["site_id", "day"],
         "cell day may not read monthly, of cell month"),
        ("month", "SELECT site_id, '2026-01-01'::date AS month FROM totals", {"site_id": "text", "month": "date"},
         ["site_id", "month"], "cell month may not read totals, of cell site"),
        ("month", "SELECT site_id::text AS site_id, '2026-01-01'::date AS month FROM execution_telemetry",
         {"site_id": "text", "month": "date"}, ["site_id", "month"], "cell month reads telemetry through"),
    ],
)  # fmt: skip
def test_a_roll_up_that_could_not_be_kept_is_refused(
    rolled_up: ModelFolder, cell: str, sql: str, columns: dict[str, str], key: list[str], said: str
) -> None:
    rolled_up.write("wrong", sql, columns, key=key, materialized="cell", cell=cell)
    with pytest.raises(ModelError, match=said):
        rolled_up.load()


@pytest.mark.parametrize(("materialized", "cell"), [("view", None), ("cell", "day")])
def test_an_index_on_what_is_no_column_of_a_cell_model_is_refused(
    rolled_up: ModelFolder, materialized: str, cell: str | None
) -> None:
    column = "n" if cell is None else "nobody"
    rolled_up.write(
        "wrong",
        "SELECT site_id, day, rule_id, n FROM daily",
        DAILY,
        key=["site_id", "day", "rule_id"],
        materialized=materialized,
        cell=cell,
        extra=f"indexes: [[{column}]]",
    )
    with pytest.raises(ModelError, match="not all columns of a cell model"):
        rolled_up.load()
